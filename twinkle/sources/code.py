"""Sources that are code of the program itself: an object in hand, or where to import it from.

Light at import: this module is imported at interpreter start when a configuration names code.
"""

from __future__ import annotations

import sys

from twinkle.errors import ConfigError, SourceError, TwinkleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

__all__ = ["CodeSource", "LoadedOnce", "RepoSource", "import_named", "is_dotted"]


def is_dotted(text: str) -> bool:
    """Whether a text is identifiers joined by dots; ``re`` would cost the start of the interpreter 9 ms."""
    return all(part.isidentifier() for part in text.split("."))


def _parts(text: str) -> tuple[str, str]:
    """Split ``"module:attribute"`` or ``"module.attribute"``."""
    module, colon, attribute = text.partition(":")
    if not colon:
        module, _, attribute = text.rpartition(".")
    return module, attribute


class LoadedOnce:
    """Base of the sources of code on this machine: loaded at the first call, once for all threads.

    Args:
        kind: ``"layer"`` or ``"function"``.
        attributes: For a layer what its class expects on ``self`` and its target lacks.
        where: Where it was registered.

    Attributes:
        of: As ``kind``; the ``kind`` of a source is where it comes from.
        trace: ``(variant, accepted, reason)`` of each build, where there are several.
    """

    def __init__(
        self, *, kind: str, attributes: Mapping[str, object] | None = None, where: str | None = None
    ) -> None:
        self.of = kind
        self.where = where
        self.attributes = dict(attributes or {})
        self.trace: list[tuple[str, bool, str]] = []

    def load(self) -> object:
        """The layer class or the callable, loaded at the first call.

        Raises:
            SourceError: It is not there, raises while it is loaded, or is something else.
            KernelError: The layer class cannot do without its ``__init__``.
        """
        loaded = self.__dict__.get("_loaded")
        if loaded is None:
            # Without a lock, which a fork in another thread would leave locked: the first one counts.
            loaded = self.__dict__.setdefault("_loaded", self._load())
        return loaded

    def _load(self) -> object:
        raise NotImplementedError


class CodeSource(LoadedOnce):
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

    @property
    def in_hand(self) -> object:
        """The class or the callable; None where the name of one was given."""
        return None if isinstance(self._given, str) else self._given

    @property
    def module(self) -> str:
        """The name of the module where it is; empty for what was given itself."""
        return self._module

    def __init__(
        self,
        implementation: object,
        *,
        kind: str,
        attributes: Mapping[str, object] | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__(kind=kind, attributes=attributes, where=where)
        self._module = self._attribute = ""
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

    def given(self) -> object:
        """What was given, or stands under the name that was: as it is, where :meth:`load` makes it ready.

        Raises:
            SourceError: It is not there, or raises while it is imported.
        """
        return self._import() if self._module else self._given

    def _load(self) -> object:
        from twinkle.sources.adapters import finish

        return finish(
            self.given(),
            kind=self.of,
            described=self.describe(),
            where=self.where,
            attributes=self.attributes,
        )

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


class RepoSource(LoadedOnce):
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
        super().__init__(kind=kind, where=where)
        self._repo = repo
        self._load_repo: Callable[[], object] = load

    def describe(self) -> str:
        """The type of the object."""
        return f"code {_name_of(type(self._repo))}.load()"

    def _load(self) -> object:
        from twinkle.sources import lookup
        from twinkle.sources.adapters import finish

        try:
            found = self._load_repo()
        except TwinkleError:
            raise
        except (Exception, SystemExit) as error:
            raise SourceError(
                f"{self.describe()} raised", where=self.where, found=lookup.failure(error)
            ) from error
        return finish(found, kind=self.of, described=self.describe(), where=self.where)


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
