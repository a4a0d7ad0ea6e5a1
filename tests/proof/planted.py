"""Kernels that are wrong in one way each, and right ones beside them, for layers and functions of a program.

Each has the calls of a program: the first is what a proof at first use sees. None of them is known to the
proof in any way; what finds them is counted by ``test_catches.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
        Plant(f"norm: {name}", Norm, lambda kernel=kernel: kernel, norm_calls)
        for name, kernel in entries.items()
    ]


def _functions(target: Any, calls: Any, entries: dict[str, Any]) -> list[Plant]:
    return [
        Plant(f"{target.__name__}: {name}", target, lambda kernel=kernel: kernel, calls)
        for name, kernel in entries.items()
    ]


def _changed_by(made: Any) -> Any:
    return lambda self, x: made(Norm.forward(self, x))


def _float_only(self: Any, x: Tensor) -> Tensor:
    y = Norm.forward(self, x)
    return y if x.dtype == torch.float32 else y * 1.02


def _with_kept_weight() -> Any:
    weight = KeptWeight()

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        return weight(self) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    return forward


def _later(calls: int) -> Any:
    """Right for some calls."""
    count = [0]

    def forward(self: Any, x: Tensor) -> Tensor:
        count[0] += 1
        y = Norm.forward(self, x)
        return y if count[0] <= calls else y * 1.1

    return forward


WRONG: list[Plant] = [
    *_norms(
        {
            "last row": _norm(lambda self, x, y: last_row(y)),
            "rows behind the 128th": _norm(lambda self, x, y: late_rows(y, 128)),
            "rows behind the 1024th": _norm(lambda self, x, y: late_rows(y, 1024)),
            "one row": _fewer_at_one_row,
            "large inputs": _norm(lambda self, x, y: y if x.numel() < 1 << 16 else y * 1.02),
            "inputs with gaps": _as_if_dense,
            "eps": _without_eps,
            "weight written": _norm(_written),
            "input written": _norm(_input_written),
            "input written and put back": _norm(_put_back),
            "memory without a value": _uninitialised,
            "a last block without a value": _uninitialised_last,
            "an outlier hides zeroed rows": lambda self, x: _hidden_rows(self, x, Norm.forward(self, x)),
            "random errors": _norm(_noisy),
            "random numbers drawn": _norm(_draws),
            "zeros at times": _norm(_zeros_at_times),
            "detached": lambda self, x: Norm.forward(self, x).detach(),
            "weight detached": lambda self, x: Norm.forward(self, x.detach()) * 0 + F.rms_norm(x, (64,), self.weight.detach(), self.eps),
            "dtype": _norm(lambda self, x, y: y.double()),
            "gradient of a view": _norm(lambda self, x, y: _bent(y, _dense_gradient)),
            "expanded gradient": _norm(lambda self, x, y: _bent(y, _expanded_gradient)),
            "gradient written": _norm(lambda self, x, y: _Spoils.apply(y)),
            "gradient scaled": _norm(lambda self, x, y: _bent(y, lambda g: g * 0.98)),
            "a single NaN": _norm(lambda self, x, y: y.index_fill(-1, torch.tensor([0]), float("nan"))),
            "returns a weight": lambda self, x: self.weight.expand_as(x) if _rows(x) == 1 else Norm.forward(self, x),
        }
    ),
    Plant("norm: one buffer", Norm, lambda: _changed_by(Static()), norm_calls),
    Plant("norm: two buffers in turns", Norm, lambda: _changed_by(Static(2)), norm_calls),
    Plant("norm: the weight of the first call", Norm, _with_kept_weight, norm_calls),
    Plant("norm: from the second call on", Norm, lambda: _later(1), norm_calls),
    Plant("norm: from the eighth call on", Norm, lambda: _later(7), norm_calls),
    Plant("norm: from the hundredth call on", Norm, lambda: _later(99), lambda: norm_calls() * 20),
    Plant("norm: overflow of squares", Norm, lambda: _overflowing, lambda: [(_x(2, 8, 64, dtype=torch.float16),), half_calls()[1]]),
    Plant("norm: all but float32", Norm, lambda: _float_only, lambda: [*norm_calls()[:1], *half_calls()]),
    *[
        Plant(f"mlp: {name}", MLP, lambda kernel=kernel: kernel, mlp_calls)
        for name, kernel in {
            "gradient of a weight scaled": _mlp(up=lambda g: g * 0.97),
            "gradient of a weight zero": _mlp(gate=torch.zeros_like),
            "gradient of a weight missing": _mlp(down=lambda g: None),
            "gradient of the bias": _mlp(down_bias=lambda g: g * 2),
            "gradient of the input in its last row": _mlp(x=last_row),
            "gradient of the weight alone": _frozen_input,
            "rows behind the 128th": lambda self, x: late_rows(MLP.forward(self, x), 128),
            "no bias": lambda self, x: F.linear(F.silu(self.gate(x)) * self.up(x), self.down.weight),
            "another activation": lambda self, x: self.down(F.gelu(self.gate(x)) * self.up(x)),
        }.items()
    ],
    Plant("dropout: never", Dropped, lambda: lambda self, x: x * self.scale, drop_calls),
    Plant("dropout: always", Dropped, lambda: lambda self, x: F.dropout(x, 0.5, True) * self.scale, drop_calls),
    Plant("running mean: not kept", Running, lambda: lambda self, x: (x - self.mean * 0.9 - x.detach().mean((0, 1)) * 0.1) * self.scale, drop_calls),
    *_functions(
        twice,
        plain_calls,
        {
            "odd widths": _only_even,
            "columns behind the 1024th": _first_thousand,
            "hides NaN": _hides_nan,
            "spreads NaN": _spreads_nan,
            "memory order": _transposed,
            "more rows than at first": lambda x: _grown(x, 6),
            "gradient twice as large": lambda x: _bent(x.mul(2).add(1), lambda g: g * 2),
            "not a leaf of the graph": lambda x: (x.detach() * 2 + 1).requires_grad_(x.requires_grad),
        },
    ),
    Plant("twice: the result for the same place", twice, KeptInput, plain_calls),
    *_functions(softplus, plain_calls, {"large values": _naive_softplus, "tiny values": lambda x: torch.where(x.abs() < 1e-3, x * 0, softplus(x))}),
    *_functions(rotate, rotate_calls, {"the first table for all": _wrong_cos, "other half": lambda x, cos, sin: rotate(x, cos, -sin), "rows behind the 128th": lambda x, cos, sin: late_rows(rotate(x, cos, sin), 128), "gradient of the second argument": lambda x, cos, sin: rotate(x, _bent(cos, lambda g: g * 1.1), sin)}),
    *_functions(add_norm, add_norm_calls, {"a list": _list_for_tuple, "in the memory of an input": _second_result_is_input, "None": lambda x, residual, weight: (add_norm(x, residual, weight)[0], None), "second result": lambda x, residual, weight: (add_norm(x, residual, weight)[0], x + residual * 0.99), "gradient of the weight zero": lambda x, residual, weight: add_norm(x, residual, _bent(weight, torch.zeros_like))}),
    *_functions(stats, plain_calls, {"whole numbers": _int_off, "keys": _other_key, "dtype of whole numbers": _int_dtype, "a part detached": lambda x: {**stats(x), "scaled": x.detach() * 2}}),
    *_functions(route, plain_calls, {"a number": _routed(count=lambda r: r.count + 1), "None": _routed(extra=lambda r: None), "a part of a dataclass": _routed(extra=lambda r: r.extra * 1.05), "another class": lambda x: tuple(vars(route(x)).values()), "a view of another part": _routed(extra=lambda r: r.scores[..., 0])}),
    *_functions(masked, mask_calls, {"no mask": lambda x, mask: x * 1.5}),
    *_functions(biased, biased_calls, {"bias of the first column": lambda x, weight, bias: F.linear(x, weight, bias[:1].expand_as(bias)), "gradient of the bias": lambda x, weight, bias: biased(x, weight, _bent(bias, lambda g: g * 0.9)), "gradient of the weight for many rows": lambda x, weight, bias: biased(x, _bent(weight, (lambda g: g * 0.9) if x.shape[0] > 32 else (lambda g: g)), bias)}),
]  # fmt: skip


def _fused(self: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _in_double(self: Any, x: Tensor) -> Tensor:
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight * wide).to(x.dtype)


RIGHT: list[Plant] = [
    *_norms({"fused": _fused, "itself": Norm.forward, "in float64": _in_double}),
    Plant("norm: bfloat16", Norm, lambda: _fused, half_calls),
    Plant("norm: 8 wide in bfloat16", lambda: Norm(8), lambda: _fused, lambda: [(_x(2, 8, 8, dtype=torch.bfloat16),)]),
    Plant("mlp: its own products", MLP, _mlp, mlp_calls),
    Plant("mlp: one product for two", MLP, lambda: lambda self, x: self.down(torch.mul(*(lambda a, b: (F.silu(a), b))(*F.linear(x, torch.cat((self.gate.weight, self.up.weight))).chunk(2, -1)))), mlp_calls),
    Plant("dropout", Dropped, lambda: Dropped.forward, drop_calls),
    Plant("running mean", Running, lambda: Running.forward, drop_calls),
    *_functions(twice, plain_calls, {"in one step": lambda x: torch.addcmul(torch.ones_like(x), x, torch.full_like(x, 2.0))}),
    *_functions(softplus, plain_calls, {"by hand": lambda x: (x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))) * x}),
    *_functions(rotate, rotate_calls, {"by halves": lambda x, cos, sin: torch.cat((x[..., : x.shape[-1] // 2] * cos[..., : x.shape[-1] // 2] - x[..., x.shape[-1] // 2 :] * sin[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :] * cos[..., x.shape[-1] // 2 :] + x[..., : x.shape[-1] // 2] * sin[..., x.shape[-1] // 2 :]), -1)}),
    *_functions(add_norm, add_norm_calls, {"by hand": lambda x, residual, weight: (Norm.forward(_Own(weight), residual + x), residual + x)}),
    *_functions(stats, plain_calls, {"another order": lambda x: {"sign": x.gt(0).to(torch.int64), "scaled": x + x, "mean": x.sum(-1) / x.shape[-1]}}),
    *_functions(route, plain_calls, {"by hand": lambda x: Routed(x.log_softmax(-1).exp(), x.argmax(-1), x.shape[-1], x.softmax(-1).sum(-1))}),
    *_functions(masked, mask_calls, {"by product": lambda x, mask: x * (mask[..., None] * 1.5)}),
    *_functions(biased, biased_calls, {"by product": lambda x, weight, bias: x @ weight.T + bias}),
]  # fmt: skip


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
        if plant.target is Dropped:
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
