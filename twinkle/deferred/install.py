"""Puts deferred logits into a language model: a kernel for its forward, which lets the head defer."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING

from twinkle.deferred.compiled import tell_dynamo
from twinkle.deferred.forward import DeferringForward, module_at, reason_against
from twinkle.deferred.frames import leave_to_python
from twinkle.match.recognition import Reason
from twinkle.match.structure import check_instance, recognise
from twinkle.records import Binding, LayerKernel
from twinkle.swap.candidate import Candidate
from twinkle.swap.layers import original_class, plan, swap_out
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from torch import nn

    from twinkle.match.reads import Guard
    from twinkle.swap.layers import Plan

__all__ = ["DeferralPlan", "Installed", "install", "plan_deferral", "reason_against", "uninstall"]


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


class DeferralPlan:
    """Deferred logits for a model, with the kernel loaded; nothing of the model has been touched yet.

    Attributes:
        installed: What there is after :meth:`commit`.
        head: The module that is to defer.
        swap: That of the model.
    """

    def __init__(self, installed: Installed, head: nn.Module, swap: Plan) -> None:
        self.installed = installed
        self.head = head
        self.swap = swap

    def commit(self) -> None:
        """Make the swap."""
        self.swap.commit()

    def undo(self) -> None:
        """Bring the model back to what it was when the plan was made."""
        self.swap.undo()


def install(model: nn.Module, recognition: Any = None) -> Installed | str:
    """Let the head of a language model defer its logits where labels are given.

    The forward of the model is swapped as for any kernel (``twinkle.swap``), and lets the head defer while
    it runs; between two calls the head is what it was.

    Args:
        model: A model whose ``forward`` takes labels.
        recognition: What ``twinkle.match`` says of its class; see :func:`plan_deferral`.

    Returns:
        What was done, or why the model is left alone.
    """
    made = plan_deferral(model, recognition)
    if isinstance(made, str):
        return made
    made.commit()
    return made.installed


def plan_deferral(
    model: nn.Module, recognition: Any = None, known: Iterable[Binding] = ()
) -> DeferralPlan | str:
    """Work out :func:`install` without touching the model.

    Args:
        model: A model whose ``forward`` takes labels.
        recognition: What ``twinkle.match`` says of its class (op ``causal_lm_loss``): the path of the head
            and the names of the labels are taken from its facts. Without one the head is what
            ``get_output_embeddings()`` gives, and the class of a model that gives none is recognised.
        known: Records of bindings; one of another model of the same class counts this model in.

    Returns:
        The plan, or why the model is left alone.
    """
    if recognition is None and not _path_of_output(model):
        recognition = recognise(original_class(model)) or None
    facts = _facts(model, recognition)
    if isinstance(facts, str):
        return facts
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
    causal = _kind(recognition) == "causal"
    # Dynamo makes a loss that is constructed in the forward a function of tensors alone.
    traceable = not (facts.get("constructed") or facts.get("output") == "logits")
    forward = DeferringForward(
        original,
        path,
        labels,
        recognised=bool(facts) and traceable,
        softcapped=_is_softcapped(model, recognition),
        ignore_index=facts.get("counted"),
        traceable=traceable,
        of_language=causal,
        owner=weakref.ref(model),
    )
    guard = getattr(recognition, "guard", None)
    candidate = _candidate(forward.layer_class(), target, known, guard)
    forward.on_run = candidate.binding.has_run
    made = plan(model, [candidate])
    why = made if isinstance(made, str) else made.resolve()
    if isinstance(made, str) or why is not None:
        return str(why)
    _take_calls(made)
    tell_dynamo()
    return DeferralPlan(Installed(model, path, candidate.binding), head, made)


def _kind(recognition: Any) -> str:
    """Of the loss, as of a :class:`CausalLMLossVariant`; without a recognition that of language models."""
    return str(getattr(getattr(recognition, "variant", None), "loss", "causal"))


def _facts(model: nn.Module, recognition: Any) -> dict[str, Any] | str:
    """The facts of a recognition; of the model itself where its class does not tell the path of the head."""
    facts = dict(getattr(recognition, "facts", None) or {})
    direct = reason_against(module_at(model, facts.get("head", "")), loaded=False) is None
    if not facts or (direct and _kind(recognition) == "causal"):
        return facts
    found = check_instance(recognition, model)
    if isinstance(found, Reason):
        # A head which is no linear layer has a better reason against it.
        return facts if _kind(recognition) == "causal" and "output" not in facts else str(found)
    return found


def uninstall(installed: Installed) -> None:
    """Undo :func:`install`."""
    swap_out(installed.model)


def _take_calls(made: Plan) -> None:
    """Load the kernel of a swap now, also on ``meta``: a model may be compiled before its first call."""
    dispatch = made.dispatch
    for entry in dispatch.entries:
        if entry.state == "new":
            dispatch.prepare(entry, (made.module,))
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
        guard: What of the model's code it rests on.

    Attributes:
        wraps: True: the forward is the program's own, with the head's part deferred.
    """

    kind = "embedded"
    wraps = True

    def __init__(self, kernel: type[nn.Module], guard: Guard | None) -> None:
        self._kernel = kernel
        self.guard = guard

    def describe(self) -> str:
        return "embedded causal_lm_loss"

    def load(self) -> type[nn.Module]:
        return self._kernel


def _candidate(
    kernel: type[nn.Module], target: type, known: Iterable[Binding], guard: Guard | None
) -> Candidate:
    source = _Source(kernel, guard)
    record = LayerKernel("causal_lm_loss", source, origin="embedded", chosen_by="twinkle", recognised=True)
    where = f"{target.__module__}:{target.__qualname__}"
    binding = Binding("layer", where, "causal_lm_loss", source, origin="embedded")
    what = (binding.target, binding.kernel, binding.source)
    same = (one for one in known if (one.target, one.kernel, one.source) == what)
    return Candidate(record, next(same, binding))
