"""The record of one call of a function that allocates and launches, and the function written from it."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle.codegen import compile_source
from twinkle.ops.direct import Slot, current_stream, direct, has_slots, hooked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.direct import Launched

__all__ = ["recorder", "replay_of"]

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_aten = torch.ops.aten
_FRESH = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)


class _Recorder(TorchDispatchMode):
    """Takes note of what is allocated and launched in this thread, and whether anything else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.launches: list[Launched] = []
        self.whole = True
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        if func in _FRESH:
            self.made.append(result)
        elif not _is_idle(func):
            self.whole = False
        return result

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Take no note of what triton does with tensors: its interpreter copies them."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


class _Current(threading.local):
    recorder: _Recorder | None = None


_current = _Current()


def recorder() -> _Recorder | None:
    """What records in this thread."""
    return _current.recorder


@functools.cache
def _is_idle(func: Any) -> bool:
    """Whether an op makes a view, or has nothing to do with tensors."""
    schema = func._schema
    if not any("Tensor" in str(argument.type) for argument in schema.arguments):
        return not any("Tensor" in str(result.type) for result in schema.returns)
    written = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return not written and any(r.alias_info is not None for r in schema.returns)


def replay_of(
    call: Callable[..., Any], inputs: tuple[Tensor | None, ...]
) -> tuple[Any, Callable[..., Any] | None, bool]:
    """Make a call and record it.

    Args:
        call: Allocates and launches, with these inputs alone.
        inputs: Tensors, or None.

    Returns:
        Its result; a function that does the same for inputs of the same metadata, or None where the record
        is not the whole of the call; and whether another call of the kind would be no different.
    """
    given = [x for x in inputs if x is not None]
    addresses = [x.data_ptr() for x in given]
    apart = len({*addresses}) == len(addresses) and not any(address & 15 for address in addresses)
    if _current.recorder is not None or not apart:
        return call(*inputs), None, False
    recorded = _Recorder()
    _current.recorder = recorded
    try:
        with recorded:
            made = call(*inputs)
    finally:
        _current.recorder = None
    if not recorded.whole or not recorded.launches or not all(type(x) in _PLAIN for x in given):
        return made, None, True
    try:
        return made, _Writer(call, inputs, recorded).written(made), True
    except _Unknown:
        return made, None, True


class _Unknown(Exception):
    """A tensor that is neither an input nor a new one, or a launch that cannot be made directly."""


class _Writer:
    """Writes the function that replays a record."""

    def __init__(
        self, call: Callable[..., Any], inputs: tuple[Tensor | None, ...], recorded: _Recorder
    ) -> None:
        self.recorded = recorded
        self.device = recorded.launches[0].tensors[0].device
        self.parameters = [f"x{i}" for i in range(len(inputs))]
        self.call = call
        self.constants: list[Any] = []
        # By name: the tensors whose addresses can be told, and how each of the new ones is made.
        self.known = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
        self.fresh: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def constant(self, value: Any) -> str:
        """The name of an object."""
        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def place(self, tensor: Tensor) -> tuple[str, int]:
        """The tensor that one shares its memory with, and the bytes from where that begins."""
        address = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        mine = {n: t for n, t in self.known.items() if t.untyped_storage().data_ptr() == storage}
        exact = [n for n, t in mine.items() if t.data_ptr() == address]
        names = exact or list(mine)
        if len(names) != 1:
            raise _Unknown
        offset = address - mine[names[0]].data_ptr()
        if offset & 15:
            raise _Unknown
        self.used.add(names[0])
        return names[0], offset

    def written(self, made: Any) -> Callable[..., Any]:
        """The function."""
        self.known |= {f"a{i}": t for i, t in enumerate(self.recorded.made)}
        launches = [self.launch(one) for one in self.recorded.launches]
        returned: dict[str, Tensor] = {}
        result = self.result(made, returned)
        # A new tensor that no launch was given has its values from elsewhere.
        for name, tensor in self.known.items():
            if name.startswith("a") and tensor.numel() and name not in self.used:
                raise _Unknown
        lines = [self.allocation(f"a{i}", t, returned) for i, t in enumerate(self.recorded.made)]
        used = [name for name in self.known if name in self.used]
        addresses = [f"p_{name} = {name}.data_ptr()" for name in used]
        unaligned = f"({' | '.join(f'p_{name}' for name in used)}) & 15"
        ready = [*self.not_ready()]
        inputs = ", ".join(self.parameters)
        body = [
            *([f"if {' or '.join(ready)}:", f"    return general({inputs})"] if ready else []),
            *lines,
            *addresses,
            f"if {unaligned}:",
            f"    return general({inputs})",
            *([f"stream = {self.stream()}"]),
            *launches,
            f"return {result}",
        ]
        names = ", ".join(f"c{i}" for i in range(len(self.constants)))
        text = "\n".join(
            [
                f"def make(general, {names}):",
                f"    def plan({inputs}):",
                *[f"        {line}" for line in body],
                "    return plan",
                "",
            ]
        )
        plan = _maker(text)(self.call, *self.constants)
        plan.compiled = [one.compiled for one in self.recorded.launches]  # which unload when they go
        return plan  # type: ignore[no-any-return]

    def not_ready(self) -> list[str]:
        """Conditions under which the launch is triton's own."""
        if self.recorded.launches[0].compiled is None:
            return []
        found = hooked(self.constant)
        if found is None:
            raise _Unknown
        if self.device.type == "cuda":
            found.append(f"{self.constant(torch._C._cuda_getDevice)}() != {self.device.index}")
        return found

    def stream(self) -> str:
        """The stream that is current on the device."""
        if self.device.type != "cuda" or self.recorded.launches[0].compiled is None:
            return "0"
        return f"{self.constant(current_stream())}({self.device.index})"

    def allocation(self, name: str, tensor: Tensor, returned: dict[str, Tensor]) -> str:
        """A line that makes a new tensor, shaped as the only view of it that is returned."""
        view = returned.get(name, tensor)
        for other, known in self.known.items():
            if other.startswith("x") and known.dtype == view.dtype and known.device == view.device:
                like = torch.empty_like(known, device="meta")
                if like.shape == view.shape and like.stride() == view.stride():
                    return f"{name} = {self.constant(torch.empty_like)}({other})"
        how = f"dtype={self.constant(view.dtype)}, device={self.constant(view.device)}"
        if view.stride() == torch.empty(view.shape, device="meta").stride():
            sizes = ", ".join(map(str, view.shape))
            return f"{name} = {self.constant(torch.empty)}({sizes or '()'}, {how})"
        made = f"{self.constant(torch.empty_strided)}({tuple(view.shape)}, {tuple(view.stride())}, {how})"
        return f"{name} = {made}"

    def result(self, made: Any, returned: dict[str, Tensor]) -> str:
        """What is returned, as text; ``returned`` receives the views that new tensors are made as."""
        flat = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, torch.Tensor)]
        views: dict[str, list[Tensor]] = {}
        for tensor in flat:
            name = self.of_result(tensor)
            if not any(tensor is other for other in views.setdefault(name, [])):
                views[name].append(tensor)
        for name, found in views.items():
            if len(found) == 1 and found[0].numel() == self.known[name].numel():
                returned[name] = found[0]
        return self.text_of(made, returned)

    def of_result(self, tensor: Tensor) -> str:
        """The new tensor that a result is, or is a view of."""
        same = [name for name, known in self.known.items() if known is tensor]
        name = same[0] if same else self.place(tensor)[0]
        if not name.startswith("a"):
            raise _Unknown
        return name

    def text_of(self, made: Any, returned: dict[str, Tensor]) -> str:
        if made is None:
            return "None"
        if isinstance(made, tuple):
            return f"({''.join(self.text_of(one, returned) + ', ' for one in made)})"
        if not isinstance(made, torch.Tensor):
            raise _Unknown
        name = self.of_result(made)
        if made is returned.get(name) or (name not in returned and made is self.known[name]):
            return name
        if made.dtype != self.known[name].dtype:
            raise _Unknown
        return f"{name}.as_strided({tuple(made.shape)}, {tuple(made.stride())}, {made.storage_offset()})"

    def launch(self, one: Launched) -> str:
        """A line that launches."""
        places = [self.place(tensor) for tensor in one.tensors]
        if one.compiled is None:
            tensors = [
                n
                if not offset
                else f"{n}.as_strided({tuple(t.shape)}, {tuple(t.stride())}, {t.storage_offset()})"
                for t, (n, offset) in zip(one.tensors, places, strict=True)
            ]
            run = self.constant(functools.partial(one.jitted[one.grid], **one.constants))
            return f"{run}({', '.join([*tensors, *map(self.constant, one.numbers)])})"
        pointers = [f"p_{n} + {offset}" if offset else f"p_{n}" for n, offset in places]
        function, arguments = direct(one)
        return f"{self.constant(function)}({self.arguments(arguments, pointers)})"

    def arguments(self, arguments: Any, pointers: list[str]) -> str:
        """Arguments as text, the slots in them filled."""
        texts = []
        for argument in arguments:
            if isinstance(argument, Slot):
                texts.append("stream" if argument.at is None else pointers[argument.at])
            elif has_slots(argument):
                texts.append(f"({self.arguments(argument, pointers)},)")
            else:
                texts.append(self.constant(argument))
        return ", ".join(texts)


@functools.lru_cache(maxsize=1024)
def _maker(text: str) -> Callable[..., Any]:
    """The function that makes a plan of its constants: plans of other shapes often have the same text."""
    scope: dict[str, Any] = {}
    compile_source(text, "plan", scope)
    return scope["make"]  # type: ignore[no-any-return]
