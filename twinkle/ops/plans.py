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
from typing import TYPE_CHECKING

from twinkle import forks
from twinkle.codegen import compile_source
from twinkle.ops.replay import replay_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Planned", "parameters_of"]

_MOST = 512  # Kept plans of a function; of shapes that vary without end the oldest go.
_KEYS = {
    "Tensor": "type({0}), {0}.shape, {0}.stride(), {0}.dtype",
    "Tensor?": "None if {0} is None else (type({0}), {0}.shape, {0}.stride(), {0}.dtype)",
    "bool[]": "tuple({0})",
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
        self._making = forks.lock()
        names = ", ".join(self.parameters)
        others = [name for name in self.parameters if name not in self.tensors]
        tensors = ", ".join(self.tensors)
        parts = [_KEYS.get(kind, "{0}").format(name) for name, (kind, _) in self.parameters.items()]
        key = f"({self.tensors[0]}.device, {', '.join(parts)})"
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

    def _unknown(self, key: Any, *inputs: Any) -> Any:
        """The first call of a kind: the next one is recorded."""
        given = dict(zip(self.parameters, inputs, strict=True))
        tensors = [given.pop(name) for name in self.tensors]
        general = self._bound(self.function, *given.values())

        def record(*tensors: Any) -> Any:
            made, replay, final = replay_of(general, tensors)
            if final:
                with self._making:
                    self._plans[key] = replay or general
            return made

        # Both zeros are one key.
        zero = any(isinstance(value, float) and value == 0.0 for value in given.values())
        with self._making:
            while len(self._plans) >= _MOST:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = general if zero else record
        return general(*tensors)
