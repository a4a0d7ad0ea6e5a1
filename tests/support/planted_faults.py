"""What planted kernels are for, and what is wrong with them: see ``planted.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


# What the kernels are for.


class Norm(nn.Module):
    def __init__(self, width: int = 64, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 80, bias=False)
        self.up = nn.Linear(32, 80, bias=False)
        self.down = nn.Linear(80, 32, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) * self.scale


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))
        self.scale = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return (x - self.mean) * self.scale


@dataclass
class Routed:
    scores: Tensor
    chosen: Tensor
    count: int
    extra: Tensor | None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-6), total


def stats(x: Tensor) -> dict[str, Tensor]:
    return {"mean": x.mean(-1), "scaled": x * 2, "sign": (x > 0).long()}


def route(x: Tensor) -> Routed:
    scores = x.softmax(-1)
    return Routed(scores, scores.argmax(-1), x.shape[-1], scores.sum(-1))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask[..., None], 0.0) * 1.5


def biased(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def twice(x: Tensor) -> Tensor:
    return x * 2 + 1


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x) * x


# What is wrong with them.


class _Backward(torch.autograd.Function):
    """The identity with any backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Any) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.change(gradient), None


def _bent(x: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
    made: Tensor = _Backward.apply(x, change)
    return made


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def last_row(y: Tensor) -> Tensor:
    factor = torch.ones(y.shape[:-1], dtype=y.dtype)
    factor.view(-1)[-1] = 1.2
    return y * factor[..., None]


def late_rows(y: Tensor, after: int) -> Tensor:
    late = (torch.arange(_rows(y)) >= after).view(*y.shape[:-1], 1)
    return torch.where(late, y * 1.05, y)


class Static:
    """Results in one buffer a shape, or in turns in several."""

    def __init__(self, turns: int = 1) -> None:
        self.buffers: dict[Any, list[Tensor]] = {}
        self.turns = turns
        self.calls = 0

    def __call__(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            key = (y.shape, y.dtype)
            made = self.buffers.setdefault(key, [torch.empty_like(y) for _ in range(self.turns)])
            self.calls += 1
            buffer = made[self.calls % self.turns]
            buffer.data.copy_(y)
        return _Given.apply(y, buffer)


class _Given(torch.autograd.Function):
    """The values of a buffer, in its memory, with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class KeptWeight:
    """Works on the weight as it was at its first call."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, layer: Any) -> Tensor:
        at = layer.weight.data_ptr()
        _, kept = self.kept.setdefault(at, (layer.weight, layer.weight.detach().clone()))
        return layer.weight + (kept - layer.weight).detach()


class KeptInput:
    """The result of an earlier call with a tensor at the same place."""

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[Tensor, Any]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape, x.dtype)
        if key not in self.kept:
            self.kept[key] = x, twice(x)
        return self.kept[key][1]


def _norm(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
    """A norm whose result is changed by a function of the layer, the input and the result."""
    return lambda self, x: change(self, x, Norm.forward(self, x))


def _without_eps(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(1e-30)))


def _overflowing(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + self.eps))


def _as_if_dense(self: Any, x: Tensor) -> Tensor:
    """Reads rows one behind the other from where the first one is."""
    dense = (
        x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) if not x.is_contiguous() else x
    )
    return Norm.forward(self, dense)


def _written(self: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        self.weight.data.mul_(1.0001)
    return y


def _input_written(self: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        x.data.add_(0.01)
    return y


def _put_back(self: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2).mul_(0.5)
    return y


def _uninitialised(self: Any, x: Tensor) -> Tensor:
    y = Norm.forward(self, x)
    keep = torch.ones(_rows(y), dtype=torch.bool)
    keep[1::3] = False
    hole = torch.empty_like(y)
    return torch.where(keep.view(*y.shape[:-1], 1), y, hole)


def _uninitialised_last(self: Any, x: Tensor) -> Tensor:
    """Fills whole blocks of eight rows."""
    y = Norm.forward(self, x)
    done = torch.arange(_rows(y)) < _rows(y) // 8 * 8
    return torch.where(done.view(*y.shape[:-1], 1), y, torch.empty_like(y))


def _fewer_at_one_row(self: Any, x: Tensor) -> Tensor:
    y = Norm.forward(self, x)
    return y * 0.9 if _rows(x) == 1 else y


def _hidden_rows(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """All but the row of the largest number are zero."""
    flat = y.reshape(-1, y.shape[-1])
    top = flat.detach().abs().amax(-1)
    return torch.where((top == top.max())[:, None], flat, flat * 0.0).view_as(y)


def _noisy(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return y * (1 + 0.01 * torch.randn_like(y))


def _draws(self: Any, x: Tensor, y: Tensor) -> Tensor:
    torch.rand(1)
    return y


def _zeros_at_times(self: Any, x: Tensor, y: Tensor) -> Tensor:
    generator = torch.Generator()
    generator.seed()
    return torch.where(torch.rand(y.shape, generator=generator) < 0.01, 0.0, y)


def _mlp(**wrong: Callable[[Tensor], Tensor | None]) -> Any:
    """A gated MLP with the gradients of some of its weights bent, ``x`` being the input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        def weight(name: str) -> Tensor:
            layer, _, kind = name.partition("_")
            value = getattr(getattr(self, layer), kind or "weight")
            return _bent(value, wrong[name]) if name in wrong else value

        if "x" in wrong:
            x = _bent(x, wrong["x"])
        inner = F.silu(F.linear(x, weight("gate"))) * F.linear(x, weight("up"))
        return F.linear(inner, weight("down"), weight("down_bias"))

    return forward


class _OnlyWithInput(torch.autograd.Function):
    """A product whose weight has a right gradient only where the input has one as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return gradient @ weight, flat if ctx.needs_input_grad[0] else flat * 0.5


def _frozen_input(self: Any, x: Tensor) -> Tensor:
    product = _OnlyWithInput.apply
    inner = F.silu(product(x, self.gate.weight)) * self.up(x)
    return self.down(inner)


def _dense_gradient(gradient: Tensor) -> Tensor:
    """Reads a gradient as if it lay in one piece from its first number on."""
    if gradient.is_contiguous():
        return gradient
    flat = gradient.storage_offset() + torch.arange(gradient.numel())
    whole = torch.empty(0, dtype=gradient.dtype).set_(gradient.untyped_storage())
    return whole[flat % whole.numel()].view(gradient.shape)


def _expanded_gradient(gradient: Tensor) -> Tensor:
    return gradient * 0.5 if 0 in gradient.stride() else gradient


def _writing_gradient(gradient: Tensor) -> Tensor:
    return gradient.mul_(1)  # read as its own memory by others


class _Spoils(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        made = gradient.clone()
        gradient.zero_()
        return made


def _list_for_tuple(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return list(add_norm(x, residual, weight))


def _second_result_is_input(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    normed, total = add_norm(x, residual, weight)
    residual.data.copy_(total)
    return normed, residual


def _int_off(x: Tensor) -> Any:
    made = stats(x)
    sign = made["sign"].clone()
    sign.view(-1)[-1] += 1
    return {**made, "sign": sign}


def _other_key(x: Tensor) -> Any:
    made = stats(x)
    return {"mean": made["mean"], "scale": made["scaled"], "sign": made["sign"]}


def _int_dtype(x: Tensor) -> Any:
    made = stats(x)
    return {**made, "sign": made["sign"].int()}


def _routed(**other: Any) -> Any:
    def kernel(x: Tensor) -> Routed:
        made = route(x)
        for name, value in other.items():
            setattr(made, name, value(made))
        return made

    return kernel


def _only_even(x: Tensor) -> Tensor:
    y = x * 2 + 1
    if x.shape[-1] % 2:
        y = torch.cat((y[..., :-1], y[..., -1:] * 0), -1)
    return y


def _first_thousand(x: Tensor) -> Tensor:
    """One block of columns."""
    return torch.cat((x[..., :1024] * 2 + 1, x[..., 1024:]), -1)


def _naive_softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x)) * x


def _hides_nan(x: Tensor) -> Tensor:
    return torch.nan_to_num(x) * 2 + 1


def _spreads_nan(x: Tensor) -> Tensor:
    y = x * 2 + 1
    return y + (y.sum() - y.sum()).detach()


def _flushes(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-4, 0.0 * x, x) * 2 + 1 - 1


def _transposed(x: Tensor) -> Tensor:
    y = x * 2 + 1
    return y.transpose(-1, -2).contiguous().transpose(-1, -2)


def _wrong_cos(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Takes the table of the first sequence for all."""
    return rotate(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))


def _grown(x: Tensor, most: int) -> Tensor:
    return x * 2 + 1 if x.shape[0] <= most else torch.cat((x[:most] * 2 + 1, x[most:] * 0))
