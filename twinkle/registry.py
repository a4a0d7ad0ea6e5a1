"""The one registry that the Python API, ``twinkle.toml`` and the environment all fill.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import threading

from twinkle.records import Binding, FunctionKernel, LayerKernel, LayerTarget

__all__ = ["Registry", "registry"]


class Registry:
    """Registrations and bindings of this process.

    Readers take a snapshot (the lists are replaced, never changed in place), so that no lock is
    held while a kernel is loaded or a model is walked.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.layer_kernels: tuple[LayerKernel, ...] = ()
        self.layer_targets: tuple[LayerTarget, ...] = ()
        self.function_kernels: tuple[FunctionKernel, ...] = ()
        self.bindings: tuple[Binding, ...] = ()
        self.generation = 0

    def add(
        self,
        *,
        layer_kernels: tuple[LayerKernel, ...] = (),
        layer_targets: tuple[LayerTarget, ...] = (),
        function_kernels: tuple[FunctionKernel, ...] = (),
    ) -> None:
        """Register all of it at once.

        A kernel registered again for the same name, device and mode takes the place of the first;
        so does a function kernel for the same target, device and mode.
        """
        with self._lock:
            for kernel in layer_kernels:
                key = (kernel.name, kernel.device, kernel.mode)
                kept = [k for k in self.layer_kernels if (k.name, k.device, k.mode) != key]
                self.layer_kernels = (*kept, kernel)
            for target in layer_targets:
                same = [t for t in self.layer_targets if t.target != target.target]
                self.layer_targets = (*same, target)
            for function in function_kernels:
                at = (function.target, function.device, function.mode)
                others = [f for f in self.function_kernels if (f.target, f.device, f.mode) != at]
                self.function_kernels = (*others, function)
            self.generation += 1

    def kernels_named(self, name: str) -> tuple[LayerKernel, ...]:
        """The layer kernels registered under ``name``, in registration order."""
        return tuple(kernel for kernel in self.layer_kernels if kernel.name == name)

    def functions_of(self, module: str) -> tuple[FunctionKernel, ...]:
        """The function kernels whose target is ``module``, in registration order."""
        return tuple(f for f in self.function_kernels if f.target_module == module)

    def bind(self, binding: Binding) -> Binding:
        """Record a binding, or return the record that stands for the same one."""
        with self._lock:
            key = _key(binding)
            for known in self.bindings:
                if _key(known) == key:
                    return known
            self.bindings = (*self.bindings, binding)
            return binding

    def unbind(self, kind: str, target: str, kernel: str) -> None:
        """Forget the bindings of a kernel with a target that others have taken the place of."""
        with self._lock:
            self.bindings = tuple(
                b for b in self.bindings if (b.kind, b.target, b.kernel) != (kind, target, kernel)
            )

    def clear(self) -> None:
        """Forget everything; what is in place stays in place."""
        with self._lock:
            self.layer_kernels = ()
            self.layer_targets = ()
            self.function_kernels = ()
            self.bindings = ()
            self.generation += 1


def _key(binding: Binding) -> tuple[str, ...]:
    return (
        binding.kind,
        binding.target,
        binding.kernel,
        binding.source,
        binding.device,
        binding.mode,
    )


registry = Registry()
