"""What is done when something arrives: torch, a module with targets, a name in one, a layer.

Nothing is done in the middle of ``import torch``, nor before the program has imported it: whatever
arrives earlier waits for the end of that import. Standard library only at its top, for it is imported at
interpreter start.
"""

from __future__ import annotations

import sys
from importlib import import_module

from twinkle.apply.bindings import function_binding, layer_binding
from twinkle.errors import ApplyError, suggest, warn
from twinkle.hooks import guard, imports
from twinkle.hooks.finder import own_dict, spec_of
from twinkle.hooks.program import follow_program, has_begun
from twinkle.hooks.resolution import (
    ABSENT,
    LATER,
    ask,
    is_program,
    look_up,
    means,
    observe_requests,
    remember,
)
from twinkle.runtime import runtime
from twinkle.targets import Class, Name, Pattern, class_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType
    from typing import Any

    from twinkle.hooks.classes import ClassWatch
    from twinkle.hooks.construction import ConstructionWatch
    from twinkle.hooks.restored import RestoredWatch
    from twinkle.records import LayerTarget

__all__ = [
    "OWNER",
    "Arrivals",
    "ask_again",
    "compiler_has_come",
    "function_module",
    "layer_module",
    "look_at_program",
    "models_may_come",
    "on_model",
    "torch_has_come",
]

OWNER = "twinkle"


class Arrivals:
    """What has arrived in this process, and what waits.

    Attributes:
        torch: It is imported, as a whole.
        without_torch: The modules in which kernels may stand that need no torch.
        suspended: The modules whose functions and classes are left as they are for now, whatever arrives.
        models: The watch for models of transformers, which are kernelized as a whole.
        classes: The watch for classes of layers, once torch is there.
        restored: The watch for models and layers from pickles, once torch is there.
    """

    def __init__(self) -> None:
        self.torch = False
        self.models: ConstructionWatch | None = None
        self.classes: ClassWatch | None = None
        self.restored: RestoredWatch | None = None
        self.waiting: list[tuple[str, Callable[[], None]]] = []
        self.on_demand: dict[str, tuple[ModuleType, set[str]]] = {}
        self.in_program: dict[str, object] = {}
        self.suspended: set[str] = set()
        self.without_torch: set[str] = set()
        self.namespaces: set[str] = set()
        self.for_functions: set[type] = set()

    def cancel(self) -> None:
        """Ask about no more classes."""
        for watch in (self.classes, self.restored):
            if watch is not None:
                watch.cancel()


def torch_has_come(module: ModuleType, name: str) -> None:
    """Begin with the layers and the program, and do all that has waited."""
    state = runtime.of(Arrivals)
    state.torch = True
    _watch_classes()
    _watch_restored()
    _watch_places()
    waiting, state.waiting = state.waiting, []
    for subject, act in waiting:
        _guarded(subject, act)
    look_at_program()


def _with_torch(subject: str, act: Callable[[], None]) -> bool:
    """Do something now, or at the end of the import of torch; whether it was done."""
    state = runtime.of(Arrivals)
    if state.torch:
        act()
    else:
        state.waiting.append((subject, act))
    return state.torch


def _guarded(subject: str, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception as error:
        guard.failed(error, owner=OWNER, subject=subject, strict=runtime.options.raises)


# Functions.


def function_module(module: ModuleType, name: str) -> None:
    """Put the kernels for the functions of a module in place."""
    if name in runtime.of(Arrivals).suspended:
        return
    if not _with_torch(f"module {name}", lambda: _functions(module, name)):
        _without_torch(module, name)


def _without_torch(module: ModuleType, name: str) -> None:
    """Put the kernels in place that need no torch; the others wait for it."""
    from twinkle.apply.without_torch import put

    runtime.of(Arrivals).without_torch.add(name)
    done = put(module, name)
    for kernel in runtime.registry.functions_of(name):
        if kernel.name not in done:
            _wait(function_binding(kernel), f"{name} is imported, and waits for the program to import torch")


def _functions(module: ModuleType, name: str) -> None:
    if name in runtime.of(Arrivals).without_torch:
        from twinkle.apply.without_torch import step_back

        runtime.of(Arrivals).without_torch.discard(name)
        step_back(name)
    ready = []
    for kernel in runtime.registry.functions_of(name):
        if look_up(module, kernel.name) is LATER:
            _wait(function_binding(kernel), f"{name} makes it when it is asked for, and was not asked yet")
            _on_demand(module, name, kernel.name)
        else:
            ready.append(kernel.name)
    _put(module, name, ready)


def _put(module: ModuleType, name: str, functions: Iterable[str]) -> None:
    from twinkle.apply.functions import apply
    from twinkle.swap.candidate import explain

    for function in dict.fromkeys(functions):
        if _waits_for_its_module(module, name, function):
            continue
        try:
            apply(
                name,
                device=runtime.options.device,
                mode=runtime.options.mode,
                strict=runtime.options.raises,
                where="activation",
                must_apply=False,
                module=module,
                names={function},
            )
        except Exception as error:  # of one target: the others are put in place
            if runtime.options.raises:
                raise
            for kernel in runtime.registry.functions_of(name):
                if kernel.name == function:
                    function_binding(kernel).set("failed", explain(error))
                    warn(f"{kernel.target} is not replaced: {explain(error)} ({kernel.origin})")


def _waits_for_its_module(module: ModuleType, name: str, function: str) -> bool:
    """Whether the module of a kernel is being imported: it has imported torch, or the target, at its top."""
    for kernel in runtime.registry.functions_of(name):
        home = getattr(kernel.source, "module", "") if kernel.name == function else ""
        if home in sys.modules and getattr(spec_of(sys.modules[home]), "_initializing", False):
            _wait(function_binding(kernel), f"the import of {home}, where its kernel is, has not ended")

            def came(home: ModuleType, _: str) -> None:
                _put(module, name, [function])

            imports.watch_module(home, came, owner=OWNER, strict=runtime.options.raises)
            return True
    return False


def _on_demand(module: ModuleType, name: str, dotted: str) -> None:
    """Look at a name that a lazy module has not made yet when it does, or when a module inside has it."""
    known = runtime.of(Arrivals).on_demand.setdefault(name, (module, set()))
    known[1].add(dotted)
    if len(known[1]) > 1:
        return

    def asked(head: str, made: Any) -> Any:
        _made(name, head, made)
        return own_dict(module).get(head, made)

    def came(inside: ModuleType, _: str) -> None:
        for head in {dotted.partition(".")[0] for dotted in known[1]}:
            if head in own_dict(inside):
                ask(module, head)  # costs nothing now, and tells asked() where the module is observed
                _made(name, head, own_dict(module).get(head))

    observe_requests(module, asked)
    imports.watch_module(f"{name}.**", came, owner=OWNER, strict=runtime.options.raises)


def _made(name: str, head: str, made: Any) -> None:
    """A lazy module has made a name: put kernels in place of the functions and classes that it stands for."""
    module, waiting = runtime.of(Arrivals).on_demand[name]
    now = {dotted for dotted in waiting if dotted.partition(".")[0] == head}
    waiting -= now
    functions = now & {kernel.name for kernel in runtime.registry.functions_of(name)}
    if functions:
        _guarded(f"{name}:{head}", lambda: _put(module, name, functions))
    for entry in runtime.registry.layer_targets:
        target = entry.target
        if isinstance(target, Name) and target.module == name and target.name in now and _is_layer(made):
            remember(target, made)
            _reconsider(made)
            _watch_first_calls(made)


def look_at_program() -> None:
    """Put kernels in place of what the program itself has defined, and follow it to what it has not."""
    if not runtime.of(Arrivals).torch:
        return
    begun = has_begun()
    modules = dict.fromkeys(kernel.target_module for kernel in runtime.registry.function_kernels)
    # Before its first line a program that -m runs has no name yet.
    names = [name for name in modules if name is not None and (is_program(name) or not begun)]
    if names:
        kernels = [kernel for name in names for kernel in runtime.registry.functions_of(name)]
        _look(names)
        follow_program({kernel.name.partition(".")[0] for kernel in kernels}, lambda: _look(names))


def _look(names: Iterable[str]) -> None:
    program = sys.modules["__main__"]
    seen = runtime.of(Arrivals).in_program
    for name in filter(is_program, names):
        new = []
        for kernel in runtime.registry.functions_of(name):
            found = look_up(program, kernel.name)
            if found is not ABSENT and found is not LATER and seen.get(kernel.target.text) is not found:
                new.append(kernel)
        if new:
            _put(program, name, [kernel.name for kernel in new])
            for kernel in new:
                seen[kernel.target.text] = look_up(program, kernel.name)
                _say_program(name, kernel.origin)


def _say_program(name: str, origin: str) -> None:
    """Once, where a target calls the program by a name that it has not while it runs."""
    runtime.session.remark(f"{name} is the program that is run: its classes and functions are of __main__")
    if name != "__main__":
        warn(f"{name} is run as __main__: its targets are taken from there ({origin})")


# Layers.


def layer_module(module: ModuleType, name: str) -> None:
    """Look at the classes in a module that targets mean."""
    _with_torch(f"module {name}", lambda: _layers(module, name))


def _layers(module: ModuleType, name: str) -> None:

    for entry in runtime.registry.layer_targets:
        target = entry.target
        if not isinstance(target, Name | Pattern) or not target.in_module(name):
            continue
        for kernel in runtime.registry.kernels_named(entry.kernel_name):
            if not entry.met:
                _wait(layer_binding(kernel, target), "no such layer was constructed yet")
        if isinstance(target, Name):
            found = look_up(module, target.name)
            if found is LATER:
                _on_demand(module, name, target.name)
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


def _wait(binding: Any, reason: str) -> None:
    if binding.state == "pending":
        binding.set("pending", reason)


def _watch_classes() -> None:
    """Ask about every class of layers, where something may be for one."""
    state = runtime.of(Arrivals)
    functions = any(kernel.op for kernel in runtime.registry.function_kernels)
    registered = bool(runtime.registry.layer_kernels) or functions
    if state.classes is not None or not (registered or runtime.options.embedded):
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
        state.restored = watch_restored(nn.Module, _on_restored, owner=OWNER, strict=runtime.options.raises)


def _on_restored(instance: Any) -> None:
    """Kernelize a model or a layer that has no construction, unless it came with kernels of this process."""
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
