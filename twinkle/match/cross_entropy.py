"""The head whose logits a forward gives to torch's cross entropy itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.match.attributes import attribute_classes
from twinkle.match.logits import Head, Other, is_whole, peel
from twinkle.match.symbolic.terms import Term, show
from twinkle.match.unify import attribute_path
from twinkle.ops.causal_lm_loss.reference import CausalLMLossVariant

if TYPE_CHECKING:
    from twinkle.match.symbolic.execute import Run

__all__ = ["LossCall", "calls_of_cross_entropy", "recognise_cross_entropy"]

_OPTIONS = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
_NEEDING_LOGITS = ("weight", "size_average", "reduce")
_OF_ONE_TENSOR = ("reshape", "flatten", "to", "index", "unsqueeze", "squeeze")


class LossCall(NamedTuple):
    """A call of a cross entropy.

    Attributes:
        kind: Of the loss of a :class:`CausalLMLossVariant`.
        logits: What it is given.
        target: The labels.
        options: The rest, by name.
        criterion: The path of the ``nn.CrossEntropyLoss`` that is called; None for a function.
        constructed: Whether an ``nn.CrossEntropyLoss`` is made where it is called.
    """

    kind: str
    logits: Term
    target: Term
    options: dict[str, Term]
    criterion: str | None = None
    constructed: bool = False

    @classmethod
    def of_masked(cls, call: Term) -> LossCall | None:
        """That of a call of the loss that transformers has for masked models."""
        given = dict(zip(("logits", "labels"), call.args[1], strict=False)) | dict(call.args[2])
        if "logits" not in given or "labels" not in given:
            return None
        return cls("masked", given["logits"], given["labels"], {})

    @classmethod
    def of_term(cls, call: Term) -> LossCall | None:
        """That of a call of ``F.cross_entropy``, or of an ``nn.CrossEntropyLoss`` made where it is called."""
        made = call.args[0]
        if made.op == "call":
            options = dict(zip(_OPTIONS, made.args[1], strict=False)) | dict(made.args[2])
            return cls._of(call, options, None)
        names = ("input", "target", *_OPTIONS)
        given = dict(zip(names, call.args[1], strict=False)) | dict(call.args[2])
        if "input" not in given or "target" not in given:
            return None
        return cls("cross_entropy", given.pop("input"), given.pop("target"), given)

    @classmethod
    def of_attribute(cls, call: Term) -> LossCall | None:
        """That of a call of an attribute which is an ``nn.CrossEntropyLoss``."""
        return cls._of(call, {}, attribute_path(call.args[0]))

    @classmethod
    def _of(cls, call: Term, options: dict[str, Term], criterion: str | None) -> LossCall | None:
        given = dict(zip(("input", "target"), call.args[1], strict=False)) | dict(call.args[2])
        if set(given) != {"input", "target"}:
            return None
        return cls(
            "cross_entropy",
            given["input"],
            given["target"],
            options,
            criterion,
            constructed=criterion is None,
        )


def calls_of_cross_entropy(run: Run, owner: type) -> list[LossCall | None]:
    """The calls that a forward makes; None for one whose arguments are others."""
    found = [LossCall.of_term(call) for call in run.losses]
    calls = [(name, call) for name, call in run.calls if attribute_path(call.args[0]) == name]
    if any(len(call.args[1]) + len(call.args[2]) == 2 for _, call in calls):
        classes = attribute_classes(owner)
        found += [
            LossCall.of_attribute(call)
            for name, call in calls
            if classes.get(name) == {torch.nn.CrossEntropyLoss}
        ]
    return found


def recognise_cross_entropy(calls: list[LossCall | None]) -> Head | None:
    """The head behind the first call whose logits come from one; None where there is none."""
    for call in calls:
        if call is None:
            continue
        try:
            return _head_of(call)
        except Other:
            continue
    return None


def _head_of(call: LossCall) -> Head:
    for name in _NEEDING_LOGITS:
        if name in call.options and call.options[name].args != (None,):
            raise Other(f"expected no {name}, found {show(call.options[name], 3)}")
    steps: list[tuple[str, str | None]] = []
    rows: list[Term] = []
    head, _, output = peel(call.logits, steps, rows)
    steps.reverse()
    labels = _source(call.target)
    names = tuple(name for name, _ in steps)
    chosen = _chosen(rows)
    variant = CausalLMLossVariant(
        "_".join((call.kind, *names, *([chosen] if chosen != "all" else ()))),
        steps=names,
        sliced=False,
        loss=call.kind,  # type: ignore[arg-type]
        rows=chosen,  # type: ignore[arg-type]
    )
    facts: dict[str, Any] = {"head": head, "factors": tuple(factor for _, factor in steps), "labels": labels}
    if output is not None:
        facts["output"] = output
    if call.criterion is not None:
        facts["criterion"] = call.criterion
    if call.constructed:
        facts["constructed"] = True
    counted = _ignored(call)
    if counted is not None:
        facts["counted"] = counted
    return Head("causal_lm_loss", variant, facts, ("head", "factors", "loss_function"))


def _source(target: Term) -> str:
    """The parameter that labels are made of."""
    while target.op != "input":
        if target.op in _OF_ONE_TENSOR:
            target = target.args[0]
        elif target.op == "if":
            yes, no = map(_source, target.args[1:])
            if yes != no:
                raise Other(f"expected labels that are an argument, found {show(target, 2)}")
            return yes
        else:
            target = _given_to(target)
    name: str = target.args[0]
    return name


def _given_to(target: Term) -> Term:
    """The tensor that a method or a function is given first, or a model as what it gives back."""
    call = target.args[0] if target.op == "attr" else target
    if isinstance(call, Term) and call.op == "call":
        function = call.args[0]
        if target.op == "attr" and target.args[1] in dict(call.args[2]):
            given: Term = dict(call.args[2])[target.args[1]]
            return given
        if target is call and function.op == "attr" and function.args[0].op != "self":
            inner: Term = function.args[0]
            return inner
        if target is call and function.op == "py" and call.args[1]:
            first: Term = call.args[1][0]
            return first
    raise Other(f"expected labels that are an argument, found {show(target, 2)}")


def _chosen(rows: list[Term]) -> str:
    """Which rows of the logits the loss is about: ``all``, ``next`` (all but the last) or ``picked``."""
    indices = [term.args[1] for term in rows if term.op == "index"]
    if not indices and all(term.op in ("reshape", "flatten") for term in rows):
        return "all"
    if len(indices) == 1 and indices[0].op == "tuple" and all(term.op != "if" for term in rows):
        parts = [part for part in indices[0].args if part.op == "slice" and not is_whole(part)]
        if len(parts) == 1 and [part.args for part in parts[0].args] == [(None,), (-1,), (None,)]:
            return "next"
    return "picked"


def _ignored(call: LossCall) -> int | str | None:
    """Labels of which value do not count: a number, or the path of one; None where that is not known."""
    if call.criterion is not None:
        return f"{call.criterion}.ignore_index"
    given = call.options.get("ignore_index")
    if given is None:
        return -100
    if given.op == "const" and type(given.args[0]) is int:
        return given.args[0]
    return attribute_path(given)
