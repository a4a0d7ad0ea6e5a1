"""What must hold of a causal language model whose head may give deferred logits."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["check"]

_LOSSES = {
    "causal": "transformers.loss.loss_utils.ForCausalLMLoss",
    "masked": "transformers.loss.loss_utils.ForMaskedLMLoss",
}


def check(instance: Any) -> None:
    """A plain linear layer at the end of the head, numbers as factors, and the loss that was recognised."""
    import torch

    facts, head = instance.facts, instance.facts["head"]
    layer = instance.get(head)
    output = facts.get("output")
    if output == "logits":
        head = f"{head}.{instance.head_of(layer)}"
        layer = instance.get(head)
    while type(layer) is not torch.nn.Linear:
        inner = instance.last_layer(layer, output)
        output = None
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
    for step, factor in zip(instance.variant.steps, facts["factors"], strict=True):
        if step == "columns" and factor < layer.weight.shape[0]:
            instance.refuse(f"its loss is of {factor:g} of the {layer.weight.shape[0]} columns of {head}")
    if instance.variant.loss == "cross_entropy":
        _check_criterion(instance)
    else:
        _check_loss(instance, _LOSSES[instance.variant.loss])
    if isinstance(facts.get("counted"), str):
        facts["counted"] = instance.get(facts["counted"])
    facts["vocab_size"], facts["hidden_size"] = layer.weight.shape
    facts["bias"] = layer.bias is not None
    if instance.variant.loss == "cross_entropy" and facts["vocab_size"] <= facts["hidden_size"]:
        instance.refuse(f"{head} is a classifier's: its logits take no more memory than what it is given")


def _check_loss(instance: Any, wanted: str) -> None:
    loss = instance.function_of(getattr(instance.module, "loss_function", None))
    if loss is None or f"{loss.__module__}.{loss.__qualname__}" != wanted:
        found = getattr(loss, "__qualname__", loss)
        instance.refuse(f"its loss_function is {found}, not that of {instance.variant.loss} models")
    instance.facts["loss_function"] = loss.__qualname__


def _check_criterion(instance: Any) -> None:
    import torch

    path = instance.facts.get("criterion")
    if path is None:
        return
    criterion = instance.get(path)
    if type(criterion) is not torch.nn.CrossEntropyLoss:
        instance.refuse(f"{path} is a {type(criterion).__qualname__}, not a torch.nn.CrossEntropyLoss")
    if criterion.weight is not None:
        instance.refuse(f"{path} has weights of the classes, which need the logits")


def _factor(instance: Any, step: str, path: str | None) -> Any:
    import torch

    if path is None or (step.startswith("optional_") and instance.number(path) is None):
        return None
    value = instance.number(path)
    if step == "bias":
        if not isinstance(value, torch.Tensor):
            instance.refuse(f"{path} is {type(value).__name__}, not a tensor")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        instance.refuse(f"{path} is {type(value).__name__}, not a number")
    return value
