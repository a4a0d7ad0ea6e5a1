"""From settings to watches: what is registered is put in place when its target appears.

Standard library only: this module is imported at interpreter start. The rooms that need torch are
imported by the callbacks, when the program itself has imported torch.
"""

from __future__ import annotations

import sys

from twinkle.apply.bindings import declare, layer_binding
from twinkle.errors import ApplyError, warn
from twinkle.runtime import runtime
from twinkle.targets import Class, Name, Pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from twinkle.config import Settings
    from twinkle.config.entries import Records
    from twinkle.hooks.construction import ConstructionWatch
    from twinkle.hooks.guard import Failure
    from twinkle.hooks.imports import Watch
    from twinkle.records import LayerTarget

__all__ = ["Activation", "start", "watch_new"]

_OWNER = "twinkle"


class Activation:
    """What this process was activated with, and what it watches.

    Attributes:
        settings: The settings in force, by the configuration that was asked for.
        active: Whether what is registered is put in place by hooks.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Settings] = {}
        self.active = False
        self.watches: list[Watch | ConstructionWatch] = []
        self.layers_seen: set[LayerTarget] = set()
        self.functions_seen: set[str] = set()
        self.classes_seen: set[type] = set()
        self.watches_models = False

    def close(self) -> None:
        """Cancel every watch; what is in place stays in place."""
        for watch in self.watches:
            watch.cancel()


def start(settings: Settings, *, door: str) -> None:
    """Register what the settings ask for, and watch for its targets.

    Raises:
        ConfigError: A registration cannot be right; nothing was registered.
    """
    for layers, targets, functions in (*_plugin_records(settings), settings.records()):
        runtime.registry.add(layer_kernels=layers, layer_targets=targets, function_kernels=functions)
    runtime.options.take(settings)
    runtime.session.door = door
    runtime.session.configs = tuple(settings.paths)
    for entry, reason in settings.left_out():
        runtime.session.remark(f"{entry.name}: {reason}")
    runtime.of(Activation).active = True
    from twinkle.hooks import guard, imports

    guard.on_failure(_on_failure)
    imports.install()
    watch_new()


def _plugin_records(settings: Settings) -> list[Records]:
    """The records of the plugins named in the settings; a broken plugin is a remark, or an error."""
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
            runtime.session.remark(f"plugin {name}: {error.reason}")
            warn(f"plugin {name} is left out: {error.reason}")
            continue
        checked = validate(plugin.document, where=plugin.where, base_dir=plugin.base_dir, allow_objects=True)
        layers, targets, functions = checked.records(trust_remote_code=settings.trust_remote_code)
        for kernel in (*layers, *functions):
            kernel.origin = f"plugin {name}: {kernel.origin}"
            if kernel.verify is None and settings.verify == "auto":
                kernel.verify = "first-use"  # nobody bound it by name
        records.append((layers, targets, functions))
    return records


def watch_new() -> None:
    """Give every registration its record and, once activated, watch for its target."""
    declare()
    state = runtime.of(Activation)
    if not state.active:
        return
    from twinkle.hooks import imports

    strict = runtime.options.raises
    for target in runtime.registry.layer_targets:
        if target in state.layers_seen:
            continue
        state.layers_seen.add(target)
        # Layers that are bound to an op are met in models, when those are constructed.
        if isinstance(target.target, Class):
            _watch_class(target.target.cls)
        elif isinstance(target.target, Name | Pattern):
            module = target.target.module
            watch = imports.watch_module(module, _on_layer_module, owner=_OWNER, strict=strict)
            state.watches.append(watch)
    for kernel in runtime.registry.function_kernels:
        function_module = kernel.target_module
        if function_module is not None and function_module not in state.functions_seen:
            state.functions_seen.add(function_module)
            watch = imports.watch_module(function_module, _on_function_module, owner=_OWNER, strict=strict)
            state.watches.append(watch)
    in_models = runtime.registry.layer_kernels or any(
        kernel.op for kernel in runtime.registry.function_kernels
    )
    if (in_models or runtime.options.kernels != "off") and not state.watches_models:
        state.watches_models = True
        from twinkle.hooks.construction import watch_pretrained

        runtime.session.remarks_at_report["models"] = _unseen_models
        state.watches.append(watch_pretrained(_on_model, owner=_OWNER, strict=strict))


def _on_function_module(module: ModuleType, name: str) -> None:
    from twinkle.apply import functions

    functions.apply(
        name,
        device=runtime.options.device,
        mode=runtime.options.mode,
        strict=runtime.options.raises,
        where="activation",
        must_apply=False,
    )


def _on_layer_module(module: ModuleType, name: str) -> None:
    """Watch the construction of every class in that module which a target means."""
    for entry in runtime.registry.layer_targets:
        target = entry.target
        if not isinstance(target, Name | Pattern) or not target.in_module(name):
            continue
        if isinstance(target, Name) or target.names_one_class:
            found = _named_class(module, target.name, entry)
            if found is not None:
                _watch_class(found)
        else:
            for cls in _classes_of(module):
                if target.fits_name(cls.__qualname__):
                    _watch_class(cls)


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
    if isinstance(entry.target, Name):
        if found is None:
            from twinkle.errors import suggest

            known = [cls.__qualname__ for cls in _classes_of(module)]
            hint = suggest(name, known)
            reason = f"{module.__name__} has no class {name}" + (f"; {hint}" if hint else "")
        else:
            reason = f"{entry.target} is no nn.Module class but {type(found).__name__}"
        for kernel in runtime.registry.kernels_named(entry.kernel_name):
            layer_binding(kernel, entry.target).set("failed", reason)
        if runtime.options.raises:
            raise ApplyError(reason, where=entry.origin, fix="correct the target, or leave it out")
        warn(f"{reason} ({entry.origin})")
    return None


def _watch_class(cls: type) -> None:
    state = runtime.of(Activation)
    if cls in state.classes_seen:
        return
    state.classes_seen.add(cls)
    from twinkle.hooks.construction import watch_class

    strict = runtime.options.raises
    state.watches.append(watch_class(cls, _on_model, owner=_OWNER, strict=strict))


def _on_model(model: Any) -> None:
    """Kernelize a model, or a layer that is a target itself, at the end of its construction."""
    from twinkle.apply.layers import kernelize_layers
    from twinkle.apply.unseen import Constructed

    runtime.of(Constructed).add(model)
    kernelize_layers(model)


def _unseen_models() -> list[str]:
    if "torch" not in sys.modules:
        return []
    from twinkle.apply.unseen import remarks

    return remarks()


def _on_failure(failure: Failure) -> None:
    runtime.session.remark(str(failure))
