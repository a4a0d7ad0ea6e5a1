"""The loss behind the head of a causal language model, in the forward that computes it."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from twinkle.match.cross_entropy import LossCall, calls_of_cross_entropy, recognise_cross_entropy
from twinkle.match.logits import Head, Other, peel
from twinkle.match.recognition import NearMiss
from twinkle.match.symbolic.terms import Term, show
from twinkle.ops.causal_lm_loss.reference import CausalLMLossVariant

if TYPE_CHECKING:
    from twinkle.match.symbolic.execute import Run

__all__ = ["loss_names", "recognise_head"]


def recognise_head(run: Run, owner: type) -> Head | None:
    """The head of a forward that ends in a loss of its logits; None where there is no such loss."""
    losses = [
        call for name, call in run.calls if name == "loss_function" and call.args[0].args[0].op == "self"
    ]
    kind = _kind_of_loss(owner) if losses else None
    head = None
    if kind == "causal":
        head = _loss(losses, run)
    elif kind == "masked":
        head = recognise_cross_entropy([LossCall.of_masked(call) for call in losses])
    if head is None or head.op is None:
        own = recognise_cross_entropy(calls_of_cross_entropy(run, owner))
        head = own if own is not None else head
    return head


def _kind_of_loss(owner: type) -> str | None:
    """Whether the ``loss_function`` of a class is that of causal or of masked models; None for another.

    transformers picks the loss by the class's name, from a table that it publishes.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in owner.__mro__):
        return "causal"
    table = loss_names()
    if table is None:
        return "causal"
    found = re.findall(rf"({'|'.join(table)})", owner.__name__)
    name = owner.__name__ if owner.__name__ in table else (found[0] if found else "ForCausalLM")
    return table[name]


@functools.cache
def loss_names() -> dict[str, str | None] | None:
    """The names of transformers' losses, and which are that of causal or of masked models.

    Asked for a model of transformers alone: without transformers there is none.
    """
    try:
        from transformers.loss import loss_utils
    except ImportError:
        return None
    kinds = {loss_utils.ForCausalLMLoss: "causal", loss_utils.ForMaskedLMLoss: "masked"}
    return {name: kinds.get(function) for name, function in loss_utils.LOSS_MAPPING.items()}


def _loss(calls: list[Term], run: Run) -> Head:
    problem = ""
    alone = len(calls) == 1 and not run.losses
    for call in calls:
        arguments = dict(zip(("logits", "labels", "vocab_size"), call.args[1], strict=False))
        arguments.update(dict(call.args[2]))
        logits = arguments.pop("logits", None)
        if logits is None or "vocab_size" not in arguments:
            problem = (
                problem or "expected logits and a vocab_size as arguments of loss_function, found others"
            )
            continue
        try:
            return _head_of(logits, arguments, counted=alone)
        except Other as error:
            problem = problem or str(error)
    near = NearMiss("causal_lm_loss", CausalLMLossVariant("plain"), problem)
    return Head(None, None, {}, (), (near,))


def _head_of(logits: Term, arguments: dict[str, Term], *, counted: bool) -> Head:
    steps: list[tuple[str, str | None]] = []
    head, hidden, output = peel(logits, steps)
    steps.reverse()
    hidden_cast = hidden.op == "to" and hidden.args[1].op == "dtype_of"
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    targets = "both" if shifted is not None else "labels"
    if labels is None or labels.args == (None,):
        targets = "shift_labels"
    names = tuple(name for name, _ in steps)
    variant = CausalLMLossVariant(
        "_".join(("cast", *names) if hidden_cast else names) or "plain",
        steps=names,
        hidden_cast=hidden_cast,
        labels=targets,  # type: ignore[arg-type]
        sliced=(hidden.args[0] if hidden_cast else hidden).op in ("index", "if"),
    )
    facts: dict[str, Any] = {"head": head, "factors": tuple(factor for _, factor in steps)}
    if output is not None:
        facts["output"] = output
    if counted:
        facts["counted"] = -100
    for role in ("labels", "shift_labels", "vocab_size"):
        if (given := arguments.get(role)) is not None and given.args != (None,):
            facts[role] = show(given).removeprefix("self.")
    return Head("causal_lm_loss", variant, facts, ("head", "factors", "loss_function"))
