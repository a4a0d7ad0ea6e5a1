"""The ops: one folder each, with one record in its ``__init__.py`` that all tables are derived from.

    twinkle/ops/<op>/
        __init__.py         OP, the record: names, roles, backends, what it exports
        reference.py        the definition in plain torch, and VARIANTS, its variants
        samples.py          calls of it, for proofs, tests and benchmarks
        recognition.py      what the matcher asks about its code and its instances, where it has to ask
        <backend>.py        an implementation, see :mod:`twinkle.ops.backends`

Standard library only, as are the records: this module is imported at interpreter start when a configuration
names an op.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from twinkle.ops.backends import Backend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any, Literal

__all__ = ["Op", "added_folder", "all_ops", "document", "exported", "find_op"]

_PACKAGE = "twinkle.ops"


class Op:
    """What there is to know of an op without importing torch.

    Args:
        name: Its name, and that of its folder.
        kind: ``layer`` or ``function`` for what a whole layer or function can be (it may stand behind
            ``match =``); ``inside`` for a few steps inside a ``forward``. A layer with ``functions`` may be
            written as a function as well.
        summary: What it computes, in a line.
        rank: Where it stands in lists, and when it is tried on code: the commonest come first.
        words: Names, ``+`` and ``*`` (:mod:`twinkle.match.words`): code that is the op has one of them at
            least. Code with none is never read.
        aliases: What others call it, where no spelling leads to its name.
        roles: What each argument of the definition may be in the code of a class or function; empty for an
            op that is not one expression. ``input``: an argument; ``table``, ``size``: an argument, or what
            code makes of its arguments (:mod:`twinkle.match.spelled`); ``tensor``, ``linear``, ``norm``,
            ``dropout``, ``layer``, ``flag``: an attribute that holds such a thing; ``number``: a number,
            or an attribute with one; ``factor``: an attribute with a number or a tensor; ``activation``: an
            elementwise function; ``shape``: sizes; ``constant``: a number that is no argument, or a flag
            that is taken for one; ``spelling``: what ``spellings`` of its ``recognition.py`` says, and no
            code has.
        layers: The layer classes it exports, and their modules in its folder; the first is the one that the
            embedded document binds.
        functions: The same for functions, and for layers that stand for functions.
        backends: Its implementations, the preferred one first: names of
            :data:`twinkle.ops.backends.KINDS`, or from these to the module that holds each.
        calls: Names of which a method that is the op calls one at least; by default its words.
    """

    def __init__(
        self,
        name: str,
        *,
        kind: Literal["layer", "function", "inside"],
        summary: str,
        rank: int = 100,
        words: tuple[str, ...] = (),
        aliases: tuple[str, ...] = (),
        roles: Mapping[str, str] | None = None,
        layers: Mapping[str, str] | None = None,
        functions: Mapping[str, str] | None = None,
        backends: tuple[str, ...] | Mapping[str, str] = (),
        calls: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.summary = summary
        self.rank = rank
        self.words = frozenset(words)
        self.calls = self.words if calls is None else frozenset(calls)
        self.aliases = aliases
        self.roles = dict(roles or {})
        self.layers = dict(layers or {})
        self.functions = dict(functions or {})
        self._hooks: dict[str, Callable[..., Any] | None] = {}
        modules = backends if isinstance(backends, dict) else {backend: backend for backend in backends}
        self.backends = tuple(
            Backend(name, backend, f"{_PACKAGE}.{name}.{module}") for backend, module in modules.items()
        )

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    @property
    def is_function(self) -> bool:
        """Whether a whole function can be the op."""
        return bool(self.functions) and (self.kind == "function" or bool(self.layers))

    @property
    def folder(self) -> str:
        """The path of its folder."""
        return os.path.dirname(str(sys.modules[f"{_PACKAGE}.{self.name}"].__file__))

    def has(self, module: str) -> bool:
        """Whether its folder has a module of that name."""
        return os.path.isfile(os.path.join(self.folder, f"{module}.py"))

    def module(self, name: str) -> ModuleType:
        """A module of its folder, imported."""
        return import_module(f"{_PACKAGE}.{self.name}.{name}")

    def backend(self, name: str) -> Backend:
        """Its implementation of that name.

        Raises:
            LookupError: It has none.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise LookupError(f"{self.name} has no {name}")

    def hook(self, name: str) -> Callable[..., Any] | None:
        """A function of its ``recognition.py``, or None: see :mod:`twinkle.match` for what is asked."""
        if name not in self._hooks:
            module = self.module("recognition") if self.has("recognition") else None
            self._hooks[name] = getattr(module, name, None)
        return self._hooks[name]

    @property
    def variants(self) -> tuple[Any, ...]:
        """All that its definition can be told to compute."""
        found: tuple[Any, ...] = self.module("reference").VARIANTS
        return found


def all_ops() -> tuple[Op, ...]:
    """Every op, in the order of their ranks."""
    package = sys.modules.get(_PACKAGE) or import_module(_PACKAGE)
    path = tuple(package.__path__)
    if path not in _records:
        _records[path] = _walk(path)
    return _records[path]


# By the folders that were walked. No functools.cache: importing that takes longer than all the records.
_records: dict[tuple[str, ...], tuple[Op, ...]] = {}


def _walk(path: tuple[str, ...]) -> tuple[Op, ...]:
    found: dict[str, Op] = {}
    for folder in path:
        for name in sorted(os.listdir(folder)):
            if name not in found and os.path.isfile(os.path.join(folder, name, "__init__.py")):
                found[name] = import_module(f"{_PACKAGE}.{name}").OP
    return tuple(sorted(found.values(), key=lambda op: (op.rank, op.name)))


def find_op(name: str) -> Op:
    """The op of that name.

    Raises:
        LookupError: There is none.
    """
    for op in all_ops():
        if op.name == name:
            return op
    raise LookupError(f"there is no op {name!r}")


class added_folder:
    """Lets the ops in one more folder be ops as long as the block runs.

    Args:
        folder: Laid out as ``twinkle/ops``: one folder in it for each op.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._path: list[str] = import_module(_PACKAGE).__path__  # type: ignore[assignment]

    def __enter__(self) -> None:
        self._path.append(self._folder)

    def __exit__(self, *exception: object) -> None:
        _records.pop(tuple(self._path), None)
        self._path.remove(self._folder)
        inside = os.path.join(self._folder, "")
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(inside):
                del sys.modules[name]


def document() -> dict[str, dict[str, dict[str, str]]]:
    """The embedded kernels as a document of bindings: an entry for every op that is a layer or a function.

    Equal to ``twinkle.toml`` beside this file, which is there to be copied.
    """
    layers = {
        op.name: {"match": op.name, "package_name": _PACKAGE, "layer_name": next(iter(op.layers))}
        for op in all_ops()
        if op.kind == "layer" and op.layers
    }
    functions = {
        op.name: {"match": op.name, "package_name": f"{_PACKAGE}:{next(iter(op.functions))}"}
        for op in all_ops()
        if op.is_function
    }
    return {"layers": layers, "functions": functions}


def exported(section: Literal["layers", "functions"]) -> dict[str, str]:
    """From each layer class (or function) that an op exports to the module that defines it."""
    return {
        name: f"{_PACKAGE}.{op.name}.{module}"
        for op in all_ops()
        for name, module in getattr(op, section).items()
    }
