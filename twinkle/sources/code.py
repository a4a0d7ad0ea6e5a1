"""Sources that are code of the program itself: an object in hand, or where to import it from.

Light at import: this module is imported at interpreter start when a configuration names code.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock

from twinkle.errors import ConfigError, SourceError, TwinkleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

__all__ = ["CodeSource", "RepoSource", "is_dotted"]


_keeping = allocate_lock()


def is_dotted(text: str) -> bool:
    """Names with dots between them; ``re`` would cost the start of the interpreter 9 ms."""
    return all(part.isidentifier() for part in text.split("."))


def _parts(text: str) -> tuple[str, str]:
    """``"module:attribute"`` or ``"module.attribute"`` in two."""
    module, colon, attribute = text.partition(":")
    if not colon:
        module, _, attribute = text.rpartition(".")
    return module, attribute


class CodeSource:
    """A class or a callable in hand, or the ``"module:attribute"`` where it is.

    Args:
        implementation: A layer class, a callable, an ``nn.Module`` class whose ``forward`` is the
            function, ``"module:attribute"`` or ``"module.attribute"``.
        kind: ``"layer"`` or ``"function"``.
        attributes: For a layer what its class expects on ``self`` and its target lacks.
        where: Where it was registered.

    Raises:
        ConfigError: It is none of these.
    """

    kind = "code"

    def __init__(
        self,
        implementation: object,
        *,
        kind: str,
        attributes: Mapping[str, object] | None = None,
        where: str | None = None,
    ) -> None:
        self.of = kind
        self.where = where
        self.trace: list[tuple[str, bool, str]] = []
        self._module = self._attribute = ""
        self.attributes = dict(attributes or {})
        self._loaded: Any = None
        self._given = implementation
        if isinstance(implementation, str):
            module, attribute = _parts(implementation)
            if not (is_dotted(module) and is_dotted(attribute)):
                raise ConfigError(
                    f"malformed {self._key}",
                    where=where,
                    found=repr(implementation),
                    expected='"module:name"',
                    fix="write the module, a colon and the name in it" if implementation else None,
                )
            self._module, self._attribute = module, attribute
        else:
            self._check_object(implementation)

    @property
    def _key(self) -> str:
        return "layer_impl" if self.of == "layer" else "func_impl"

    def _check_object(self, implementation: object) -> None:
        torch = sys.modules.get("torch")
        module_class = torch.nn.Module if torch is not None else ()
        fix = None
        if self.of == "layer":
            if isinstance(implementation, type) and issubclass(implementation, module_class):
                return
            expected = 'a subclass of torch.nn.Module, or "module:Class"'
            if isinstance(implementation, module_class):
                fix = f"pass the class {type(implementation).__name__}, not an instance of it"
        else:
            function_class = torch.autograd.Function if torch is not None else ()
            is_autograd = isinstance(implementation, type) and issubclass(implementation, function_class)
            if callable(implementation) and not is_autograd:
                return
            expected = 'a callable, an nn.Module class, or "module:name"'
            if is_autograd:
                fix = f"pass {_name_of(implementation)}.apply"
        raise ConfigError(
            f"{self._key} is no {self.of}",
            where=self.where,
            found=repr(implementation),
            expected=expected,
            fix=fix,
        )

    def describe(self) -> str:
        """``module:name`` of the code."""
        if self._module:
            return f"code {self._module}:{self._attribute}"
        return f"code {_name_of(self._given)}"

    def load(self) -> object:
        """The layer class or the callable; a string is imported at the first call.

        Raises:
            SourceError: The module or the name is not there, or the module raises on import.
        """
        if self._loaded is None:
            from twinkle.sources.adapters import finish

            found = self._import() if self._module else self._given
            finished = finish(
                found,
                kind=self.of,
                described=self.describe(),
                where=self.where,
                attributes=self.attributes,
            )
            return keep_first(self, finished)
        return self._loaded

    def _import(self) -> object:
        from twinkle.sources import lookup

        module = import_named(self._module, described=self.describe(), where=self.where)
        found: object = lookup.find(module, self._attribute, homes=("",))
        if found is lookup.MISSING:
            raise lookup.not_found(
                module,
                self._attribute,
                kind=self.of,
                homes=("",),
                described=f"module {self._module}",
                where=self.where,
            )
        return found


class RepoSource:
    """An object with ``load()`` that the program passed: ``FuncRepositoryProtocol``.

    Args:
        repo: The object; its ``load()`` is called once, at first use.
        kind: ``"function"`` (or ``"layer"``).
        where: Where it was registered.

    Raises:
        ConfigError: It has no ``load()``.
    """

    kind = "code"

    def __init__(self, repo: object, *, kind: str, where: str | None = None) -> None:
        load = getattr(repo, "load", None)
        if isinstance(repo, type) or not callable(load):
            raise ConfigError(
                "repo has no load()" if not isinstance(repo, type) else "repo is a class, not an object",
                where=where,
                found=repr(repo),
                expected="an object whose load() returns a callable or an nn.Module class",
                fix=f"pass {repo.__name__}()" if isinstance(repo, type) else None,
            )
        self.of = kind
        self.where = where
        self.trace: list[tuple[str, bool, str]] = []
        self._repo = repo
        self._load: Callable[[], object] = load
        self._loaded: Any = None

    def describe(self) -> str:
        """The type of the object."""
        return f"code {_name_of(type(self._repo))}.load()"

    def load(self) -> object:
        """What the object's ``load()`` returns, made a layer class or a callable.

        Raises:
            SourceError: ``load()`` raised, or returned something else.
        """
        if self._loaded is None:
            from twinkle.sources import lookup
            from twinkle.sources.adapters import finish

            try:
                found = self._load()
            except TwinkleError:
                raise
            except (Exception, SystemExit) as error:
                raise SourceError(
                    f"{self.describe()} raised", where=self.where, found=lookup.failure(error)
                ) from error
            finished = finish(found, kind=self.of, described=self.describe(), where=self.where)
            return keep_first(self, finished)
        return self._loaded


def keep_first(source: Any, loaded: object) -> object:
    """Of several threads that loaded at once all get what the first one has made."""
    with _keeping:
        if source._loaded is None:
            source._loaded = loaded
        return source._loaded


def import_named(name: str, *, described: str, where: str | None) -> ModuleType:
    """Import a module that the program or an installed package provides.

    Raises:
        SourceError: It is not there, or raises on import.
    """
    import importlib

    from twinkle.errors import MissingDependencyError
    from twinkle.sources import lookup

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if absent and (name == absent or name.startswith(absent + ".")):
            top = name.partition(".")[0]
            is_top = absent == top
            raise MissingDependencyError(
                f"{described}: no module {absent!r}",
                where=where,
                found=f"no package {top!r} on this machine" if is_top else f"{top!r} without {absent!r}",
                fix=f"install the package that has {top!r}, or put it on PYTHONPATH" if is_top else None,
            ) from error
        raise lookup.raised(error, described=described, where=where) from error
    except TwinkleError:
        raise
    except (Exception, SystemExit) as error:
        raise lookup.raised(error, described=described, where=where) from error


def _name_of(thing: object) -> str:
    name = getattr(thing, "__qualname__", None) or getattr(type(thing), "__qualname__", "object")
    module = getattr(thing, "__module__", None) or type(thing).__module__
    code = getattr(thing, "__code__", None)
    if code is not None and "<" in str(name):
        # Every lambda is called the same: the line tells them apart.
        return f"{module}:{name} ({code.co_filename}:{code.co_firstlineno})"
    return f"{module}:{name}"
