"""Why a binding did nothing: read anew from the program as it is, at the moment of a report."""

from __future__ import annotations

import sys

from twinkle._environment import switched_off, variables
from twinkle.errors import ConfigError, suggest
from twinkle.hooks.finder import own_dict
from twinkle.hooks.resolution import is_program
from twinkle.report import where
from twinkle.runtime import runtime
from twinkle.targets import Name, Op, Pattern, parse_target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType
    from typing import Any

    from twinkle.records import Binding

__all__ = [
    "absent_module",
    "lines",
    "mistake",
    "mistake_in",
    "nothing_bound",
    "waits_for",
    "waits_in_program",
]

_SHOWN = 10
_OFF = "switched off by"
_UNMADE = object()
"""Stands for what a module may make when it is asked for it."""


def waits_for(binding: Binding) -> str:
    """Why a binding that no layer and no function was met for waits, as things are now."""
    elsewhere = where.reason(binding)
    if elsewhere is not None:
        return elsewhere
    noun = "layer" if binding.scope == "layer" else "function"
    try:
        target = parse_target(binding.target)
    except ConfigError:  # kernel_layer_name=…, or a class that a function made
        return f"no {noun} of that {'kernel_layer_name ' if '=' in binding.target else ''}was met yet"
    if isinstance(target, Op):
        return f"no such {noun} was met yet" if "torch" in sys.modules else "torch was not imported yet"
    if isinstance(target, Pattern):
        return _pattern_waits(target)
    found = mistake(target)
    if found is not None:
        return found
    if waits_in_program(binding):
        return f"{target.module} is the program itself, whose functions wait for it to import torch"
    if target.module not in sys.modules:
        return f"{target.module} was not imported yet"
    if binding.scope == "function" and "torch" not in sys.modules:
        return f"{target.module} is imported, and waits for the program to import torch"
    if binding.scope == "function":
        return f"{target} is there, and was not replaced"
    cls = _at(sys.modules[target.module], target.name)
    if isinstance(cls, type):
        path = f"{cls.__module__}:{cls.__qualname__}"
        same = "" if path == binding.target else f" ({path})"
        return f"no layer was met whose forward is that of {target.name}{same}"
    return f"{target} is no class" if cls is not _UNMADE else f"{target} was not asked for yet"


def waits_in_program(binding: Binding) -> bool:
    """Whether a function of the program itself waits for torch, which the program has not imported."""
    if binding.scope != "function" or binding.state != "pending" or "torch" in sys.modules:
        return False
    module, _, name = binding.target.partition(":")
    return is_program(module) and name.partition(".")[0] in own_dict(sys.modules["__main__"])


def mistake(target: Name) -> str | None:
    """Why a target cannot be met, whatever the program does: there is no such module, or no such name."""
    module = sys.modules.get(target.module)
    if module is None:
        return absent_module(target.module)
    if _at(module, target.name) is not None:
        return None
    elsewhere = _elsewhere(target)
    hint = f"did you mean {elsewhere}?" if elsewhere else suggest(target.name, dir(module))
    return f"{target.module} has no {target.name}" + (f"; {hint}" if hint else "")


def mistake_in(text: str) -> str | None:
    """The :func:`mistake` of a target as the report writes it, where it names one thing."""
    try:
        target = parse_target(text)
    except ConfigError:
        return None
    return mistake(target) if isinstance(target, Name) else None


def absent_module(name: str) -> str | None:
    """Why a module cannot be imported, found without importing anything; None where it can, or may."""
    parts = name.split(".")
    path: Sequence[str] | None = None
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        module = sys.modules.get(full)
        if module is not None:
            path = getattr(module, "__path__", None)
        else:
            spec = _spec(full, path)
            if spec is None:
                hint = suggest(parts[end - 1], _siblings(path))
                return f"there is no module {full}" + (f"; {hint}" if hint else "")
            path = getattr(spec, "submodule_search_locations", None)
        if path is None and end < len(parts):
            # A module may make its submodules itself.
            return None if module is not None else f"{full} is no package, and has no {parts[end]}"
    return None


def lines(data: Mapping[str, Any]) -> list[str]:
    """A line for each binding of the user's that did nothing, with its reason, and for layers it passed over.

    A program that registers kernels and opens no door keeps a catalogue: what was not met is no miss there,
    and only what could never be met is said.

    Args:
        data: The report.
    """
    ours = {
        (binding.target, binding.kernel)
        for kernel, binding in runtime.registry.bound()
        if kernel.chosen_by == "user" and not kernel.origin.startswith("plugin ")
    }
    bindings = [b for b in data["bindings"] if (b["target"], b["kernel"]) in ours]
    served = {(b["target"], b["kernel"]) for b in bindings if _did_something(b)}
    said = {}
    for binding in bindings:
        key = (binding["target"], binding["kernel"])
        if key in served or key in said or _OFF in binding["reason"]:
            continue
        if not runtime.session.door and not _is_mistake(binding):
            continue
        said[key] = (
            f"{binding['target']} keeps its original, kernel {binding['kernel']!r} did nothing: "
            f"{binding['reason']} ({binding['origin']})"
        )
    if runtime.session.door:
        for target, kernel, line in where.lines():
            if (target, kernel) not in said:
                said[target, line] = line
    found = [*said.values(), *(runtime.session.misses if runtime.session.door else ())]
    if len(found) > _SHOWN:
        found[_SHOWN:] = [f"and {len(found) - _SHOWN} more did nothing; TWINKLE_LOG=info prints all of them"]
    return found


def nothing_bound() -> list[str]:
    """Why nothing is bound in this process, and what to do."""
    if switched_off(variables()):
        return ["switched off by TWINKLE_DISABLE or TWINKLE_USE_KERNELS"]
    if not runtime.options.embedded:
        reason = "nothing was registered, and the embedded kernels are off"
        return [f'{reason}: TWINKLE_CONFIG=auto, or kernels = "auto" in a file, turns them on']
    if "torch" not in sys.modules:
        return ["the program did not import torch"]
    return [
        "no layer was called that the embedded kernels are for: "
        "`twinkle match MODULE` prints what the layers of a module are recognised as"
    ]


def _did_something(binding: Mapping[str, Any]) -> bool:
    states = [binding["state"], *(one["state"] for one in binding.get("elsewhere", ()))]
    return not {"active", "quarantined", "displaced", "reverted"}.isdisjoint(states)


def _is_mistake(binding: Mapping[str, Any]) -> bool:
    return binding["state"] == "pending" and mistake_in(binding["target"]) is not None


def _pattern_waits(target: Pattern) -> str:
    modules = [name for name in list(sys.modules) if target.in_module(name)]
    if not modules:
        return f"no module {target.module} was imported yet"
    shown = ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")
    return f"no layer {target.name} of {shown} was met yet"


def _at(module: ModuleType, dotted: str) -> object | None:
    """What a name in a module stands for; a lazy module is not made to import it."""
    first, *rest = dotted.split(".")
    found = vars(module).get(first)
    if found is None:
        return _UNMADE if "__getattr__" in dir(type(module)) or hasattr(module, "__getattr__") else None
    for part in rest:
        found = getattr(found, part, None)
    return found


def _elsewhere(target: Name) -> str | None:
    """Where in the same package something of that name is."""
    package = target.module.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and name != target.module:
            found = vars(module).get(target.name) if hasattr(module, "__dict__") else None
            if callable(found) and getattr(found, "__module__", None) == name:
                return f"{name}:{target.name}"
    return None


def _spec(name: str, path: Sequence[str] | None) -> object | None:
    for finder in list(sys.meta_path):
        if type(finder).__module__.partition(".")[0] in ("twinkle", "wrapt"):
            continue  # they ask the others
        try:
            spec = finder.find_spec(name, path)
        except Exception:
            continue
        if spec is not None:
            return spec
    return None


def _siblings(path: Sequence[str] | None) -> list[str]:
    import pkgutil

    found = [module.name for module in pkgutil.iter_modules(None if path is None else list(path))]
    return found + [name for name in sys.modules if path is None and "." not in name]
