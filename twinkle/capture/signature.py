"""What kind of call a call is: its arguments without their contents, and the settings that kernels follow."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinkle.capture.caches import is_cache, kind_of_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "BUSY",
    "IN_USE",
    "PLAIN",
    "Call",
    "Drawing",
    "Passing",
    "Undecided",
    "Unservable",
    "call_of",
    "containers_in",
    "holds_other",
    "overlaps",
    "settings",
    "template",
    "words_of",
]

BUSY = "the call before waits for its backward"
IN_USE = "gradients of the backward before are in use"
PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})
_TENSORS = frozenset({Tensor, torch.nn.Parameter})


class Unservable(Exception):
    """A call that is not captured; the message says why, in words that are the same for calls of its kind.

    Attributes:
        of_recorded: Others of its kind are replayed.
        of_device: The device is the wall in calls of its kind.
    """

    of_recorded = False
    of_device = False


class Drawing(Unservable):
    """It draws random numbers on the CPU."""


class Passing(Unservable):
    """What may be otherwise at a later call."""


class Undecided(Unservable):
    """Whether calls of this kind are captured is not known yet."""


class Call:
    """The arguments of a call, taken apart.

    Attributes:
        args: The arguments.
        kwargs: The arguments by name.
        key: Equal for calls of one kind.
        tensors: The tensors among the arguments, in order.
        caches: The caches among them, in order.
        grad: Whether its result may want a gradient, as far as its arguments and the mode tell.
    """

    __slots__ = ("args", "caches", "grad", "key", "kwargs", "tensors")

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: list[Any],
        tensors: list[Tensor],
        caches: list[Any],
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.key: tuple[Any, ...] = tuple(key)
        self.tensors = tensors
        self.caches = caches
        self.grad: bool = key[1]


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, *, training: bool) -> Call:
    """Take a call apart.

    Args:
        args: Of the call.
        kwargs: Of the call.
        device: Where the block is.
        training: Whether the block is in training.

    Raises:
        Unservable: An argument is nothing whose contents could be put in the place of another's.
    """
    key: list[Any] = [training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    tensors: list[Tensor] = []
    caches: list[Any] = []
    for value in args:
        _take(value, key, tensors, caches, device)
    for name, value in kwargs.items():
        key.append(name)
        _take(value, key, tensors, caches, device)
    return Call(args, kwargs, key, tensors, caches)


def _take(value: Any, key: list[Any], tensors: list[Tensor], caches: list[Any], device: torch.device) -> None:
    kind = type(value)
    if kind in _TENSORS:
        if value.device != device:
            raise Unservable("an argument is on another device than the block")
        if value.layout is not torch.strided or value.is_quantized:
            raise Unservable("an argument is no plain tensor")
        if value.data_ptr() & 15 and value.is_floating_point():  # of which kernels take several at a time
            raise Unservable("an argument is not aligned in memory")
        if value.is_inference() and not key[2]:
            raise Unservable("an argument was made in inference mode")
        tensors.append(value)
        key.append(
            (value.shape, value.stride(), value.dtype, value.requires_grad, value.is_conj(), value.is_neg())
        )
    elif kind in PLAIN:
        # A flag is no number, though they are equal.
        key.append((kind, value))
    elif kind is tuple or kind is list:
        key.append((kind, len(value)))
        for part in value:
            _take(part, key, tensors, caches, device)
    elif kind is dict:
        key.append((kind, tuple(value)))
        for part in value.values():
            _take(part, key, tensors, caches, device)
    elif is_cache(kind):
        known = kind_of_cache(value)
        if known is None:
            raise Unservable("a cache keeps its tokens elsewhere")
        caches.append(value)
        key.append(known)
    elif isinstance(value, Tensor):
        raise Unservable(f"an argument is a {kind.__qualname__}, whose operations are its own")
    else:
        raise Unservable(f"an argument is a {kind.__qualname__}")


def template(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """A function that makes the arguments of a call like this one, of other tensors and caches.

    It holds neither those of the call.

    Args:
        args: Of a call that was taken apart.
        kwargs: Of it.
    """
    places = [_place(value) for value in args]
    named = {name: _place(value) for name, value in kwargs.items()}

    def fill(tensors: Sequence[Tensor], caches: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given, kept = iter(tensors), iter(caches)
        positional = tuple(place(given, kept) for place in places)
        return positional, {name: place(given, kept) for name, place in named.items()}

    return fill


def _place(value: Any) -> Callable[[Iterator[Tensor], Iterator[Any]], Any]:
    kind = type(value)
    if kind in _TENSORS:
        return lambda tensors, caches: next(tensors)
    if kind is tuple or kind is list:
        parts = [_place(part) for part in value]
        return lambda tensors, caches: kind(part(tensors, caches) for part in parts)
    if kind is dict:
        named = {name: _place(part) for name, part in value.items()}
        return lambda tensors, caches: {name: part(tensors, caches) for name, part in named.items()}
    if is_cache(kind):
        return lambda tensors, caches: next(caches)
    return lambda tensors, caches: value


def containers_in(value: Any) -> Iterator[Any]:
    """The lists and dictionaries in an argument, itself included."""
    if type(value) in (list, dict):
        yield value
    if type(value) in (tuple, list, dict):
        for part in value.values() if type(value) is dict else value:
            yield from containers_in(part)


def holds_other(container: Any, before: Any) -> bool:
    """Whether a list or dictionary holds other objects than a copy of it."""
    if len(container) != len(before):
        return True
    if type(container) is dict and [*container] != [*before]:
        return True
    pairs = (container.values(), before.values()) if type(container) is dict else (container, before)
    return not all(map(operator.is_, *pairs))


def overlaps(tensor: Tensor) -> bool:
    """Whether two places of a tensor are one place in memory, other than by a stride of zero."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride:
            if stride < extent:
                return True
            extent = stride * (size - 1) + extent
    return False


def settings() -> tuple[Any, ...]:
    """What torch's operators look at besides their arguments."""
    autocast: tuple[Any, ...] = ()
    if torch.is_autocast_enabled("cuda"):
        autocast = (torch.get_autocast_dtype("cuda"),)
    c = torch._C
    return (
        autocast,
        c._get_cublas_allow_tf32(),
        c._get_cudnn_allow_tf32(),
        c._get_cudnn_enabled(),
        c._get_cudnn_benchmark(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(),
        c._get_deterministic_algorithms(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch.get_default_dtype(),
    )


def words_of(tensors: Sequence[Tensor]) -> str:
    """The inputs of a kind of call in words: its first tensor, and how many more there are."""
    if not tensors:
        return "no tensors"
    first = tensors[0]
    text = f"{str(first.dtype).removeprefix('torch.')}{list(first.shape)}"
    return text if len(tensors) == 1 else f"{text} and {len(tensors) - 1} more"
