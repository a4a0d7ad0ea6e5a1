"""Canonical terms: one spelling for each computation that torch has several for.

Every rule keeps the result bit for bit: ``x.float()`` is ``x.to(torch.float32)``, ``x ** 2`` is
``x.pow(2)``, ``torch.cat`` takes a list or a tuple, ``x.size(-1)`` is ``x.shape[-1]``. What rounds
differently (``x / sqrt(v)`` and ``x * rsqrt(v)``, two groupings of a product) stays different.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from twinkle.match.symbolic.norm_idioms import NormIdioms
from twinkle.match.symbolic.torch_signatures import (
    ALIASES,
    BINARY,
    BOUND,
    CASTS,
    KEYWORDS,
    MISSING,
    SIGNATURES,
)

if TYPE_CHECKING:
    from twinkle.match.symbolic.terms import Arena, Term

__all__ = ["ACTIVATIONS", "Idioms"]

# Functions of one tensor that a role `act` may be bound to directly.
ACTIVATIONS = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh", "swish", "relu2"})
# The result's elements are elements of the first argument (or their negation): a cast may move through.
_MOVES = frozenset(
    {
        "neg",
        "index",
        "flatten",
        "unsqueeze",
        "transpose",
        "reshape",
        "repeat_interleave",
        "permute",
        "squeeze",
        "expand",
        "unflatten",
    }
)
_SAME_SHAPE = frozenset({"to", "neg", "rsqrt", "pow2", "clamp"}) | ACTIVATIONS


class Idioms(NormIdioms):
    """Builds canonical terms in an arena.

    Args:
        arena: The arena.
        keep_casts: Leave each cast where it is written: where a tensor is cast in one place and a rearranged
            copy of it in another, each cast rounds a gradient, and one cast before both rounds their sum.

    Attributes:
        casts: How often each cast was made, where they are kept: twice is not once, for the same reason.
    """

    def __init__(self, arena: Arena, *, keep_casts: bool = False) -> None:
        self.arena = arena
        self.keep_casts = keep_casts
        self.casts: Counter[Term] = Counter()
        self.term = arena.term
        self.const = arena.const
        self.none = arena.const(None)

    # -- calls ------------------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """Whether there are rules for the torch function or tensor method of that name."""
        name = self._bare(name)
        return name in SIGNATURES or name in BINARY or name in CASTS or name in _EXTRA

    @staticmethod
    def _bare(name: str) -> str:
        if name.endswith("_") and not name.startswith("_"):
            name = name[:-1]
        return ALIASES.get(name, name)

    def call(self, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """``torch.name(*args, **kwargs)``, or that method of ``args[0]``."""
        name = self._bare(name)
        kwargs = dict(kwargs)
        if not args:
            for key in ("input", "tensors", "x", "self"):
                if key in kwargs:
                    args = [kwargs.pop(key)]
                    break
        if not args:
            return self.opaque(name, args, kwargs)
        if name in CASTS and len(args) == 1:
            return self.to(args[0], self.term("dtype", CASTS[name]))
        if name in BINARY and len(args) == 2 and not kwargs:
            return self.binary(BINARY[name], args[0], args[1])
        special = getattr(self, f"_call_{name}", None)
        if special is not None:
            made = special(args, kwargs)
            if made is not None:
                return made  # type: ignore[no-any-return]
        signature = BOUND.get(name)
        if signature is None:
            return self.opaque(name, args, kwargs)
        kwargs = {KEYWORDS.get(key, key) or key: value for key, value in kwargs.items()}
        bound = list(args[: 1 + len(signature)])
        if len(args) > len(bound) or any(arg.op == "star" for arg in args):
            return self.opaque(name, args, kwargs)
        for key, default in signature[len(bound) - 1 :]:
            value = kwargs.pop(key, None)
            if value is None:
                if default is MISSING:
                    return self.opaque(name, args, kwargs)
                value = self.const(default)
            bound.append(value)
        if kwargs:
            return self.opaque(name, args, kwargs)
        return self.simplify(name, bound)

    def opaque(self, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call that no rule is for, as it is written."""
        return self.term(name, *args, *(self.term("keyword", key, kwargs[key]) for key in sorted(kwargs)))

    # -- special forms of calls -------------------------------------------------------------------

    def _call_type_as(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self.to(args[0], self.dtype_of(args[1])) if len(args) == 2 else None

    def _call_to(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        x, rest = args[0], list(args[1:])
        for key in ("device", "non_blocking", "copy"):
            kwargs.pop(key, None)
        if "dtype" in kwargs:
            rest.append(kwargs.pop("dtype"))
        if kwargs:
            return None
        # Where the data lies does not change it.
        rest = [arg for arg in rest if arg.op != "device_of" and not _is_device(arg)]
        if not rest:
            return x
        if len(rest) != 1:
            return None
        target = rest[0]
        if target.op in ("dtype", "dtype_of") or not self.is_tensor(target):
            return self.to(x, target)
        return self.to(x, self.dtype_of(target))

    def _call_type(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        if len(args) == 2 and args[1].op in ("dtype", "dtype_of"):
            return self.to(args[0], args[1])
        return None

    def is_tensor(self, term: Term) -> bool:
        """Whether a term is surely a tensor: the result of an operation of torch."""
        return term.op in SIGNATURES or term.op in ("to", "add", "mul", "sub", "div", "pow2", "input")

    def _call_contiguous(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return args[0]

    def _call_square(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self.square(args[0])

    def _call_dim(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self.term("ndim", args[0])

    def _call_size(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        shape = self.shape(args[0])
        if len(args) == 1 and not kwargs:
            return shape
        return self.index(shape, args[1] if len(args) > 1 else kwargs["dim"])

    def _shaped(self, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """``reshape(a, b)``, ``reshape((a, b))`` and ``reshape(shape)`` are one."""
        sizes = args[1:] or [kwargs.get("shape") or kwargs.get("size") or kwargs.get("dims") or self.none]
        if len(sizes) == 1 and (sizes[0].op == "tuple" or sizes[0].op == "shape"):
            return self.term(name, args[0], sizes[0])
        if len(sizes) == 1 and sizes[0].op == "dtype":
            return None
        return self.term(name, args[0], self.tuple(sizes))

    def _call_reshape(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._shaped("reshape", args, kwargs)

    def _call_permute(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._shaped("permute", args, kwargs)

    def _call_expand(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._shaped("expand", args, kwargs)

    def _call_repeat(self, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._shaped("repeat", args, kwargs)

    # -- simplification ---------------------------------------------------------------------------

    def simplify(self, name: str, args: list[Term]) -> Term:
        """The canonical term of an operation whose arguments are in order."""
        if name == "pow":
            return self.power(args[0], args[1])
        if name == "neg" and args[0].op == "const" and isinstance(args[0].args[0], int | float):
            return self.const(-args[0].args[0])
        if name in ("silu", "relu"):
            return self.term(name, args[0])  # in place or not, the result is the same
        if name == "dropout":
            return self.term("dropout", *args[:3])
        if name in ("cat", "stack") and args[0].op == "list":
            args[0] = self.term("tuple", *args[0].args)
        if name == "narrow" and args[2].args == (0,) and args[1].args == (-1,):
            window = self.slice(self.none, args[3], self.none)
            return self.index(args[0], self.term("tuple", self.const(Ellipsis), window))
        if name in ("rms_norm", "layer_norm"):
            args[1] = self.normalized_shape(args[0], args[1])
        if name == "vector_norm" and args[2].op == "tuple" and len(args[2].args) == 1:
            args[2] = args[2].args[0]
        if name in ("mean", "sum", "var", "std") and args[1].op == "tuple" and len(args[1].args) == 1:
            args[1] = args[1].args[0]
        if name == "zeros_like":
            dtype, device = args[1], args[2]
            if dtype is self.dtype_of(args[0]):
                dtype = self.none
            if device.op == "device_of" and device.args[0] is args[0]:
                device = self.none
            return self.term("zeros_like", args[0], dtype, device)
        if name == "index_add" and args[4].args == (1,):
            return self.term("index_add", *args[:4])
        return self.term(name, *args)

    def power(self, base: Term, exponent: Term) -> Term:
        """``base ** exponent``; torch computes these exponents by the named functions."""
        value = exponent.args[0] if exponent.op == "const" else None
        if base.op == "const" and value is not None:
            return self.const(base.args[0] ** value)
        if value == 2:
            return self.square(base)
        if value == -0.5:
            return self.term("rsqrt", base)
        if value == 0.5:
            return self.term("sqrt", base)
        return self.term("pow", base, exponent)

    def square(self, x: Term) -> Term:
        """``x * x``."""
        return self.term("relu2", *x.args) if x.op == "relu" else self.term("pow2", x)

    def binary(self, op: str, left: Term, right: Term) -> Term:
        """A binary operator; constants are folded."""
        if left.op == "const" and right.op == "const":
            folded = _fold(op, left.args[0], right.args[0])
            if folded is not None:
                return self.const(folded)
        # An operator expands by itself.
        if right.op == "expand_as" and right.args[1] is left:
            right = right.args[0]
        if op == "mul" and left is right:
            return self.square(left)
        if op == "mul":
            for x, gate in ((left, right), (right, left)):
                if gate.op == "sigmoid" and gate.args[0] is x:
                    # The sigmoid is rounded before the product, which silu does not do.
                    return self.term("swish", x)
        if op == "add" and {left.op, right.op} <= {"tuple", "list"} and left.op == right.op:
            return self.term(left.op, *left.args, *right.args)
        return self.term(op, left, right)

    def to(self, x: Term, dtype: Term) -> Term:
        """``x.to(dtype)``; casts to what x already is vanish, and casts move inside moves of data."""
        if self.dtype_of(x) is dtype:
            return x
        if self.keep_casts:
            made = self.term("to", x, dtype)
            self.casts[made] += 1
            return made
        if dtype.op == "dtype" and x.op in _MOVES:
            return self.term(x.op, self.to(x.args[0], dtype), *x.args[1:])
        if dtype.op == "dtype" and x.op in ("chunk", "split", "unbind"):
            return self.term(x.op, self.to(x.args[0], dtype), *x.args[1:])
        if dtype.op == "dtype" and x.op in ("cat", "stack") and x.args[0].op == "tuple":
            parts = self.term("tuple", *(self.to(part, dtype) for part in x.args[0].args))
            return self.term(x.op, parts, *x.args[1:])
        return self.term("to", x, dtype)

    def dtype_of(self, x: Term) -> Term:
        """The dtype of a term, as far as its operation tells."""
        if x.op == "to":
            return x.args[1]  # type: ignore[no-any-return]
        if x.op in _MOVES or x.op in (
            "rsqrt",
            "sqrt",
            "pow2",
            "clamp",
            *ACTIVATIONS,
        ):
            return self.dtype_of(x.args[0])
        if x.op in ("chunk", "split", "unbind"):
            return self.dtype_of(x.args[0])
        if x.op == "carry":
            return self.dtype_of(x.args[2])
        if x.op == "zeros_like" and x.args[1] is not self.none:
            return x.args[1]  # type: ignore[no-any-return]
        if x.op in ("zeros_like", "mean") and x.args[1 if x.op == "zeros_like" else 3] is self.none:
            return self.dtype_of(x.args[0])
        if x.op in ("add", "mul", "sub", "div"):
            sides = [side for side in x.args if side.op != "const"]
            dtypes = {id(found): found for found in map(self.dtype_of, sides)}
            if len(dtypes) == 1:
                return next(iter(dtypes.values()))
        if x.op in ("cat", "stack") and x.args[0].op == "tuple":
            dtypes = {id(found): found for found in map(self.dtype_of, x.args[0].args)}
            if len(dtypes) == 1:
                return next(iter(dtypes.values()))
        return self.term("dtype_of", x)

    def shape(self, x: Term) -> Term:
        """The shape of a term."""
        while x.op in _SAME_SHAPE:
            x = x.args[0]
        return self.term("shape", x)

    def tuple(self, items: list[Term]) -> Term:
        """A tuple; starred tuples are spliced in."""
        flat: list[Term] = []
        for item in items:
            if item.op == "star" and item.args[0].op in ("tuple", "list"):
                flat.extend(item.args[0].args)
            else:
                flat.append(item)
        return self.term("tuple", *flat)

    def index(self, x: Term, index: Term) -> Term:
        """``x[index]``."""
        if index.op == "const" and isinstance(index.args[0], int) and x.op in ("tuple", "list"):
            at = index.args[0]
            if -len(x.args) <= at < len(x.args) and all(arg.op != "star" for arg in x.args):
                return x.args[at]  # type: ignore[no-any-return]
        if index.op == "tuple":
            return self._multi_index(x, index)
        pair = self._pair(x, index)
        if pair is not None:
            return pair
        if index.op == "const" and index.args[0] is None:
            return self.term("unsqueeze", x, self.const(0))
        if x.op == "if" and x.args[1].op == x.args[2].op == "tuple":
            return self.choose(x.args[0], self.index(x.args[1], index), self.index(x.args[2], index))
        return self.term("index", x, index)

    def _pair(self, x: Term, index: Term) -> Term | None:
        """``x.view(*x.shape[:-1], -1, 2).unbind(-1)[i]`` is ``x[..., i::2]``."""
        if x.op != "unbind" or x.args[1].args != (-1,) or x.args[0].op not in ("reshape", "unflatten"):
            return None
        pairs, sizes = x.args[0].args[0], x.args[0].args[1]
        if x.args[0].op == "unflatten":
            if sizes.args != (-1,) or [size.args for size in x.args[0].args[2].args] != [(-1,), (2,)]:
                return None
        else:
            lead = self.index(self.shape(pairs), self.slice(self.none, self.const(-1), self.none))
            if sizes.args != (self.term("star", lead), self.const(-1), self.const(2)):
                return None
        window = self.slice(index, self.none, self.const(2))
        return self.index(pairs, self.term("tuple", self.const(Ellipsis), window))

    def _multi_index(self, x: Term, index: Term) -> Term:
        # x[:, :, None, :] is x.unsqueeze(2); x[..., None] is x.unsqueeze(-1).
        items = list(index.args)
        news = [i for i, item in enumerate(items) if item.op == "const" and item.args[0] is None]
        if len(news) == 1:
            rest = [item for i, item in enumerate(items) if i != news[0]]
            plain = [self._is_full(item) for item in rest]
            dots = [i for i, item in enumerate(rest) if item.op == "const" and item.args[0] is Ellipsis]
            if all(plain):
                return self.term("unsqueeze", x, self.const(news[0]))
            others = all(full for i, full in enumerate(plain) if i not in dots)
            if len(dots) == 1 and dots[0] == 0 and others and news[0] > 0:
                return self.term("unsqueeze", x, self.const(news[0] - len(items)))
        return self.term("index", x, index)

    @staticmethod
    def _is_full(item: Term) -> bool:
        return item.op == "slice" and all(part.args == (None,) for part in item.args)

    def slice(self, start: Term, stop: Term, step: Term) -> Term:
        """A slice; a start of 0 and a step of 1 are no start and no step."""
        if start.op == "const" and start.args[0] == 0:
            start = self.none
        if step.op == "const" and step.args[0] == 1:
            step = self.none
        return self.term("slice", start, stop, step)

    # -- truth ------------------------------------------------------------------------------------

    def negate(self, test: Term) -> Term:
        """``not test``."""
        if test.op == "not":
            return test.args[0]  # type: ignore[no-any-return]
        if test.op == "const":
            return self.const(not test.args[0])
        return self.term("not", test)

    def choose(self, test: Term, yes: Term, no: Term) -> Term:
        """``yes if test else no``."""
        if yes is no:
            return yes
        if test.op == "const":
            return yes if test.args[0] else no
        if test.op == "not":
            return self.choose(test.args[0], no, yes)
        return self.term("if", test, yes, no)


def _is_device(term: Term) -> bool:
    return term.op == "const" and isinstance(term.args[0], str)


def _fold(op: str, left: Any, right: Any) -> Any:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if not numbers or isinstance(left, bool) or isinstance(right, bool):
        return None
    try:
        return {
            "add": lambda: left + right,
            "sub": lambda: left - right,
            "mul": lambda: left * right,
            "div": lambda: left / right,
            "floordiv": lambda: left // right,
            "mod": lambda: left % right,
        }[op]()
    except (KeyError, ArithmeticError):
        return None


_EXTRA = frozenset(name[len("_call_") :] for name in dir(Idioms) if name.startswith("_call_"))
