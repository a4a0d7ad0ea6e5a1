"""Launches of compiled kernels by the C function of triton itself, with the addresses of their tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = ["Launched", "Slot", "current_stream", "direct", "has_slots", "hooked"]


class Launched(NamedTuple):
    """One launch.

    Attributes:
        jitted: The kernel.
        compiled: What triton compiled for these arguments; None in the interpreter.
        grid: Three sizes.
        tensors: Its first arguments.
        numbers: The next.
        rest: The constants that are arguments, in their order.
        constants: All of them by name, and options such as ``num_warps``.
    """

    jitted: Any
    compiled: Any
    grid: tuple[int, int, int]
    tensors: tuple[Tensor, ...]
    numbers: tuple[float, ...]
    rest: tuple[Any, ...]
    constants: dict[str, Any]


class Slot:
    """An argument that differs from call to call: the address of a tensor, or without a number the stream."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at


def has_slots(argument: Any) -> bool:
    """Whether an argument is a tuple with slots in it, or in one of its tuples."""
    return isinstance(argument, tuple) and any(isinstance(a, Slot) or has_slots(a) for a in argument)


def direct(one: Launched) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that launches, and its arguments with slots.

    ``compiled.run`` takes the same in all versions of triton that we support; it hands what it was given and
    what it adds to its C function, ``launch``. A copy of it is called once, with a function in that place
    that notes its arguments and launches nothing: from then on the C function is called as it would be. Any
    other function in C refuses a slot, so that nothing is launched by this.
    """
    run, compiled = one.compiled.run, one.compiled
    slots = [Slot(i) for i in range(len(one.tensors))]
    arguments = (
        *one.grid,
        Slot(),
        compiled.function,
        compiled.packed_metadata,
        *(None, None, None),
        *slots,
        *one.numbers,
        *one.rest,
    )
    if getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0):
        return run, arguments
    noted: list[tuple[Any, ...]] = []
    try:
        beneath = run.launch
        spied = copy.copy(run)
        spied.launch = lambda *given: noted.append(given)
        spied(*arguments)
    except Exception:  # another launcher
        return run, arguments
    if len(noted) != 1 or _slots(noted[0]) != _slots(arguments):
        return run, arguments
    return beneath, noted[0]


def _slots(arguments: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Slot):
            found.append(argument.at)
        elif isinstance(argument, tuple):
            found += _slots(argument)
    return found


def hooked(constant: Callable[[Any], str]) -> list[str] | None:
    """Conditions, as Python text, under which a profiler has set hooks: they are triton's to call.

    Args:
        constant: Gives the name of an object in that text.

    Returns:
        The conditions, or None where one is met now.
    """
    try:
        from triton import knobs

        owner, runtime = f"{constant(knobs)}.runtime", knobs.runtime
    except ImportError:  # triton 3.3
        from triton.compiler import CompiledKernel

        owner, runtime = constant(CompiledKernel), CompiledKernel
    found = []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(runtime, name)
        if hook is None:
            found.append(f"{owner}.{name} is not None")
        elif getattr(hook, "calls", None) == []:
            chain = constant(hook)
            found += [f"{owner}.{name} is not {chain}", f"{chain}.calls"]
        else:
            return None
    return found


def current_stream() -> Callable[[int], int]:
    """The function that gives the current stream of a device, by its number."""
    from triton.runtime import driver

    return driver.active.get_current_stream  # type: ignore[no-any-return]
