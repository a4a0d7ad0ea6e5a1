"""The records of bindings, made when a kernel is registered and settled when its target appears."""

from __future__ import annotations

from twinkle.runtime import runtime
from twinkle.targets import Name, Op, Pattern, class_path, is_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle.records import Binding, FunctionKernel, LayerKernel, LayerTarget
    from twinkle.targets import Target

__all__ = ["declare", "function_binding", "layer_binding", "settle_target"]

BY_NAME = "kernel_layer_name"
_NOT_MET = "no such function was met yet"


def layer_binding(kernel: LayerKernel, target: type | Target) -> Binding:
    """The record of a layer kernel with a class, or with a target that no class was met for yet."""
    return runtime.registry.bind(kernel, class_path(target) if isinstance(target, type) else target.text)


def function_binding(kernel: FunctionKernel) -> Binding:
    """The record of a function kernel."""
    return runtime.registry.bind(kernel, kernel.target.text)


def declare() -> None:
    """Give every registration its record, so that the report shows what was never met as well."""
    source = runtime.registry
    targets: dict[str, list[LayerTarget]] = {}
    for target in source.layer_targets:
        targets.setdefault(target.kernel_name, []).append(target)
    for kernel in source.layer_kernels:
        for target in targets.get(kernel.name, ()):
            if target.met:
                continue
            binding = layer_binding(kernel, target.target)
            if binding.state == "pending" and not binding.reason:
                binding.set("pending", _why_pending(target.target))
        if kernel.name in targets:
            source.unbind(kernel, _by_name(kernel))
        else:
            binding = source.bind(kernel, _by_name(kernel))
            if binding.state == "pending" and not binding.reason:
                binding.set("pending", "no layer of that kernel_layer_name was met yet")
    for function in source.function_kernels:
        binding = function_binding(function)
        if binding.state == "pending" and not binding.reason:
            module = function.target_module
            binding.set("pending", f"{module} is not imported yet" if module else _NOT_MET)


def _by_name(kernel: LayerKernel) -> str:
    """What stands in the report in place of a target, for layers that name their kernel themselves."""
    return f"{BY_NAME}={kernel.name}"


def _why_pending(target: Target) -> str:
    import sys

    if isinstance(target, Name | Pattern):
        module = target.module
        if not is_pattern(module) and module not in sys.modules:
            return f"{module} was not imported yet"
    return "no such layer was met yet"


def settle_target(kernels: tuple[LayerKernel, ...], entry: LayerTarget | None, cls: type) -> None:
    """Drop the records of a registration without a class, or of another name of it: one was met for it.

    Args:
        kernels: Those that are bound to the class.
        entry: The registration that bound them; None for a class that names its kernel itself.
        cls: The class.
    """
    if entry is None:
        for kernel in kernels:
            runtime.registry.unbind(kernel, _by_name(kernel))
    elif entry.met and not isinstance(entry.target, Name):
        return  # at each construction: its records are dropped already
    elif isinstance(entry.target, Pattern | Op) or entry.target.text != class_path(cls):
        entry.met = True
        for kernel in runtime.registry.kernels_named(entry.kernel_name):
            runtime.registry.unbind(kernel, entry.target.text)
            if isinstance(entry.target, Name):
                layer_binding(kernel, cls).note(f"registered as {entry.target}")
