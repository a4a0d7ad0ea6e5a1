"""Ops that are a place inside a larger forward: the loss behind a head, a sum before a norm."""

from __future__ import annotations

import ast
import re
from types import FunctionType
from typing import Any, Literal, NamedTuple

from twinkle.match import source
from twinkle.match.execute import Run
from twinkle.match.nearness import NearMiss
from twinkle.match.terms import Term, show, walk
from twinkle.match.unify import attribute_path
from twinkle.ops.causal_lm_loss.reference import CausalLMLossForm
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryForm
from twinkle.ops.residual_norm.reference import ResidualNormForm

__all__ = ["Site", "attribute_classes", "recognise_sites"]


class Site(NamedTuple):
    """An op inside a forward."""

    op: str | None
    form: Any
    facts: dict[str, Any]
    instance_facts: tuple[str, ...]
    near: tuple[NearMiss, ...] = ()


def recognise_sites(term: Term, run: Run, owner: type) -> Site | None:
    """The op of a forward that is more than one expression; None when there is none."""
    losses = [
        call for name, call in run.calls if name == "loss_function" and call.args[0].args[0].op == "self"
    ]
    if losses and _is_causal(owner):
        return _loss(losses)
    classes = attribute_classes(owner)
    return _qk_norm_rotary(run, classes) or _residual_norm(term, classes)


# -- the loss -------------------------------------------------------------------------------------


class _Other(Exception):
    """The logits are not what a head and simple steps make of hidden states."""


def _is_causal(owner: type) -> bool:
    """The loss of the class may be that of causal models.

    transformers picks the loss by the class's name, from a table that it publishes.
    """
    from twinkle.match.instance import causal_loss_names

    table = causal_loss_names()
    if table is None or not any(cls.__name__ == "PreTrainedModel" for cls in owner.__mro__):
        return True
    names, causal = table
    found = re.findall(rf"({'|'.join(names)})", owner.__name__)
    name = owner.__name__ if owner.__name__ in names else (found[0] if found else "ForCausalLM")
    return name in causal


def _loss(calls: list[Term]) -> Site:
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
            return _loss_site(logits, arguments)
        except _Other as error:
            problem = problem or str(error)
    near = NearMiss("causal_lm_loss", CausalLMLossForm("plain"), problem)
    return Site(None, None, {}, (), (near,))


def _loss_site(logits: Term, arguments: dict[str, Term]) -> Site:
    steps: list[tuple[str, str | None]] = []
    head, hidden = _peel(logits, steps)
    steps.reverse()
    hidden_cast = hidden.op == "to" and hidden.args[1].op == "dtype_of"
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    kind = "both" if shifted is not None else "labels"
    if labels is None or labels.args == (None,):
        kind = "shift_labels"
    names = tuple(name for name, _ in steps)
    form = CausalLMLossForm(
        "_".join(("cast", *names) if hidden_cast else names) or "plain",
        steps=names,
        hidden_cast=hidden_cast,
        labels=kind,  # type: ignore[arg-type]
        sliced=(hidden.args[0] if hidden_cast else hidden).op in ("index", "if"),
    )
    facts: dict[str, Any] = {"head": head, "factors": tuple(factor for _, factor in steps)}
    for role in ("labels", "shift_labels", "vocab_size"):
        if (given := arguments.get(role)) is not None and given.args != (None,):
            facts[role] = show(given).removeprefix("self.")
    return Site("causal_lm_loss", form, facts, ("head", "factors", "loss_function"))


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


# -- norms inside a layer -------------------------------------------------------------------------


def attribute_classes(owner: type) -> dict[str, set[type]]:
    """The classes that ``__init__`` gives the attributes of ``self``, as far as its text tells."""
    found: dict[str, set[type]] = {}
    for cls in owner.__mro__:
        init = _init(cls)
        if init is None or cls.__module__.startswith("torch."):
            continue
        try:
            node = source.parse(init)
        except source.NoSource:
            continue
        for child in ast.walk(node):
            if isinstance(child, ast.Assign) and len(child.targets) == 1:
                target = child.targets[0]
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                    for part in ast.walk(child.value):
                        if isinstance(part, ast.Call):
                            value = _resolve(part.func, init.__globals__)
                            if isinstance(value, type):
                                found.setdefault(target.attr, set()).add(value)
    return found


def _init(cls: type) -> FunctionType | None:
    init, _ = source.unwrap(vars(cls).get("__init__"))
    while isinstance(init, FunctionType):
        # A class decorator may wrap __init__ and keep it in a closure only.
        inner = [cell.cell_contents for cell in init.__closure__ or () if _is_init(cell)]
        if not inner:
            return init
        init, _ = source.unwrap(inner[0])
    return None


def _is_init(cell: Any) -> bool:
    try:
        value = cell.cell_contents
    except ValueError:
        return False
    return isinstance(value, FunctionType) and value.__name__ == "__init__"


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, names), node.attr, None)
    return None


def _norm_form(path: str | None, classes: dict[str, set[type]]) -> tuple[str, Any] | None:
    """The op and the form of the norm that an attribute holds."""
    from twinkle.match.structure import recognise

    forms = {
        (found.op, found.form) for cls in classes.get(path or "", ()) for found in [recognise(cls)] if found
    }
    norms = [(op, form) for op, form in forms if op in ("rms_norm", "layer_norm")]
    return norms[0] if len(norms) == 1 and getattr(norms[0][1], "gate", "none") == "none" else None


def _residual_norm(term: Term, classes: dict[str, set[type]]) -> Site | None:
    sites: list[dict[str, Any]] = []
    forms: list[ResidualNormForm] = []
    for part in reversed(walk(term)):
        if part.op != "call" or len(part.args[1]) != 1 or part.args[2]:
            continue
        path = attribute_path(part.args[0])
        total = part.args[1][0]
        norm = _norm_form(path, classes) if total.op == "add" else None
        if norm is None:
            continue
        scales = [_number(side.args[1]) or _number(side.args[0]) for side in total.args if side.op == "mul"]
        scale = next((scale for scale in scales if scale), None)
        sites.append({"norm": path, "scale": scale, "sum": show(total, 2)})
        forms.append(ResidualNormForm(f"{norm[0]}_{norm[1].name}", norm[1], scale is not None))
    if not forms:
        return None
    facts = {"norm": sites[0]["norm"], "scale": sites[0]["scale"], "sites": tuple(sites)}
    return Site("residual_norm", forms[0], facts, ("norm",))


def _qk_norm_rotary(run: Run, classes: dict[str, set[type]]) -> Site | None:
    from twinkle.match.structure import recognise

    for function, args in run.inlined:
        rotation = recognise(function)
        if rotation.op != "rotary" or len(args) < 2:
            continue
        q_side, k_side = _normed(args[0]), _normed(args[1])
        if q_side is None or k_side is None or q_side[1:] != k_side[1:]:
            continue
        (q_path, over, when), k_path = q_side, k_side[0]
        q_norm, k_norm = _norm_form(q_path, classes), _norm_form(k_path, classes)
        if q_norm is None or q_norm != k_norm or q_norm[0] != "rms_norm":
            continue
        form = QKNormRotaryForm(
            f"{q_norm[1].name}_{rotation.form.name}_{over}", q_norm[1], rotation.form, over
        )
        facts = {"q_norm": q_path, "k_norm": k_path, "rotary": rotation.target, "when": when}
        return Site("qk_norm_rotary", form, facts, ("q_norm", "k_norm"))
    return None


def _normed(term: Term) -> tuple[str, Literal["head", "all"], str | None] | None:
    """The norm on the way from a projection to the rotation, what it is over, and the flag it depends on."""
    split, when = False, None
    while True:
        if term.op in ("reshape", "unflatten"):
            split, term = True, term.args[0]
        elif term.op == "transpose":
            term = term.args[0]
        elif term.op == "if" and when is None and (when := attribute_path(term.args[0])) is not None:
            term = term.args[1]
        elif term.op == "call":
            path = attribute_path(term.args[0])
            if path is None or len(term.args[1]) != 1:
                return None
            return path, "all" if split else "head", when
        else:
            return None
