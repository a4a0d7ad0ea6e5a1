"""Inputs derived from those of a call: what it did not show, and the next one may.

One row, an odd number of rows, many of them, more sequences; other strides; values that are large, tiny,
equal, zero or not finite; other masks; weights and inputs that changed in place; gradients of some tensors
only. All are small, and each is judged by the original alone: where that raises, there is nothing to compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from twinkle.proof.inputs import Axes, axes_of, tensors_of
from twinkle.proof.runs import How

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["Trial", "nudged", "trials"]

_ROWS = 5
"""Rows of most trials: odd, and more than one."""
_MOST_ELEMENTS = 1 << 19
"""Elements of the largest trial."""
_MOST_PRODUCTS = 1 << 26
"""Multiplications by weights in the largest trial."""
_HEAVY = 1 << 18
"""Weights whose gradients take longer to compare than all the rest of a trial."""
_MANY = 4099
"""Rows of the largest trial where these bounds allow it."""
_SEVERAL, _LARGE = 67, 1 << 16
"""Rows of a trial with gradients, and its elements at most."""
_WIDE = 4100
"""Width of a trial of a function that takes any."""


class Trial(NamedTuple):
    """A derived call.

    Attributes:
        name: What is special about it, in words that follow a comma.
        inputs: Arguments and keyword arguments.
        how: The way of its runs.
        uneven: Its rows differ by orders of magnitude: they are compared one by one, and by how much they
            change with a rounding error of the inputs.
    """

    name: str
    inputs: Any
    how: How = How(gradients=False)
    uneven: bool = False


def trials(
    inputs: Any, module: nn.Module | None, *, backward: bool, extent: str, flips: bool
) -> Iterator[Trial]:
    """Derive calls from one.

    Args:
        inputs: The arguments and keyword arguments of the call, cut to a few rows already where that is done.
        module: The layer, for a layer.
        backward: Gradients are compared.
        extent: ``full``; ``none``;
            ``light`` for kernels whose tests go through sizes, which are to cost a first step
            next to nothing; ``brief`` leaves out what kernels of a GPU would be compiled anew for as well:
            other strides, numbers of rows and widths.
        flips: The kernel is for training and for inference.
    """
    given = tensors_of(inputs)
    if not given or any(type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in given):
        return
    if extent == "none":
        return
    inputs = _small(inputs)
    axes, brief = _axes(inputs), extent == "brief"
    heavy = extent != "full" and _weights(inputs, axes, module) > _HEAVY
    few = _taken(inputs, axes, range(_ROWS), sequences=1) if axes is not None and not brief else inputs
    if not heavy:
        yield Trial("after its values changed in place", few, How(gradients=False, again=True))
    if axes is not None:
        yield from _of_values(inputs, axes, brief)
    other = _mapped(_other_mask(given), few)
    if any(a is not b for a, b in zip(tensors_of(other), tensors_of(few), strict=True)):
        yield Trial("for other masks or indices", other)
    if given[0].is_cuda:
        yield Trial("on another stream", few, How(gradients=False, aside=True))
    if brief:
        return
    wants = "all" if not heavy else "arguments"
    yield Trial("with gaps between rows", _mapped(_gapped, few), How(True, wants, "strided", poisoned=True))
    if axes is not None:
        yield Trial(
            "for one row", _taken(inputs, axes, [0], sequences=1), How(gradients=False, poisoned=True)
        )
    if extent != "full":
        return
    if axes is not None:
        yield from _of_sizes(inputs, axes, module)
    yield Trial("transposed in memory", _mapped(_turned, few))
    if axes is not None and backward:
        yield from _of_gradients(inputs, axes, module)
    if module is not None and flips:
        training = "in inference" if module.training else "in training"
        yield Trial(training, few, How(gradients=False, flipped=True))
    if module is None:
        yield from _of_widths(few)


def _mapped(change: Callable[[Any], Any], inputs: Any) -> Any:
    """Inputs with each tensor changed, and one that is there twice changed once."""
    made: dict[int, Any] = {}

    def once(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = change(value)
        return made[id(value)]

    return tree_map(once, inputs)


def _small(inputs: Any) -> Any:
    """The inputs with fewer of what is neither sequences, rows nor columns, of a lone tensor."""
    wide = [tensor for tensor in tensors_of(inputs) if tensor.ndim > 1]
    if len(wide) != 1 or wide[0].ndim < 4 or wide[0].layout is not torch.strided:
        return inputs
    cut = (slice(None), *[slice(_ROWS)] * (wide[0].ndim - 3))
    return _mapped(lambda value: value.detach()[cut].clone() if value is wide[0] else value, inputs)


def _axes(inputs: Any) -> Axes | None:
    """Where tokens and sequences are; of tensors that all have one shape, the last axis but one."""
    found = axes_of(inputs)
    if found is not None and found.tokens:
        return found
    wide = [tensor for tensor in tensors_of(inputs) if tensor.ndim > 1]
    if not wide or any(tensor.layout is not torch.strided for tensor in wide):
        return None
    alike = [tensor for tensor in wide if tensor.shape == wide[0].shape]
    axis = wide[0].ndim - 2
    return Axes({id(tensor): axis for tensor in alike}, wide[0].shape[axis], set(), 0)


def _taken(inputs: Any, axes: Axes, rows: Any, *, sequences: int = 0) -> Any:
    """Inputs of some of their tokens, by number, over and over where there are fewer, of some sequences."""
    index = [row % max(axes.length, 1) for row in rows]

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in axes.tokens:
            return value
        axis = axes.tokens[id(value)]
        made = value.detach()
        if sequences and id(value) in axes.sequences:
            batch = [number % axes.batch for number in range(sequences)]
            made = made.index_select(0, torch.tensor(batch, device=made.device))
        return made.index_select(axis, torch.tensor(index, device=made.device))

    return _mapped(take, inputs)


def _of_sizes(inputs: Any, axes: Axes, module: nn.Module | None) -> Iterator[Trial]:
    weights, a_row = _weights(inputs, axes, module), _row_size(inputs, axes)
    sequences = max(axes.batch, 1)
    rows = min(_MANY, _MOST_ELEMENTS // max(a_row, 1), _MOST_PRODUCTS // max(weights * sequences, 1))
    if rows > axes.length:
        rows -= 1 - rows % 2
        yield Trial(f"for {rows} rows", _scaled(_taken(inputs, axes, range(rows)), axes, inputs))
    if axes.batch and (axes.batch * 2 + 1) * _ROWS * a_row <= _MOST_ELEMENTS:
        more = axes.batch * 2 + 1
        yield Trial(f"for {more} sequences", _taken(inputs, axes, range(3), sequences=more))


def _weights(inputs: Any, axes: Axes | None, module: nn.Module | None) -> int:
    """Elements of what is no row: the parameters of a layer, and the weights among the arguments."""
    own = [] if module is None else [*module.parameters()]
    rows = {} if axes is None else axes.tokens
    weights = [*own, *(tensor for tensor in tensors_of(inputs) if id(tensor) not in rows)]
    return sum(tensor.numel() for tensor in weights)


def _row_size(inputs: Any, axes: Axes) -> int:
    """Elements of one token, in all sequences."""
    return sum(t.numel() // max(axes.length, 1) for t in tensors_of(inputs) if id(t) in axes.tokens)


def _scaled(made: Any, axes: Axes, inputs: Any) -> Any:
    """Inputs whose first tensor is scaled row by row, so that no two rows are the same."""
    at, axis = _first(inputs, axes)
    if at is None:
        return made

    def scale(value: Tensor) -> None:
        count = value.shape[axis]
        factors = torch.linspace(0.5, 1.5, count, device=value.device, dtype=torch.float32).to(value.dtype)
        value.mul_(factors.reshape([-1 if number == axis else 1 for number in range(value.ndim)]))

    return _changed(made, at, scale)


def _first(inputs: Any, axes: Axes) -> tuple[int | None, int]:
    """The number of the first floating tensor with tokens, and their axis in it."""
    for number, tensor in enumerate(tensors_of(inputs)):
        if tensor.is_floating_point() and id(tensor) in axes.tokens:
            return number, axes.tokens[id(tensor)]
    return None, 0


def _changed(inputs: Any, at: int, change: Callable[[Tensor], None]) -> Any:
    """Inputs with a copy in the place of one tensor, that a function then changes."""
    tensors = tensors_of(inputs)
    made = tensors[at].detach().clone()
    change(made)
    return _mapped(lambda value: made if value is tensors[at] else value, inputs)


def _of_values(inputs: Any, axes: Axes, brief: bool) -> Iterator[Trial]:
    at, axis = _first(inputs, axes)
    if at is None or (brief and axes.length < len(_VALUES)):
        return
    made = _taken(inputs, axes, range(axes.length if brief else len(_VALUES)), sequences=0 if brief else 1)

    def change(value: Tensor) -> None:
        for number, change_row in enumerate(_VALUES):
            change_row(value.select(axis, number))

    yield Trial("for extreme values", _changed(made, at, change), uneven=True)


def _enlarge(row: Tensor) -> None:
    largest = min(torch.finfo(row.dtype).max / 2, 1e4 * max(float(row.abs().max()), 1e-3))
    row.mul_(largest / max(float(row.abs().max()), 1e-30))


def _one_nan(row: Tensor) -> None:
    row[..., :1] = float("nan")


def _one_outlier(row: Tensor) -> None:
    row[..., -1:] = min(1e3, torch.finfo(row.dtype).max / 2)


_VALUES: tuple[Any, ...] = (
    lambda row: None,
    lambda row: row.zero_(),
    lambda row: row.fill_(0.75),
    lambda row: row.mul_(1e-3),
    lambda row: row.mul_(1e-5),
    _enlarge,
    _one_nan,
    _one_outlier,
    lambda row: row.neg_(),
)
"""What becomes of the rows of one input, one after another."""


def nudged(inputs: Any, exact: torch.dtype) -> Any:
    """Inputs that are off by about a rounding error of float32, or of float64 where that is what they are."""
    generator = torch.Generator().manual_seed(0)

    def nudge(value: Any) -> Any:
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.layout is not torch.strided
        ):
            return value
        wide = value.detach().to(exact)
        signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1)
        share = 1.2e-7 if value.dtype != torch.float64 else 2.3e-16
        return wide + wide * signs.to(wide) * share

    return _mapped(nudge, inputs)


def _other_mask(given: list[Tensor]) -> Callable[[Any], Any]:
    """A function from a mask, or indices, to others; from a constant to random numbers; else to the same."""
    generator = torch.Generator().manual_seed(1)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() < 2 or value.layout is not torch.strided:
            return value
        value = value.detach()
        if value.is_floating_point():
            if value is given[0] or not bool((value == value.flatten()[0]).all()):
                return value
            drawn = torch.randn(value.shape, generator=generator).to(value)
            return value + drawn.mul_(0.25)
        if value.is_complex():
            return value
        if value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all()):
            drawn = torch.rand(value.shape, generator=generator) < 0.6
            return drawn.to(value.device, value.dtype)
        return value.roll(1, -1)

    def changed(value: Any) -> Any:
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.data_ptr() == given[0].data_ptr()
        ):
            return value
        made = change(value)
        return value if isinstance(value, Tensor) and made.data_ptr() == value.data_ptr() else made

    return changed


def _of_gradients(inputs: Any, axes: Axes, module: nn.Module | None) -> Iterator[Trial]:
    if (
        _row_size(inputs, axes) * _SEVERAL <= _LARGE
        and _weights(inputs, axes, module) * _SEVERAL <= _MOST_PRODUCTS // 8
    ):
        several = _taken(inputs, axes, range(_SEVERAL), sequences=1)
        yield Trial(f"for {_SEVERAL} rows", _scaled(several, axes, inputs), How())
    wants = ("layer", "arguments") if module is not None else ("first", "all")
    for number, wanted in enumerate(wants):
        kind = ("expanded", "strided")[number]
        how = How(wants=wanted, cotangents=kind, poisoned=True)
        few = _taken(inputs, axes, range(_ROWS + 2 * number), sequences=1)
        words = {"layer": "of the weights alone", "first": "of the first argument alone"}
        yield Trial(f"with gradients {words.get(wanted, 'of the arguments')}", few, how)


def _gapped(value: Any) -> Any:
    """The same values, with a gap behind each row, and the first one not where the memory begins."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.layout is not torch.strided:
        return value
    width = value.shape[-1]
    wide = value.new_zeros((*value.shape[:-1], width + 7))
    view = wide[..., 3 : 3 + width]
    view.copy_(value.detach())
    return view


def _turned(value: Any) -> Any:
    """The same values, those of the last axis but one next to each other."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.layout is not torch.strided:
        return value
    return value.detach().transpose(-1, -2).contiguous().transpose(-1, -2)


def _of_widths(few: Any) -> Iterator[Trial]:
    """Another width of all tensors that have the first one's; an odd one, and a large one."""
    given = tensors_of(few)
    width = given[0].shape[-1] if given[0].ndim else 0
    if width < 2 or any(tensor.is_complex() for tensor in given):
        return
    for wanted in (width - 1 if width % 2 == 0 else width - 2, _WIDE):
        if wanted <= 0 or sum(t.numel() // width * wanted for t in given) > _MOST_ELEMENTS:
            continue
        index = torch.arange(wanted, device=given[0].device) % width

        def widen(value: Any, index: Tensor = index) -> Any:
            fits = isinstance(value, Tensor) and value.ndim and value.shape[-1] == width
            if not fits:
                return value
            made = value.detach().index_select(-1, index.to(value.device))
            # So that no two are the same: the largest of them is to be the same for both.
            return made * torch.linspace(0.9, 1.1, len(index)).to(made) if made.is_floating_point() else made

        yield Trial(f"for rows of {wanted}", _mapped(widen, few))
