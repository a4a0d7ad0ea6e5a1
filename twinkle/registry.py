"""The registry that the Python API, ``twinkle.toml`` and the environment all fill.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle import forks
from twinkle.records import Binding, FunctionKernel, LayerKernel, LayerTarget

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = ["Registry"]


class Registry:
    """Registrations and bindings of this process.

    Readers take a snapshot (the lists are replaced, never changed in place), so that no lock is
    held while a kernel is loaded or a model is walked.

    Attributes:
        on_change: Called when the record of a kernel has changed.
    """

    def __init__(self) -> None:
        self._lock = forks.lock()
        self.layer_kernels: tuple[LayerKernel, ...] = ()
        self.layer_targets: tuple[LayerTarget, ...] = ()
        self.function_kernels: tuple[FunctionKernel, ...] = ()
        self.bindings: tuple[Binding, ...] = ()
        self.on_change: Callable[[], object] | None = None
        self._bound: dict[tuple[LayerKernel | FunctionKernel, str], Binding] = {}
        self._alike: dict[tuple[object, ...], Binding] = {}

    def add(
        self,
        *,
        layer_kernels: tuple[LayerKernel, ...] = (),
        layer_targets: tuple[LayerTarget, ...] = (),
        function_kernels: tuple[FunctionKernel, ...] = (),
    ) -> None:
        """Register all of it at once.

        A kernel registered again for the same name, device and mode takes the place of the first;
        so does a function kernel for the same target, device and mode, and a layer target for the same
        class and places.
        """
        with self._lock:
            for kernel in layer_kernels:
                key = (kernel.name, kernel.device, kernel.mode)
                kept = [k for k in self.layer_kernels if (k.name, k.device, k.mode) != key]
                self._replaced(set(self.layer_kernels).difference(kept))
                self.layer_kernels = (*kept, kernel)
            for target in layer_targets:
                others = [
                    t for t in self.layer_targets if (t.target, t.where) != (target.target, target.where)
                ]
                self.layer_targets = (*others, target)
            for function in function_kernels:
                at = (function.target, function.device, function.mode)
                left = [f for f in self.function_kernels if (f.target, f.device, f.mode) != at]
                self._replaced(set(self.function_kernels).difference(left))
                self.function_kernels = (*left, function)

    def kernels_named(self, name: str) -> tuple[LayerKernel, ...]:
        """The layer kernels registered under ``name``, in registration order."""
        return tuple(kernel for kernel in self.layer_kernels if kernel.name == name)

    def functions_of(self, module: str) -> tuple[FunctionKernel, ...]:
        """The function kernels whose target is ``module``, in registration order."""
        return tuple(f for f in self.function_kernels if f.target_module == module)

    def bind(self, kernel: LayerKernel | FunctionKernel, target: str) -> Binding:
        """The record of a registration with a target; made at the first question."""
        with self._lock:
            place: dict[Any, Binding] = self._bound
            key: tuple[object, ...] = (kernel, target)
            if kernel.alike is not None:  # and not kept here: it goes with its class
                place, key = self._alike, (target, kernel.name, kernel.device, kernel.mode, kernel.alike)
            known = place.get(key)
            if known is None:
                known = Binding(
                    "layer" if isinstance(kernel, LayerKernel) else "function",
                    target,
                    kernel.name,
                    kernel.source,
                    device=kernel.device,
                    mode=kernel.mode,
                    origin=kernel.origin,
                )
                known.on_change = self._changed
                place[key] = known
                self.bindings = (*self.bindings, known)
            return known

    def bound(self) -> tuple[tuple[LayerKernel | FunctionKernel, Binding], ...]:
        """Every kernel with its record, for the targets that there are records for."""
        with self._lock:
            return tuple((kernel, binding) for (kernel, _), binding in self._bound.items())

    def nameless(self) -> tuple[LayerTarget, ...]:
        """The layer targets that were bound to a name under which no kernel is registered."""
        names = {kernel.name for kernel in self.layer_kernels}
        return tuple(target for target in self.layer_targets if target.kernel_name not in names)

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def record(self, binding: Binding) -> None:
        """Take in a record that was made elsewhere."""
        with self._lock:
            if not any(known is binding for known in self.bindings):
                binding.on_change = self._changed
                self.bindings = (*self.bindings, binding)

    def unbind(self, kernel: LayerKernel | FunctionKernel, target: str) -> None:
        """Forget a record that others have taken the place of."""
        with self._lock:
            gone = self._bound.pop((kernel, target), None)
            self.bindings = tuple(binding for binding in self.bindings if binding is not gone)

    def _replaced(self, kernels: Iterable[LayerKernel | FunctionKernel]) -> None:
        """Forget the records of registrations that are no more, but for what is still in place."""
        for kernel in kernels:
            for known, target in list(self._bound):
                if known is kernel and not self._bound[known, target].instances:
                    self.unbind(known, target)

    def clear(self) -> None:
        """Forget everything; what is in place stays in place."""
        with self._lock:
            self.layer_kernels = ()
            self.layer_targets = ()
            self.function_kernels = ()
            self.bindings = ()
            self._bound = {}
            self._alike = {}
