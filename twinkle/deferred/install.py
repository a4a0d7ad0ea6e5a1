"""Puts deferred logits into a causal language model: a kernel for its forward, which lets the head defer."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING

from twinkle.deferred.forward import (
    DeferringForward,
    leave_to_python,
    module_at,
    reason_against,
)
from twinkle.records import Binding, LayerKernel
from twinkle.swap.candidate import Candidate
from twinkle.swap.layers import original_class, placed, plan, swap_out
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import nn

__all__ = ["Installed", "install", "reason_against", "uninstall"]


class Installed:
    """A model whose head defers its logits.

    Attributes:
        model: The model.
        head: The path of its head.
        binding: The record of the swap.
    """

    def __init__(self, model: nn.Module, head: str, binding: Binding) -> None:
        self.model = model
        self.head = head
        self.binding = binding


def install(model: nn.Module, recognition: Any = None) -> Installed | str:
    """Let the head of a causal language model defer its logits where labels are given.

    The forward of the model is swapped as for any kernel (``twinkle.swap``), and lets the head defer while
    it runs; between two calls the head is what it was.

    Args:
        model: A model whose ``forward`` takes labels.
        recognition: What ``twinkle.match`` says of its class (op ``causal_lm_loss``): the path of the head
            and the names of the labels are taken from its facts. Without one the head is what
            ``get_output_embeddings()`` gives.

    Returns:
        What was done, or why the model is left alone.
    """
    facts = dict(getattr(recognition, "facts", None) or {})
    path = facts.get("head") or _path_of_output(model)
    head = module_at(model, path) if path else None
    reason = reason_against(head, loaded=False)  # it is asked again at each call
    if reason is not None or head is None:
        return reason or "the model has no output head"
    target: Any = original_class(model)
    original: Any = own_forward(target)
    labels = _labels(original, facts)
    if not labels:
        return f"{target.__name__}.forward takes no labels"
    forward = DeferringForward(
        original,
        path,
        labels,
        recognised=bool(facts),
        softcapped=_is_softcapped(model, recognition),
        owner=weakref.ref(model),
    )
    candidate = _candidate(forward.layer_class(), target)
    why = _put_in(model, candidate)
    return Installed(model, path, candidate.binding) if why is None else why


def _put_in(model: nn.Module, candidate: Candidate) -> str | None:
    """Put the forward into the model, or say why not."""
    made = plan(model, [candidate])
    if isinstance(made, str):
        return made
    why = made.resolve()
    if why is not None:
        return why
    made.commit()
    _take_calls(model)
    return None


def uninstall(installed: Installed) -> None:
    """Undo :func:`install`."""
    swap_out(installed.model)


def _take_calls(module: nn.Module) -> None:
    """Load the kernel of a module now, also on ``meta``: a model may be compiled before its first call."""
    dispatch = placed(module)
    assert dispatch is not None
    for entry in dispatch.entries:
        if entry.state == "new":
            dispatch.prepare(entry, ())
        if entry.function is not None:
            entry.state = "live"
    dispatch.rebuild()
    leave_to_python(dispatch.function)
    if dispatch.front is not None:
        dispatch.front.on_code = leave_to_python
        leave_to_python(dispatch.front.function)


def _labels(forward: Callable[..., Any], facts: dict[str, Any]) -> dict[str, int | None]:
    """The parameters that labels come in by, and where they stand among those after ``self``."""
    parameters = inspect.signature(forward).parameters.values()
    wanted = [facts.get("labels"), facts.get("shift_labels"), "labels", "shift_labels"]
    found: dict[str, int | None] = {}
    for index, parameter in enumerate(parameters):
        if parameter.name in wanted:
            found[parameter.name] = index - 1 if parameter.kind is not parameter.KEYWORD_ONLY else None
    if found and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        found.setdefault("shift_labels", None)
    return found


def _is_softcapped(model: nn.Module, recognition: Any) -> bool:
    """Whether the model soft-caps its logits; its code may have a soft cap that its config turns off."""
    variant = getattr(recognition, "variant", None)
    steps = [step for step in getattr(variant, "steps", ()) if "softcap" in step]
    factors = recognition.facts.get("factors", ()) if steps else ()
    values = [module_at(model, factor) if isinstance(factor, str) else factor for factor in factors]
    return bool(steps) and any(value is not None for value in values)


def _path_of_output(model: nn.Module) -> str:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    paths = (name for name, module in model.named_modules() if module is head)
    return next(paths, "") if head is not None else ""


class _Source:
    """Where the kernel comes from: it is made for one model.

    Args:
        kernel: The layer class.
    """

    kind = "embedded"

    def __init__(self, kernel: type[nn.Module]) -> None:
        self._kernel = kernel

    def describe(self) -> str:
        return "embedded causal_lm_loss"

    def load(self) -> type[nn.Module]:
        return self._kernel


def _candidate(kernel: type[nn.Module], target: type) -> Candidate:
    source = _Source(kernel)
    record = LayerKernel("causal_lm_loss", source, origin="embedded", chosen_by="twinkle", recognised=True)
    where = f"{target.__module__}:{target.__qualname__}"
    return Candidate(record, Binding("layer", where, "causal_lm_loss", source, origin="embedded"))
