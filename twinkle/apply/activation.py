"""From settings to watches: what is registered is put in place when its target appears.

Standard library only: this module is imported at interpreter start. The rooms that need torch are
imported by the callbacks, when the program itself has imported torch.
"""

from __future__ import annotations

import sys

from twinkle.apply.arrivals import OWNER, Arrivals, function_module, look_at_program
from twinkle.apply.arriving_layers import (
    ask_again,
    compiler_has_come,
    layer_module,
    models_may_come,
    on_model,
    torch_has_come,
)
from twinkle.apply.autoreload import autoreload_has_come
from twinkle.apply.bindings import declare
from twinkle.errors import warn
from twinkle.runtime import runtime
from twinkle.targets import Name, Pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from twinkle.config import Settings
    from twinkle.config.entries import Records
    from twinkle.hooks.construction import ConstructionWatch
    from twinkle.hooks.guard import Failure
    from twinkle.hooks.imports import Watch
    from twinkle.records import LayerTarget

__all__ = ["Activation", "start", "watch_new"]


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
        self.watches_torch = False
        self.watches_autoreload = False
        self.watches_models = False

    def close(self) -> None:
        """Cancel every watch; what is in place stays in place."""
        for watch in self.watches:
            watch.cancel()
        runtime.of(Arrivals).cancel()


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

    def watch(module: str, arrived: Callable[[ModuleType, str], None]) -> None:
        if module != "__main__":  # never imported: it is looked at while it runs
            state.watches.append(imports.watch_module(module, arrived, owner=OWNER, strict=strict))

    new = [target for target in runtime.registry.layer_targets if target not in state.layers_seen]
    functions = dict.fromkeys(kernel.target_module for kernel in runtime.registry.function_kernels)
    in_models = runtime.registry.layer_kernels or None in functions
    if (in_models or runtime.options.embedded) and not state.watches_models:
        state.watches_models = True
        from twinkle.hooks.construction import watch_pretrained

        runtime.session.remarks_at_report["models"] = _unseen_models
        models = runtime.of(Arrivals).models = watch_pretrained(on_model, owner=OWNER, strict=strict)
        state.watches.append(models)
        watch("transformers.modeling_utils", models_may_come)
    embedded = runtime.options.embedded
    wanted = in_models or functions or embedded or runtime.options.capture != "off"
    if wanted and not state.watches_torch:
        state.watches_torch = True
        watch("torch", torch_has_come)
        if embedded:
            watch("torch._dynamo.callback", compiler_has_come)
    for target in new:
        state.layers_seen.add(target)
        if isinstance(target.target, Name | Pattern):
            watch(target.target.module, layer_module)
    if new:
        ask_again(new)
    for name in functions:
        if name is not None and name not in state.functions_seen:
            state.functions_seen.add(name)
            watch(name, function_module)
    if (in_models or functions) and not state.watches_autoreload:
        state.watches_autoreload = True
        watch("IPython.extensions.autoreload", autoreload_has_come)
    look_at_program()


def _unseen_models() -> list[str]:
    if "torch" not in sys.modules:
        return []
    from twinkle.apply.unseen import remarks

    return remarks()


def _on_failure(failure: Failure) -> None:
    runtime.session.remark(str(failure))
