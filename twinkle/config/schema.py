"""The validator of documents: of files, of variables and of the dict given to ``register_kernels``.

Everything is checked before anything is registered, all mistakes are reported together, and the
document is never changed: what is kept are copies.
"""

from __future__ import annotations

from twinkle.config.entries import Checked, FunctionEntry, LayerEntry, raise_all
from twinkle.config.fields import (
    FUNCTION_KEYS,
    LAYER_KEYS,
    SETTING_KEYS,
    WrongError,
    is_dotted,
    is_table,
    shown,
)
from twinkle.config.locations import Locations, dotted, printable
from twinkle.config.one_source import check_source, keys_of, source_spec
from twinkle.errors import ConfigError, suggest
from twinkle.targets import Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from twinkle.config.entries import Entry
    from twinkle.config.fields import Check

    Path = tuple[str | int, ...]
    Locate = Callable[[Path], str]

__all__ = ["validate"]

# Keys that people write and that no spelling leads to.
_SYNONYMS = {
    "layers": {
        "cls": "target",
        "class": "target",
        "target_module": "target",
        "impl": "layer_impl",
        "func_impl": "layer_impl",
        "path": "repo_path",
        "module": "target",
        "tag": "revision",
        "branch": "revision",
        "package": "package_name",
        "repo": "repo_id",
    },
    "functions": {
        "target": "target_module",
        "module": "target_module",
        "impl": "func_impl",
        "layer_impl": "func_impl",
        "function": "func_name",
        "layer_name": "func_name",
        "path": "repo_path",
        "package": "package_name",
        "tag": "revision",
        "branch": "revision",
    },
    "twinkle": {"fallback": "use_fallback", "trust": "trust_remote_code", "log_level": "log"},
}

_EXAMPLE = {
    "layers": "a table of keys such as target and layer_impl",
    "functions": "a table of keys such as target_module and func_impl",
}


_LAYERS_ONLY = {"where": "functions have no place in a model: where is for layers"}


def validate(
    document: object,
    *,
    where: str = "the configuration",
    locate: Locate | None = None,
    base_dir: str | None = None,
    allow_objects: bool = False,
    allow_settings: bool | None = None,
) -> Checked:
    """Check a whole document.

    Args:
        document: ``{"twinkle": …, "layers": …, "functions": …}``. ``layers`` and ``functions`` are
            tables of name → spec (or a list of specs under one name), or lists of specs that carry
            their name.
        where: What messages call the document when there is no ``locate``.
        locate: Gives ``file:line (key)`` for a key path.
        base_dir: What relative paths in it are relative to; ``None`` is the working directory.
        allow_objects: Classes, callables, ``torch.device``, repository objects and ``None`` (for
            "not given") may be values: the document comes from Python.
        allow_settings: ``[twinkle]`` may be there; when not given, exactly if no objects are allowed.

    Returns:
        The entries and settings, as copies.

    Raises:
        ConfigError: With all the mistakes found.
    """
    return _Validation(
        locate or Locations(where),
        base_dir,
        objects=allow_objects,
        settings=not allow_objects if allow_settings is None else allow_settings,
    ).run(document)


class _Validation:
    def __init__(self, locate: Locate, base_dir: str | None, *, objects: bool, settings: bool) -> None:
        self.locate = locate
        self.base_dir = base_dir
        self.objects = objects
        self.sections = ("twinkle", "layers", "functions") if settings else ("layers", "functions")
        self.errors: list[ConfigError] = []

    def wrong(self, path: Path, what: str, *, found: str | None = None, expected: str, fix: str) -> None:
        self.errors.append(
            ConfigError(what, where=self.locate(path), found=found, expected=expected, fix=fix)
        )

    # --- the document -------------------------------------------------------------------------

    def run(self, document: object) -> Checked:
        if not is_table(document, self.objects):
            self.wrong(
                (),
                "the configuration is no table",
                found=shown(document),
                expected="the tables " + ", ".join(self.sections),
                fix="see docs/configuration.md",
            )
            raise_all(self.errors)
        tables = self.copied(document)
        for key in tables:
            if key in self.sections:
                continue
            if key == "twinkle":
                self.wrong(
                    (key,),
                    "settings are no part of a registration",
                    found="the table twinkle",
                    expected="layers and functions",
                    fix="put [twinkle] into a file (TWINKLE_CONFIG) or set the TWINKLE_ variables",
                )
            else:
                self.unknown(
                    (), key, tables[key], self.sections, {"kernels": "layers", "settings": "twinkle"}
                )
        settings, origins = self.settings(tables.get("twinkle") if "twinkle" in self.sections else None)
        layers = tuple(
            self.layer(path, name, spec)
            for path, name, spec in self.specs("layers", LAYER_KEYS, tables.get("layers"))
        )
        functions = tuple(
            self.function(path, name, spec)
            for path, name, spec in self.specs("functions", FUNCTION_KEYS, tables.get("functions"))
        )
        raise_all(self.errors)
        self.once(layers)
        self.once(functions)
        self.one_kernel_a_target(layers)
        raise_all(self.errors)
        return Checked(
            settings=settings,
            origins=origins,
            layers=layers,
            functions=functions,
            base_dir=self.base_dir,
        )

    def copied(self, table: Any) -> dict[Any, Any]:
        """A copy of a mapping as a dict, without the ``None`` that Python code may give."""
        return {
            key: table[key]
            for key in table.keys()  # noqa: SIM118 (any mapping)
            if not (self.objects and table[key] is None)
        }

    def unknown(
        self,
        path: Path,
        key: object,
        value: object,
        known: tuple[str, ...],
        synonyms: Mapping[str, str],
    ) -> None:
        if not isinstance(key, str):
            self.wrong(
                path,
                "a key is no string",
                found=shown(key),
                expected="a name in quotes",
                fix="write the key as a string",
            )
            return
        hint = None
        if len(self.errors) < 20:  # comparing words takes a while, and no one reads on
            near = synonyms.get(key)
            hint = f"did you mean {near!r}?" if near else suggest(key[:40], known)
        self.wrong(
            (*path, key),
            f"unknown key {shown(key).removesuffix(' (a string)')}",
            found=f"{key[:40]} = {shown(value)}" if key.isprintable() else shown(key),
            expected=", ".join(known),
            fix=hint or "remove the key; docs/configuration.md explains each",
        )

    def checked(
        self, path: Path, table: Mapping[Any, object], keys: Mapping[str, Check], section: str
    ) -> dict[str, Any]:
        """The values of ``table`` that pass their checks; the others are reported."""
        kept = {}
        for key, value in table.items():
            check = keys.get(key) if isinstance(key, str) else None
            if check is None and section == "functions" and key in _LAYERS_ONLY:
                self.wrong(
                    (*path, key),
                    _LAYERS_ONLY[key],
                    found=f"{key} = {shown(value)}",
                    expected=", ".join(sorted(keys)),
                    fix="remove the key",
                )
                continue
            if check is None:
                self.unknown(path, key, value, tuple(sorted(keys)), _SYNONYMS[section])
                continue
            try:
                kept[key] = check(value, self.objects)
            except WrongError as error:
                self.wrong(
                    (*path, key),
                    f"{key}: {error.what}",
                    found=error.found or shown(value),
                    expected=error.expected,
                    fix=error.fix,
                )
        return kept

    def settings(self, table: object) -> tuple[dict[str, object], dict[str, str]]:
        if table is None:
            return {}, {}
        if not is_table(table, self.objects):
            self.wrong(
                ("twinkle",),
                "twinkle: wrong type",
                found=shown(table),
                expected="a table of settings",
                fix='write [twinkle] on a line of its own and settings such as mode = "auto" below it',
            )
            return {}, {}
        kept = self.checked(("twinkle",), self.copied(table), SETTING_KEYS, "twinkle")
        return kept, {key: self.locate(("twinkle", key)) for key in kept}

    # --- layers and functions -----------------------------------------------------------------

    def specs(
        self, section: str, keys: Mapping[str, Check], table: object
    ) -> Iterator[tuple[Path, str | None, dict[Any, Any]]]:
        """Every spec of a section with its path and the name that its key gives it."""
        if table is None:
            return
        if isinstance(table, (list, tuple)):
            yield from self.listed((section,), None, table)
        elif is_table(table, self.objects):
            for key, value in self.without_stray_keys(section, keys, self.copied(table)).items():
                yield from self.named(section, keys, key, value)
        else:
            self.wrong(
                (section,),
                f"{section}: wrong type",
                found=shown(table),
                expected="a table of names, or a list of specs",
                fix=f"write [{section}.NAME] and its keys below it",
            )

    def listed(
        self, path: Path, name: str | None, specs: list[object] | tuple[object, ...]
    ) -> Iterator[tuple[Path, str | None, dict[Any, Any]]]:
        """The specs of a list, which stand under one name or carry their own."""
        for index, spec in enumerate(specs):
            if is_table(spec, self.objects):
                yield (*path, index), name, self.copied(spec)
            else:
                self.no_spec((*path, index), str(path[0]), spec)

    def named(
        self, section: str, keys: Mapping[str, Check], name: object, value: object
    ) -> Iterator[tuple[Path, str | None, dict[Any, Any]]]:
        """The spec under a name, or the several in a list."""
        if not isinstance(name, str) or not name or not name.isprintable():
            self.wrong(
                (section,),
                "not a name",
                found=shown(name),
                expected="a printable name",
                fix="rename the table",
            )
            return
        path = (section, name)
        if isinstance(value, (list, tuple)) and value:
            yield from self.listed(path, name, value)
        elif not is_table(value, self.objects):
            self.no_spec(path, section, value)
        else:
            spec = self.copied(value)
            if spec and all(key not in keys and is_table(inner) for key, inner in spec.items()):
                self.dotted_name(section, name, str(next(iter(spec))))
            else:
                yield path, name, spec

    def without_stray_keys(
        self, section: str, keys: Mapping[str, Check], table: dict[Any, Any]
    ) -> dict[Any, Any]:
        """The names of a section; keys of a kernel that stand among them are one mistake."""
        stray = [
            key
            for key, value in table.items()
            if key in keys and not isinstance(value, (list, tuple)) and not is_table(value, self.objects)
        ]
        if stray:
            self.without_name(section, stray[0], table[stray[0]])
        return {key: value for key, value in table.items() if key not in stray}

    def dotted_name(self, section: str, name: str, inside: str) -> None:
        path = (section, name)
        self.wrong(
            (*path, inside),
            "a name with a dot stands without quotes",
            found=f"a table {dotted((*path, inside))} in {dotted(path)}",
            expected=_EXAMPLE[section],
            fix=f'write [{section}."{printable(name)}.{printable(inside)}"]',
        )

    def without_name(self, section: str, key: str, value: object) -> None:
        what = "your kernel" if section == "layers" else "the function"
        self.wrong(
            (section, key),
            f"the keys of a kernel stand directly under {section}, without its name",
            found=f"{key} = {shown(value)}",
            expected=f"a table for each: [{section}.NAME] with {key} in it",
            fix=f"write [{section}.NAME] above this line, with the name of {what}",
        )

    def no_spec(self, path: Path, section: str, value: object) -> None:
        name = next((key for key in path[1:] if isinstance(key, str)), "NAME")
        self.wrong(
            path,
            "wrong type",
            found=shown(value),
            expected=_EXAMPLE[section],
            fix=f"write [{section}.{name}] and its keys below it",
        )

    def common(self, path: Path, kept: dict[str, Any], given: Mapping[Any, object], kind: str) -> Any:
        """The arguments that both kinds of entry take."""
        check_source(path, kept, given, kind, self.wrong)
        return {
            "device": kept.get("device"),
            "mode": kept.get("mode"),
            "verify": kept.get("verify"),
            "watch": kept.get("watch"),
            "spec": source_spec(kept, kind),
            "base_dir": self.base_dir,
            "enabled": kept.get("enabled", True),
            "origin": self.locate(path),
        }

    def name(
        self, path: Path, name: str | None, kept: Mapping[str, Any], given: Mapping[Any, object], key: str
    ) -> str:
        """The name of an entry: from its spec, else from its table."""
        if key in given and "name" in given:
            self.wrong(
                (*path, "name"),
                f"both name and {key}",
                found=f"{key} = {shown(given[key])}, name = {shown(given['name'])}",
                expected="one of them",
                fix="remove name",
            )
        own = kept.get(key, kept.get("name", name))
        if own is None and key not in given and "name" not in given:
            self.wrong(
                path,
                f"{key} is missing",
                found=keys_of(given),
                expected=f"{key} in each spec of a list",
                fix=f'add {key} = "..."',
            )
        return own or ""

    def layer(self, path: Path, name: str | None, given: dict[Any, Any]) -> LayerEntry:
        kept = self.checked(path, given, LAYER_KEYS, "layers")
        name = self.name(path, name, kept, given, "kernel_name")
        entry = LayerEntry(name, **self.common(path, kept, given, LayerEntry.kind))
        targets = kept.get("target", ())
        if "match" in kept:
            targets = (*targets, Op(kept["match"]))
        entry.targets = targets
        entry.where = kept.get("where")
        if entry.where is not None and not targets and not {"target", "match"} & given.keys():
            self.wrong(
                (*path, "where"),
                "where without a target",
                found=keys_of(given),
                expected="target or match beside where",
                fix="add target, or move where to the entry that has the target",
            )
        entry.attributes = kept.get("attributes", {})
        return entry

    def function(self, path: Path, name: str | None, given: dict[Any, Any]) -> FunctionEntry:
        kept = self.checked(path, given, FUNCTION_KEYS, "functions")
        name = self.name(path, name, kept, given, "func_name")
        if name and not is_dotted(name):
            self.wrong(
                path,
                "not a function name",
                found=shown(name),
                expected='a function such as "silu_and_mul", or "Class.method"',
                fix="name the table by the function, or give func_name",
            )
        if "match" in given and "target_module" in given:
            self.wrong(
                path,
                "both match and target_module",
                found=keys_of(given),
                expected="one of them",
                fix="remove target_module: match finds the function wherever it is",
            )
        elif "target_module" not in given and "match" not in given:
            self.wrong(
                path,
                "target_module is missing",
                found=keys_of(given),
                expected="the module that defines the function, or match and an op",
                fix='add target_module = "package.module"',
            )
        entry = FunctionEntry(name, **self.common(path, kept, given, FunctionEntry.kind))
        entry.target_module = Op(kept["match"]) if "match" in kept else kept.get("target_module", "")
        return entry

    # --- between entries ----------------------------------------------------------------------

    def once(self, entries: tuple[Entry, ...]) -> None:
        """Refuse two kernels for one target, device and mode."""
        first: dict[object, Entry] = {}
        for entry in entries:
            known = first.setdefault(entry.key, entry)
            if known is entry or not (known.enabled and entry.enabled):
                continue
            place = f"{entry.device or 'any'} device and {entry.mode or 'any'} mode"
            self.errors.append(
                ConfigError(
                    f"two kernels for {entry.labels[-1]!r}, {place}",
                    where=entry.origin,
                    found=f"the first at {known.origin}",
                    expected="one kernel for each device and mode",
                    fix="give them different devices or modes, or turn one off with enabled = false",
                )
            )

    def one_kernel_a_target(self, layers: tuple[LayerEntry, ...]) -> None:
        first: dict[object, LayerEntry] = {}
        for entry in layers:
            for target in entry.targets if entry.enabled else ():
                known = first.setdefault((target, entry.where), entry)
                if known.name == entry.name:
                    continue
                self.errors.append(
                    ConfigError(
                        "one target is bound to two kernel names",
                        where=entry.origin,
                        found=f"{target} is bound to {known.name!r} at {known.origin}",
                        expected="one kernel name for a target and place; devices and modes add up under it",
                        fix=f"put both under one name: [[layers.{known.name}]] twice, with device or mode",
                    )
                )
