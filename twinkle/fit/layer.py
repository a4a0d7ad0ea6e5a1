"""Compatibility of a kernel with its target, from the code alone: nothing runs."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING

from torch import nn

from twinkle.errors import KernelError
from twinkle.fit.bytecode import function_of_member, reads_of, stored_names
from twinkle.fit.signatures import arguments_text, mismatch, signature_of
from twinkle.sources.adapters import explain_lacking
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from inspect import Signature

__all__ = ["LayerCompatibility", "check_function", "check_layer"]

_MISSING = object()
# What the class statement itself puts in a class, what kernels say about themselves, and
# what changes nothing but how a layer prints.
_OWN_BUSINESS = frozenset(
    {
        *vars(type("_", (), {})),
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__classcell__",
        "__classdictcell__",
        "__constants__",
        "__firstlineno__",
        "__init__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__repr__",
        "__slots__",
        "__static_attributes__",
        "_abc_impl",
        "can_torch_compile",
        "extra_repr",
        "forward",
        "has_backward",
        "kernel_layer_name",
        "reset_parameters",
    }
)


class LayerCompatibility:
    """A kernel class that is compatible with a target class, and what has to go along with its ``forward``.

    Attributes:
        kernel_class: The class as its source gave it.
        forward: The kernel's function.
        members: Other members of the kernel class that its code wants, by name.
        needs: Attributes every instance must bring.
        same_signature: ``forward`` has the very signature of the original, defaults included.
        comes_back: It may call the original by the name of its class.
        can_torch_compile, has_backward: The flags of the kernel class; ``None`` where it has none.
    """

    __slots__ = (
        "can_torch_compile",
        "comes_back",
        "forward",
        "has_backward",
        "kernel_class",
        "members",
        "needs",
        "same_signature",
        "what",
    )

    def __init__(
        self,
        what: str,
        kernel_class: type,
        forward: FunctionType,
        members: dict[str, object],
        needs: frozenset[str],
        *,
        same_signature: bool,
        can_torch_compile: bool | None,
        has_backward: bool | None,
    ) -> None:
        self.what = what
        self.kernel_class = kernel_class
        self.forward = forward
        self.members = members
        self.needs = needs
        self.same_signature = same_signature
        self.comes_back = False
        self.can_torch_compile = can_torch_compile
        self.has_backward = has_backward

    @property
    def needs_class(self) -> bool:
        """Whether modules need a class of their own: it has members, or comes to the original's code."""
        return bool(self.members) or self.comes_back or "__class__" in self.forward.__code__.co_freevars

    def problem_with(self, module: nn.Module) -> str | None:
        """Why this one instance cannot take the kernel, or ``None``."""
        lacking = [name for name in self.needs if not _has(module, name)]
        if lacking:
            problem = f"{self.what} reads {_list(sorted(lacking))}, which this {type(module).__name__} lacks"
            return problem + self.explained(lacking)
        taken = [name for name in self.members if _is_own(module, name)]
        if taken:
            names = _list(sorted(taken))
            return f"{self.what} brings {names}, which this {type(module).__name__} has otherwise"
        return None

    def explained(self, lacking: list[str]) -> str:
        """The end of a message: a hint of the kernel's source about attributes that are lacking."""
        hint = explain_lacking(self.kernel_class, sorted(lacking))
        return f"; {hint}" if hint else ""


def check_layer(
    kernel_class: object,
    target_class: type[nn.Module],
    *,
    attributes: Mapping[str, object] | None = None,
    instances: Iterable[nn.Module] = (),
    guarded: bool = False,
) -> LayerCompatibility:
    """Check that a layer kernel can stand in for a target.

    Args:
        kernel_class: What the source gave.
        target_class: The class whose instances it is for.
        attributes: Class attributes that the kernel reads and its target lacks.
        instances: Some of them, to tell which attributes there are; one that has all is enough. Without
            any they are looked up in the code of the target's constructors.
        guarded: The kernel is the target's own code on another path: nothing that it reads is demanded.

    Raises:
        KernelError: The kernel is no ``nn.Module`` class, lacks ``forward``, has an ``__init__`` of its own
            and no ``attributes``, has another signature, reads an attribute that neither the target
            nor ``attributes`` has, or has a member that the target has otherwise.
    """
    kernel = _check_class(kernel_class, target_class, attributes)
    if guarded:
        kernel.needs = frozenset()
    _check_needs(kernel, target_class, instances)
    return kernel


def _check_needs(
    kernel: LayerCompatibility, target_class: type[nn.Module], instances: Iterable[nn.Module]
) -> None:
    """Raise unless some instance, or without any the code of the target, has what a kernel reads."""
    problem, first = None, True
    for instance in instances:
        if first:
            _yield_constants(kernel, instance)
        here = kernel.problem_with(instance)
        if here is None:
            return
        problem, first = problem or here, False
    if first:
        problem = _lacking_in_code(kernel, target_class)
    if problem is not None:
        raise KernelError(
            f"kernel {kernel.what} does not fit {_qualified_name(target_class)}: {problem}",
            fix="give the attribute in `attributes` of the registration, or register it for another target",
        )


def _check_class(
    kernel_class: object, target_class: type[nn.Module], attributes: Mapping[str, object] | None
) -> LayerCompatibility:
    """Check a kernel class against its target, but for the attributes that instances must bring."""
    attributes = dict(attributes or {})
    what = _qualified_name(kernel_class)
    if not isinstance(kernel_class, type):
        raise KernelError(
            "a layer kernel must be a class", found=repr(kernel_class), expected="an nn.Module class"
        )
    if not issubclass(kernel_class, nn.Module):
        raise KernelError(
            f"kernel {what} is no nn.Module",
            found=f"a class with bases {_bases(kernel_class)}",
            expected="class …(torch.nn.Module) with a forward",
        )
    chain = _own_classes(kernel_class, target_class)
    forward = inspect.getattr_static(kernel_class, "forward", None)
    if forward is nn.Module.forward or not isinstance(forward, FunctionType):
        found = "no forward" if forward is nn.Module.forward else f"a {type(forward).__name__} as forward"
        raise KernelError(
            f"kernel {what} has no forward of its own", found=found, expected="def forward(self, …)"
        )
    if not attributes:
        for klass in chain:
            if "__init__" in vars(klass):
                raise KernelError(
                    f"kernel {what} has an __init__ of its own, which never runs",
                    found=f"{_qualified_name(klass)}.__init__",
                    expected="a class with forward only",
                    fix="give what its code reads as `attributes` of the registration, or drop the __init__",
                )
    same = _check_signature(what, forward, target_class)
    needed, members = _collect(what, kernel_class, target_class, chain, attributes)
    needs = frozenset(name for name in needed if name not in members and not _class_has(target_class, name))
    return LayerCompatibility(
        what,
        kernel_class,
        forward,
        members,
        needs,
        same_signature=same,
        can_torch_compile=_flag(kernel_class, "can_torch_compile"),
        has_backward=_flag(kernel_class, "has_backward"),
    )


def check_function(
    implementation: Callable[..., object], original: Callable[..., object], *, called: str | None = None
) -> None:
    """Check that a function kernel accepts every call of the original.

    Where one of the two has no signature to read (builtins), nothing is said. A keyword-only parameter
    ``original`` gets the original.

    Args:
        implementation: The kernel.
        original: What it replaces.
        called: What messages call the original, where it does not know its own name.

    Raises:
        KernelError: It is not callable or has another signature.
    """
    if not callable(implementation):
        raise KernelError(
            "a function kernel must be callable",
            found=repr(implementation),
            expected="a function or a class",
        )
    kernel = implementation
    if isinstance(implementation, nn.Module):
        kernel = implementation.forward
    elif isinstance(implementation, type) and issubclass(implementation, nn.Module):
        kernel = _unbound(inspect.getattr_static(implementation, "forward"))
    ours, theirs = signature_of(kernel), signature_of(original)
    if ours is None or theirs is None:
        return
    given = ours.parameters.get("original")
    if given is not None and given.kind is given.KEYWORD_ONLY and "original" not in theirs.parameters:
        ours = ours.replace(parameters=[p for p in ours.parameters.values() if p is not given])
    problem = mismatch(ours, theirs)
    if problem is not None:
        reason, hint = problem
        raise KernelError(
            f"kernel {_qualified_name(implementation)} has another signature than "
            f"{called or _qualified_name(original)}: {reason}",
            found=arguments_text(ours),
            expected=arguments_text(theirs),
            fix=hint,
        )


def _check_signature(what: str, forward: FunctionType, target_class: type[nn.Module]) -> bool:
    """Whether the signatures are the same to the last default; raises where they are not compatible."""
    original: Callable[..., object] = own_forward(target_class)
    ours, theirs = signature_of(forward), signature_of(original)
    if ours is None or theirs is None:
        return False
    theirs = _with_first(theirs, ours)
    problem = mismatch(ours, theirs)
    if problem is not None:
        reason, hint = problem
        raise KernelError(
            f"kernel {what} has another signature than {_qualified_name(target_class)}.forward: {reason}",
            found=f"forward{arguments_text(ours)}",
            expected=f"forward{arguments_text(theirs)}",
            fix=hint,
        )
    if hasattr(forward, "__wrapped__") or hasattr(original, "__wrapped__"):
        return False
    return [(p.name, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.kind) for p in theirs.parameters.values()
    ] and all(
        a.default is b.default or _same_constant(a.default, b.default)
        for a, b in zip(ours.parameters.values(), theirs.parameters.values(), strict=True)
    )


def _with_first(signature: Signature, other: Signature) -> Signature:
    """A method's signature whose first argument is called as another's: no call gives it by name."""
    first, name = next(iter(signature.parameters.values()), None), next(iter(other.parameters), None)
    if first is None or name is None or first.kind is not first.POSITIONAL_OR_KEYWORD:
        return signature
    rest = [*signature.parameters.values()][1:]
    if any(parameter.name == name for parameter in rest):
        return signature
    return signature.replace(parameters=[first.replace(name=name), *rest])


def _collect(
    what: str,
    kernel_class: type[nn.Module],
    target_class: type[nn.Module],
    chain: list[type],
    attributes: Mapping[str, object],
) -> tuple[set[str], dict[str, object]]:
    """Names the kernel's code needs, and the members that have to travel with it."""
    own: dict[str, object] = {}
    for klass in reversed(chain):
        own.update({n: v for n, v in vars(klass).items() if n not in _OWN_BUSINESS})
    reads = reads_of(_as_function(kernel_class.forward))
    todo, done = set(reads.needed | reads.optional), set()
    while todo:
        name = todo.pop()
        done.add(name)
        inner = function_of_member(own.get(name))
        if inner is not None:
            more = reads_of(inner)
            reads.add(more)
            todo |= (more.needed | more.optional) - done
    members: dict[str, object] = {}
    for name, value in own.items():
        theirs = inspect.getattr_static(target_class, name, _MISSING)
        if theirs is _MISSING or theirs is value:
            if theirs is _MISSING:
                members[name] = value
        elif not _same_constant(theirs, value):
            raise KernelError(
                f"kernel {what} has a member {name!r} that {_qualified_name(target_class)} has otherwise",
                found=f"{name} = {value!r}",
                expected="members that the target does not have",
                fix=f"rename {name!r} in the kernel, or make it a function of its module",
            )
    for name, value in attributes.items():
        if name not in members and not _class_has(target_class, name):
            members[name] = value
    if len(chain) > 1 and any("__class__" in _freevars(m) for c in chain for m in vars(c).values()):
        raise KernelError(
            f"kernel {what} calls super() and has base classes of its own",
            found=" -> ".join(_qualified_name(c) for c in chain),
            expected="super() in a kernel that stands directly on nn.Module: it reaches the original",
            fix="call the base kernel's function by name",
        )
    return {n for n in reads.needed if n not in reads.optional and n not in reads.stored}, members


def _yield_constants(kernel: LayerCompatibility, instance: nn.Module) -> None:
    """Let an instance's own parameter or attribute win over a plain constant of the kernel class.

    ``weight: Tensor = None`` in a kernel class is a way to declare what it reads; carried to the
    target's class it would hide the parameter.
    """
    for name in [n for n, v in kernel.members.items() if not _is_code(v) and _is_own(instance, name=n)]:
        del kernel.members[name]
        kernel.needs |= {name}


def _lacking_in_code(kernel: LayerCompatibility, target_class: type[nn.Module]) -> str | None:
    if not kernel.needs or _reads_freely(target_class):
        return None
    given: set[str] = set()
    for klass in target_class.__mro__:
        for member in vars(klass).values():
            function = function_of_member(member)
            if function is not None and klass not in nn.Module.__mro__:
                given |= stored_names(function)
    given |= set(vars(nn.Module())) if nn.Module in target_class.__mro__ else set()
    lacking = sorted(kernel.needs - given)
    if not lacking:
        return None
    return f"it reads {_list(lacking)}, which {target_class.__name__} lacks{kernel.explained(lacking)}"


def _has(module: nn.Module, name: str) -> bool:
    if _is_own(module, name) or _class_has(type(module), name):
        return True
    return _reads_freely(type(module)) and hasattr(module, name)


def _is_own(module: nn.Module, name: str) -> bool:
    state = module.__dict__
    return name in state or any(
        name in (state.get(store) or ()) for store in ("_parameters", "_buffers", "_modules")
    )


def _class_has(cls: type, name: str) -> bool:
    return inspect.getattr_static(cls, name, _MISSING) is not _MISSING


def _reads_freely(cls: type) -> bool:
    """Whether a class has a ``__getattr__`` of its own, which may answer for any attribute."""
    return (
        inspect.getattr_static(cls, "__getattr__", None) is not vars(nn.Module)["__getattr__"]
        or inspect.getattr_static(cls, "__getattribute__") is not object.__dict__["__getattribute__"]
    )


def _own_classes(kernel_class: type, target_class: type) -> list[type]:
    """The bases of a kernel class, itself included, that neither its target nor every layer has."""
    shared = {*target_class.__mro__, *nn.Module.__mro__}
    return [klass for klass in kernel_class.__mro__ if klass not in shared]


def _freevars(member: object) -> tuple[str, ...]:
    inner = getattr(member, "__func__", member)
    if isinstance(inner, property):
        inner = inner.fget
    code = getattr(inner, "__code__", None)
    return tuple(code.co_freevars) if code is not None else ()


def _as_function(forward: Callable[..., object]) -> Callable[..., object]:
    return function_of_member(forward) or forward


def _unbound(forward: Callable[..., object]) -> Callable[..., object]:
    """``forward`` of a class, without its ``self``: the signature of a function kernel."""
    return forward.__get__(object(), object) if isinstance(forward, FunctionType) else forward


def _flag(kernel_class: type, name: str) -> bool | None:
    value = getattr(kernel_class, name, None)
    return None if value is None else bool(value)


def _same_constant(a: object, b: object) -> bool:
    plain = (bool, int, float, complex, str, bytes, type(None), tuple)
    return type(a) is type(b) and isinstance(a, plain) and a == b


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def _list(names: list[str]) -> str:
    return ", ".join(f"self.{name}" for name in names)


def _bases(cls: type) -> str:
    return ", ".join(base.__name__ for base in cls.__bases__)


def _qualified_name(thing: object) -> str:
    module = getattr(thing, "__module__", None)
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if not isinstance(name, str):
        return repr(thing)
    return f"{module}.{name}" if isinstance(module, str) else name
