"""Layer kernels: what replaces a layer's ``forward``.

A kernel class has no ``__init__``: its ``forward`` runs on the layer that is already there and reads only
attributes which that layer has. Under ``torch.compile`` the plain formula runs, because a compiler fuses it
better than a fixed sequence of ready-made operators. Second derivatives are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["DenseGelu", "GatedMLP", "RMSNorm"]


class _RMSNorm(torch.autograd.Function):
    """``weight * (x * rsqrt(mean(x^2) + eps)).to(x.dtype)``; keeps ``x`` and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        out = x32 * x32  # this buffer is also the result: one large tensor instead of three
        rstd = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x32, rstd, out=out)
        ctx.save_for_backward(x, weight, rstd)
        if x.dtype == weight.dtype == torch.float32:
            return out.mul_(weight)
        return weight * out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        size = x.shape[-1]
        grad32, weight32 = grad.float(), weight.float()
        # torch has a fused backward of LayerNorm. With a mean of zero it is that of RMSNorm, less the
        # gradient of the mean that was subtracted there: rstd * mean(grad * weight), one number a row,
        # put back here.
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            grad32,
            x.float(),
            [size],
            torch.zeros_like(rstd),
            rstd,
            weight32,
            None,
            [needs_x, needs_weight, False],
        )
        if needs_x:
            with torch.autocast(grad.device.type, enabled=False):  # a matrix product, but not one to round
                dx.add_(torch.matmul(grad32, weight32).unsqueeze(-1).mul_(rstd).div_(size))
            dx = dx.to(x.dtype)
        return dx, dw.to(weight.dtype) if needs_weight else None, None


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) in the rounding of Llama and Qwen.

    The forward is transformers', bit for bit: normalised in float32, rounded to the input's dtype, then
    multiplied by the weight. The gradients are computed in float32 and rounded once, at the end.
    """

    can_torch_compile = True
    has_backward = True

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of ``hidden_states``: same shape out."""
        if torch.compiler.is_compiling():
            x = hidden_states.float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * x.to(hidden_states.dtype)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _SiluMul(torch.autograd.Function):
    """``silu(gate) * up``; keeps its two inputs and computes the activation again for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


def _nobody_listens(module: nn.Module) -> bool:
    """Whether it may be left out: a hook on it or a ``forward`` put on it must still run."""
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_silu(activation: object) -> bool:
    """Whether calling it is ``silu(x)`` and nothing else."""
    return (
        isinstance(activation, nn.Module)
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and _nobody_listens(activation)
    )


class GatedMLP(nn.Module):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, keeping three wide tensors for backward, not four.

    The projections are called as the modules they are, so that LoRA, quantisation and hooks on them work. Any
    activation but silu is applied as the layer says. Results and gradients are transformers', bit for bit.
    """

    can_torch_compile = True
    has_backward = True

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., hidden_size]`` to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling() or gate.dtype != up.dtype or not _is_silu(self.act_fn):
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(_SiluMul.apply(gate, up))


def _is_exact_gelu(activation: object) -> bool:
    """Whether calling it is ``gelu(x)`` in the form of the error function, and nothing else."""
    if not isinstance(activation, nn.Module) or not _nobody_listens(activation):
        return False
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return (
        type(activation).__name__ == "GELUActivation"
        and getattr(activation, "act", None) is nn.functional.gelu
    )


class DenseGelu(nn.Module):
    """``intermediate_act_fn(dense(x))`` of BERT's MLP, with the activation written over its input.

    For inference: the widest tensor of the model is allocated once instead of twice. Where that input is
    still needed (a gradient is recorded, a hook may hold it) or the activation is another, the original
    steps run. The result is transformers', bit for bit.
    """

    can_torch_compile = True
    has_backward = True

    dense: nn.Module
    intermediate_act_fn: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map ``[..., hidden_size]`` to ``[..., intermediate_size]``."""
        wide = self.dense(hidden_states)
        ours = type(self.dense) is nn.Linear and _nobody_listens(self.dense) and not wide.requires_grad
        if torch.compiler.is_compiling() or not ours or not _is_exact_gelu(self.intermediate_act_fn):
            return self.intermediate_act_fn(wide)
        return torch.ops.aten.gelu_(wide)
