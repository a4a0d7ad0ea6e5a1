"""One record a binding, from the moment it is registered."""

from __future__ import annotations

from twinkle.runtime import runtime
from twinkle.targets import class_path, is_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle.records import Binding, FunctionKernel, LayerKernel, LayerTarget

__all__ = ["declare", "function_binding", "layer_binding", "settle_pattern"]

BY_NAME = "kernel_layer_name"
_NOT_MET = "no such function was met yet"


def layer_binding(kernel: LayerKernel, target: type | str) -> Binding:
    """The record of a layer kernel with a class (or with a target that no class answers to yet)."""
    return runtime.registry.bind(kernel, target if isinstance(target, str) else class_path(target))


def function_binding(kernel: FunctionKernel) -> Binding:
    """The record of a function kernel."""
    return runtime.registry.bind(kernel, kernel.target)


def declare() -> None:
    """Give every registration its record, so that the report shows what was never met as well."""
    source = runtime.registry
    targets: dict[str, list[LayerTarget]] = {}
    for target in source.layer_targets:
        targets.setdefault(target.kernel_name, []).append(target)
    for kernel in source.layer_kernels:
        for target in targets.get(kernel.name, ()):
            binding = layer_binding(kernel, target.target)
            if binding.state == "pending" and not binding.reason:
                binding.set("pending", _why_pending(target.target))
        if kernel.name in targets:
            source.unbind(kernel, f"{BY_NAME}={kernel.name}")
        else:
            binding = layer_binding(kernel, f"{BY_NAME}={kernel.name}")
            if binding.state == "pending" and not binding.reason:
                binding.set("pending", "no layer of that kernel_layer_name was met yet")
    for function in source.function_kernels:
        binding = function_binding(function)
        if binding.state == "pending" and not binding.reason:
            module = function.target_module
            binding.set("pending", _NOT_MET if function.op else f"{module} is not imported yet")


def _why_pending(target: type | str) -> str:
    import sys

    module = "" if isinstance(target, type) else target.partition(":")[0]
    if module in ("", "match") or is_pattern(module) or module in sys.modules:
        return "no such layer was met yet"
    return f"{module} was not imported yet"


def settle_pattern(kernel: LayerKernel, target: LayerTarget | None) -> None:
    """Drop the record of a pattern or a bare name now that a class answers to it."""
    if target is None:
        runtime.registry.unbind(kernel, f"{BY_NAME}={kernel.name}")
    elif isinstance(target.target, str) and (is_pattern(target.target) or target.target[:6] == "match:"):
        runtime.registry.unbind(kernel, target.target)
