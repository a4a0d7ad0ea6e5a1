"""The public API: register kernels, put them in place, take them out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.kernel._calling import caller, register_document
from twinkle.kernel.function import (
    FuncRepositoryProtocol,
    apply_function_kernel,
    function_kernels,
    register_function_kernel,
    unapply_function_kernel,
)
from twinkle.kernel.layer import (
    kernelize_model,
    kernelized,
    register_external_layer,
    register_layer_kernel,
    unkernelize_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FuncRepositoryProtocol",
    "apply_function_kernel",
    "function_kernels",
    "kernelize_model",
    "kernelized",
    "register_external_layer",
    "register_function_kernel",
    "register_kernels",
    "register_layer_kernel",
    "unapply_function_kernel",
    "unkernelize_model",
]


def register_kernels(config: Mapping[str, object]) -> None:
    """Register layer and function kernels together.

    Args:
        config: ``{"layers": {kernel_name: spec}, "functions": {func_name: spec}}``, where a spec
            holds the arguments of :func:`register_layer_kernel` (and ``target``, what
            :func:`register_external_layer` takes) or of :func:`register_function_kernel`; ``match``,
            an op, stands in place of ``target`` and of ``target_module``. Either
            may be a list of specs that carry ``kernel_name`` or ``func_name``. It is not changed.

    Raises:
        ConfigError: Something in it cannot be right; nothing was registered.
    """
    register_document(config, where=caller())
