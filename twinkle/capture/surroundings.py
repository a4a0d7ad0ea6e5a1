"""What a program finds around it while it is recorded: what it would find if it ran, and nothing that waits.

A recording stands for what the program does by itself. So it is not told that a graph is captured, which some
ask before they choose their way. And what copies a number of the program to the device is put as a launch: a
copy from the host's memory is nothing that a graph may hold.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinkle import forks
from twinkle.capture.caches import without_copies
from twinkle.ops.cuda_graphs import STANDS_FOR
from twinkle.ops.plain import at_every_size
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["as_if_run", "every_size_on", "filled", "instead"]

_MOST = 64  # numbers of a constant
_NUMBERS = frozenset({bool, int, float})
_MODELS = "transformers.modeling_utils"
_CACHES = "transformers.cache_utils"
_LOOKS_FOR_PADDING = "warn_if_padding_and_no_attention_mask"


class Replaced:
    """The lock that is held while functions of torch and transformers are replaced."""

    def __init__(self) -> None:
        self.lock = forks.lock()


@contextlib.contextmanager
def instead(replacements: Iterable[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Have this thread call other functions in the place of some, and all others these.

    Args:
        replacements: Of each its owner, a module or class, its name there, and the function that is called.
    """
    thread, undo = threading.get_ident(), []

    def only_here(theirs: Any, ours: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (ours if threading.get_ident() == thread else theirs)(*args, **kwargs)

        call.__dict__[STANDS_FOR] = theirs
        return call

    with runtime.of(Replaced).lock:
        try:
            for owner, name, ours in replacements:
                undo.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, only_here(getattr(owner, name), ours))
            yield
        finally:
            for owner, name, own in reversed(undo):
                if own is None:
                    delattr(owner, name)  # it is inherited
                else:
                    setattr(owner, name, own)


@contextlib.contextmanager
def as_if_run() -> Iterator[None]:
    """Have this thread's program find, while it is recorded, what it finds when it runs.

    - ``torch.cuda.is_current_stream_capturing`` says no: transformers masks all of a sequence otherwise, and
      leaves that to the kernel when it runs.
    - ``torch.tensor`` fills in its numbers on the device.
    - Models of transformers do not look for padding in tokens without a mask, to warn of it: they did when
      they ran.
    - Its caches with a window leave the number that says so on the CPU; whoever makes such a cache of what
      was recorded brings it to the device.
    - Its caches that are empty keep what they are given, and no copy of it.
    """
    models: Any = getattr(sys.modules.get(_MODELS), "PreTrainedModel", None)
    windows: Any = getattr(sys.modules.get(_CACHES), "DynamicSlidingWindowLayer", None)
    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "is_current_stream_capturing", _no),
        (torch, "tensor", filled(torch.tensor)),
    ]
    if hasattr(models, _LOOKS_FOR_PADDING):
        replacements.append((models, _LOOKS_FOR_PADDING, _pass))
    begin = None if windows is None else vars(windows).get("lazy_initialization")
    if begin is not None and _only_moves(windows, begin):
        replacements.append((windows, "lazy_initialization", _base_of(windows)))
    layers: Any = getattr(sys.modules.get(_CACHES), "DynamicLayer", None)
    update = None if layers is None else without_copies(layers)
    if update is not None:
        replacements.append((layers, "update", update))
    with instead(replacements):
        yield


def every_size_on(device: torch.device) -> Any:
    """Have kernels run at every size on a GPU, as in a replay: there a launch costs the host nothing."""
    return at_every_size() if device.type == "cuda" else contextlib.nullcontext()


def _no() -> bool:
    return False


def _pass(*args: Any, **kwargs: Any) -> None:
    return None


def filled(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As ``torch.tensor``, but for a few numbers that are to be on a device."""

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
        if device is not None and not kwargs and torch.device(device).type == "cuda" and _is_constant(data):
            made = theirs(data, dtype=dtype, device="cpu")
            if 0 < made.numel() <= _MOST:
                values: list[Any] = made.flatten().tolist()
                numbers = [torch.full((), value, dtype=made.dtype, device=device) for value in values]
                return torch.stack(numbers).view(made.shape)
        return theirs(data, dtype=dtype, device=device, **kwargs)

    return tensor


def _is_constant(data: Any) -> bool:
    if type(data) in (list, tuple):
        return len(data) <= _MOST and all(map(_is_constant, data))
    return type(data) in _NUMBERS


def _base_of(cls: Any) -> Callable[..., None]:
    def lazy_initialization(self: Any, *args: Any, **kwargs: Any) -> None:
        super(cls, self).lazy_initialization(*args, **kwargs)

    return lazy_initialization


@functools.lru_cache(maxsize=4)
def _only_moves(cls: Any, begin: Any) -> bool:
    """Whether a layer with a window does nothing else with its first tokens than one without: it is tried."""
    try:
        one, other, keys = cls(4), cls(4), torch.zeros(1, 2, 3, 2, device="cpu")
        begin(one, keys, keys)
        super(cls, other).lazy_initialization(keys, keys)
        same = [
            torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its
            for mine, its in zip(vars(one).values(), vars(other).values(), strict=True)
        ]
        return all(same) and [*vars(one)] == [*vars(other)]
    except Exception:  # of another version
        return False
