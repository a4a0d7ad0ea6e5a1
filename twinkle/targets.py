"""Targets: the classes and functions that kernels replace, and how they are written.

A target is one of four types: a :class:`Class` in hand, the :class:`Name` of a class or function
(``module:Class``), a :class:`Pattern` of such names, or an :class:`Op` (``match:rms_norm``), which is
whatever code computes that op. ``*`` in a pattern stands for any characters but a dot, ``**`` for any
characters at all, ``?`` for one that is no dot.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "Class",
    "Name",
    "Op",
    "Pattern",
    "Target",
    "class_path",
    "defining_match",
    "is_pattern",
    "own_forward",
    "parse_target",
    "pattern_regex",
    "pattern_source",
]

_OP = "match"


class Target:
    """What a kernel is registered for. Two targets are equal when they are written alike.

    Attributes:
        text: The target in one line, as the report and a configuration write it.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def means(self, cls: type) -> bool:
        """Whether that very class is the target; its subclasses are not considered here."""
        return False

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class Class(Target):
    """A class in hand.

    Attributes:
        cls: The class. Another class of the same name is another target.
    """

    __slots__ = ("cls",)

    def __init__(self, cls: type) -> None:
        super().__init__(class_path(cls))
        self.cls = cls

    def means(self, cls: type) -> bool:
        """Whether it is this class."""
        return cls is self.cls

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and other.cls is self.cls

    def __hash__(self) -> int:
        return hash(self.cls)

    def __str__(self) -> str:
        return str(self.cls)


class Name(Target):
    """The name of one class or function.

    Attributes:
        module: The module that defines it.
        name: Its qualified name there.
    """

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}:{name}")
        self.module = module
        self.name = name

    def means(self, cls: type) -> bool:
        """Whether the class has this name and module."""
        return cls.__qualname__ == self.name and cls.__module__ == self.module

    def in_module(self, module: str) -> bool:
        """Whether the module of that name may define the target."""
        return module == self.module


class Pattern(Target):
    """A description of the names of classes: module and name may both hold wildcards.

    Attributes:
        module: The module's name, or a pattern of it.
        name: The class's qualified name, or a pattern of it.
    """

    __slots__ = ("_module_regex", "_name_regex", "module", "name")

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}:{name}")
        self.module = module
        self.name = name
        # Compiled at the first question: a start does not import re.
        self._module_regex: re.Pattern[str] | None = None
        self._name_regex: re.Pattern[str] | None = None

    @property
    def names_one_class(self) -> bool:
        """Whether the name of the class is given in full, and only the module is a pattern."""
        return not is_pattern(self.name)

    def means(self, cls: type) -> bool:
        """Whether name and module of the class fit the pattern."""
        return self.fits_name(cls.__qualname__) and self.in_module(cls.__module__)

    def in_module(self, module: str) -> bool:
        """Whether the module of that name may define a target."""
        if not is_pattern(self.module):
            return module == self.module
        if self._module_regex is None:
            self._module_regex = pattern_regex(self.module)
        return self._module_regex.fullmatch(module) is not None

    def fits_name(self, qualname: str) -> bool:
        """Whether a class of that qualified name is meant, in a module that is."""
        if self.names_one_class:
            return qualname == self.name
        if self._name_regex is None:
            self._name_regex = pattern_regex(self.name)
        return self._name_regex.fullmatch(qualname) is not None


class Op(Target):
    """An op: every class or function whose code computes it.

    Attributes:
        op: One of ``twinkle.op_names.OPS``.
    """

    __slots__ = ("op",)

    def __init__(self, op: str) -> None:
        super().__init__(f"{_OP}:{op}")
        self.op = op


def is_pattern(text: str) -> bool:
    """Whether the text holds wildcards, so that it describes names instead of being one."""
    return "*" in text or "?" in text


def pattern_source(pattern: str) -> str:
    """The regular expression that a pattern stands for, to be combined with others."""
    import re

    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """The compiled form of a pattern."""
    import re

    return re.compile(pattern_source(pattern))


def parse_target(text: str, *, where: str | None = None) -> Name | Pattern | Op:
    """Read ``"package.module:Class"``, a pattern of that form, or ``"match:op"``.

    Args:
        text: As written in a configuration or given to the API.
        where: Where it was written, for the message.

    Raises:
        ConfigError: There is not exactly one colon with something on both sides of it, or a part
            is no dotted name.
    """
    module, colon, name = text.partition(":")
    module, name = module.strip(), name.strip()
    expected = '"module:Class", where both parts may hold * (a part of a name) and ** (dots too)'
    if not colon or not module or not name or ":" in name:
        fix = None
        if not colon and "." in text:
            head, _, tail = text.rpartition(".")
            fix = f'write "{head}:{tail}"'
        raise ConfigError("not a target", where=where, found=repr(text), expected=expected, fix=fix)
    for part in (*module.split("."), *name.split(".")):
        bare = part.replace("*", "a").replace("?", "a")
        if not bare.isidentifier() and not (bare[:1].isdigit() and part[:1] in "*?"):
            raise ConfigError(
                "not a target",
                where=where,
                found=f"{text!r} ({part!r} is no name)",
                expected=expected,
            )
    if module == _OP:
        return Op(name)
    return (Pattern if is_pattern(module) or is_pattern(name) else Name)(module, name)


def class_path(cls: type) -> str:
    """``module:Qualified.Name`` of a class, as targets and the report write it."""
    return f"{cls.__module__}:{cls.__qualname__}"


def own_forward(cls: type) -> Any:
    """The ``forward`` of a class without what Twinkle put in its place; None where it has none."""
    function = getattr(cls, "forward", None)
    front = getattr(function, "__twinkle__", None)
    # A wrapper by `functools.wraps` has the attribute, too, and is the program's own.
    while front is not None and front.function is function:
        function = front.original
        front = getattr(function, "__twinkle__", None)
    return function


def defining_match(
    cls: type, target: Target, means: Callable[[Target, type], bool] | None = None
) -> type | None:
    """The class in ``cls``'s MRO that ``target`` means and whose ``forward`` instances run.

    A subclass that overrides ``forward`` computes something else and does not match; one that
    inherits it (FSDP2's generated classes, a renamed subclass) does.

    Args:
        cls: The class of a module.
        target: As registered.
        means: Whether a target means a very class; by default its names decide.
    """
    running = getattr(cls, "forward", None)
    for base in cls.__mro__:
        if getattr(base, "forward", None) is not running:
            continue
        if target.means(base) if means is None else means(target, base):
            return base
    return None
