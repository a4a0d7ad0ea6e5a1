"""Recognition by a canonical form: for ops whose code has many spellings that agree on most inputs.

The ``recognition.py`` of such an op has four functions more:

    by_form(variant)                     whether a variant is recognised this way
    canonical(term, turned, make)        the canonical form of a term relative to one of its inputs, and facts
    possible_form(variant, parts)        whether a canonical form with these parts can be that variant
    alike()                              the arguments of the definition for inputs that are treated alike

What a term computes without the values of that input is bound as a whole: its fact is Python text over the
parameters. Which inputs the spellings agree on is for the maker of the kernel to know; on all others the
code itself runs.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.match.symbolic import source
from twinkle.match.symbolic.execute import Run, Unsupported, execute
from twinkle.match.symbolic.terms import Arena, Term, walk
from twinkle.match.symbolic.text import text_of
from twinkle.match.templates import Template, holes
from twinkle.match.unify import shape_key, unify

if TYPE_CHECKING:
    from types import FunctionType

    from twinkle.ops.catalog import Op

__all__ = ["Spelled", "form_template", "recognise_spelled"]

_MOST_CHOICES = 12


class Spelled(NamedTuple):
    """What a function is by its canonical form.

    Attributes:
        variant: The variant of the op.
        facts: From each argument of the definition to Python text over the parameters; ``requires`` holds
            conditions on parameters that choose this path.
        run: The execution that it was recognised in.
    """

    variant: Any
    facts: dict[str, Any]
    run: Run


def recognise_spelled(op: Op, function: FunctionType, owner: type | None, term: Term) -> Spelled | None:
    """What ``function`` is by its canonical form, or None.

    Args:
        op: The op whose core expression the code holds.
        function: A function, or a method of ``owner``.
        owner: The class of a method.
        term: What the function returns, as it was executed before.
    """
    if op.hook("canonical") is None:
        return None
    for chosen in _choices(function, term):
        try:
            made, run = execute(function, Arena(), owner=owner, keep_casts=True, assume=chosen)
        except (source.NoSource, Unsupported, RecursionError):
            return None
        if run.effects or len(walk(made)) > 400:
            continue
        found = _of_results(op, made, run)
        if found is not None:
            variant, facts = found
            conditions = [_condition(name, value) for name, (value,) in chosen.items()]
            conditions += facts.pop("requires", ())
            if conditions:
                facts["requires"] = tuple(conditions)
            return Spelled(variant, facts, run)
    return None


def _condition(name: str, value: Any) -> str:
    return f"{name} is {value}" if value is None or isinstance(value, bool) else f"{name} == {value!r}"


def _choices(function: FunctionType, term: Term) -> list[dict[str, tuple[Any]]]:
    """Values of parameters that choose the path, those of the defaults first; nothing is chosen before."""
    code, defaults = function.__code__, dict(function.__kwdefaults__ or {})
    names = code.co_varnames[: code.co_argcount]
    defaults.update(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
    values: dict[str, dict[Any, None]] = {}
    for part in walk(term):
        tests = part.args[:1] if part.op == "if" else part.args if part.op in ("and", "or", "not") else ()
        for test in tests:
            if isinstance(test, Term):
                _note(test, values)
    wanted: dict[str, list[Any]] = {}
    for name, found in values.items():
        if name in defaults:
            # A branch for the default may be one that all others raise before.
            usual = [value for value in found if value == defaults[name]]
            wanted[name] = [defaults[name], *(value for value in found if value not in usual)]
    choices = [
        {name: (value,) for name, value in zip(wanted, each, strict=True)}
        for each in product(*wanted.values())
    ]
    return [{}, *(choice for choice in choices[:_MOST_CHOICES] if choice)]


def _note(test: Term, values: dict[str, dict[Any, None]]) -> None:
    if test.op == "input":
        values.setdefault(test.args[0], {}).update({True: None, False: None})
    elif test.op == "eq" and {test.args[0].op, test.args[1].op} == {"input", "const"}:
        name, const = sorted(test.args, key=lambda side: side.op != "input")
        values.setdefault(name.args[0], {})[const.args[0]] = None


def _of_results(op: Op, term: Term, run: Run) -> tuple[Any, dict[str, Any]] | None:
    roles = op.hook("alike")()  # type: ignore[misc]
    results = term.args if term.op == "tuple" else (term,)
    if not 0 < len(results) <= len(roles):
        return None
    variant: Any = None
    facts: dict[str, Any] = {}
    requires: dict[str, None] = {}
    for role, result in zip(roles, results, strict=False):
        found = _of_result(op, result, run, roles[0])
        if found is None:
            return None
        facts_of_it = dict(found[1])
        turned = facts_of_it.pop(roles[0])
        requires.update(dict.fromkeys(facts_of_it.pop("requires", ())))
        if variant is not None and (found[0] is not variant or not facts_of_it.items() <= facts.items()):
            return None
        variant, facts = found[0], {**facts, **facts_of_it, role: turned}
    return variant, {**facts, "requires": tuple(requires)} if requires else facts


def _of_result(op: Op, term: Term, run: Run, first: str) -> tuple[Any, dict[str, Any]] | None:
    kinds = {**holes(op), **{role: "table" for role, kind in op.roles.items() if kind in ("table", "size")}}
    parts = walk(term)
    twice = {id(cast) for cast, count in run.idioms.casts.items() if count > 1 and cast.args[1].op == "dtype"}
    for turned in [part for part in parts if part.op == "input"]:
        if any(id(part) in twice and _reads(part.args[0], turned) for part in parts):
            continue
        made, more = op.hook("canonical")(term, turned, run.arena.term)  # type: ignore[misc]
        key = shape_key(made)
        of_form = walk(made)
        for template in (
            form_template(op, variant)
            for variant in op.variants
            if op.hook("by_form")(variant) and op.hook("possible_form")(variant, of_form)  # type: ignore[misc]
        ):
            bound = unify(template.term, made, kinds) if template.key == key else None
            if bound is None or bound[first] is not turned:
                continue
            texts = {
                role: text_of(value.args[0] if value.op == "table" else value)
                for role, value in bound.items()
            }
            if None not in texts.values():
                return template.variant, {**texts, **more}
    return None


def _reads(value: Any, turned: Term) -> bool:
    """Whether a term reads the values of a tensor."""
    if isinstance(value, tuple):
        return any(_reads(item, turned) for item in value)
    if not isinstance(value, Term) or value.op in ("shape", "dtype_of", "ndim"):
        return False
    return value is turned or _reads(value.args, turned)


@cache
def form_template(op: Op, variant: Any) -> Template:
    """The template of a variant that is recognised by its form."""
    alike = op.hook("alike")()  # type: ignore[misc]
    definition = getattr(op.module("reference"), op.name)
    run = Run(Arena(), inline=200, keep_casts=True)
    given: dict[str, Term] = {"variant": run.embed(variant)}
    for name, parameter in inspect.signature(definition).parameters.items():
        if name in alike[1:]:
            given[name] = run.none  # one of them alone
        elif name in op.roles:
            given[name] = run.arena.term("hole", name)
        elif parameter.default is not parameter.empty:
            given.setdefault(name, run.embed(parameter.default))
    term = run.function(definition, [], given)
    made, _ = op.hook("canonical")(term, given[alike[0]], run.arena.term)  # type: ignore[misc]
    return Template(op, variant, made, shape_key(made), {})
