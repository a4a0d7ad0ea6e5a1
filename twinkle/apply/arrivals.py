"""What is done when a module with targets arrives, or a name in one, and what waits for torch.

Nothing is done in the middle of ``import torch``, nor before the program has imported it: whatever
arrives earlier waits for the end of that import. Standard library only at its top, for it is imported at
interpreter start.
"""

from __future__ import annotations

import sys

from twinkle.apply.bindings import function_binding
from twinkle.errors import warn
from twinkle.hooks import guard, imports
from twinkle.hooks.finder import own_dict, spec_of
from twinkle.hooks.program import follow_program, has_begun
from twinkle.hooks.resolution import ABSENT, LATER, ask, is_program, look_up, observe_requests
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType
    from typing import Any

    from twinkle.hooks.classes import ClassWatch
    from twinkle.hooks.construction import ConstructionWatch
    from twinkle.hooks.restored import RestoredWatch

    Act = Callable[[ModuleType, str, str, Any], None]
__all__ = [
    "OWNER",
    "Arrivals",
    "function_module",
    "guarded",
    "look_at_program",
    "on_demand",
    "waits",
    "with_torch",
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
        self.on_demand: dict[str, tuple[ModuleType, dict[tuple[str, Act], None]]] = {}
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


def with_torch(subject: str, act: Callable[[], None]) -> bool:
    """Do something now, or at the end of the import of torch; whether it was done."""
    state = runtime.of(Arrivals)
    if state.torch:
        act()
    else:
        state.waiting.append((subject, act))
    return state.torch


def guarded(subject: str, act: Callable[[], None]) -> None:
    """Run an action; where it fails, its subject is reported and nothing else stops."""
    try:
        act()
    except Exception as error:
        guard.failed(error, owner=OWNER, subject=subject, strict=runtime.options.raises)


def waits(binding: Any, reason: str) -> None:
    """Say in a record that has nothing else to say why its kernel waits."""
    if binding.state == "pending":
        binding.set("pending", reason)


def function_module(module: ModuleType, name: str) -> None:
    """Put the kernels for the functions of a module in place."""
    if name in runtime.of(Arrivals).suspended:
        return
    if not with_torch(f"module {name}", lambda: _functions(module, name)):
        _without_torch(module, name)


def _without_torch(module: ModuleType, name: str) -> None:
    """Put the kernels in place that need no torch; the others wait for it."""
    from twinkle.apply.without_torch import put

    runtime.of(Arrivals).without_torch.add(name)
    done = put(module, name)
    for kernel in runtime.registry.functions_of(name):
        if kernel.name not in done:
            waits(function_binding(kernel), f"{name} is imported, and waits for the program to import torch")


def _functions(module: ModuleType, name: str) -> None:
    if name in runtime.of(Arrivals).without_torch:
        from twinkle.apply.without_torch import step_back

        runtime.of(Arrivals).without_torch.discard(name)
        step_back(name)
    ready = []
    for kernel in runtime.registry.functions_of(name):
        if look_up(module, kernel.name) is LATER:
            waits(function_binding(kernel), f"{name} makes it when it is asked for, and was not asked yet")
            on_demand(module, name, kernel.name, _function_made)
        else:
            ready.append(kernel.name)
    _put(module, name, ready)


def _function_made(module: ModuleType, name: str, dotted: str, made: Any) -> None:
    guarded(f"{name}:{dotted}", lambda: _put(module, name, [dotted]))


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
            waits(function_binding(kernel), f"the import of {home}, where its kernel is, has not ended")

            def came(home: ModuleType, _: str) -> None:
                _put(module, name, [function])

            imports.watch_module(home, came, owner=OWNER, strict=runtime.options.raises)
            return True
    return False


def on_demand(module: ModuleType, name: str, dotted: str, act: Act) -> None:
    """Wait for a name that a lazy module has not made yet: it makes it, or a module inside has it.

    Args:
        module: The module.
        name: Its name.
        dotted: The name in it.
        act: Is called with these three and what was made.
    """
    known = runtime.of(Arrivals).on_demand.setdefault(name, (module, {}))
    known[1][dotted, act] = None
    if len(known[1]) > 1:
        return

    def asked(head: str, made: Any) -> Any:
        _made(name, head, made)
        return own_dict(module).get(head, made)

    def came(inside: ModuleType, _: str) -> None:
        for head in {dotted.partition(".")[0] for dotted, _ in known[1]}:
            if head in own_dict(inside):
                ask(module, head)  # costs nothing now, and tells asked() where the module is observed
                _made(name, head, own_dict(module).get(head))

    observe_requests(module, asked)
    imports.watch_module(f"{name}.**", came, owner=OWNER, strict=runtime.options.raises)


def _made(name: str, head: str, made: Any) -> None:
    """A lazy module has made a name: whoever waits for it, or for a name in it, is told."""
    module, waiting = runtime.of(Arrivals).on_demand[name]
    for dotted, act in [key for key in waiting if key[0].partition(".")[0] == head]:
        del waiting[dotted, act]
        act(module, name, dotted, made)


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
