"""Checks of single values: what each key of a configuration may hold.

A check takes a value and whether Python objects are allowed (they are in ``register_kernels``, not in
a file), and returns the value to keep or raises :class:`WrongError`.
"""

from __future__ import annotations

from twinkle._environment import is_switch
from twinkle.config.locations import printable
from twinkle.devices import parse_device
from twinkle.errors import ConfigError, suggest
from twinkle.modes import Mode
from twinkle.op_names import hint
from twinkle.targets import Class, parse_target
from twinkle.where import EXPECTED, parse_where

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.targets import Target

    Check = Callable[[object, bool], object]

__all__ = [
    "CAPTURE",
    "FUNCTION_KEYS",
    "LAYER_KEYS",
    "LOG_LEVELS",
    "SETTING_KEYS",
    "SIZES",
    "VERIFY",
    "WrongError",
    "is_dotted",
    "is_table",
    "shown",
]

VERIFY = ("auto", "off", "first-use", "always")
_VENDORS = {"gpu": "cuda", "nvidia": "cuda", "hip": "rocm", "amd": "rocm", "metal": "mps", "ascend": "npu"}
SIZES = ("fixed", "auto", "all")
"""The sizes that embedded kernels run at: those in their code, those measured to pay, or every one."""
CAPTURE = ("auto", "off", "inference", "train")
"""The calls of repeated layers that may be captured into CUDA graphs: all, none, or those of one mode."""
LOG_LEVELS = ("off", "warning", "info", "debug")


class WrongError(Exception):
    """A value that its key cannot hold."""

    def __init__(self, what: str, expected: str, fix: str, found: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.fix = fix
        self.found = found


# --- words ----------------------------------------------------------------------------------------


def is_table(value: object, objects: bool = False) -> bool:
    """Whether a value is a table: a dict, or from Python any mapping."""
    if isinstance(value, dict):
        return True
    # isinstance(value, Mapping) would import collections.abc at interpreter start.
    kind = type(value)
    return objects and hasattr(kind, "keys") and hasattr(kind, "__getitem__")


def is_dotted(text: str) -> bool:
    """Whether a text is identifiers joined by dots, such as ``a.b.c``."""
    return all(part.isidentifier() for part in text.split("."))


def shown(value: object) -> str:
    """A value and its type for a message, short and printable."""
    if value is None:
        return "None"
    try:
        text = repr(value if not isinstance(value, (str, list, tuple)) else value[:200])
    except Exception:  # a __repr__ of someone else's
        text = f"<{type(value).__name__}>"
    text = printable(text)
    if len(text) > 80:
        text = f"{text[:76]} ..."
    return f"{text} ({_kind(value)})"


def _kind(value: object) -> str:
    for kind, word in (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a float"),
        (dict, "a table"),
        ((list, tuple), "an array"),
        (type, "a class"),
    ):
        if isinstance(value, kind):
            return word
    return f"a {type(value).__name__}"


def _one_of(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _wrong_type(expected: str, fix: str) -> WrongError:
    return WrongError("wrong type", expected, fix)


# --- checks ---------------------------------------------------------------------------------------


def _text(expected: str, example: str) -> Check:
    def check(value: object, objects: bool) -> object:
        if not isinstance(value, str):
            raise _wrong_type(expected, f"write {example}")
        if not value.strip() or not value.isprintable():
            raise WrongError("empty or unprintable text", expected, f"write {example}")
        return value

    return check


def _report(value: object, objects: bool) -> object:
    expected = "the path of a JSON file"
    path = _text(expected, 'a path such as "report.json"')(value, objects)
    if is_switch(str(path)):
        raise WrongError("not a path", expected, f'write "./{path}" if a file of that name is meant')
    return path


def _boolean(value: object, objects: bool) -> object:
    if isinstance(value, bool):
        return value
    fix = "write true or false"
    if isinstance(value, str) and value.lower() in ("true", "false"):
        fix = f"write {value.lower()} without the quotes"
    raise _wrong_type("true or false", fix)


def _choice(*words: str) -> Check:
    def check(value: object, objects: bool) -> object:
        if isinstance(value, str) and value in words:
            return value
        near = suggest(value[:40].lower(), words) if isinstance(value, str) else None
        what = "unknown value" if isinstance(value, str) else "wrong type"
        raise WrongError(what, _one_of(words), near or f'write "{words[0]}"')

    return check


def _device(value: object, objects: bool) -> object:
    if not objects and not isinstance(value, str):
        raise _wrong_type('a device such as "cuda" or "cpu"', 'write device = "cuda"')
    try:
        return parse_device(value)
    except ConfigError as error:
        meant = _VENDORS.get(value.lower()) if isinstance(value, str) else None
        fix = f"did you mean {meant!r}?" if meant else error.fix
        raise WrongError(
            error.what, error.expected or "", fix or "choose one of them, or leave the key out for any"
        ) from None


def _mode(value: object, objects: bool) -> object:
    expected = "train, inference, compile or a combination such as train|compile"
    if not isinstance(value, str) and not (objects and isinstance(value, Mode)):
        fix = 'write mode = "train"'
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            fix = f'write mode = "{printable("|".join(value)[:80])}"'
        raise _wrong_type(expected, fix)
    try:
        return Mode.parse(value)
    except ConfigError as error:
        raise WrongError(
            error.what, expected, error.fix or "choose one of them, or leave the key out for any"
        ) from None


def _names(expected: str, accept: Callable[[str], bool]) -> Check:
    """Make a check of a list of names; ``accept`` judges one name."""

    def check(value: object, objects: bool) -> object:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(expected, "write a list of strings")
        for item in value:
            if not isinstance(item, str) or not item or not item.isprintable() or not accept(item):
                raise WrongError("not such a name", expected, "correct or remove it", found=shown(item))
        return tuple(dict.fromkeys(value))

    return check


def _repository(name: str) -> bool:
    """Whether a text is ``owner/name`` or ``owner``."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part[:1].isalnum() and all(char.isalnum() or char in "_.-" for char in part) for part in parts
    )


def _trust(value: object, objects: bool) -> object:
    if isinstance(value, bool):
        return value
    expected = 'true, false or a list of repositories such as ["kernels-community/activation"]'
    return _names(expected, _repository)(value, objects)


def _kernels(value: object, objects: bool) -> object:
    if isinstance(value, str) and value in ("auto", "off"):
        return value
    from twinkle.op_names import OPS  # reads the records of the ops

    expected = f"auto, off or a list of {', '.join(OPS)}"
    if isinstance(value, str):
        fix = f'write kernels = ["{value}"]' if value in OPS else hint(value) or 'write kernels = "auto"'
        raise WrongError("unknown value", expected, fix)
    kept = _names(expected, str.isidentifier)(value, objects)
    for name in kept:  # type: ignore[attr-defined]
        if name not in OPS:
            raise WrongError("unknown op", expected, hint(name) or "correct or remove it", found=shown(name))
    return kept


def _plugins(value: object, objects: bool) -> object:
    return _names('a list of entry points such as ["my_plugin"]', lambda name: not name.isspace())(
        value, objects
    )


def _repo_id(value: object, objects: bool) -> object:
    expected = 'a Hub repository such as "kernels-community/activation"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the repository as owner/name in quotes")
    if not _repository(value) or "/" not in value:
        fix = "write it as owner/name"
        if value.startswith((".", "/", "~")):
            fix = "for a folder on this machine, use repo_path and package_name"
        elif "://" in value:
            fix = "write owner/name without the address in front of it"
        raise WrongError("not a repository name", expected, fix)
    return value


def _repo_path(value: object, objects: bool) -> object:
    expected = 'the folder that holds the package, such as "kernels"'
    if objects and hasattr(type(value), "__fspath__"):
        value = value.__fspath__()  # type: ignore[attr-defined]
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the folder in quotes")
    if not value.strip() or "\0" in value:
        raise WrongError("not a path", expected, "write the folder, relative to the configuration file")
    return value


def _package_name(value: object, objects: bool) -> object:
    expected = 'a package as Python imports it, such as "my_kernels"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the name in quotes")
    module, colon, inside = value.partition(":")
    if is_dotted(module) and (not colon or is_dotted(inside)):
        return value
    fix = "write its import name: letters, digits, underscores, dots between packages"
    if "-" in value and is_dotted(value.replace("-", "_")):
        fix = f"did you mean {value.replace('-', '_')!r}?"
    elif "/" in value or "\\" in value:
        fix = "put the folder into repo_path and the package's own name here"
    raise WrongError("not a package name", expected, fix)


def _version(value: object, objects: bool) -> object:
    expected = 'a version such as 1, "0.1.0" or ">=0.1,<0.3"'
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        fix = f'write it in quotes: version = "{value}"' if isinstance(value, float) else f"write {expected}"
        raise _wrong_type(expected, fix)
    if isinstance(value, int) and value < 0:
        raise WrongError("not a version", expected, "write the version that the repository offers")
    if isinstance(value, str) and (not value.strip() or not value.isprintable()):
        raise WrongError("not a version", expected, "write the version, or leave the key out for the newest")
    return value


def _attributes(value: object, objects: bool) -> object:
    expected = "a table such as { offset = 0.0 }"
    if not is_table(value, objects):
        raise _wrong_type(expected, "write the names and values in braces")
    kept = {}
    for name in value.keys():  # type: ignore[attr-defined]  # noqa: SIM118 (any mapping)
        if not isinstance(name, str) or not name.isidentifier():
            raise WrongError(
                "not an attribute name", "names that follow self.", "correct the name", found=shown(name)
            )
        kept[name] = value[name]  # type: ignore[index]
    return kept


def _object_reference(what: str, example: str) -> Callable[[str], str]:
    """Make a check of the syntax ``module:attribute`` or ``module.attribute``."""

    def check(value: str) -> str:
        module, colon, attribute = value.partition(":")
        if is_dotted(module) and (is_dotted(attribute) if colon else "." in module):
            return value
        raise WrongError(f"not the place of {what}", f'"{example}"', f'write it like "{example}"')

    return check


def _layer_impl(value: object, objects: bool) -> object:
    example = "my_kernels.layers:FastMLP"
    if isinstance(value, str):
        return _object_reference("a class", example)(value)
    if objects and isinstance(value, type):
        return value
    if objects:
        fix = f"give the class: {type(value).__name__}"
        raise _wrong_type(f'an nn.Module class or "{example}"', fix)
    raise _wrong_type(f'"{example}"', "write the module and the class in quotes")


def _func_impl(value: object, objects: bool) -> object:
    example = "my_kernels.fast:silu_and_mul"
    if isinstance(value, str):
        return _object_reference("a function", example)(value)
    if objects and callable(value):
        return value
    expected = f'a callable or "{example}"' if objects else f'"{example}"'
    raise _wrong_type(expected, "write the module and the function in quotes")


def _repo(value: object, objects: bool) -> object:
    if not objects:
        raise _wrong_type(
            "nothing: an object can be given from Python only",
            'use func_impl = "module:function", or register_function_kernel(repo=...)',
        )
    if isinstance(value, type) or not callable(getattr(value, "load", None)):
        fix = f"give an instance: {value.__name__}()" if isinstance(value, type) else "give it a load()"
        raise _wrong_type("an object with a method load()", fix)
    return value


def _target(value: object, objects: bool) -> object:
    """One or several classes, ``module:Class`` or patterns, as a tuple of targets."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    if not items:
        raise WrongError("no target", _TARGET, "name a class, or leave the key out")
    kept: list[Target] = []
    for item in items:
        if objects and isinstance(item, type):
            kept.append(Class(item))
        elif isinstance(item, str):
            kept.append(_named_target(item))
        else:
            raise WrongError("wrong type", _TARGET, "write module and class in quotes", found=shown(item))
    return tuple(dict.fromkeys(kept))


_TARGET = '"package.module:Class", a pattern of that form ("models.*.modeling_*:*MLP"), or a list'


def _named_target(text: str) -> Target:
    try:
        return parse_target(text)
    except ConfigError as error:
        fix = error.fix
        if fix is None and text.isidentifier():
            fix = f'put the module in front: "package.module:{text}"'
        raise WrongError(
            "not a target", _TARGET, fix or 'write "package.module:Class"', found=shown(text)
        ) from None


def _match(value: object, objects: bool) -> object:
    expected = 'an op such as "rms_norm" or "gated_mlp"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the op in quotes")
    if not value.isidentifier():
        fix = f"write target = {value!r}" if ":" in value and value.isprintable() else "write one op"
        raise WrongError("not an op", expected, fix)
    return value


def _where(value: object, objects: bool) -> object:
    """A place in a model or a list of them."""
    try:
        return parse_where(value)
    except ConfigError as error:
        raise WrongError(error.what, EXPECTED, error.fix or "", found=error.found) from None


def _module(value: object, objects: bool) -> object:
    expected = 'the module that defines the function, such as "my_pkg.activations"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the module's name in quotes")
    if is_dotted(value):
        return value
    module, colon, name = value.partition(":")
    fix = "write the module as Python imports it"
    if colon and is_dotted(module) and is_dotted(name):
        fix = f'write target_module = "{module}" and func_name = "{name}"'
    elif "*" in value:
        fix = "write one module; patterns are for the target of a layer"
    raise WrongError("not a module name", expected, fix)


def _function_name(value: object, objects: bool) -> object:
    expected = 'a function such as "silu_and_mul", or "Class.method"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the name in quotes")
    if not is_dotted(value):
        raise WrongError("not a function name", expected, "write the name it has in target_module")
    return value


def _layer_name(value: object, objects: bool) -> object:
    expected = 'a class of the package, such as "FastMLP"'
    if not isinstance(value, str):
        raise _wrong_type(expected, "write the name in quotes")
    if not is_dotted(value):
        raise WrongError("not a class name", expected, "write the name it has in the package")
    return value


def _watch(value: object, objects: bool) -> object:
    expected = '"off", "nan", or "nan:N" to look at one of N calls'
    if not isinstance(value, str):
        raise _wrong_type(expected, 'write "nan"')
    word, colon, every = value.partition(":")
    if value != "off" and not (word == "nan" and (not colon or (every.isdecimal() and int(every) > 0))):
        raise WrongError("nothing that can be watched for", expected, 'write "nan"')
    return value


def _capture_memory(value: object, objects: bool) -> object:
    from twinkle.config.amounts import memory  # at interpreter start only where it is asked for

    amount = memory(value)
    if amount is None:
        expected = 'a share of the device (above 0, at most 1) such as 0.1, or a size such as "2GiB"'
        nothing = value == 0 or (isinstance(value, str) and value.strip() in ("0", "off"))
        fix = 'to capture nothing, write capture = "off"' if nothing else 'write 0.1 or "2GiB"'
        raise WrongError("no amount of memory", expected, fix)
    return amount


_kernel_name = _text("a name for the kernel", 'a name such as "MyMLP"')

_COMMON: dict[str, Check] = {
    "device": _device,
    "enabled": _boolean,
    "mode": _mode,
    "name": _kernel_name,
    "package_name": _package_name,
    "repo_id": _repo_id,
    "repo_path": _repo_path,
    "revision": _text("a branch, tag or commit", 'a revision such as "main"'),
    "trust_remote_code": _trust,
    "verify": _choice(*VERIFY),
    "version": _version,
    "watch": _watch,
}

LAYER_KEYS: dict[str, Check] = {
    **_COMMON,
    "attributes": _attributes,
    "kernel_name": _kernel_name,
    "layer_impl": _layer_impl,
    "layer_name": _layer_name,
    "match": _match,
    "target": _target,
    "where": _where,
}

FUNCTION_KEYS: dict[str, Check] = {
    **_COMMON,
    "func_impl": _func_impl,
    "func_name": _function_name,
    "match": _match,
    "repo": _repo,
    "target_module": _module,
}

SETTING_KEYS: dict[str, Check] = {
    "capture": _choice(*CAPTURE),
    "capture_memory": _capture_memory,
    "device": _device,
    "kernels": _kernels,
    "log": _choice(*LOG_LEVELS),
    "mode": _mode,
    "plugins": _plugins,
    "report": _report,
    "sizes": _choice(*SIZES),
    "strict": _boolean,
    "trust_remote_code": _trust,
    "use_fallback": _boolean,
    "verify": _choice(*VERIFY),
    "watch": _watch,
    "where": _where,
}
