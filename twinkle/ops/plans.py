"""Launches that are decided once: what a function did for a kind of tensors is recorded and replayed.

What such a function allocates and launches follows from shapes, strides, dtypes, the device and its other
arguments. So a call that is made a second time is recorded: each allocation, and each launch with its grid,
its compiled kernel, its numbers, and the tensors it was given. From then on one generated function does the
same and nothing else: it takes the addresses, allocates, and calls the launcher of the compiled kernels.

A record that is not the whole of the call is none: where anything else happened to a tensor (a copy, zeros),
where two inputs have one address, or where an address is not aligned, the function itself goes on to run.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from twinkle.codegen import compile_source
from twinkle.ops import launch
from twinkle.ops.replay import replay_of
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Kept", "Planned", "Settled", "parameters_of"]

_MOST = 512  # Kept plans or answers of a function; of shapes that vary without end the oldest go.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_KEYS = {
    "Tensor": "type({0}), {0}.shape, {0}.stride(), {0}.dtype",
    "Tensor?": "None if {0} is None else (type({0}), {0}.shape, {0}.stride(), {0}.dtype)",
    "bool[]": "tuple({0})",
    "int[]?": "None if {0} is None else tuple({0})",
    "object": "id({0})",
}


def parameters_of(schema: str) -> dict[str, tuple[str, bool]]:
    """From the names of the arguments of a schema to their types, and whether they default to None.

    Args:
        schema: As for ``torch.library.define``, such as ``name(Tensor x, Tensor? weight=None) -> Tensor``.
    """
    inside = schema[schema.index("(") + 1 : schema.index(") ->")]
    found = {}
    for text in inside.split(", "):
        kind, name, default = re.fullmatch(r"(\S+) (\w+)(=None)?", text).groups()  # type: ignore[union-attr]
        found[name] = kind, default is not None
    return found


class Kept:
    """What keeps plans or answers, for as long as the runtime's state lives."""

    def __init__(self) -> None:
        self.keepers: weakref.WeakSet[Planned | Settled] = weakref.WeakSet()

    def close(self) -> None:
        """Forget all plans and answers."""
        for keeper in list(self.keepers):
            keeper.clear()


def _key_of(parameters: dict[str, tuple[str, bool]], *first: str) -> str:
    """A key of the metadata of all tensors and of the other arguments, as Python text over them."""
    parts = [_KEYS.get(kind, "{0}").format(name) for name, (kind, _) in parameters.items()]
    return f"({', '.join((*first, *parts))})"


class Planned:
    """A function of an op, by whose calls plans are made.

    Its results are new tensors (or None), and what it does follows from the metadata of its tensors, from
    whether they are aligned, and from its other arguments.

    Args:
        function: Allocates and launches.
        schema: Of its arguments, as for ``torch.library.define``.
        planned: Whether plans are made; else the function runs.

    Attributes:
        call: The function to call in its place.
        result: The call as Python text over its arguments, for functions that are written with it.
        scope: The names in that text.
        parameters: As :func:`parameters_of` reads the schema.
        tensors: The names of those that are tensors.
    """

    def __init__(self, function: Callable[..., Any], schema: str, *, planned: bool = True) -> None:
        self.function = function
        self.parameters = parameters_of(schema)
        self.tensors = [name for name, (kind, _) in self.parameters.items() if kind.startswith("Tensor")]
        self._plans: dict[Any, Callable[..., Any]] = {}
        self._kinds: deque[Any] = deque()  # the keys, the oldest first
        names = ", ".join(self.parameters)
        others = [name for name in self.parameters if name not in self.tensors]
        tensors = ", ".join(self.tensors)
        given_always = next(name for name, (kind, _) in self.parameters.items() if kind == "Tensor")
        key = _key_of(self.parameters, f"{given_always}.device")
        self.scope: dict[str, Any] = {"_tw_known": self._plans.get, "_tw_unknown": self._unknown}
        self.result = (
            f"_tw_plan({tensors}) if (_tw_plan := _tw_known(_tw_key := {key})) is not None"
            f" else _tw_unknown(_tw_key, {names})"
        )
        given = ", ".join(name + ("=None" if absent else "") for name, (_, absent) in self.parameters.items())
        text = (
            f"def call({given}):\n    return {self.result}\n"
            f"def bound({', '.join(['_tw_function', *others])}):\n"
            f"    def general({tensors}):\n        return _tw_function({names})\n"
            "    return general\n"
        )
        scope = dict(self.scope)
        compile_source(text, f"call of {function.__name__}", scope)
        self.call: Callable[..., Any] = scope["call"]
        self._bound: Callable[..., Callable[..., Any]] = scope["bound"]

    def clear(self) -> None:
        """Forget the plans."""
        self._plans.clear()
        self._kinds.clear()

    def _unknown(self, key: Any, *inputs: Any) -> Any:
        """The first call of a kind: the next one is recorded."""
        runtime.of(Kept).keepers.add(self)
        given = dict(zip(self.parameters, inputs, strict=True))
        tensors = [given.pop(name) for name in self.tensors]
        general = self._bound(self.function, *given.values())

        def record(*tensors: Any) -> Any:
            made, replay, final = replay_of(general, tensors)
            if final and key in self._plans:
                self._plans[key] = replay or general
            return made

        # Both zeros are one key.
        zero = any(isinstance(value, float) and value == 0.0 for value in given.values())
        if key not in self._plans:
            self._plans[key] = general if zero else record
            self._kinds.append(key)
        if len(self._kinds) > _MOST:
            self._plans.pop(self._kinds.popleft(), None)
        return general(*tensors)


class Settled:
    """A question about the tensors of a call, whose answer is kept for calls of the kind.

    It is asked again under a compiler, a tracer, a mode or a transform, and of tensor subclasses. The answer
    follows from the metadata of the tensors, from whether autocast is on for their device, and from the
    other arguments.

    Args:
        function: Answers.
        schema: Of its arguments, as for :class:`Planned`; an ``object`` is kept, and known by its identity.

    Attributes:
        call: The function to call in its place.
    """

    def __init__(self, function: Callable[..., Any], schema: str) -> None:
        self._parameters = parameters_of(schema)
        self._answers: dict[Any, Any] = {}
        self._kinds: deque[tuple[Any, Any]] = deque()  # the keys, the oldest first, and the objects in them
        self._function = function
        names = ", ".join(self._parameters)
        device = f"{next(iter(self._parameters))}.device"
        key = _key_of(
            self._parameters,
            "_tw_launch.DEVICE_TYPES",
            device,
            f"_tw_autocast() and _tw_autocast_of({device}.type)",
        )
        text = (
            f"def call({names}):\n"
            "    if (_tw_compiling() or _tw_modes() or _tw_transforms() or _tw_traced() is not None):\n"
            f"        return _tw_function({names})\n"
            f"    try:\n        key = {key}\n"
            f"    except RuntimeError:\n        return _tw_function({names})\n"  # a tensor without strides
            "    answer = _tw_known(key)\n"
            f"    return _tw_unknown(key, {names}) if answer is None else answer\n"
        )
        scope: dict[str, Any] = {
            "_tw_compiling": torch.compiler.is_compiling,
            "_tw_modes": torch._C._len_torch_dispatch_stack,
            "_tw_transforms": torch._C._are_functorch_transforms_active,
            "_tw_traced": torch._C._get_tracing_state,
            "_tw_autocast": torch._C._is_any_autocast_enabled,
            "_tw_autocast_of": torch.is_autocast_enabled,
            "_tw_launch": launch,
            "_tw_function": function,
            "_tw_known": self._answers.get,
            "_tw_unknown": self._unknown,
        }
        compile_source(text, f"answer of {function.__name__}", scope)
        self.call: Callable[..., Any] = scope["call"]

    def clear(self) -> None:
        """Forget the answers."""
        self._answers.clear()
        self._kinds.clear()

    def _unknown(self, key: Any, *inputs: Any) -> Any:
        runtime.of(Kept).keepers.add(self)
        answer = self._function(*inputs)
        if all(not isinstance(x, torch.Tensor) or type(x) in _PLAIN for x in inputs):
            kept = [x for x in inputs if not isinstance(x, torch.Tensor)]
            self._answers[key] = answer
            self._kinds.append((key, kept))
            if len(self._kinds) > _MOST:
                self._answers.pop(self._kinds.popleft()[0], None)
        return answer
