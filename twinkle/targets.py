"""Targets by name: ``module:Class``, patterns of that form, and ``kernel_layer_name``.

``*`` stands for any characters but a dot, ``**`` for any characters at all, ``?`` for one that is
no dot. Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from re import Pattern

__all__ = [
    "Target",
    "class_path",
    "defining_match",
    "is_pattern",
    "parse_target",
    "pattern_regex",
    "pattern_source",
]


class Target:
    """What a target names: the module and the class (or function) in it, either may be a pattern.

    Attributes:
        text: As it was written.
        module: The module's name or pattern.
        name: The class's qualified name or pattern.
    """

    __slots__ = ("_module_regex", "_name_regex", "module", "name", "text")

    def __init__(self, module: str, name: str) -> None:
        self.text = f"{module}:{name}"
        self.module = module
        self.name = name
        self._module_regex: Pattern[str] | None = None
        self._name_regex: Pattern[str] | None = None

    @property
    def module_is_exact(self) -> bool:
        """The module is named, not described by a pattern."""
        return not is_pattern(self.module)

    def matches_module(self, module: str) -> bool:
        """The module of that name is meant."""
        if self.module_is_exact:
            return module == self.module
        if self._module_regex is None:
            self._module_regex = pattern_regex(self.module)
        return self._module_regex.fullmatch(module) is not None

    def matches_name(self, qualname: str) -> bool:
        """The class or function of that qualified name is meant."""
        if not is_pattern(self.name):
            return qualname == self.name
        if self._name_regex is None:
            self._name_regex = pattern_regex(self.name)
        return self._name_regex.fullmatch(qualname) is not None

    def matches_class(self, cls: type) -> bool:
        """That very class is meant (its subclasses are not considered here)."""
        return self.matches_name(cls.__qualname__) and self.matches_module(cls.__module__)

    def __repr__(self) -> str:
        return f"Target({self.text!r})"


def is_pattern(text: str) -> bool:
    """The text describes names instead of being one."""
    return "*" in text or "?" in text


def pattern_source(pattern: str) -> str:
    """The regular expression that a pattern stands for, to be combined with others."""
    import re

    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def pattern_regex(pattern: str) -> Pattern[str]:
    """The compiled form of a pattern."""
    import re

    return re.compile(pattern_source(pattern))


def parse_target(text: str, *, where: str | None = None) -> Target:
    """Read ``"package.module:Class"``.

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
    return Target(module, name)


def class_path(cls: type) -> str:
    """``module:Qualified.Name`` of a class, as targets and the report write it."""
    return f"{cls.__module__}:{cls.__qualname__}"


def defining_match(cls: type, target: Target | type) -> type | None:
    """The class in ``cls``'s MRO that ``target`` means and whose ``forward`` instances run.

    A subclass that overrides ``forward`` computes something else and does not match; one that
    inherits it (FSDP2's generated classes, a renamed subclass) does.
    """
    running = getattr(cls, "forward", None)
    for base in cls.__mro__:
        meant = base is target if isinstance(target, type) else target.matches_class(base)
        if meant and getattr(base, "forward", None) is running:
            return base
    return None
