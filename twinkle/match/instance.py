"""The facts that only an instance can tell: numbers, activations, biases, the type of its layers."""

from __future__ import annotations

import functools
import re
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from twinkle.match import reads
from twinkle.match.reads import Guard, Read
from twinkle.match.recognition import Reason
from twinkle.match.symbolic import source
from twinkle.match.symbolic.execute import Run, Unsupported, execute
from twinkle.match.symbolic.idioms import ACTIVATIONS
from twinkle.match.symbolic.terms import Arena, Term
from twinkle.match.unify import attribute_path
from twinkle.ops.catalog import find_op
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from twinkle.match.recognition import Recognition
    from twinkle.ops.catalog import Op

__all__ = ["Facts", "Instance", "activation_name", "elementwise_of", "read_instance", "read_path"]


class _Refused(Exception):
    pass


class Facts(dict[str, Any]):
    """What is known of a layer or a function, and what that rests on.

    Args:
        known: From each argument of the op's definition to what it is.
        reads: What it rests on besides its arguments.

    Attributes:
        paths: The numbers among them, by the attributes that they were read from: a kernel that reads them
            itself follows their changes.
    """

    def __init__(self, known: Mapping[str, Any], reads: Iterable[Read] = ()) -> None:
        super().__init__(known)
        self.paths: dict[str, str] = {}
        self._fixed = list(reads)
        self._handed: list[Read] = []
        self._kept: list[Read] = []

    def rest_on(self, *reads: Read, handed: Iterable[Read] | None = None) -> None:
        """Note what a fact rests on.

        Args:
            reads: What has to be as it is now.
            handed: What has to be instead where the kernel takes it at each call: a number, or a layer that
                it calls.
        """
        self._kept += reads
        self._handed += reads if handed is None else handed

    @property
    def guard(self) -> Guard:
        """For a kernel that was made for these facts."""
        return Guard((*self._fixed, *self._kept))

    @property
    def handed_guard(self) -> Guard:
        """For a kernel that takes numbers, tensors and layers at each call."""
        return Guard((*self._fixed, *self._handed))


def read_instance(
    recognition: Recognition, module: Any, recognise: Callable[[Any], Recognition]
) -> Facts | Reason:
    """Read from ``module`` what its class left open.

    Args:
        recognition: The recognition of ``type(module)``.
        module: An instance.
        recognise: Recognises the classes of the layers in it.

    Returns:
        The :class:`Facts`: names of attributes for tensors and layers, values for numbers and flags, a
        canonical name for an activation (``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``,
        ``sigmoid``, ``tanh``, ``quick_gelu``, else ``unknown:<its class>``). Or the reason why this
        instance is not to be replaced.
    """
    if recognition.op is None:
        return Reason(recognition.reason or "its class is not recognised")
    op = find_op(recognition.op)
    instance = Instance(recognition, module, recognise)
    reader = _Reader(op, instance, recognise)
    try:
        for role in recognition.instance_facts:
            if role in op.roles:
                instance.facts[role] = reader.read(role, instance.facts[role])
        check = op.hook("check")
        if check is not None:
            check(instance)
    except _Refused as error:
        return Reason(str(error))
    return instance.facts


class Instance:
    """A layer whose class was recognised, as ``check`` in the ``recognition.py`` of its op gets it.

    Args:
        recognition: The recognition of its class.
        module: The layer.
        recognise: Recognises the classes of the layers in it.

    Attributes:
        variant: The variant of its class.
        facts: What is known of it; ``check`` may add to them.
        module: The layer.
    """

    def __init__(
        self, recognition: Recognition, module: Any, recognise: Callable[[Any], Recognition]
    ) -> None:
        self._recognise = recognise
        self.variant = recognition.variant
        self.facts = Facts(recognition.facts, recognition.reads)
        self.module = module

    def refuse(self, reason: str) -> NoReturn:
        """The layer is not what its class promises, and is to be left alone."""
        raise _Refused(reason)

    def get(self, path: str) -> Any:
        """The value at a path of attributes; without one the layer is refused."""
        try:
            return read_path(self.module, path)
        except (AttributeError, LookupError, TypeError) as error:
            raise _Refused(f"{path} cannot be read: {error}") from None

    def rest_on(self, path: str, default: Any = None) -> Any:
        """The value at a path, or the default; the kernel is only for layers that have the same there."""
        try:
            value = read_path(self.module, path)
        except (AttributeError, LookupError, TypeError):
            self.facts.rest_on(reads.absent(self.module, path.partition(".")[0]))
            return default
        self.facts.rest_on(reads.same(reads.place_of(self.module, path), value, (), path))
        return value

    def rest_on_choice(self, path: str) -> Any:
        """The value at a path by which a wrapper of the forward chooses what runs; and what it would find.

        A wrapper asks a table that is in its closure, as those of transformers are: a mapping on top of
        another one that all tables of the class have.
        """
        chosen = self.rest_on(path)
        for table in filter(None, map(_table_of, _closures(own_forward(type(self.module))))):
            self.facts.rest_on(*(reads.of_entry(mapping, chosen, path) for mapping in table))
        return chosen

    def number(self, path: str) -> Any:
        """The value at a path, or the number that the path is."""
        return float(path) if re.fullmatch(r"-?[\d.e+-]+", path) else self.get(path)

    def check_hooks(self, path: str, layer: Any) -> None:
        """Refuse a layer in it with hooks or a forward of its own.

        Code that computes with the layer's weight instead of calling the layer would lose them.
        """
        if not hasattr(layer, "_forward_hooks"):
            return
        hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        if "forward" in vars(layer) or hooks:
            raise _Refused(f"{path} has hooks or a forward of its own")

    @staticmethod
    def function_of(value: Any) -> FunctionType | None:
        """The function behind wrappers, or None."""
        return source.function_of_callable(value)

    def head_of(self, model: Any) -> str:
        """The path of the head of a model in it, which is a language model itself."""
        found = self._recognise(type(model))
        facts = read_instance(found, model, self._recognise) if found.op == "causal_lm_loss" else None
        if not isinstance(facts, Facts):
            raise _Refused(f"{type(model).__qualname__} is not recognised as a language model: {facts}")
        head: str = facts["head"]
        return head

    @staticmethod
    def last_layer(layer: Any, output: int | None = None) -> str | None:
        """The attribute whose call makes the result of a layer, or one of several."""
        forward = own_forward(type(layer))
        if not isinstance(forward, FunctionType):
            return None
        try:
            term, run = execute(forward, Arena(), owner=type(layer))
        except (source.NoSource, Unsupported):
            return None
        if output is not None and term.op == "tuple" and output < len(term.args):
            term = term.args[output]
        elif output is not None:
            return None
        if run.effects or term.op != "call" or len(term.args[1]) != 1:
            return None
        return attribute_path(term.args[0])


def _closures(function: Any) -> list[Any]:
    """What stands in the closures of a function and of those that it wraps."""
    found = []
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:
                continue
        function = getattr(function, "__wrapped__", None)
    return found


def _table_of(value: Any) -> tuple[dict[Any, Any], dict[Any, Any]] | None:
    own, everyones = (getattr(value, name, None) for name in ("_local_mapping", "_global_mapping"))
    return (own, everyones) if isinstance(own, dict) and isinstance(everyones, dict) else None


def read_path(module: Any, path: str) -> Any:
    """The value at a path such as ``config.get_text_config().scales[0]``.

    Raises:
        AttributeError: There is no such attribute.
    """
    value = module
    for name, parts in _steps(path):
        value = getattr(value, name)
        for part in parts:
            value = value() if part == "()" else value[int(part[1:-1])]
    return value


@functools.lru_cache(maxsize=1024)
def _steps(path: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The attributes on a path, each with the calls and the indices that follow it."""
    return tuple(
        (name, tuple(re.findall(r"\(\)|\[-?\d+\]", suffix)))
        for name, suffix in re.findall(r"(\w+)((?:\(\)|\[-?\d+\])*)", path)
    )


class _Reader:
    """Reads what the class of a layer left open, each argument by its role in the record of the op."""

    def __init__(self, op: Op, instance: Instance, recognise: Callable[[Any], Recognition]) -> None:
        self.op = op
        self.instance = instance
        self.recognise = recognise
        self.may_be_none = self._allowed("may_be_none")
        self.may_be_missing = self._allowed("may_be_missing")

    def _allowed(self, hook: str) -> tuple[str, ...]:
        asked = self.op.hook(hook)
        allowed: tuple[str, ...] = () if asked is None else asked(self.instance.variant)
        return allowed

    def read(self, argument: str, path: str) -> Any:
        """What an argument of the definition is on this instance: a path, a number or a name."""
        module, rest_on = self.instance.module, self.instance.facts.rest_on
        if argument in self.may_be_missing and not hasattr(module, path):
            rest_on(reads.absent(module, path))
            return None
        value, place = self.instance.get(path), reads.place_of(module, path)
        role = self.op.roles[argument]
        if role == "activation":
            name, found = _activation(value, place, path)
            rest_on(*found)
            return name
        if role == "shape":
            rest_on(reads.same(place, value, (), path))
            return (value,) if isinstance(value, int) else tuple(value)
        if role == "flag":
            rest_on(Read(f"(not {place}) is {not value}", (), path))
            return bool(value)
        if value is None and argument in self.may_be_none:
            rest_on(reads.same(place, None, (), path))
            return None
        if role == "constant" and isinstance(value, bool):
            rest_on(reads.same(place, value, (), path))
            return float(value)
        if role in ("number", "constant"):
            return self._number(argument, path, value, place)
        self._check(role, path, value)
        if role == "tensor":
            rest_on(Read(f"{place} is not None", (), path))
        elif isinstance(value, torch.nn.Module):
            rest_on(*reads.bare(place, value, path)[1], reads.of_forward(type(value)), handed=())
        return path

    def _number(self, argument: str, path: str, value: Any, place: str) -> Any:
        number = value
        # A tensor of one dimension is no number: it decides the dtype of what it is added to.
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            number = value if value.is_meta or value.requires_grad else value.item()
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise _Refused(f"{path} is {type(number).__name__}, not a number")
        if number is not value:
            self.instance.facts.rest_on(
                Read(f"{place} is {{0}} and {place}._version == {value._version}", (value,), path)
            )
            return number
        handed = None
        if re.fullmatch(r"[\w.]+", path):
            self.instance.facts.paths[argument] = path
            handed = (Read(f"_tw_type({place}) is {{0}}", (type(value),), path),)
        self.instance.facts.rest_on(reads.same(place, value, (), path), handed=handed)
        return number

    def _check(self, role: str, path: str, value: Any) -> None:
        cls = type(value)
        if role == "tensor":
            if not isinstance(value, torch.Tensor):
                raise _Refused(f"{path} is {cls.__name__}, not a tensor")
            return
        if role == "linear" and cls is not torch.nn.Linear:
            raise _Refused(f"{path} is a {cls.__module__}.{cls.__qualname__}, not a torch.nn.Linear")
        self.instance.check_hooks(path, value)
        if role == "norm":
            self._check_norm(path, value)
        if role == "dropout" and cls not in (torch.nn.Dropout, torch.nn.Identity):
            raise _Refused(f"{path} is a {cls.__qualname__}, not a dropout")

    def _check_norm(self, path: str, layer: Any) -> None:
        if type(layer) is torch.nn.Identity:
            return
        found = self.recognise(type(layer))
        if found.op not in ("rms_norm", "layer_norm"):
            raise _Refused(f"{path} is a {type(layer).__qualname__}, which is not recognised as a norm")
        facts = read_instance(found, layer, self.recognise)
        if isinstance(facts, Reason):
            raise _Refused(f"{path}: {facts}")


def activation_name(value: Any) -> str:
    """The canonical name of an elementwise function: a name in transformers' table, a function or a layer."""
    return _activation(value, "{self}", "")[0]


def _activation(value: Any, place: str, what: str) -> tuple[str, tuple[Read, ...]]:
    """The canonical name of an elementwise function, and what that rests on.

    Args:
        value: As for :func:`activation_name`.
        place: The expression that reads it.
        what: Its name, in words.
    """
    if isinstance(value, str):
        return activation_name(_by_name(value)), (reads.same(place, value, (), what),)
    arena = Arena()
    unknown = f"unknown:{getattr(value, '__qualname__', type(value).__qualname__)}"
    x = arena.term("input", "x")
    function = source.function_of_callable(own_forward(type(value)))
    try:
        if function is not None:
            instance = value
            run = Run(arena, instance=instance)
            run.cls = type(value)
            term = run.function(function, [arena.term("self"), x], {})
        else:
            run = Run(arena)
            term = run.apply(value, [x])
    except (source.NoSource, Unsupported):
        return unknown, ()
    found = [read for read in run.reads if read is not None]
    if isinstance(value, torch.nn.Module):
        here, rests_on = reads.bare(place, value, what)
        rests_on += (reads.of_forward(type(value)),)
        rests_on += tuple(read.inside(here, type(value), what) for read in found)
    else:
        rests_on = (reads.same(place, value, (), what), *found)
    return (_name(term, x) if not run.effects else None) or unknown, rests_on


def elementwise_of(value: Any) -> tuple[str | None, Guard]:
    """The canonical name of what every layer of a class computes, or a function, and what that rests on.

    Args:
        value: A class of layers, whose instances may differ in nothing that counts; or a function.

    Returns:
        None where it is none that is known; the guard of a class is asked with a layer and the class.
    """
    if not isinstance(value, type):
        name, rests_on = _activation(value, "{self}", getattr(value, "__qualname__", "a function"))
        return None if name.startswith("unknown:") else name, Guard(rests_on)
    arena = Arena()
    function, foreign = source.unwrap(own_forward(value))
    try:
        if foreign is not None or not isinstance(function, FunctionType):
            return None, Guard(())
        run = Run(arena)
        run.cls = value
        x = arena.term("input", "x")
        term = run.function(function, [arena.term("self"), x], {})
    except (source.NoSource, Unsupported, RecursionError):
        return None, Guard(())
    found = Guard(read for read in run.reads if read is not None).of(value)
    return None if run.effects else _name(term, x), Guard((reads.of_forward(value), *found.reads))


def _by_name(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name] if name in ACT2FN else functools.partial(_missing, name)


def _missing(name: str, x: Any) -> Any:
    raise KeyError(name)


def _name(term: Term, x: Term) -> str | None:
    if term.op in ACTIVATIONS and term.args[0] is x:
        if term.op == "gelu":
            return "gelu_tanh" if term.args[1].args == ("tanh",) else "gelu"
        return term.op
    if term is x:
        return "identity"
    if term.op == "mul" and x in term.args:
        other = term.args[1] if term.args[0] is x else term.args[0]
        if other.op == "sigmoid" and other.args[0].op == "mul":
            factors = [part.args[0] for part in other.args[0].args if part.op == "const"]
            if factors == [1.702] and x in other.args[0].args:
                return "quick_gelu"
    return None
