"""Kernels that are wrong in one way each, and right ones beside them, for layers and functions of a program.

Each has the calls of a program: the first is what a proof at first use sees. None of them is known to the
proof in any way; what finds them is counted by ``test_catches.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import planted_faults as p
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinkle.records import Binding, FunctionKernel, LayerKernel
from twinkle.swap.candidate import Candidate, FunctionCandidate
from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import plan

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RIGHT", "WRONG", "Plant", "rejected_by"]


class Plant(NamedTuple):
    """A kernel for a target, and the calls of a program.

    Attributes:
        name: What is wrong with it, or why it is right.
        target: The class of the layer, or the function.
        make: Makes the kernel; each program has its own.
        calls: The arguments of each call, made from a seed.
        grad: Gradients are recorded and taken.
    """

    name: str
    target: Any
    make: Callable[[], Any]
    calls: Callable[[], list[tuple[Any, ...]]]
    grad: bool = True


def _x(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def norm_calls() -> list[tuple[Any, ...]]:
    large = _x(2, 12, 64)
    large[0, 3] *= 1e6
    strided = _x(2, 64, 9).transpose(1, 2)
    return [
        (_x(2, 12, 64),),
        (_x(1, 1, 64),),
        (large,),
        (_x(3, 200, 64),),
        (strided,),
        (_x(2, 5, 64, scale=1e-4),),
    ]


def mlp_calls() -> list[tuple[Any, ...]]:
    return [(_x(2, 9, 32),), (_x(1, 1, 32),), (_x(4, 60, 32),)]


def plain_calls() -> list[tuple[Any, ...]]:
    nan = _x(4, 48)
    nan[1, 1] = float("nan")
    wide, turned = _x(3, 3000), _x(48, 6).t()
    return [
        (_x(6, 48),),
        (_x(6, 47),),
        (_x(5, 48, scale=1e3),),
        (nan,),
        (_x(600, 48),),
        (wide,),
        (turned,),
        (_x(4, 48, scale=1e-5),),
    ]


def drop_calls() -> list[tuple[Any, ...]]:
    return [(_x(2, 6, 48),)] * 3


def rotate_calls() -> list[tuple[Any, ...]]:
    return [
        (_x(b, t, 16), _x(b, t, 16).cos(), _x(b, t, 16).sin()) for b, t in ((2, 6), (1, 1), (5, 33), (2, 300))
    ]


def add_norm_calls() -> list[tuple[Any, ...]]:
    return [(_x(2, n, 32), _x(2, n, 32), _x(32)) for n in (7, 1, 40)]


def mask_calls() -> list[tuple[Any, ...]]:
    return [(_x(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)), (_x(2, 6, 8), torch.rand(2, 6) < 0.5)]


def biased_calls() -> list[tuple[Any, ...]]:
    return [(_x(n, 24), _x(40, 24), _x(40)) for n in (6, 1, 50)]


def half_calls() -> list[tuple[Any, ...]]:
    return [(_x(2, 8, 64, dtype=torch.bfloat16),), (_x(2, 8, 64, dtype=torch.float16, scale=100),)]


def _norms(entries: dict[str, Any]) -> list[Plant]:
    return [
        Plant(f"norm: {name}", p.Norm, lambda kernel=kernel: kernel, norm_calls)
        for name, kernel in entries.items()
    ]


def _functions(target: Any, calls: Any, entries: dict[str, Any]) -> list[Plant]:
    return [
        Plant(f"{target.__name__}: {name}", target, lambda kernel=kernel: kernel, calls)
        for name, kernel in entries.items()
    ]


def _changed_by(made: Any) -> Any:
    return lambda self, x: made(p.Norm.forward(self, x))


def _float_only(self: Any, x: Tensor) -> Tensor:
    y = p.Norm.forward(self, x)
    return y if x.dtype == torch.float32 else y * 1.02


def _with_kept_weight() -> Any:
    weight = p.KeptWeight()

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        return weight(self) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    return forward


def _later(calls: int) -> Any:
    """Right for some calls."""
    count = [0]

    def forward(self: Any, x: Tensor) -> Tensor:
        count[0] += 1
        y = p.Norm.forward(self, x)
        return y if count[0] <= calls else y * 1.1

    return forward


WRONG: list[Plant] = [
    *_norms(
        {
            "last row": p._norm(lambda self, x, y: p.last_row(y)),
            "rows behind the 128th": p._norm(lambda self, x, y: p.late_rows(y, 128)),
            "rows behind the 1024th": p._norm(lambda self, x, y: p.late_rows(y, 1024)),
            "one row": p._fewer_at_one_row,
            "large inputs": p._norm(lambda self, x, y: y if x.numel() < 1 << 16 else y * 1.02),
            "inputs with gaps": p._as_if_dense,
            "eps": p._without_eps,
            "weight written": p._norm(p._written),
            "input written": p._norm(p._input_written),
            "input written and put back": p._norm(p._put_back),
            "memory without a value": p._uninitialised,
            "a last block without a value": p._uninitialised_last,
            "an outlier hides zeroed rows": lambda self, x: p._hidden_rows(self, x, p.Norm.forward(self, x)),
            "random errors": p._norm(p._noisy),
            "random numbers drawn": p._norm(p._draws),
            "zeros at times": p._norm(p._zeros_at_times),
            "detached": lambda self, x: p.Norm.forward(self, x).detach(),
            "weight detached": lambda self, x: (
                p.Norm.forward(self, x.detach()) * 0 + F.rms_norm(x, (64,), self.weight.detach(), self.eps)
            ),
            "dtype": p._norm(lambda self, x, y: y.double()),
            "gradient of a view": p._norm(lambda self, x, y: p._bent(y, p._dense_gradient)),
            "expanded gradient": p._norm(lambda self, x, y: p._bent(y, p._expanded_gradient)),
            "gradient written": p._norm(lambda self, x, y: p._Spoils.apply(y)),
            "gradient scaled": p._norm(lambda self, x, y: p._bent(y, lambda g: g * 0.98)),
            "a single NaN": p._norm(lambda self, x, y: y.index_fill(-1, torch.tensor([0]), float("nan"))),
            "returns a weight": lambda self, x: (
                self.weight.expand_as(x) if p._rows(x) == 1 else p.Norm.forward(self, x)
            ),
        }
    ),
    Plant("norm: one buffer", p.Norm, lambda: _changed_by(p.Static()), norm_calls),
    Plant("norm: two buffers in turns", p.Norm, lambda: _changed_by(p.Static(2)), norm_calls),
    Plant("norm: the weight of the first call", p.Norm, _with_kept_weight, norm_calls),
    Plant("norm: from the second call on", p.Norm, lambda: _later(1), norm_calls),
    Plant("norm: from the eighth call on", p.Norm, lambda: _later(7), norm_calls),
    Plant("norm: from the hundredth call on", p.Norm, lambda: _later(99), lambda: norm_calls() * 20),
    Plant(
        "norm: overflow of squares",
        p.Norm,
        lambda: p._overflowing,
        lambda: [(_x(2, 8, 64, dtype=torch.float16),), half_calls()[1]],
    ),
    Plant("norm: all but float32", p.Norm, lambda: _float_only, lambda: [*norm_calls()[:1], *half_calls()]),
    *[
        Plant(f"mlp: {name}", p.MLP, lambda kernel=kernel: kernel, mlp_calls)
        for name, kernel in {
            "gradient of a weight scaled": p._mlp(up=lambda g: g * 0.97),
            "gradient of a weight zero": p._mlp(gate=torch.zeros_like),
            "gradient of a weight missing": p._mlp(down=lambda g: None),
            "gradient of the bias": p._mlp(down_bias=lambda g: g * 2),
            "gradient of the input in its last row": p._mlp(x=p.last_row),
            "gradient of the weight alone": p._frozen_input,
            "rows behind the 128th": lambda self, x: p.late_rows(p.MLP.forward(self, x), 128),
            "no bias": lambda self, x: F.linear(F.silu(self.gate(x)) * self.up(x), self.down.weight),
            "another activation": lambda self, x: self.down(F.gelu(self.gate(x)) * self.up(x)),
        }.items()
    ],
    Plant("dropout: never", p.Dropped, lambda: lambda self, x: x * self.scale, drop_calls),
    Plant(
        "dropout: always",
        p.Dropped,
        lambda: lambda self, x: F.dropout(x, 0.5, True) * self.scale,
        drop_calls,
    ),
    Plant(
        "running mean: not kept",
        p.Running,
        lambda: lambda self, x: (x - self.mean * 0.9 - x.detach().mean((0, 1)) * 0.1) * self.scale,
        drop_calls,
    ),
    *_functions(
        p.twice,
        plain_calls,
        {
            "odd widths": p._only_even,
            "columns behind the 1024th": p._first_thousand,
            "hides NaN": p._hides_nan,
            "spreads NaN": p._spreads_nan,
            "memory order": p._transposed,
            "more rows than at first": lambda x: p._grown(x, 6),
            "gradient p.twice as large": lambda x: p._bent(x.mul(2).add(1), lambda g: g * 2),
            "not a leaf of the graph": lambda x: (x.detach() * 2 + 1).requires_grad_(x.requires_grad),
        },
    ),
    Plant("twice: the result for the same place", p.twice, p.KeptInput, plain_calls),
    *_functions(
        p.softplus,
        plain_calls,
        {
            "large values": p._naive_softplus,
            "tiny values": lambda x: torch.where(x.abs() < 1e-3, x * 0, p.softplus(x)),
        },
    ),
    *_functions(
        p.rotate,
        rotate_calls,
        {
            "the first table for all": p._wrong_cos,
            "other half": lambda x, cos, sin: p.rotate(x, cos, -sin),
            "rows behind the 128th": lambda x, cos, sin: p.late_rows(p.rotate(x, cos, sin), 128),
            "gradient of the second argument": lambda x, cos, sin: p.rotate(
                x, p._bent(cos, lambda g: g * 1.1), sin
            ),
        },
    ),
    *_functions(
        p.add_norm,
        add_norm_calls,
        {
            "a list": p._list_for_tuple,
            "in the memory of an input": p._second_result_is_input,
            "None": lambda x, residual, weight: (p.add_norm(x, residual, weight)[0], None),
            "second result": lambda x, residual, weight: (
                p.add_norm(x, residual, weight)[0],
                x + residual * 0.99,
            ),
            "gradient of the weight zero": lambda x, residual, weight: p.add_norm(
                x, residual, p._bent(weight, torch.zeros_like)
            ),
        },
    ),
    *_functions(
        p.stats,
        plain_calls,
        {
            "whole numbers": p._int_off,
            "keys": p._other_key,
            "dtype of whole numbers": p._int_dtype,
            "a part detached": lambda x: {**p.stats(x), "scaled": x.detach() * 2},
        },
    ),
    *_functions(
        p.route,
        plain_calls,
        {
            "a number": p._routed(count=lambda r: r.count + 1),
            "None": p._routed(extra=lambda r: None),
            "a part of a dataclass": p._routed(extra=lambda r: r.extra * 1.05),
            "another class": lambda x: tuple(vars(p.route(x)).values()),
            "a view of another part": p._routed(extra=lambda r: r.scores[..., 0]),
        },
    ),
    *_functions(p.masked, mask_calls, {"no mask": lambda x, mask: x * 1.5}),
    *_functions(
        p.biased,
        biased_calls,
        {
            "bias of the first column": lambda x, weight, bias: F.linear(x, weight, bias[:1].expand_as(bias)),
            "gradient of the bias": lambda x, weight, bias: p.biased(
                x, weight, p._bent(bias, lambda g: g * 0.9)
            ),
            "gradient of the weight for many rows": lambda x, weight, bias: p.biased(
                x, p._bent(weight, (lambda g: g * 0.9) if x.shape[0] > 32 else (lambda g: g)), bias
            ),
        },
    ),
]


def _fused(self: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _in_double(self: Any, x: Tensor) -> Tensor:
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight * wide).to(x.dtype)


RIGHT: list[Plant] = [
    *_norms({"fused": _fused, "itself": p.Norm.forward, "in float64": _in_double}),
    Plant("norm: bfloat16", p.Norm, lambda: _fused, half_calls),
    Plant(
        "norm: 8 wide in bfloat16",
        lambda: p.Norm(8),
        lambda: _fused,
        lambda: [(_x(2, 8, 8, dtype=torch.bfloat16),)],
    ),
    Plant("mlp: its own products", p.MLP, p._mlp, mlp_calls),
    Plant(
        "mlp: one product for two",
        p.MLP,
        lambda: (
            lambda self, x: self.down(
                torch.mul(
                    *(lambda a, b: (F.silu(a), b))(
                        *F.linear(x, torch.cat((self.gate.weight, self.up.weight))).chunk(2, -1)
                    )
                )
            )
        ),
        mlp_calls,
    ),
    Plant("dropout", p.Dropped, lambda: p.Dropped.forward, drop_calls),
    Plant("running mean", p.Running, lambda: p.Running.forward, drop_calls),
    *_functions(
        p.twice,
        plain_calls,
        {"in one step": lambda x: torch.addcmul(torch.ones_like(x), x, torch.full_like(x, 2.0))},
    ),
    *_functions(
        p.softplus,
        plain_calls,
        {"by hand": lambda x: (x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))) * x},
    ),
    *_functions(
        p.rotate,
        rotate_calls,
        {
            "by halves": lambda x, cos, sin: torch.cat(
                (
                    x[..., : x.shape[-1] // 2] * cos[..., : x.shape[-1] // 2]
                    - x[..., x.shape[-1] // 2 :] * sin[..., : x.shape[-1] // 2],
                    x[..., x.shape[-1] // 2 :] * cos[..., x.shape[-1] // 2 :]
                    + x[..., : x.shape[-1] // 2] * sin[..., x.shape[-1] // 2 :],
                ),
                -1,
            )
        },
    ),
    *_functions(
        p.add_norm,
        add_norm_calls,
        {
            "by hand": lambda x, residual, weight: (
                p.Norm.forward(_Own(weight), residual + x),
                residual + x,
            )
        },
    ),
    *_functions(
        p.stats,
        plain_calls,
        {
            "another order": lambda x: {
                "sign": x.gt(0).to(torch.int64),
                "scaled": x + x,
                "mean": x.sum(-1) / x.shape[-1],
            }
        },
    ),
    *_functions(
        p.route,
        plain_calls,
        {
            "by hand": lambda x: p.Routed(
                x.log_softmax(-1).exp(), x.softmax(-1).argmax(-1), x.shape[-1], x.softmax(-1).sum(-1)
            )
        },
    ),
    *_functions(p.masked, mask_calls, {"by product": lambda x, mask: x * (mask[..., None] * 1.5)}),
    *_functions(p.biased, biased_calls, {"by product": lambda x, weight, bias: x @ weight.T + bias}),
]


class _Own(NamedTuple):
    weight: Tensor
    eps: float = 1e-6


class _Source:
    """Where the kernel of a user comes from."""

    kind = "function"
    identity = text = "planted"

    def __init__(self, made: Any) -> None:
        self.made = made

    def load(self) -> Any:
        return self.made


def rejected_by(plant: Plant, proofs: int) -> str | None:
    """Run a program with a kernel in place; why the kernel was rejected, or None.

    Args:
        plant: The kernel and the calls of the program.
        proofs: How many calls of each kind are compared.
    """
    torch.manual_seed(0)
    calls, kernel = plant.calls(), plant.make()
    binding: Binding
    if isinstance(plant.target, type) or plant.target.__name__ == "<lambda>":
        layer: nn.Module = plant.target()
        source = _Source(type("Planted", (nn.Module,), {"forward": lambda self, x: kernel(self, x)}))
        binding = Binding("layer", "program:Layer", "planted", source)
        held = LayerKernel("planted", source, chosen_by="user")
        plan(layer, [Candidate(held, binding, proofs=proofs)]).commit()
        call: Any = layer
    else:
        layer, source = nn.Module(), _Source(kernel)
        binding = Binding("function", "program:f", "planted", source)
        held_function = FunctionKernel("f", "program", source, chosen_by="user")
        call = dispatcher(plant.target, [FunctionCandidate(held_function, binding, proofs=proofs)])
    for number, args in enumerate(calls):
        given = [
            a.clone().requires_grad_(plant.grad and number % 2 == 0 and a.is_floating_point()) for a in args
        ]
        layer.to(given[0].dtype)
        if plant.target is p.Dropped:
            layer.train(number > 0)
        made = call(*given)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.01)
        if binding.state in ("failed", "quarantined"):
            assert binding.proof.startswith("rejected: "), (plant.name, binding.reason, binding.proof)
            return binding.proof
        del made
    assert binding.state == "active", (plant.name, binding.reason)
    return None
