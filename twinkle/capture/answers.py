"""Numbers that a program reads from the device or draws on the CPU: those that decide the same at every call.

A recording cannot wait for the device. Some waits are for what no input decides: whether positions that were
counted just before are in a row, whether a mask of ones masks anything. Others ask of a mask whether it has
a zero, which is a part of the kind of a call. A call is followed once, operator by operator, to see which of
the numbers that it reads come from nothing else; the recording is told these. Others leave it impossible.

A layer that may be left out, with the probability 0, is a number drawn on the CPU that is asked whether it is
below 0. Replays draw such numbers as well, for those that come after them.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from twinkle.capture.guard import Draw, Draws, Traces
from twinkle.capture.surroundings import as_if_run, instead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from twinkle.capture.signature import Call

__all__ = ["NOTHING", "Answer", "Followed", "answered", "followed", "is_wait"]

_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
_BELOW = frozenset({_aten.lt.Scalar, _aten.ge.Scalar})
"""What ``torch.rand`` answers alike for all its numbers, where the other one is not above 0."""
_READERS: dict[str, Callable[[Any], Any]] = {
    "item": lambda value: value,
    "__bool__": bool,
    "__int__": int,
    "__float__": float,
    "__index__": int,
}


class Answer(NamedTuple):
    """A number that was read.

    Attributes:
        value: The number.
        dtype: Of the tensor that had it.
        is_constant: Whether no input, weight or random number had a part in it.
    """

    value: Any
    dtype: torch.dtype
    is_constant: bool


class Followed(NamedTuple):
    """What a call does that is no launch.

    Attributes:
        answers: The numbers that it reads from the device, in order.
        draws: The numbers that it draws on the CPU, none of which matters; None where one may.
    """

    answers: list[Answer]
    draws: list[Draw] | None

    @property
    def is_alike(self) -> bool:
        """Whether it does the same at every call of its kind."""
        return self.draws is not None and all(one.is_constant for one in self.answers)


NOTHING = Followed([], [])


def is_wait(error: BaseException) -> bool:
    """Whether an error may come from a wait for the device, which nothing that is recorded can do."""
    return "captur" in str(error)


def followed(
    block: nn.Module, call: Call, graphs: Any, constants: Iterable[Tensor] = (), masks: Iterable[Tensor] = ()
) -> Followed:
    """What a call reads from the device and draws on the CPU: it is run for that, and leaves no other trace.

    Args:
        block: The module.
        call: A call of it.
        graphs: Of the device, for its random numbers.
        constants: Inputs whose contents are a part of the kind of the call.
        masks: Inputs of which it is a part of the kind that they have a zero.
    """
    # Their memory may be a part of what others lie in as well; that of copies is theirs alone.
    known = {id(one): one.clone() for one in constants}
    asked = {id(one): one.clone() for one in masks}
    given = tree_map(functools.partial(_stand_in, known | asked), (call.args, call.kwargs))
    follower = _Follower(graphs.device, known.values(), asked.values())
    traces, draws, random = Traces(block), Draws(), graphs.random()
    try:
        with as_if_run(), follower:
            block._call_impl(*given[0], **given[1])
    finally:
        graphs.set_random(random)
        draws.put_back()
        traces.wipe()
    return Followed(follower.found, None if follower.draws_matter else follower.draws)


def _stand_in(copies: dict[int, Tensor], value: Any) -> Any:
    """What a call is given in the place of an argument: no gradient is followed to what came before it."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return copies.get(id(value), value)


class _Follower(TorchDispatchMode):
    """Which memory holds what comes from constants alone.

    What an operator makes of such memory is such memory, and what it writes to it as well; anything else that
    it has a part in is not. Of a mask its copies are followed, how many of their numbers are not zero, and
    whether these are all of them: nothing else comes from whether it has a zero.
    """

    def __init__(self, device: torch.device, constants: Iterable[Tensor], masks: Iterable[Tensor]) -> None:
        super().__init__()
        self._masks = {one.untyped_storage()._cdata: (one.untyped_storage(), one.numel()) for one in masks}
        self._counts: dict[int, tuple[Any, int]] = {}
        self._drawn: dict[int, Any] = {}
        self.found: list[Answer] = []
        self.draws: list[Draw] = []
        self.draws_matter = False
        self._device = device
        storages = [one.untyped_storage() for one in constants]
        # With the storages themselves: their addresses are taken so long.
        self._held: dict[int, Any] = {one._cdata: one for one in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        draws = torch.Tag.nondeterministic_seeded in func.tags
        constant = not draws and all(map(self._holds, given))
        asked = [one for one in given if one.untyped_storage()._cdata in self._drawn]
        if asked:
            constant = func in _BELOW and not args[1] > 0
            self.draws_matter |= not constant and any(one.device != self._device for one in asked)
        result = func(*args, **kwargs)
        if draws:
            self._note_draw(func, kwargs, result)
        if func is _READ and given[0].device == self._device:
            self.found.append(Answer(result, given[0].dtype, constant))
        written, made = _written(func, args, kwargs), tree_leaves(result)
        for one in (*written, *made):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if constant:
                    self._held[storage._cdata] = storage
                else:
                    self._held.pop(storage._cdata, None)
        for one in written:
            if isinstance(one, Tensor):
                self._masks.pop(one.untyped_storage()._cdata, None)
                self._counts.pop(one.untyped_storage()._cdata, None)
        if self._masks and given and len(made) == 1 and isinstance(made[0], Tensor):
            self._follow_masks(func, args, given[0], made[0])
        return result

    def _note_draw(self, func: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Follow what is drawn: on the device a replay draws it too, on the CPU whoever replays has to."""
        is_rand = func is _aten.rand.default
        if is_rand:
            storage = result.untyped_storage()
            self._drawn[storage._cdata] = storage
        # Attention on the device gives its seed on the CPU, too.
        on_device = any(one.device == self._device for one in tree_leaves(result) if isinstance(one, Tensor))
        if is_rand and not on_device and result.device.type == "cpu":
            before = self.draws.pop() if self.draws and self.draws[-1].dtype is result.dtype else None
            self.draws.append(Draw(result.numel() + (before.numbers if before else 0), result.dtype))
        elif not on_device:
            self.draws_matter = True

    def _follow_masks(self, func: Any, args: Any, given: Tensor, made: Tensor) -> None:
        source, target = given.untyped_storage()._cdata, made.untyped_storage()
        mask, count = self._masks.get(source), self._counts.get(source)
        if mask is not None and given.numel() == mask[1] and given.is_contiguous():
            to_bool = func is _aten._to_copy.default and torch.bool in (made.dtype, given.dtype)
            if to_bool or func is _aten.clone.default:
                self._masks[target._cdata] = target, made.numel()
            elif func is _aten.sum.default and given.dtype is torch.bool:
                self._counts[target._cdata] = target, mask[1]
            elif func is _aten.all.default:
                self._held[target._cdata] = target
        elif count is not None and func is _aten.eq.Scalar and args[1] == count[1]:
            self._held[target._cdata] = target

    def _holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    written = []
    for at, parameter in enumerate(func._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(parameter.name)
            written += tree_leaves(value)
    return written


@contextlib.contextmanager
def answered(answers: Sequence[Answer], device: torch.device) -> Iterator[None]:
    """Have this thread read these numbers, in order, from tensors of the device.

    Raises:
        RuntimeError: The program reads others, or more or fewer.
    """
    if not answers:
        yield
        return
    left = list(answers)

    def reader(theirs: Any, convert: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
        def read(self: Tensor) -> Any:
            if self.device != device:
                return theirs(self)
            if not left or left[0].dtype is not self.dtype or not left[0].is_constant:
                raise RuntimeError("what is captured reads another number than it did before")
            return convert(left.pop(0).value)

        return read

    with instead((Tensor, name, reader(getattr(Tensor, name), to)) for name, to in _READERS.items()):
        yield
    if left:
        raise RuntimeError("what is captured reads fewer numbers than it did before")
