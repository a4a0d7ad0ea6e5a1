"""The ``TWINKLE_`` variables, read into the same documents and settings as a file."""

from __future__ import annotations

import os

from twinkle._environment import FALSE, TRUE, check_path
from twinkle.config.entries import Checked
from twinkle.config.fields import SETTING_KEYS, WrongError, shown
from twinkle.config.files import parse
from twinkle.config.locations import Locations, printable
from twinkle.config.schema import validate
from twinkle.errors import ConfigError, suggest
from twinkle.op_names import slip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any


__all__ = [
    "VARIABLES",
    "check_config_path",
    "check_disabled",
    "checked_variables",
    "config_paths",
    "disabled",
    "unknown_variables",
]

# Setting, and what the text of its variable is: a word, a boolean, a list, or a boolean or a list.
_SETTINGS = {
    "TWINKLE_CAPTURE": ("capture", "word"),
    "TWINKLE_CAPTURE_MEMORY": ("capture_memory", "word"),
    "TWINKLE_DEVICE": ("device", "word"),
    "TWINKLE_KERNELS": ("kernels", "word or list"),
    "TWINKLE_LOG": ("log", "word"),
    "TWINKLE_MODE": ("mode", "word"),
    "TWINKLE_REPORT": ("report", "word"),
    "TWINKLE_SIZES": ("sizes", "word"),
    "TWINKLE_STRICT": ("strict", "boolean"),
    "TWINKLE_TRUST_REMOTE_CODE": ("trust_remote_code", "boolean or list"),
    "TWINKLE_VERIFY": ("verify", "word"),
    "TWINKLE_WATCH": ("watch", "word"),
    "TWINKLE_WHERE": ("where", "places"),
}
_TABLES = {"TWINKLE_FUNCTIONS": "functions", "TWINKLE_LAYERS": "layers"}

# What a variable that takes a path names.
_PATHS = {
    "TWINKLE_CACHE": "a directory, or off to keep no verdicts",
    "TWINKLE_LOCK": "the path of a twinkle.lock",
    "TWINKLE_REPORT": "the path of a JSON file",
    "TWINKLE_TRUST_FILES": "directories whose modes mean nothing, joined by the path separator",
}

VARIABLES = (
    *_SETTINGS,
    *_TABLES,
    *(variable for variable in _PATHS if variable not in _SETTINGS),
    "TWINKLE_CONFIG",
    "TWINKLE_DISABLE",
    "TWINKLE_USE_KERNELS",
)


def config_paths(environ: Mapping[str, str]) -> list[str]:
    """The parts of ``TWINKLE_CONFIG``: paths and ``auto``, in their order."""
    text = environ.get("TWINKLE_CONFIG", "")
    return [part for part in text.split(os.pathsep) if part.strip()]


def check_config_path(name: str, environ: Mapping[str, str]) -> None:
    """Refuse the path of a configuration that looks like a switch, wherever it was given.

    Raises:
        ConfigError: It is ``1``, ``true``, ``off`` or the like.
    """
    given = name in config_paths(environ)
    check_path(
        "TWINKLE_CONFIG" if given else "the configuration",
        name,
        "the path of a TOML file, or auto for the defaults without one",
        where="environment variable TWINKLE_CONFIG" if given else printable(name),
    )


def disabled(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The kernels and ops that ``TWINKLE_DISABLE`` names, when it is not the off switch.

    Raises:
        ConfigError: ``TWINKLE_USE_KERNELS`` is no boolean.
    """
    use = environ.get("TWINKLE_USE_KERNELS", "").strip()
    if use:
        _boolean("TWINKLE_USE_KERNELS", use)
    text = environ.get("TWINKLE_DISABLE", "").strip()
    if text.lower() in TRUE or text.lower() in FALSE:
        return ()
    return tuple(dict.fromkeys(_listed(text)))


def check_disabled(names: tuple[str, ...], labels: Collection[str]) -> None:
    """Refuse a misspelt op in ``TWINKLE_DISABLE``, which would disable nothing.

    Args:
        names: What :func:`disabled` gave. Other names may be those of kernels registered later.
        labels: The names of kernels and functions that are configured.

    Raises:
        ConfigError: A name is no op and no label, and one letter or two from an op.
    """
    for name in names:
        near = None if name in labels else slip(name)
        if near:
            from twinkle.op_names import OPS

            raise _error(
                "TWINKLE_DISABLE",
                "unknown op",
                shown(name),
                f"{', '.join(OPS)}, or names of kernels or functions",
                f"did you mean {near!r}?",
            )


def checked_variables(environ: Mapping[str, str], *, cwd: str | None = None) -> list[Checked]:
    """The documents that the variables make; they come after those of the files.

    Raises:
        ConfigError: A variable cannot be read; the message names it.
    """
    found = []
    for variable, section in _TABLES.items():
        text = environ.get(variable, "").strip()
        if text:
            document, locations = _table(variable, section, text)
            found.append(validate({section: document}, locate=locations, base_dir=cwd))
    for variable, expected in _PATHS.items():
        text = environ.get(variable, "").strip()
        if variable == "TWINKLE_CACHE" and text.lower() in FALSE:
            continue
        check_path(variable, text, expected, where=f"environment variable {variable}")
    settings: dict[str, object] = {}
    origins: dict[str, str] = {}
    for variable, (key, form) in _SETTINGS.items():
        text = environ.get(variable, "").strip()
        if not text:
            continue
        value = _read(variable, text, form)
        try:
            settings[key] = SETTING_KEYS[key](value, False)
        except WrongError as error:
            raise _error(
                variable, error.what, error.found or shown(text), error.expected, error.fix
            ) from None
        origins[key] = variable
    if settings:
        found.append(Checked(settings=settings, origins=origins, layers=(), functions=(), base_dir=cwd))
    return found


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Remarks on the ``TWINKLE_`` variables that nothing reads.

    It is no error: the environment is shared with other programs. ``TWINKLE__`` with two underscores
    is ours, for what a parent tells its children.
    """
    remarks = []
    for name in environ:
        if not name.startswith("TWINKLE_") or name.startswith("TWINKLE__") or name in VARIABLES:
            continue
        near = suggest(name[:60], VARIABLES)
        remarks.append(
            f"{printable(name)} is no variable that Twinkle knows; "
            + (near or f"the variables are {', '.join(sorted(VARIABLES))}")
        )
    return remarks


def _error(variable: str, what: str, found: str, expected: str, fix: str) -> ConfigError:
    if fix.startswith(("write ", "choose ")):  # advice for a file
        fix = f"set {variable} to such a value, or unset it"
    return ConfigError(
        f"{variable}: {what}",
        where=f"environment variable {variable}",
        found=found,
        expected=expected,
        fix=fix,
    )


def _boolean(variable: str, text: str) -> bool:
    word = text.lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise _error(
        variable,
        "not a boolean",
        shown(text),
        "1, true, yes, on, 0, false, no or off",
        f"set {variable}=1 or {variable}=0",
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _read(variable: str, text: str, form: str) -> object:
    """Convert the text of a variable to the value that a file would have."""
    if form == "boolean":
        return _boolean(variable, text)
    if form == "boolean or list":
        word = text.lower()
        return word in TRUE if word in TRUE or word in FALSE else _listed(text)
    if form == "places":
        return _listed(text)
    if form == "word or list":
        return text if text in ("auto", "off") else _listed(text)
    return text


def _table(variable: str, section: str, text: str) -> tuple[dict[str, Any], Locations]:
    """Parse inline TOML (``MyMLP = { … }``, also over several lines and with headers) or a JSON object."""
    if text.startswith("{"):
        document = _json(variable, text)
        return document, Locations(variable)
    document, locations = parse(text, variable, prefix=(section,))
    # The whole table, header included, is a natural thing to paste here.
    if list(document) == [section] and isinstance(document[section], dict):
        locations.prefix = ()
        return document[section], locations
    return document, locations


def _json(variable: str, text: str) -> dict[str, Any]:
    import json

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return table

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _error(
            variable,
            "not JSON",
            printable(str(error)[:200]),
            'JSON such as {"MyMLP": {"target": "...", "layer_impl": "..."}}',
            "correct it; for TOML begin with a name, not with a brace",
        ) from None
    assert isinstance(document, dict)
    return document
