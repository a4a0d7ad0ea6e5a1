"""Recognition of a class or a function by the structure of its code.

    >>> from twinkle.match.structure import recognise
    >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
    >>> found = recognise(LlamaRMSNorm)
    >>> found.op, found.variant.name, found.facts["eps"]
    ('rms_norm', 'llama', 'variance_epsilon')

No name of a class, function or attribute takes part in the decision.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch

from twinkle.match.attributes import attribute_classes
from twinkle.match.causal_lm import recognise_head
from twinkle.match.instance import read_instance
from twinkle.match.near_misses import near_misses, ops_with_core
from twinkle.match.recognition import NearMiss, Reason, Recognition
from twinkle.match.spelled import recognise_spelled
from twinkle.match.symbolic import source
from twinkle.match.symbolic.execute import Run, Unsupported, execute
from twinkle.match.symbolic.terms import Arena, Term, show, walk
from twinkle.match.symbolic.text import text_of
from twinkle.match.templates import holes, templates
from twinkle.match.unify import Bindings, attribute_path, is_given, shape_key, unify
from twinkle.runtime import runtime
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from twinkle.ops.catalog import Op

__all__ = ["NearMiss", "Reason", "Recognition", "check_instance", "recognise", "recognitions"]


class _Recognitions:
    """The recognitions of classes and functions so far, and the code that they are of.

    By the object, not by its code: two modules may hold the same code over different helpers.
    """

    def __init__(self) -> None:
        self.by_object: WeakKeyDictionary[Any, tuple[Any, Recognition]] = WeakKeyDictionary()


def recognise(obj: Any) -> Recognition:
    """Recognise a class (by the ``forward`` its instances run) or a function.

    Args:
        obj: A class, a function, or a layer that `kernels` made of a function.

    Returns:
        The recognition; false when nothing was recognised. The same object as long as the code is the same.
    """
    function, owner, reason = _code(obj)
    target = _target(obj if owner is not None or function is None else function)
    if function is None:
        return Recognition(target, reason=reason)
    key = function if owner is None else owner
    known = runtime.of(_Recognitions).by_object
    code = ref(function), reason  # not the function itself: it may hold its class
    before, found = known.get(key, (None, None))
    if found is None or before != code or not found.guard.holds(cls=owner):
        found = _recognise(target, function, owner, reason)
        known[key] = code, found
    return found


def recognitions() -> tuple[Recognition, ...]:
    """What the classes that are alive were recognised as so far."""
    known = list(runtime.of(_Recognitions).by_object.items())
    return tuple(found for key, (_, found) in known if isinstance(key, type))


def check_instance(recognition: Recognition, module: Any) -> dict[str, Any] | Reason:
    """Read the facts that only an instance can tell (:func:`twinkle.match.instance.read_instance`).

    Args:
        recognition: The recognition of ``type(module)``.
        module: An instance.

    Returns:
        The facts, or the reason why this instance is not to be replaced.
    """
    return read_instance(recognition, module, recognise)


def _code(obj: Any) -> tuple[FunctionType | None, type | None, str | None]:
    owner = obj if isinstance(obj, type) else None
    function: Any = own_forward(obj) if owner is not None else source.function_of_callable(obj)
    if function is None:
        return None, None, "it has no forward" if owner is not None else "it is no function with a source"
    function, foreign = source.unwrap(function)
    if not isinstance(function, FunctionType):
        return None, owner, "its forward is no Python function"
    return function, owner, None if foreign is None else f"its forward is wrapped by {foreign}"


def _target(obj: Any) -> str:
    name = getattr(obj, "__qualname__", None) or type(obj).__qualname__
    return f"{getattr(obj, '__module__', type(obj).__module__)}:{name}"


def _recognise(target: str, function: FunctionType, owner: type | None, reason: str | None) -> Recognition:
    if reason is not None:
        return Recognition(target, reason=reason)
    try:
        term, run = execute(function, Arena(), owner=owner)
    except (source.NoSource, Unsupported) as error:
        return Recognition(target, reason=str(error))
    except RecursionError:
        return Recognition(target, reason="too deep to follow")
    found = _as_expression(target, function, owner, term, run)
    if found is not None:
        return found
    if owner is not None:
        head = recognise_head(run, owner)
        if head is not None:
            run.cls = None
            read = tuple(filter(None, run.reads))
            made = Recognition(target, head.op, head.variant, head.facts, head.instance_facts, reads=read)
            return replace(made, _nearest=lambda: head.near) if head.near else made
    run.cls = None
    if not ops_with_core(term):
        return Recognition(target)  # and the terms need not be kept
    why = "; ".join(run.effects) or None
    return Recognition(target, reason=why, _nearest=partial(near_misses, term, run))


def _as_expression(
    target: str, function: FunctionType, owner: type | None, term: Term, run: Run
) -> Recognition | None:
    if len(walk(term)) > 400:
        return None
    # Methods that overwrite their own input in place, or write attributes, are more than what they return.
    if not run.effects:
        made = _lookup(target, term, run, ())
        if made is not None:
            return made
    for assume in _assumptions(function, term):
        special, special_run = execute(function, Arena(), owner=owner, assume=assume)
        if not special_run.effects:
            requires = tuple(f"{name} {state}" for name, state in assume.items())
            made = _lookup(target, special, special_run, requires)
            if made is not None:
                return made
    for op in ops_with_core(term):
        spelled = recognise_spelled(op, function, owner, term)
        if spelled is not None:
            read = tuple(filter(None, spelled.run.reads))
            return Recognition(target, op.name, spelled.variant, spelled.facts, reads=read)
    return None


def _assumptions(function: FunctionType, term: Term) -> list[dict[str, str]]:
    """Parameters whose being None chooses the path, when all the others are used as they are."""
    tested = [
        part.args[0].args[0]
        for part in walk(term)
        if part.op == "is" and part.args[0].op == "input" and part.args[1].args == (None,)
    ]
    optional = [
        name
        for name, parameter in inspect.signature(function, follow_wrapped=False).parameters.items()
        if parameter.default is not parameter.empty or name in tested
    ]
    names = [name for name in dict.fromkeys(tested) if name in optional]
    if not names or len(names) > 2:
        return []
    return [dict.fromkeys(names, "given"), dict.fromkeys(names, "absent")]


def _lookup(target: str, term: Term, run: Run, requires: tuple[str, ...]) -> Recognition | None:
    guards = tuple(
        dict.fromkeys(path for guard in run.guards for part in walk(guard) if (path := attribute_path(part)))
    )
    for op in ops_with_core(term):
        rewritten = op.hook("rewritten")
        form, more = (term, {}) if rewritten is None else rewritten(term, run.arena.term)
        key, operations = shape_key(form), {part.op for part in walk(form)}
        kinds = holes(op, of_function=run.cls is None)
        for template in templates(op).among(operations):
            bound = unify(template.term, form, kinds) if template.key == key else None
            if (
                bound is not None
                and _apart(bound)
                and _plausible(op, template.variant, bound, run.cls)
                and _tellable(op, bound)
            ):
                facts, instance_facts = _facts(bound)
                facts.update(template.says)
                facts.update(more)
                if requires:
                    facts["requires"] = requires
                read = tuple(filter(None, run.reads))
                return Recognition(target, op.name, template.variant, facts, instance_facts, guards, read)
    return None


def _apart(bound: Bindings) -> bool:
    """Whether no argument has two roles: ``x * sigmoid(x)`` is no product of two inputs."""
    given = [term for term in bound.values() if term.op == "input"]
    return len({*map(id, given)}) == len(given)


def _plausible(op: Op, variant: Any, bound: Bindings, owner: type | None) -> bool:
    """Whether ``__init__`` builds what is bound, where two roles are written alike.

    The calls of a dropout, a norm and a linear layer are, and the products with a number and with a tensor.
    """
    paths = {role: path for role, term in bound.items() if (path := attribute_path(term)) is not None}
    alike = op.hook("written_alike")
    factors = paths.keys() & set(() if alike is None else alike(variant))
    layers = {role for role in paths if op.roles.get(role) in _LAYERS}
    classes = attribute_classes(owner) if owner is not None and (factors or layers) else {}
    if not all(
        _may_be(op.roles[role], {cls for cls in classes.get(paths[role], ()) if hasattr(cls, "forward")})
        for role in layers
    ):
        return False
    return all(
        paths[role] not in classes
        or (op.roles[role] == "tensor") == any(issubclass(cls, torch.Tensor) for cls in classes[paths[role]])
        for role in factors
    )


_LAYERS = ("dropout", "norm", "linear")


def _may_be(kind: str, classes: set[type]) -> bool:
    """Whether a layer of one of the classes may have the role of that kind; any may where none is known."""
    dropouts = {cls for cls in classes if cls.__name__ in ("Dropout", "Identity")}
    if not classes or kind == "dropout":
        return not classes or bool(dropouts)
    if kind == "linear":
        return bool(classes - dropouts)
    linear = {cls for cls in classes if issubclass(cls, torch.nn.Linear)}
    return bool(classes - linear - {cls for cls in dropouts if cls.__name__ == "Dropout"})


def _tellable(op: Op, bound: Bindings) -> bool:
    """Whether a shape is an attribute, an argument or numbers: no kernel is handed one that is computed."""
    shapes = (bound[role] for role, kind in op.roles.items() if kind == "shape" and role in bound)
    return all(_numbers(s) is not None or _shape_path(s) is not None or _is_given_shape(s) for s in shapes)


def _is_given_shape(term: Term) -> bool:
    """Whether a function is given a shape, or the shape of an argument: ``weight.shape``."""
    return is_given(term.args[0] if term.op == "shape" else term)


def _shape_path(term: Term) -> str | None:
    """The path to a shape: that of an attribute, ``weight.shape``, or that of the only number in it."""
    if term.op == "shape":
        path = attribute_path(term.args[0])
        return None if path is None else f"{path}.shape"
    if term.op in ("tuple", "list") and len(term.args) == 1:
        return attribute_path(term.args[0])
    return attribute_path(term)


def _numbers(term: Term) -> tuple[Any, ...] | None:
    """The numbers of a tuple of constants; None for any other term."""
    if term.op not in ("tuple", "list") or any(item.op != "const" for item in term.args):
        return None
    return tuple(item.args[0] for item in term.args)


def _facts(bound: Bindings) -> tuple[dict[str, Any], tuple[str, ...]]:
    facts: dict[str, Any] = {}
    ask: list[str] = []
    for role, term in bound.items():
        path = _shape_path(term.args[0] if term.op == "float" else term)
        if path is not None:
            facts[role] = path
            ask.append(role)
        elif term.op in ("attr", "shape") and _is_given_shape(term):
            facts[role] = text_of(term)
        elif term.op in ("input", "const"):
            facts[role] = term.args[0]
        elif (numbers := _numbers(term)) is not None:
            facts[role] = numbers
        elif term.op == "py":
            value = term.args[0].value
            facts[role] = value if isinstance(value, tuple) else getattr(value, "__name__", repr(value))
            if isinstance(value, tuple):
                facts[role] = _activation(value)
        elif term.op == "index" and (path := attribute_path(term.args[0])) is not None:
            facts[role] = f"{path}[{show(term.args[1])}]"
            ask.append(role)
        elif term.op == "index" and (path := attribute_path(term.args[1])) is not None:
            facts[role] = path  # the name of an entry of a table of activations
            ask.append(role)
        else:
            facts[role] = show(term)
    return facts, tuple(ask)


def _activation(key: tuple[Any, ...]) -> str:
    return "gelu_tanh" if key == ("gelu", "tanh") else str(key[0])
