"""What is done when torch arrives, and with it layers: their classes, their instances, those from pickles.

Standard library only at its top, for it is imported at interpreter start (:mod:`twinkle.apply.arrivals`).
"""

from __future__ import annotations

import sys
from importlib import import_module

from twinkle.apply import captures
from twinkle.apply.arrivals import OWNER, Arrivals, guarded, look_at_program, on_demand, waits, with_torch
from twinkle.apply.bindings import layer_binding
from twinkle.errors import ApplyError, suggest, warn
from twinkle.hooks.finder import own_dict
from twinkle.hooks.resolution import ABSENT, LATER, look_up, means, remember
from twinkle.runtime import runtime
from twinkle.targets import Class, Name, Pattern, class_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any

    from twinkle.records import LayerTarget

__all__ = [
    "ask_again",
    "compiler_has_come",
    "layer_module",
    "models_may_come",
    "on_model",
    "torch_has_come",
]


def torch_has_come(module: ModuleType, name: str) -> None:
    """Begin with the layers and the program, and do all that has waited."""
    state = runtime.of(Arrivals)
    state.torch = True
    _watch_classes()
    _watch_restored()
    _watch_places()
    captures.begin()
    waiting, state.waiting = state.waiting, []
    for subject, act in waiting:
        guarded(subject, act)
    look_at_program()


def layer_module(module: ModuleType, name: str) -> None:
    """Look at the classes in a module that targets mean."""
    with_torch(f"module {name}", lambda: _layers(module, name))


def _layers(module: ModuleType, name: str) -> None:
    for entry in runtime.registry.layer_targets:
        target = entry.target
        if not isinstance(target, Name | Pattern) or not target.in_module(name):
            continue
        for kernel in runtime.registry.kernels_named(entry.kernel_name):
            if not entry.met:
                waits(layer_binding(kernel, target), "no such layer was constructed yet")
        if isinstance(target, Name):
            found = look_up(module, target.name)
            if found is LATER:
                on_demand(module, name, target.name, _layer_made)
            elif _is_layer(found):
                remember(target, found)
                _reconsider(found)
                _watch_first_calls(found)
            else:
                _wrong(module, found, entry)
        else:
            for value in {v for v in list(own_dict(module).values()) if _is_layer(v)}:
                if means(target, value):
                    _reconsider(value)
                    _watch_first_calls(value)


def _layer_made(module: ModuleType, name: str, dotted: str, made: Any) -> None:
    for entry in runtime.registry.layer_targets:
        target = entry.target
        ours = isinstance(target, Name) and target.module == name and target.name == dotted
        if ours and _is_layer(made):
            remember(target, made)
            _reconsider(made)
            _watch_first_calls(made)


def _is_layer(thing: object) -> bool:
    from torch import nn

    return issubclass(type(thing), type) and issubclass(thing, nn.Module)  # type: ignore[arg-type]


def _wrong(module: ModuleType, found: Any, entry: LayerTarget) -> None:
    """A target that names nothing, or no layer."""
    home, _, name = entry.target.text.partition(":")
    if found is ABSENT:
        hint = suggest(name, [key for key, value in own_dict(module).items() if _is_layer(value)])
        reason = f"{home} has no class {name}" + (f"; {hint}" if hint else "")
    else:
        reason = f"{entry.target} is no nn.Module class but {type(found).__name__}"
    for kernel in runtime.registry.kernels_named(entry.kernel_name):
        layer_binding(kernel, entry.target).set("failed", reason)
    if runtime.options.raises:
        raise ApplyError(reason, where=entry.origin, fix="correct the target, or leave it out")
    warn(f"{reason} ({entry.origin})")


def _watch_classes() -> None:
    """Ask about every class of layers, where something may be for one."""
    state = runtime.of(Arrivals)
    functions = any(kernel.op for kernel in runtime.registry.function_kernels)
    registered = bool(runtime.registry.layer_kernels) or functions
    wanted = registered or runtime.options.embedded or captures.begins()
    if state.classes is not None or not wanted:
        return
    from torch import nn

    from twinkle.hooks.classes import watch_classes

    if registered:
        import_module("twinkle.apply.matching")  # whole, before it is asked: it makes classes itself

    state.classes = watch_classes(
        nn.Module,
        _is_wanted,
        _on_instance,
        owner=OWNER,
        strict=runtime.options.raises,
        instead=state.models,
        but=_is_passed_over,
    )


_NORMS = frozenset({"group_norm", "layer_norm", "rms_norm"})
"""What the layers of torch call that there may be embedded kernels for."""


def _is_passed_over(cls: type) -> bool:
    """Whether a class is asked about by nobody: one that Twinkle made, or a plain one of torch.

    Compiled code constructs layers of torch (a slice of a ``ModuleList``), which a compiler cannot follow
    into a constructor that asks.
    """
    generated: Any = sys.modules.get("twinkle.swap.generated")  # there is none before that room
    if generated is not None and generated.original_of(cls) is not cls:
        return True
    if runtime.registry.layer_kernels or cls.__module__.partition(".")[0] != "torch":
        return False
    code = getattr(vars(cls).get("forward"), "__code__", None)
    return code is None or _NORMS.isdisjoint(code.co_names)


def compiler_has_come(module: ModuleType, name: str) -> None:
    """Have what waits for its first use looked at before a graph is traced."""
    from twinkle.hooks.first_use import first_uses

    first_uses().before_compiling(module)


def models_may_come(module: ModuleType, name: str) -> None:
    """Models of transformers may come from pickles from now on."""
    _watch_restored()


def _watch_restored() -> None:
    """Put kernels into what comes from a pickle as into what is constructed."""
    from torch import nn

    from twinkle.hooks.restored import watch_restored

    state = runtime.of(Arrivals)
    if state.restored is None:
        strict = runtime.options.raises
        state.restored = watch_restored(
            nn.Module, _on_restored, copied=captures.restored, owner=OWNER, strict=strict
        )


def _on_restored(instance: Any) -> None:
    """Kernelize a model or a layer that has no construction, unless it came with kernels of this process."""
    captures.restored(instance)
    state = runtime.of(Arrivals)
    whole = state.models is not None and state.models.is_in(instance)
    if not whole and (state.classes is None or not state.classes.wants(type(instance))):
        return
    from twinkle.swap.layers import placed

    if not (any(map(placed, instance.modules())) if whole else placed(instance)):
        on_model(instance, whole=whole)


def _watch_places() -> None:
    """Decide about layers again as they are put into others, where something is registered for places."""
    entries = runtime.registry.layer_targets
    if runtime.options.where is None and all(entry.where is None for entry in entries):
        return
    from twinkle.apply.layers import place_again
    from twinkle.apply.places import watch_places
    from twinkle.hooks.construction import under_construction

    def building() -> bool:
        models = runtime.of(Arrivals).models
        return models is not None and any(map(models.is_in, under_construction()))

    watch_places(place_again, building=building, owner=OWNER, strict=runtime.options.raises)


def ask_again(new: Iterable[LayerTarget]) -> None:
    """Something was registered: classes that were constructed before are asked about once more."""
    state = runtime.of(Arrivals)
    if not state.torch:
        return
    _watch_places()
    if state.classes is None:
        _watch_classes()
        return
    for entry in new:
        if isinstance(entry.target, Class):
            _reconsider(entry.target.cls)
            _watch_first_calls(entry.target.cls)
        elif not isinstance(entry.target, Name):  # that is met in its module
            from torch import nn

            _reconsider(nn.Module)


def _reconsider(cls: type) -> None:
    from twinkle.apply.matching import classes_have_come
    from twinkle.swap.first_calls import ask_anew

    classes_have_come()
    ask_anew()
    classes = runtime.of(Arrivals).classes
    if classes is not None:
        classes.reconsider(cls)


def _watch_first_calls(cls: type) -> bool:
    """Have a class ask about the layers that come without their constructor; whether it has kernels."""
    from twinkle.apply.matching import kernels_for

    kernels = kernels_for(cls)
    if kernels and cls.__module__ not in runtime.of(Arrivals).suspended:
        from twinkle.apply.first_calls import watch

        watch(cls, kernels)
    return bool(kernels)


def _is_wanted(cls: type) -> bool | None:
    """Whether to be told of the instances of a class: they get kernels, or the functions of its module may.

    None to be asked at the next construction again.
    """
    captures.notice(cls)
    if runtime.registry.layer_kernels and _watch_first_calls(cls):
        from twinkle.apply.matching import taken_for

        entry = taken_for(cls) if runtime.options.strict else None  # with strict no step is silent
        if entry is not None:
            kernel = f"its instances get kernel {entry.kernel_name}"
            warn(f"{class_path(cls)} is taken for {entry.target}: {kernel} ({entry.origin})")
        return True
    seen = runtime.of(Arrivals).namespaces
    functions = any(kernel.op for kernel in runtime.registry.function_kernels)
    if not functions or cls.__module__ in seen or cls.__module__.partition(".")[0] == "torch":
        from twinkle.apply.every_class import notice

        return notice(cls)
    seen.add(cls.__module__)
    runtime.of(Arrivals).for_functions.add(cls)
    return True


def _on_instance(layer: Any) -> None:
    from twinkle.apply.first_calls import renew

    cls = type(layer)
    on_model(layer, whole=False)
    renew(cls)
    state = runtime.of(Arrivals)
    if state.classes is not None and cls in state.for_functions:
        state.for_functions.discard(cls)
        state.classes.forget(cls)


def on_model(model: Any, *, whole: bool = True) -> None:
    """Kernelize a model, or a layer by itself, at the end of its construction."""
    from twinkle.apply.layers import kernelize_layers
    from twinkle.apply.unseen import Constructed
    from twinkle.swap.first_calls import leave_alone

    runtime.of(Constructed).add(model)
    kernelize_layers(model, whole=whole)
    leave_alone(model.modules() if whole else (model,))
