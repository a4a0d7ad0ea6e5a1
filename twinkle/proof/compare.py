"""Does a kernel compute what the original computes? Both run on the same inputs, beside a finer original.

The measure is the original's own rounding: each result is compared with the original run in the next
finer dtype (float32 for half precision, float64 for float32), and a kernel may be off by twice what the
original is, and a little. A kernel that is off by one percent is caught in bfloat16 as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Verdict", "compare"]

_FINER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
# What a kernel may add to twice the original's error, as a share of the result's norm.
_SLACK = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-12}


class Verdict:
    """What a comparison gave.

    Attributes:
        ok: The kernel may run.
        text: Why, with the errors, for the report.
    """

    __slots__ = ("ok", "text")

    def __init__(self, ok: bool, text: str) -> None:
        self.ok = ok
        self.text = text

    def __repr__(self) -> str:
        return f"<Verdict {'proven' if self.ok else 'rejected'}: {self.text}>"


class _Rejected(Exception):
    pass


def compare(
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    module: nn.Module | None = None,
    plain_class: type | None = None,
    backward: bool = False,
    rows: int | None = None,
) -> Verdict:
    """Run a kernel and its original on copies of the same inputs.

    Args:
        original: The function that the kernel replaces; with ``module`` it takes that first.
        kernel: The same for the kernel.
        args: The arguments of the call at hand, without the module.
        kwargs: Its keyword arguments.
        module: The layer, when they are ``forward`` functions.
        plain_class: The class of the layer without Twinkle, for the finer copy.
        backward: Compare the gradients of the inputs and parameters as well.
        rows: At most so many of the last but one dimension of a lone tensor argument.

    Returns:
        The verdict. A comparison that cannot be made is a rejection that says why.
    """
    inputs = (tuple(args), dict(kwargs))
    if rows is not None:
        inputs = _fewer(inputs, rows)
    dtype = _dtype_of(inputs, module)
    state = torch.random.get_rng_state()
    devices = sorted({t.device.index or 0 for t in _tensors(inputs) if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            return _compare(original, kernel, inputs, module, plain_class, dtype, backward, state)
    except _Rejected as rejected:
        return Verdict(False, str(rejected))
    except Exception as error:
        return Verdict(False, f"the comparison could not be made: {type(error).__name__}: {error}")


def _compare(
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    inputs: Any,
    module: nn.Module | None,
    plain_class: type | None,
    dtype: torch.dtype,
    backward: bool,
    state: torch.Tensor,
) -> Verdict:
    theirs = _run(original, inputs, module, backward, state)
    ours = _run(kernel, inputs, module, backward, state)
    if ours.wrote and not theirs.wrote:
        raise _Rejected("it writes to its input")
    finer = _FINER[dtype]
    twin = _finer(module, plain_class, finer)
    if module is not None and twin is None:
        best = theirs
    else:
        with torch.autocast(_device_type(inputs), enabled=False):
            best = _run(original, _cast(inputs, dtype, finer), twin, backward, state)
    outputs = _worst("result", ours.outputs, theirs.outputs, best.outputs)
    text = f"error {outputs[0]:.1e} (original {outputs[1]:.1e})"
    if backward:
        gradients = _worst("gradient", ours.gradients, theirs.gradients, best.gradients)
        text += f", gradients {gradients[0]:.1e} ({gradients[1]:.1e})"
    return Verdict(True, f"{text} in {str(dtype).removeprefix('torch.')}")


class _Result:
    def __init__(self, outputs: list[Any], gradients: list[Any], wrote: bool) -> None:
        self.outputs = outputs
        self.gradients = gradients
        self.wrote = wrote


def _run(
    function: Callable[..., Any], inputs: Any, module: nn.Module | None, backward: bool, state: torch.Tensor
) -> _Result:
    """Run on copies, from one state of the random numbers."""
    leaves: list[torch.Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Strides are kept: a kernel that reads them wrongly has to be seen to.
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        twin.copy_(value.detach())
        if backward and twin.is_floating_point():
            leaves.append(twin.requires_grad_())
        return twin

    args, kwargs = tree_map(fresh, inputs)
    torch.random.set_rng_state(state)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    lead = () if module is None else (module,)
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        outputs = tree_flatten(function(*lead, *args, **kwargs))[0]
        wrote = _differs(inputs, (args, kwargs))
        if wrote or not backward:
            return _Result(outputs, [], wrote)
        leaves += [p for p in module.parameters() if p.requires_grad] if module is not None else []
        pulled = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
        gradients: list[Any] = []
        if pulled and leaves:
            pushes = [_push(out, number) for number, out in enumerate(pulled)]
            gradients = list(torch.autograd.grad(pulled, leaves, pushes, allow_unused=True))
    plain = [out.detach() if isinstance(out, torch.Tensor) else out for out in outputs]
    # Checked after backward, which may write to what forward kept.
    return _Result(plain, gradients, _differs(inputs, (args, kwargs)))


def _push(out: torch.Tensor, number: int) -> torch.Tensor:
    """A cotangent that is the same in every dtype."""
    generator = torch.Generator().manual_seed(number)
    count = min(out.numel(), 1 << 16)
    values = torch.randn(count, generator=generator).to(torch.bfloat16)
    repeats = -(-out.numel() // max(count, 1))
    return values.repeat(repeats)[: out.numel()].reshape(out.shape).to(out.device, out.dtype)


def _worst(what: str, ours: list[Any], theirs: list[Any], best: list[Any]) -> tuple[float, float]:
    """The largest error of the kernel and the original's own there.

    Raises:
        _Rejected: They are of another kind, or the error is too large.
    """
    if len(ours) != len(theirs):
        raise _Rejected(f"it gives {len(ours)} {what}s where the original gives {len(theirs)}")
    worst = (0.0, 0.0)
    for mine, other, fine in zip(ours, theirs, best, strict=True):
        if not isinstance(other, torch.Tensor):
            if type(mine) is not type(other):
                raise _Rejected(f"a {what} is {type(mine).__name__}, the original's {type(other).__name__}")
            continue
        if not isinstance(mine, torch.Tensor):
            raise _Rejected(f"a {what} is {'missing' if mine is None else type(mine).__name__}")
        if mine.dtype != other.dtype or mine.shape != other.shape:
            raise _Rejected(f"a {what} is {_kind(mine)}, the original's {_kind(other)}")
        if not other.is_floating_point():
            if not torch.equal(mine, other):
                raise _Rejected(f"a {what} of whole numbers differs")
            continue
        error, own = _error(mine, fine), _error(other, fine)
        allowed = 2 * own + _SLACK[other.dtype]
        if not error <= allowed:  # also when it is NaN
            if own != own:
                continue  # the original is NaN here too
            raise _Rejected(f"{what} off by {error:.1e}, where the original is off by {own:.1e}")
        worst = max(worst, (error, own))
    return worst


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _error(value: torch.Tensor, fine: torch.Tensor) -> float:
    wide = torch.float64 if fine.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(fine.to(wide))
    off = torch.linalg.vector_norm(value.to(wide) - fine.to(wide))
    return float(off / norm) if norm > 0 else float(off)


def _finer(module: nn.Module | None, plain_class: type | None, dtype: torch.dtype) -> nn.Module | None:
    """A copy of the layer in a finer dtype; ``None`` where it cannot be copied (sharded layers)."""
    if module is None:
        return None
    cls: Any = plain_class or type(module)
    try:
        # Not a copy of the module itself: that would be one more swapped layer.
        twin: nn.Module = cls.__new__(cls)
        twin.__dict__.update(copy.deepcopy(module.__dict__, {id(module): twin}))
    except Exception:
        return None
    return twin.to(dtype)


def _cast(inputs: Any, dtype: torch.dtype, finer: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(finer) if isinstance(value, torch.Tensor) and value.dtype == dtype else value

    return tree_map(cast, inputs)


def _fewer(inputs: Any, rows: int) -> Any:
    tensors = _tensors(inputs)
    if len(tensors) != 1 or tensors[0].ndim < 2 or tensors[0].shape[-2] <= rows:
        return inputs

    def cut(value: Any) -> Any:
        return value[..., :rows, :] if isinstance(value, torch.Tensor) else value

    return tree_map(cut, inputs)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _device_type(inputs: Any) -> str:
    tensors = _tensors(inputs)
    return tensors[0].device.type if tensors else "cpu"


def _dtype_of(inputs: Any, module: nn.Module | None) -> torch.dtype:
    candidates = [*_tensors(inputs), *(module.parameters() if module is not None else ())]
    return next((t.dtype for t in candidates if t.dtype in _FINER), torch.float32)


def _differs(before: Any, after: Any) -> bool:
    pairs = zip(_tensors(before), _tensors(after), strict=True)
    return any(not torch.equal(a, b) and bool((a == a).all()) for a, b in pairs)
