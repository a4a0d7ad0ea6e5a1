"""From settings to watches: what is registered is put in place when its target appears.

Standard library only: this module is imported at interpreter start. The rooms that need torch are
imported by the callbacks, when the program itself has imported torch.
"""

from __future__ import annotations

import sys

from twinkle.apply.bindings import declare, layer_binding
from twinkle.apply.options import options
from twinkle.errors import ApplyError, warn
from twinkle.match.names import is_pattern, parse_target
from twinkle.registry import registry
from twinkle.report.records import session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from twinkle.config import Settings
    from twinkle.config.entries import Records
    from twinkle.hooks.construction import ConstructionWatch
    from twinkle.hooks.guard import Failure
    from twinkle.hooks.imports import Watch
    from twinkle.records import FunctionKernel, LayerKernel, LayerTarget

__all__ = ["deactivate", "start", "watch_new"]

_OWNER = "twinkle"


class _State:
    """What this process watches."""

    def __init__(self) -> None:
        self.active = False
        self.watches: list[Watch | ConstructionWatch] = []
        self.layers_seen: set[LayerTarget] = set()
        self.functions_seen: set[str] = set()
        self.classes_seen: set[type] = set()
        self.watches_models = False


_state = _State()


def start(settings: Settings, *, door: str) -> None:
    """Register what the settings ask for, watch for its targets and arrange the report.

    Raises:
        ConfigError: A registration cannot be right; nothing was registered.
    """
    for layers, targets, functions in (*_plugin_records(settings), settings.records()):
        registry.add(layer_kernels=layers, layer_targets=targets, function_kernels=functions)
    options.mode = settings.mode
    options.device = settings.device
    options.use_fallback = settings.use_fallback
    options.strict = settings.strict
    options.verify = settings.verify
    options.disabled = settings.disable
    options.kernels = settings.kernels
    session.door = door
    session.configs = tuple(settings.paths)
    for warning in settings.warnings:
        session.remark(warning)
        if settings.log != "off":
            print(f"twinkle: {warning}", file=sys.stderr)
    for entry, reason in settings.left_out():
        session.remark(f"{entry.name}: {reason}")
    _state.active = True
    from twinkle.hooks import guard, imports

    guard.on_failure(_on_failure)
    imports.install()
    watch_new()
    log = settings.log in ("info", "debug")
    if log or settings.report:
        from twinkle.report.exit import register_at_exit

        register_at_exit(text=log, path=settings.report)


def _plugin_records(settings: Settings) -> list[Records]:
    """What the plugins named in the settings ask for; one that is broken is a remark, or an error."""
    if not settings.plugins:
        return []
    from twinkle.config.schema import validate
    from twinkle.errors import SourceError
    from twinkle.sources import plugins

    records = []
    for name in settings.plugins:
        try:
            plugin = plugins.load(name)
        except SourceError as error:
            if settings.strict:
                raise
            session.remark(f"plugin {name}: {error.reason}")
            warn(f"plugin {name} is left out: {error.reason}")
            continue
        checked = validate(plugin.document, where=plugin.where, base_dir=plugin.base_dir, allow_objects=True)
        layers, targets, functions = checked.records(trust_remote_code=settings.trust_remote_code)
        kernels: tuple[LayerKernel | FunctionKernel, ...] = (*layers, *functions)
        for kernel in kernels:
            if kernel.verify is None and settings.verify == "auto":
                kernel.verify = "first-use"  # nobody bound it by name
        records.append((layers, targets, functions))
    return records


def watch_new() -> None:
    """Give every registration its record and, once activated, watch for its target."""
    declare()
    if not _state.active:
        return
    from twinkle.hooks import imports

    strict = options.raises
    for target in registry.layer_targets:
        if target in _state.layers_seen:
            continue
        _state.layers_seen.add(target)
        if isinstance(target.target, str) and target.target.startswith("match:"):
            continue  # found in models, when they are constructed
        if isinstance(target.target, str):
            module = parse_target(target.target).module
            watch = imports.watch_module(module, _on_layer_module, owner=_OWNER, strict=strict)
            _state.watches.append(watch)
        else:
            _watch_class(target.target)
    for kernel in registry.function_kernels:
        if kernel.op is None and kernel.target_module not in _state.functions_seen:
            _state.functions_seen.add(kernel.target_module)
            watch = imports.watch_module(
                kernel.target_module, _on_function_module, owner=_OWNER, strict=strict
            )
            _state.watches.append(watch)
    in_models = registry.layer_kernels or any(kernel.op for kernel in registry.function_kernels)
    if (in_models or options.kernels != "off") and not _state.watches_models:
        _state.watches_models = True
        from twinkle.hooks.construction import watch_pretrained

        _state.watches.append(watch_pretrained(_on_model, owner=_OWNER, strict=strict))


def deactivate() -> None:
    """Cancel every watch; what is in place stays in place."""
    global _state
    for watch in _state.watches:
        watch.cancel()
    if _state.active:
        from twinkle import _bootstrap
        from twinkle.hooks import guard, imports

        imports.uninstall()
        guard.forget()
        _bootstrap.forget()
    _state = _State()


def _on_function_module(module: ModuleType, name: str) -> None:
    from twinkle.apply import functions

    functions.apply(
        name,
        device=options.device,
        mode=options.mode,
        strict=options.raises,
        where="activation",
        must_apply=False,
    )


def _on_layer_module(module: ModuleType, name: str) -> None:
    """Watch the construction of every class in that module which a target means."""
    for entry in registry.layer_targets:
        if not isinstance(entry.target, str) or entry.target.startswith("match:"):
            continue
        target = parse_target(entry.target)
        if not target.matches_module(name):
            continue
        if is_pattern(target.name):
            for cls in _classes_of(module):
                if target.matches_name(cls.__qualname__):
                    _watch_class(cls)
        else:
            found = _named_class(module, target.name, entry)
            if found is not None:
                _watch_class(found)


def _classes_of(module: ModuleType) -> list[type]:
    from torch import nn

    return [
        value
        for value in list(vars(module).values())
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]


def _named_class(module: ModuleType, name: str, entry: LayerTarget) -> type | None:
    from torch import nn

    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    if not is_pattern(str(entry.target)):
        if found is None:
            from twinkle.modes import suggest

            known = [cls.__qualname__ for cls in _classes_of(module)]
            hint = suggest(name, known)
            reason = f"{module.__name__} has no class {name}" + (f"; {hint}" if hint else "")
        else:
            reason = f"{entry.target} is no nn.Module class but {type(found).__name__}"
        for kernel in registry.kernels_named(entry.kernel_name):
            layer_binding(kernel, str(entry.target)).set("failed", reason)
        if options.raises:
            raise ApplyError(reason, where=entry.origin, fix="correct the target, or leave it out")
        warn(f"{reason} ({entry.origin})")
    return None


def _watch_class(cls: type) -> None:
    if cls in _state.classes_seen:
        return
    _state.classes_seen.add(cls)
    from twinkle.hooks.construction import watch_class

    strict = options.raises
    _state.watches.append(watch_class(cls, _on_model, owner=_OWNER, strict=strict))


def _on_model(model: Any) -> None:
    """A model, or a layer that is a target itself, was constructed."""
    from twinkle.apply.models import kernelize_layers

    kernelize_layers(model)


def _on_failure(failure: Failure) -> None:
    session.remark(str(failure))
