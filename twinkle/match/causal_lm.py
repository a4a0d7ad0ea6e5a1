"""The loss behind the head of a causal language model, in the forward that computes it."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.match.recognition import NearMiss
from twinkle.match.symbolic.terms import Term, show, walk
from twinkle.match.unify import attribute_path
from twinkle.ops.causal_lm_loss.reference import CausalLMLossVariant

if TYPE_CHECKING:
    from twinkle.match.symbolic.execute import Run

__all__ = ["Head", "causal_loss_names", "recognise_head"]


class Head(NamedTuple):
    """The head of a model and the causal loss behind it.

    Attributes:
        op: ``causal_lm_loss``, or None where the loss is another.
        variant: The variant of the op.
        facts: The path of the head, the factors of the steps between head and loss, and the arguments.
        instance_facts: The facts that only an instance can tell.
        near: The near miss, where the loss is another.
    """

    op: str | None
    variant: Any
    facts: dict[str, Any]
    instance_facts: tuple[str, ...]
    near: tuple[NearMiss, ...] = ()


def recognise_head(run: Run, owner: type) -> Head | None:
    """The head of a forward that ends in a causal loss; None where there is no such loss."""
    losses = [
        call for name, call in run.calls if name == "loss_function" and call.args[0].args[0].op == "self"
    ]
    return _loss(losses) if losses and _is_causal(owner) else None


class _Other(Exception):
    """The logits are not those of a head followed by the steps that the op knows."""


def _is_causal(owner: type) -> bool:
    """Whether the loss of a class may be that of causal models.

    transformers picks the loss by the class's name, from a table that it publishes.
    """
    table = causal_loss_names()
    if table is None or not any(cls.__name__ == "PreTrainedModel" for cls in owner.__mro__):
        return True
    names, causal = table
    found = re.findall(rf"({'|'.join(names)})", owner.__name__)
    name = owner.__name__ if owner.__name__ in names else (found[0] if found else "ForCausalLM")
    return name in causal


@functools.cache
def causal_loss_names() -> tuple[tuple[str, ...], frozenset[str]] | None:
    """The names of transformers' losses, and those that are the loss of causal models."""
    try:
        from transformers.loss import loss_utils
    except ImportError:
        return None
    table = loss_utils.LOSS_MAPPING
    causal = {name for name, function in table.items() if function is loss_utils.ForCausalLMLoss}
    return tuple(table), frozenset(causal)


def _loss(calls: list[Term]) -> Head:
    problem = ""
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
            return _head_of(logits, arguments)
        except _Other as error:
            problem = problem or str(error)
    near = NearMiss("causal_lm_loss", CausalLMLossVariant("plain"), problem)
    return Head(None, None, {}, (), (near,))


def _head_of(logits: Term, arguments: dict[str, Term]) -> Head:
    steps: list[tuple[str, str | None]] = []
    head, hidden = _peel(logits, steps)
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
    for role in ("labels", "shift_labels", "vocab_size"):
        if (given := arguments.get(role)) is not None and given.args != (None,):
            facts[role] = show(given).removeprefix("self.")
    return Head("causal_lm_loss", variant, facts, ("head", "factors", "loss_function"))


def _peel(term: Term, steps: list[tuple[str, str | None]]) -> tuple[str, Term]:
    """The head and the hidden states below ``term``; the steps are collected from the outside in."""
    while True:
        if term.op == "call":
            path = attribute_path(term.args[0])
            if path is not None and len(term.args[1]) == 1 and not term.args[2]:
                return path, term.args[1][0]
            raise _Other(f"expected a head called with the hidden states, found {show(term, 3)}")
        if term.op == "to" and term.args[1].op == "dtype" and term.args[1].args == ("float32",):
            steps.append(("float32", None))
            term = term.args[0]
        elif term.op == "if":
            term = _optional(term, steps)
        elif (capped := _softcap(term)) is not None:
            term, factor = capped
            steps.append(("softcap", factor))
        elif term.op in ("mul", "div"):
            left, right = term.args
            if term.op == "mul" and _number(left) is not None:
                left, right = right, left
            number = _number(right)
            if number is None:
                raise _Other(f"expected the logits times a number, found {show(term, 3)}")
            steps.append(("multiply" if term.op == "mul" else "divide", number))
            term = left
        else:
            raise _Other(f"expected the result of a head, found {show(term, 3)}")


def _softcap(term: Term) -> tuple[Term, str] | None:
    """``tanh(x / c) * c``."""
    if term.op != "mul":
        return None
    for capped, outer in (term.args, term.args[::-1]):
        if capped.op == "tanh" and capped.args[0].op == "div" and capped.args[0].args[1] is outer:
            factor = _number(outer)
            if factor is not None:
                return capped.args[0].args[0], factor
    return None


def _optional(term: Term, steps: list[tuple[str, str | None]]) -> Term:
    """``x if number is None else step(x, number)``."""
    test, yes, no = term.args
    if test.op == "not":
        test, yes, no = test.args[0], no, yes
    inner: Term = yes
    if test.op == "is" and _number(test.args[0]) is not None:
        capped = _softcap(no)
        if capped is not None and capped[0].op == "to" and capped[0].args[0] is yes:
            steps.append(("optional_softcap_float32", capped[1]))
            return inner
        if capped is not None and capped[0] is yes and capped[1] == _number(test.args[0]):
            steps.append(("optional_softcap", capped[1]))
            return inner
        if no.op in ("mul", "div") and no.args[0] is yes and _number(no.args[1]) == _number(test.args[0]):
            steps.append(("optional_multiply" if no.op == "mul" else "optional_divide", _number(no.args[1])))
            return inner
    raise _Other(f"expected one way from the head to the loss, found {show(term, 2)}")


def _number(term: Term) -> str | None:
    """A number that the instance holds, as a path from it: ``config.final_logit_softcapping``."""
    if term.op == "const":
        return repr(term.args[0]) if isinstance(term.args[0], int | float) else None
    parts = walk(term)
    allowed = {"attr", "self", "call", "const", "index", "py", "pow"}
    if any(part.op not in allowed for part in parts) or not any(part.op == "self" for part in parts):
        return None
    return show(term, 9).removeprefix("self.")
