"""Attributes and calls: what torch computes, what is inlined, and what stays a call."""

from __future__ import annotations

import ast
import functools
import inspect
import math
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from twinkle.match import reads
from twinkle.match.symbolic import source
from twinkle.match.symbolic.names import Names, TooLarge, Unsupported
from twinkle.match.symbolic.terms import Ref
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from twinkle.match.symbolic.terms import Term

__all__ = ["Calls"]

_FOLDED = (len, tuple, list, int)
# Methods of tensors that are also what programs call a layer.
_LAYERS = frozenset({"norm"})
_OF_EINOPS = frozenset({"rearrange", "repeat"})


class Calls(Names):
    """A call that follows attributes and calls: the second layer of a frame."""

    def attribute(self, base: Term, name: str) -> Term:
        """``base.name``."""
        if base.op == "py":
            value = base.args[0].value
            if isinstance(value, ModuleType | type) or _is_form(value):
                try:
                    found = getattr(value, name)
                except AttributeError:
                    return self.run.unknown(f"no attribute {name}")
                self.run.reads[reads.of_attribute(value, name, found)] = None
                return self.run.embed(found)
        if base.op == "self":
            found = self._instance_value(name)
            return found if found is not None else self.term("attr", base, name)
        if name == "dtype":
            return self.idioms.dtype_of(base)
        if name == "shape":
            return self.idioms.shape(base)
        if name == "device":
            return self.term("device_of", base)
        if name == "ndim":
            return self.term("ndim", base)
        return self.term("attr", base, name)

    def _instance_value(self, name: str) -> Term | None:
        if self.run.instance is None:
            return None
        value = getattr(self.run.instance, name, None)
        if (
            isinstance(value, bool | int | float | str | functools.partial)
            or source.function_of_callable(value) is not None
            # torch's own functions are builtins, not functions with a source.
            or type(value).__name__ == "builtin_function_or_method"
        ):
            self.run.reads[reads.same(f"{{self}}.{name}", value, (), name)] = None
            return self.run.embed(value)
        return None

    def _eval_Call(self, node: ast.Call) -> Term:
        args = list(self.idioms.tuple([self.eval(arg) for arg in node.args]).args)
        kwargs: dict[str, Term] = {}
        for keyword in node.keywords:
            kwargs[keyword.arg or "**"] = self.eval(keyword.value)
        func = node.func
        if isinstance(func, ast.Attribute):
            base = self.eval(func.value)
            return self.method(base, func.attr, args, kwargs)
        return self.call(self.eval(func), args, kwargs)

    def method(self, base: Term, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """``base.name(...)``."""
        if base.op == "self":
            return self.own_method(base, name, args, kwargs)
        if base.op == "super":
            return self.inherited(base, name, args, kwargs)
        if base.op == "py":
            return self.call(self.attribute(base, name), args, kwargs)
        # What no tensor has is a method of something else, and no function of torch.
        known = self.idioms.knows(name) and hasattr(torch.Tensor, name)
        if base.op == "attr" and (name in _LAYERS or not known):
            return self.call(self.term("attr", base, name), args, kwargs)
        if known:
            return self.idioms.call(name, [base, *args], kwargs)
        return self.opaque(self.term("attr", base, name), args, kwargs)

    def own_method(self, base: Term, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """``self.name(...)``: inlined where it is a plain method."""
        static = inspect.getattr_static(self.run.cls, name, None) if self.run.cls is not None else None
        if isinstance(static, staticmethod | FunctionType):
            method = reads.of_method(name, getattr(static, "__func__", static))
            self.run.reads.update(dict.fromkeys(method))
        if isinstance(static, staticmethod):
            return self.call(self.run.embed(static.__func__), args, kwargs)
        if isinstance(static, classmethod):
            return self.opaque(self.term("attr", base, name), args, kwargs)
        if isinstance(static, FunctionType):
            function, foreign = source.unwrap(static)
            if foreign is None and isinstance(function, FunctionType):
                inlined = self.inlined(function, [base, *args], kwargs)
                if inlined is not None:
                    return inlined
            return self.opaque(self.term("attr", base, name), args, kwargs)
        return self.call(self.attribute(base, name), args, kwargs)

    def inherited(self, base: Term, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """``super().name(...)``: inlined where the next class that has it has a plain method."""
        order = self.run.cls.__mro__ if self.run.cls is not None else ()
        below = base.args[0].value
        after = order[order.index(below) + 1 :] if below in order else ()
        owner = next((cls for cls in after if name in vars(cls)), None)
        method: Any = None
        read: reads.Read | None = None
        if owner is not None and name == "forward":
            # What stands there may be Twinkle's by now, or wait for its first use.
            method, read = own_forward(owner), reads.of_forward(owner)
        elif owner is not None:
            method = vars(owner)[name]
            read = reads.of_attribute(owner, name, method)
        if isinstance(method, FunctionType):
            self.run.reads[read] = None
            function, foreign = source.unwrap(method)
            if foreign is None and isinstance(function, FunctionType):
                inlined = self.inlined(function, [self.term("self"), *args], kwargs)
                if inlined is not None:
                    return inlined
        return self.opaque(self.term("attr", base, name), args, kwargs)

    def call(self, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call of ``callee``."""
        if callee.op == "py":
            return self.python_call(callee.args[0].value, callee, args, kwargs)
        return self.opaque(callee, args, kwargs)

    def opaque(self, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call that is not followed."""
        named = tuple((name, kwargs[name]) for name in sorted(kwargs))
        made = self.term("call", callee, tuple(args), named)
        if callee.op == "attr":
            self.run.calls.append((callee.args[1], made))
        elif _is_cross_entropy(callee):
            self.run.losses.append(made)
        return made

    def python_call(self, value: Any, callee: Term, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call of a Python object."""
        if isinstance(value, functools.partial):
            args = [*map(self.run.embed, value.args), *args]
            kwargs = {**{name: self.run.embed(given) for name, given in value.keywords.items()}, **kwargs}
            return self.call(self.run.embed(value.func), args, kwargs)
        if value is super and not kwargs and (below := self._class_below(args)) is not None:
            return self.term("super", Ref(below))
        function = source.function_of_callable(value)
        module = getattr(value, "__module__", None) or ""
        name = getattr(value, "__name__", "")
        owner = getattr(value, "__objclass__", None)
        is_torch = module.startswith("torch") or (module == "" and owner is not None) or _is_torch(value)
        if is_torch and self.idioms.knows(name):
            return self.idioms.call(name, args, kwargs)
        moved = _einops_call(value, args, kwargs)
        if moved is not None:  # an op that has a form of its own says what the pattern does
            return self.term("einops", *moved)
        if value is math.sqrt and len(args) == 1 and not kwargs:
            # Not the power of a half: the two differ in the last bit for some widths below 65536.
            only = args[0].args[0] if args[0].op == "const" else None
            folded = isinstance(only, int | float) and only >= 0
            return self.idioms.const(math.sqrt(only)) if folded else self.term("math_sqrt", args[0])
        if value is float and len(args) == 1 and args[0].op == "attr":
            return self.term("float", args[0])
        if value in _FOLDED and len(args) == 1 and not kwargs:
            only = args[0]
            if value is len and only.op in ("tuple", "list"):
                return self.idioms.const(len(only.args))
            if value is len and only.op == "shape":
                return self.term("ndim", only.args[0])
            if value in (tuple, list) and only.op in ("tuple", "list"):
                return self.term(value.__name__, *only.args)
            if value is int and only.op == "floordiv":
                return only
            if value is int and only.op == "const" and isinstance(only.args[0], int | float):
                return self.idioms.const(int(only.args[0]))
        if value is getattr and len(args) >= 2 and args[1].op == "const":
            return self.attribute(args[0], args[1].args[0])
        if function is not None and not is_torch:
            plain, foreign = source.unwrap(function)
            if foreign is None:
                inlined = self.inlined(plain, args, kwargs)
                if inlined is not None:
                    return inlined
        return self.opaque(callee, args, kwargs)

    def _class_below(self, args: list[Term]) -> type | None:
        """The class whose bases ``super()`` or ``super(cls, self)`` looks in; None for another object's."""
        if not args and "__class__" in self.free and next(iter(self.env.values())).op == "self":
            found = self.free["__class__"].cell_contents
        elif len(args) == 2 and args[0].op == "py" and args[1].op == "self":
            found = args[0].args[0].value
        else:
            return None
        return found if isinstance(found, type) else None

    def inlined(self, function: FunctionType, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """The result of a helper; None when it stays a call: too large, not followed, or with effects."""
        run = self.run
        if len(run.inside) >= 6 or function in run.inside or "**" in kwargs:
            return None
        try:
            node = source.parse(function)
        except source.NoSource:
            return None
        statements, plain = source.size_of(node)
        if statements > run.inline or not plain:
            return None
        effects, calls, loops = list(run.effects), len(run.calls), run.loops
        losses = len(run.losses)
        run.inside.append(function)
        try:
            result = run.function(function, args, kwargs)
        except TooLarge:
            raise
        except Unsupported:
            run.effects, run.loops = effects, loops
            return None
        finally:
            run.inside.pop()
        if run.effects != effects or result.op == "unknown":
            run.effects = effects
            del run.calls[calls:]
            del run.losses[losses:]
            return None
        return result


def _is_cross_entropy(callee: Term) -> bool:
    """Whether it is ``F.cross_entropy``, or an ``nn.CrossEntropyLoss`` that is made where it is called."""
    if callee.op == "call":
        callee, wanted = callee.args[0], nn.CrossEntropyLoss
    else:
        wanted = F.cross_entropy
    return callee.op == "py" and callee.args[0].value is wanted


def _einops_call(value: Any, args: list[Term], kwargs: dict[str, Term]) -> tuple[Any, ...] | None:
    """The arguments of the term of a call, the function's name first; None where it is no call of einops.

    Args:
        value: What is called.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    root = str(getattr(value, "__module__", "")).partition(".")[0]
    name = getattr(value, "__name__", "")
    if root != "einops" or name not in _OF_EINOPS or len(args) != 2:
        return None
    pattern = args[1].args[0] if args[1].op == "const" else None
    if not isinstance(pattern, str):
        return None
    return (name, *args, tuple((key, kwargs[key]) for key in sorted(kwargs)))


def _is_form(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") and not isinstance(value, type)


def _is_torch(value: Any) -> bool:
    if type(value).__name__ != "builtin_function_or_method":
        return False
    owner = getattr(value, "__self__", None)
    return str(getattr(owner, "__name__", "")).startswith("torch") or "torch" in type(owner).__module__
