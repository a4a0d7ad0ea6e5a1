"""Function kernels in a program that has not imported torch: plain functions for plain functions.

Whatever chooses by device, mode or gradients, compares or compiles needs torch, and waits for it. The rest is
a function of Python code for another with the same arguments: it is put in place as it is, loaded at its
first call. When the program comes to import torch, the originals come back, and kernels come as always.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING

from twinkle.apply.bindings import function_binding
from twinkle.errors import ApplyError, TwinkleError, warn
from twinkle.hooks.finder import own_dict
from twinkle.runtime import runtime
from twinkle.sources.code import CodeSource
from twinkle.swap import aliases, holders

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from twinkle.records import FunctionKernel

__all__ = ["put", "step_back"]

_NOT_PLAIN = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Placed:
    """The kernels that are in place without torch, by module."""

    def __init__(self) -> None:
        self.by_module: dict[str, list[_StandIn]] = {}

    def close(self) -> None:
        """Put every original back."""
        for name in list(self.by_module):
            step_back(name)


def put(module: ModuleType, name: str) -> set[str]:
    """Put the kernels for functions of a module in place that need no torch.

    Args:
        module: Was imported; it need not be in ``sys.modules``.
        name: As registrations call it.

    Returns:
        The names of the functions that have one now.
    """
    placed = runtime.of(_Placed).by_module.setdefault(name, [])
    kernels = runtime.registry.functions_of(name)
    for kernel in kernels:
        alone = sum(other.name == kernel.name for other in kernels) == 1
        standing = own_dict(module).get(kernel.name)
        if standing is not None and alone and _is_plain(standing) and _needs_no_torch(kernel):
            placed[:] = [one for one in placed if one.kernel.name != kernel.name]  # of before a reload
            placed.append(_StandIn(module, kernel, standing))
            placed[-1].put()
    return {one.kernel.name for one in placed if not one.is_out}


def step_back(name: str) -> None:
    """Put the originals of a module back: the program has imported torch.

    Args:
        name: Of the module, as registrations call it.
    """
    for one in runtime.of(_Placed).by_module.pop(name, ()):
        one.take_out()


def _is_plain(function: object) -> bool:
    if isinstance(function, BuiltinFunctionType):
        return True
    return isinstance(function, FunctionType) and not function.__code__.co_flags & _NOT_PLAIN


def _needs_no_torch(kernel: FunctionKernel) -> bool:
    """Whether a kernel is the program's own code, for every call and without a comparison."""
    disabled = {kernel.name, kernel.target.text, kernel.target.text.replace(":", ".", 1)}
    return (
        type(kernel.source) is CodeSource
        and kernel.device is None
        and kernel.mode is None
        and runtime.options.device is None
        and runtime.options.mode is None
        and disabled.isdisjoint(runtime.options.disabled)
        and not runtime.options.proofs(kernel.verify, bound_by_name=kernel.bound_by_name)
    )


class _StandIn:
    """What stands in the place of one function while torch is not there.

    Attributes:
        kernel: As registered.
        function: What stands there. Whoever got hold of it reaches what stands there later.
        is_out: The original is back.
    """

    def __init__(self, module: ModuleType, kernel: FunctionKernel, original: Callable[..., Any]) -> None:
        self.kernel = kernel
        self.is_out = False
        self._module = module
        self._original = original
        self._loaded: Callable[..., Any] | None = None
        self._failed = False
        self._thread = threading.local()
        self._binding = function_binding(kernel)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        self.function = function

    def put(self) -> None:
        """Put it under every name of the function."""
        own_dict(self._module)[self.kernel.name] = self.function
        self._binding.count(1 + _rebind(self._original, self.function, self.kernel))
        self._binding.ran = False
        self._binding.set("pending", "in place; loads at its first call")

    def take_out(self) -> None:
        """Put the original back under every name."""
        self.is_out = True
        names = own_dict(self._module)
        if names.get(self.kernel.name) is self.function:
            names[self.kernel.name] = self._original
        _rebind(self.function, self._original, self.kernel)
        self._binding.count(-self._binding.instances)
        # What looks for the original is not to find it here.
        del self._original, self.function.__wrapped__

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = getattr(self._thread, "inside", False)  # the kernel calls its target
        if self._loaded is None and not (inside or self._failed or self.is_out):
            self._load()
        if self.is_out:  # loading it has imported torch, or the program has
            return own_dict(self._module)[self.kernel.name](*args, **kwargs)
        if inside or self._loaded is None:
            return self._original(*args, **kwargs)
        self._thread.inside = True
        try:
            result = self._loaded(*args, **kwargs)
        except Exception as error:
            if runtime.options.raises:
                self._fail(f"raised: {type(error).__name__}: {error}", "quarantined", error)
            failure = f"raised: {type(error).__name__}: {error}"
        else:
            self._binding.has_run()
            return result
        finally:
            self._thread.inside = False
        # What the original raises as well is the program's own affair, and the kernel stays.
        result = self._original(*args, **kwargs)
        if not self._failed:
            self._fail(failure, "quarantined", None)
        return result

    def _load(self) -> None:
        assert isinstance(self.kernel.source, CodeSource)
        self._thread.inside = True
        try:
            found = self.kernel.source.given()
        except TwinkleError as error:
            self._fail(error.reason, "failed", error)
            return
        finally:
            self._thread.inside = False
        if self.is_out or "torch" in sys.modules:
            return
        if not (callable(found) and _is_plain(found) and _takes_the_same(found, self._original)):
            # What adapts one to the other needs torch.
            reason = "its arguments are written otherwise: it waits for the program to import torch"
            self._fail(reason, "pending", None)
            return
        self._loaded = found
        self._binding.set("active")

    def _fail(self, reason: str, state: str, error: Exception | None) -> None:
        self._failed, self._loaded = True, None
        self._binding.set(state, reason)
        if error is not None and runtime.options.raises:
            raise ApplyError(
                f"{self.kernel.target} is not replaced", where=self.kernel.origin, found=reason
            ) from error
        warn(f"{self.kernel.target} is not replaced: {reason} ({self.kernel.origin})")


def _rebind(old: Any, new: Any, kernel: FunctionKernel) -> int:
    """Put another function under the names of one, and in what else holds it; how many these are."""
    kernels = [getattr(kernel.source, "in_hand", None)]
    home = getattr(old, "__module__", None)
    homes = {getattr(one, "__module__", None) for one in kernels} - {"__main__", home}
    held, left = holders.rebind(old, new, kernels=kernels, homes=homes)
    for where in left:
        function_binding(kernel).note(f"{where} still holds the original")
    return len(aliases.rebind(old, new)) + len(held)


def _takes_the_same(kernel: Callable[..., Any], original: Callable[..., Any]) -> bool:
    """Whether two functions have the same arguments, with the same defaults."""
    try:
        ours, theirs = (inspect.signature(one).parameters.values() for one in (kernel, original))
    except (TypeError, ValueError):
        return False
    return [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
