"""What a block is made of (parts, attributes, the memory of its weights), and whether it still is."""

from __future__ import annotations

import operator
import random
import sys
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global

from twinkle.capture.slot import NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Draw", "Draws", "Makeup", "Traces", "draw_again", "hooks_on"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(_global, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
_TABLES = ("_parameters", "_buffers", "_modules")
_TORCH = frozenset(nn.Module().__dict__)
_values_of: Callable[[dict[str, Any]], Iterable[Any]] = dict.values
_pointer: Callable[[Tensor], int] = Tensor.data_ptr
_state = attrgetter("requires_grad", "dtype")
_call: Callable[..., Any] = getattr(operator, "call", lambda function, given: function(given))  # from 3.11
_MOST_PARTS = 64  # of a list, set or dictionary that is looked into while a block is recorded


def hooks_on(module: nn.Module) -> bool:
    """Whether hooks are called around a part of a module: code that a replay would leave out."""
    if any(_GLOBAL_HOOKS):
        return True
    return any(getattr(part, name) for part in module.modules() for name in _HOOKS)


class Makeup:
    """A block as it is now.

    Replays compute what the block did when it was recorded. That is what it does as long as its parts are the
    same objects with the same attributes, no hook has come, and each weight lies where it lay. Weights that
    are written in place (an optimizer's step, ``load_state_dict``) lie where they lay.

    The block itself is not held: it holds its recordings, and these this.

    Args:
        block: The block.
    """

    __slots__ = (
        "_attributes",
        "_class",
        "_contents",
        "_getters",
        "_hooks",
        "_length",
        "_lengths",
        "_parts",
        "_pointers",
        "_sized",
        "_spaces",
        "_states",
        "_tables",
        "_types",
        "_values",
        "parameters",
        "weights",
    )

    def __init__(self, block: nn.Module) -> None:
        self.parameters = [*block.parameters()]
        modules = [*block.modules()]
        self._class = type(block)
        self._parts = modules[1:]
        self._types = [*map(type, self._parts)]
        self._hooks = [getattr(part, name) for part in modules for name in _HOOKS]
        configs: dict[int, dict[str, Any]] = {}
        left = [value for part in modules for value in part.__dict__.values() if _is_config(value)]
        while left:
            config = left.pop()
            if id(config) not in configs:
                configs[id(config)] = vars(config)
                left += filter(_is_config, vars(config).values())
        held = [part.__dict__[name] for part in modules for name in _TABLES]
        tables = [*held, *configs.values()]
        self._spaces = [part.__dict__ for part in self._parts]
        self._sized = [*tables, *self._spaces]
        self._lengths = [*map(len, self._sized)]
        self._tables = [*filter(None, tables)]
        self._values = [*chain.from_iterable(map(_values_of, self._tables))]
        self._length = len(block.__dict__)
        self._getters = [*map(_names, modules)]
        self._attributes = [
            *chain.from_iterable(
                names(part.__dict__) for names, part in zip(self._getters, modules, strict=True)
            )
        ]
        self.weights = [*self.parameters, *block.buffers()]
        self._pointers = [*map(_pointer, self.weights)]
        self._states = [*map(_state, self.weights)]
        self._contents = _contents(block)

    def holds(self, block: nn.Module) -> bool:
        """Whether the block is as it was, but for what its weights hold."""
        if any(_GLOBAL_HOOKS) or any(self._hooks) or type(block) is not self._class:
            return False
        own = block.__dict__
        if [*map(type, self._parts)] != self._types or self._length != len(own):
            return False
        if [*map(len, self._sized)] != self._lengths:
            return False
        if not all(map(is_, chain.from_iterable(map(_values_of, self._tables)), self._values)):
            return False
        try:
            attributes = chain.from_iterable(map(_call, self._getters, (own, *self._spaces)))
            if not all(map(is_, attributes, self._attributes)):
                return False
        except KeyError:
            return False
        return [*map(_pointer, self.weights)] == self._pointers and [
            *map(_state, self.weights)
        ] == self._states

    def has_kept(self, block: nn.Module) -> bool:
        """Whether a call left no trace in the block, nor in lists and dictionaries that it holds."""
        return self.holds(block) and self._contents == _contents(block)


class Traces:
    """The attributes of the parts of a block, to be put back after a call that has changed them.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        self._before = [(part.__dict__, dict(part.__dict__)) for part in block.modules()]
        self._held = [(value, value.copy()) for value in _containers(block)]

    def wipe(self) -> None:
        """Give the parts the attributes that they had, and these what they held."""
        for space, before in self._before:
            for name in space.keys() - before.keys():
                del space[name]
            space.update(before)
        for value, before in self._held:
            if type(value) is list:
                value[:] = before
            else:
                value.clear()
                value.update(before)


class Draw(NamedTuple):
    """Numbers that ``torch.rand`` draws on the CPU.

    Attributes:
        numbers: How many, one after the other.
        dtype: Of all of them.
    """

    numbers: int
    dtype: torch.dtype


def draw_again(draws: Iterable[Draw]) -> None:
    """Move the CPU's generator as these draws do: a program that goes on finds the numbers it would find."""
    for one in draws:
        torch.rand(one.numbers, dtype=one.dtype, device="cpu")


class Draws:
    """The generators of random numbers besides the device's, to be put back after a call."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        numpy: Any = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else (numpy, numpy.get_state())

    def put_back(self, expected: Iterable[Draw] = ()) -> bool:
        """Put all back; whether one has moved, other than by the draws that were expected.

        Args:
            expected: From the CPU's generator, in order.
        """
        now_torch = torch.get_rng_state()
        torch.set_rng_state(self._torch)
        draw_again(expected)
        moved = random.getstate() != self._python or not torch.equal(torch.get_rng_state(), now_torch)
        if self._numpy is not None:
            numpy, state = self._numpy
            now = numpy.get_state()
            moved = moved or now[2] != state[2] or not (now[1] == state[1]).all()
            numpy.set_state(state)
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        return moved


def _names(part: nn.Module) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Takes the attributes of a part out of its ``__dict__``, but for torch's own and the slot for calls."""
    names = [name for name in part.__dict__ if name not in _TORCH and name != NAME]
    return itemgetter("training", *names or ("training",))  # of a single name it would make no tuple


def _is_config(value: Any) -> bool:
    cls = type(value)
    return not isinstance(value, nn.Module) and cls.__name__.endswith("Config") and hasattr(value, "__dict__")


def _containers(block: nn.Module) -> list[Any]:
    """The lists, sets and dictionaries among the attributes of a block's parts, but for torch's own."""
    found = []
    for part in block.modules():
        for name, value in part.__dict__.items():
            if type(value) in (list, dict, set) and not name.startswith("_") and len(value) <= _MOST_PARTS:
                found.append(value)
    return found


def _contents(block: nn.Module) -> list[list[int]]:
    """What those hold."""
    return [[*map(id, one.values() if type(one) is dict else one)] for one in _containers(block)]
