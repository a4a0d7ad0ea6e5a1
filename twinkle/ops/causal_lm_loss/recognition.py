"""What must hold of a causal language model whose head may give deferred logits."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["check"]

_LOSS = "transformers.loss.loss_utils.ForCausalLMLoss"


def check(instance: Any) -> None:
    """A plain linear layer at the end of the head, numbers as factors, and the loss of causal models."""
    import torch

    facts, head = instance.facts, instance.facts["head"]
    layer = instance.get(head)
    while type(layer) is not torch.nn.Linear:
        inner = instance.last_layer(layer)
        if inner is None:
            instance.refuse(
                f"{head} is a {type(layer).__qualname__}, and no torch.nn.Linear makes its result"
            )
        head = f"{head}.{inner}"
        layer = instance.get(head)
    instance.check_hooks(head, layer)
    facts["head"] = head
    steps = zip(instance.variant.steps, facts["factors"], strict=True)
    facts["factors"] = tuple(_factor(instance, step, path) for step, path in steps)
    loss = instance.function_of(getattr(instance.module, "loss_function", None))
    if loss is None or f"{loss.__module__}.{loss.__qualname__}" != _LOSS:
        instance.refuse(
            f"its loss_function is {getattr(loss, '__qualname__', loss)}, not that of causal models"
        )
    facts["loss_function"] = loss.__qualname__
    facts["vocab_size"], facts["hidden_size"] = layer.weight.shape
    facts["bias"] = layer.bias is not None


def _factor(instance: Any, step: str, path: str | None) -> float | None:
    if path is None or (step.startswith("optional_") and instance.number(path) is None):
        return None
    value = instance.number(path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        instance.refuse(f"{path} is {type(value).__name__}, not a number")
    return value  # type: ignore[no-any-return]
