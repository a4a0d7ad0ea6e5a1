"""A document of bindings, a user's or that of the embedded kernels: checked, then registered as a whole.

Standard library only, and nothing of torch: documents are registered before a program imports it.
"""

from __future__ import annotations

from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twinkle.records import ChosenBy
    from twinkle.registry import Registry

__all__ = ["register"]


def register(
    document: Mapping[str, object],
    *,
    where: str,
    locate: Callable[[tuple[str | int, ...]], str] | None = None,
    allow_objects: bool = True,
    into: Registry | None = None,
    chosen_by: ChosenBy = "user",
) -> None:
    """Validate all of a document, then register all of it.

    Args:
        document: ``{"layers": …, "functions": …}``, as ``register_kernels`` takes it.
        where: Where it was written, for messages.
        locate: Where each key of it was written; what the report calls the origin of a binding.
        allow_objects: Its values may be classes and callables: it was written in Python.
        into: What it is registered in; by default the registry of this process.
        chosen_by: Whose choice its kernels are.

    Raises:
        ConfigError: Something in it cannot be right; nothing was registered.
    """
    from twinkle.config.schema import validate

    checked = validate(
        document, where=where, locate=locate, allow_objects=allow_objects, allow_settings=False
    )
    layers, targets, functions = checked.records(trust_remote_code=runtime.options.trust_remote_code)
    for kernel in (*layers, *functions):
        kernel.chosen_by = chosen_by
    (into or runtime.registry).add(layer_kernels=layers, layer_targets=targets, function_kernels=functions)
