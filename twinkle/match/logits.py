"""From the logits that a loss gets back to the head they come from, through what is done to them between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.match.symbolic.terms import show, walk
from twinkle.match.unify import attribute_path

if TYPE_CHECKING:
    from twinkle.match.recognition import NearMiss
    from twinkle.match.symbolic.terms import Term

__all__ = ["Head", "Other", "is_whole", "peel"]


_Found = tuple[str, "Term", "int | str | None"]


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


class Other(Exception):
    """The logits are not those of a head followed by the steps that the op knows."""


def peel(term: Term, steps: list[tuple[str, str | None]], rows: list[Term] | None = None) -> _Found:
    """The head and the hidden states below ``term``.

    Args:
        term: The logits.
        steps: Gets what is done to them since the head, from the outside in: its name, and a path or number.
        rows: Gets the reshapes and indices by which rows are chosen; None where there may be none.

    Returns:
        The path of the head, what it is called with, and which of its outputs the logits are where it has
        several: a number, or ``logits`` where it is a model.

    Raises:
        Other: They are not those of a head.
    """
    while True:
        inner = _of_model(term)
        if inner is not None:
            return inner, term, "logits"
        one = _of_several(term)
        if one is not None:
            return one, term, term.args[1].args[0]
        if term.op == "call":
            path = attribute_path(term.args[0])
            if path is not None and len(term.args[1]) == 1 and not term.args[2]:
                return path, term.args[1][0], None
            raise Other(f"expected a head called with the hidden states, found {show(term, 3)}")
        if term.op == "to" and term.args[1].op == "dtype" and term.args[1].args == ("float32",):
            steps.append(("float32", None))
            term = term.args[0]
        elif rows is not None and (columns := _first_columns(term)) is not None:
            steps.append(("columns", columns))
            term = term.args[0]
        elif rows is not None and _keeps_rows(term):
            rows.append(term)
            term = term.args[0]
        elif term.op == "if":
            try:
                term = _optional(term, steps)
            except Other:
                if rows is None:
                    raise
                return _either(term, steps, rows)
        elif (capped := _softcap(term)) is not None:
            term, factor = capped
            steps.append(("softcap", factor))
        elif term.op in ("mul", "div"):
            left, right = term.args
            if term.op == "mul" and number_of(left) is not None:
                left, right = right, left
            number = number_of(right)
            if number is None:
                raise Other(f"expected the logits times a number, found {show(term, 3)}")
            steps.append(("multiply" if term.op == "mul" else "divide", number))
            term = left
        elif term.op == "add" and (added := _added(term)) is not None:
            term, path = added
            steps.append(("bias", path))
        else:
            raise Other(f"expected the result of a head, found {show(term, 3)}")


def _of_model(term: Term) -> str | None:
    """The path of a model, for ``self.model(...)[0]`` and ``self.model(...).logits``."""
    first = term.op == "index" and term.args[1].op == "const" and term.args[1].args[0] in (0, "logits")
    if not first and not (term.op == "attr" and term.args[1] == "logits"):
        return None
    call = term.args[0]
    return attribute_path(call.args[0]) if call.op == "call" and call.args[2] else None


def _of_several(term: Term) -> str | None:
    """The path of a head with several outputs, for ``self.heads(hidden, pooled)[0]``."""
    if term.op != "index" or term.args[1].op != "const" or type(term.args[1].args[0]) is not int:
        return None
    call = term.args[0]
    several = call.op == "call" and len(call.args[1]) > 1 and not call.args[2]
    return attribute_path(call.args[0]) if several else None


def _either(term: Term, steps: list[tuple[str, str | None]], rows: list[Term]) -> _Found:
    """One head on both sides of a condition, which chooses between rows alone."""
    found = []
    for side in term.args[1:]:
        done: list[tuple[str, str | None]] = []
        picked: list[Term] = []
        found.append((peel(side, done, picked), done, picked))
    (yes, steps_yes, _), (no, steps_no, _) = found
    if (yes[0], yes[2]) != (no[0], no[2]) or yes[1] is not no[1] or steps_yes != steps_no:
        raise Other(f"expected one way from the head to the loss, found {show(term, 2)}")
    steps += steps_yes
    rows += (term, *found[0][2], *found[1][2])
    return yes


def _keeps_rows(term: Term) -> bool:
    """Whether it chooses or arranges rows, and leaves the vocabulary as it is."""
    if term.op == "reshape" and term.args[1].op == "tuple":
        return len(term.args[1].args) > 1 and not _of_an_input(term.args[1].args[-1])
    if term.op == "flatten":
        return all(arg.op == "const" for arg in term.args[1:]) and term.args[2].args[0] not in (-1, None)
    if term.op != "index":
        return False
    index = term.args[1]
    if index.op != "tuple":
        return index.op in _MASKS or is_whole(index)
    dots = [at for at, part in enumerate(index.args) if part.op == "const" and part.args[0] is Ellipsis]
    if any(part.op not in ("slice", *_MASKS) for at, part in enumerate(index.args) if at not in dots):
        return False
    # Without an ellipsis the vocabulary is the third dimension.
    return is_whole(index.args[-1]) if dots or len(index.args) > 2 else True


def _of_an_input(size: Term) -> bool:
    """Whether it is a size of what the forward is given: no vocabulary, but a number of choices, say."""
    return any(part.op == "shape" and part.args[0].op == "input" for part in walk(size)) and not any(
        part.op == "shape" and part.args[0].op != "input" for part in walk(size)
    )


def _first_columns(term: Term) -> str | None:
    """``[..., :number]``: the vocabulary without what it was padded by."""
    if term.op != "index" or term.args[1].op != "tuple" or len(term.args[1].args) != 2:
        return None
    dots, part = term.args[1].args
    if dots.args != (Ellipsis,) or part.op != "slice" or part.args[0].args != (None,):
        return None
    return number_of(part.args[1]) if part.args[2].args == (None,) and not is_whole(part) else None


_MASKS = ("eq", "not", "and", "or", "lt", "le")


def is_whole(term: Term) -> bool:
    """Whether it is ``:``."""
    return term.op == "slice" and all(part.args == (None,) for part in term.args)


def _added(term: Term) -> tuple[Term, str] | None:
    """``x + self.bias``."""
    for tensor, other in (term.args, term.args[::-1]):
        path = attribute_path(other)
        if path is not None and attribute_path(tensor) is None:
            return tensor, path
    return None


def _softcap(term: Term) -> tuple[Term, str] | None:
    """``tanh(x / c) * c``."""
    if term.op != "mul":
        return None
    for capped, outer in (term.args, term.args[::-1]):
        if capped.op == "tanh" and capped.args[0].op == "div" and capped.args[0].args[1] is outer:
            factor = number_of(outer)
            if factor is not None:
                return capped.args[0].args[0], factor
    return None


def _optional(term: Term, steps: list[tuple[str, str | None]]) -> Term:
    """``x if number is None else step(x, number)``."""
    test, yes, no = term.args
    if test.op == "not":
        test, yes, no = test.args[0], no, yes
    inner: Term = yes
    if test.op == "is" and number_of(test.args[0]) is not None:
        capped = _softcap(no)
        if capped is not None and capped[0].op == "to" and capped[0].args[0] is yes:
            steps.append(("optional_softcap_float32", capped[1]))
            return inner
        if capped is not None and capped[0] is yes and capped[1] == number_of(test.args[0]):
            steps.append(("optional_softcap", capped[1]))
            return inner
        scaled = no.op in ("mul", "div") and no.args[0] is yes
        if scaled and number_of(no.args[1]) == number_of(test.args[0]):
            name = "optional_multiply" if no.op == "mul" else "optional_divide"
            steps.append((name, number_of(no.args[1])))
            return inner
    raise Other(f"expected one way from the head to the loss, found {show(term, 2)}")


def number_of(term: Term) -> str | None:
    """A number that the instance holds, as a path from it: ``config.final_logit_softcapping``."""
    if term.op == "const":
        return repr(term.args[0]) if isinstance(term.args[0], int | float) else None
    parts = walk(term)
    allowed = {"attr", "self", "call", "const", "index", "py", "pow"}
    if any(part.op not in allowed for part in parts) or not any(part.op == "self" for part in parts):
        return None
    return show(term, 9).removeprefix("self.")
