"""One spelling for rotations that are written in many ways, relative to the tensor that is turned.

Halves by ``chunk``, ``split``, slices or ``reshape``, pairs by strides, ``unflatten`` or ``reshape``, results
joined by ``cat``, ``stack`` or by assignment, signs on either factor: on a tensor of four dimensions with an
even number of channels these are the same numbers, bit for bit, gradients too. On any other tensor they need
not be, so what is recognised by this form runs its own code there (``functions.py``).

What does not depend on the values of the turned tensor is a table, whatever computes it: it becomes one
``table`` term around the code as written.
"""

from __future__ import annotations

from twinkle.ops.rotary.patterns import Merge, move_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["canonical"]

_DOTS = Ellipsis
_OF_FORM = ("shape", "dtype_of", "ndim", "device_of")
_FLAT = ("summed", "view_as_real")
_EXACT = ("neg", "to")  # a move of data may pass these


def canonical(term: Any, turned: Any, make: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """A term in the one spelling, and facts that go with it.

    Args:
        term: With ``op`` and ``args``.
        turned: The term of the tensor that is turned.
        make: Makes a term of an operation and its arguments.
    """
    form = _Canonical(turned, make)
    found = form.of(term)
    facts: dict[str, Any] = {"requires": tuple(form.requires)} if form.requires else {}
    # What is written into a new tensor keeps the strides of the turned one.
    return (found.args[0], {**facts, "dense": True}) if found.op == "dense" else (found, facts)


class _Canonical:
    def __init__(self, turned: Any, make: Callable[..., Any]) -> None:
        self.turned = turned
        self.make = make
        self.none = make("const", None)
        self.requires: dict[str, None] = {}
        self._made: dict[int, Any] = {}
        self._depends: dict[int, bool] = {}

    # -- what depends on what -----------------------------------------------------------------------

    def depends(self, value: Any) -> bool:
        """Whether a term depends on the values of the turned tensor, not merely on its shape and dtype."""
        if isinstance(value, tuple):
            return any(map(self.depends, value))
        if not hasattr(value, "op"):
            return False
        if value is self.turned:
            return True
        if value.op in _OF_FORM:
            return False
        known = self._depends.get(id(value))
        if known is None:
            known = self._depends[id(value)] = self.depends(value.args)
        return known

    def of(self, value: Any) -> Any:
        """The canonical form of a term, or of each in a tuple."""
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if not self.depends(value) or value is self.turned:
            return value
        made = self._made.get(id(value))
        if made is None:
            made = self._made[id(value)] = self.node(value.op, *self.of(value.args))
        return made

    def node(self, op: str, *args: Any) -> Any:
        """The canonical term of an operation on canonical arguments."""
        rule = getattr(self, f"_{op}", None)
        made = None if rule is None else rule(*args)
        return self.make(op, *args) if made is None else made

    def table(self, value: Any) -> Any:
        """A factor or a size that does not depend on the turned tensor; a hole of a template as it is."""
        if self.depends(value) or value.op in ("hole", "table"):
            return value
        return self.make("table", self._tidy(value))

    def _tidy(self, value: Any) -> Any:
        """A table whose sizes are read from the turned tensor itself, not from a copy of it in pairs."""
        if isinstance(value, tuple):
            return tuple(map(self._tidy, value))
        if not hasattr(value, "op") or self.depends(value):
            return value
        if value.op in ("shape", "ndim"):
            sizes = self._sizes(value.args[0])
            if sizes is not None:
                return self.make("tuple", *sizes) if value.op == "shape" else self.make("const", len(sizes))
        if value.op == "index" and value.args[0].op == "shape" and (at := _number(value.args[1])) is not None:
            sizes = self._sizes(value.args[0].args[0])
            if sizes is not None and -len(sizes) <= at < len(sizes):
                return sizes[at]
        return self.make(value.op, *map(self._tidy, value.args)) if value.args else value

    def _sizes(self, x: Any) -> tuple[Any, ...] | None:
        """The sizes of the turned tensor as pairs of numbers or as complex numbers."""
        if not self.depends(x):
            return self._sizes_of_another(x)
        x = self._of_shape(x)
        is_complex = x.op == "view_as_complex"
        x = x.args[0] if is_complex else x
        if x.op != "paired" or _bare(x.args[0]) is not self.turned:
            return None
        shape = self.make("shape", self.turned)
        *lead, width = (self.make("index", shape, self.make("const", at)) for at in (0, 1, 2, -1))
        two = self.make("const", 2)
        return (*lead, self.make("floordiv", width, two), *(() if is_complex else (two,)))

    def _sizes_of_another(self, x: Any) -> tuple[Any, ...] | None:
        others = _inputs(x)
        if len(others) != 1 or x.op not in ("reshape", "unflatten", "view_as_complex"):
            return None
        sizes = _Canonical(others[0], self.make)._sizes(x)
        if sizes is not None:
            self.requires[f"{others[0].args[0]}.ndim == 4"] = None
        return sizes

    # -- signs --------------------------------------------------------------------------------------

    def _neg(self, x: Any) -> Any:
        return x.args[0] if x.op == "neg" else None

    def _mul(self, a: Any, b: Any) -> Any:
        if a.op == "neg":
            return self.node("neg", self.node("mul", a.args[0], b))
        if b.op == "neg":
            return self.node("neg", self.node("mul", a, b.args[0]))
        # A table is bound as a whole, and its sign belongs to the product.
        return self.make("mul", self.table(a), self.table(b))

    def _add(self, a: Any, b: Any) -> Any:
        if b.op == "neg":
            return self.node("sub", a, b.args[0])
        return self.node("sub", b, a.args[0]) if a.op == "neg" else None

    def _sub(self, a: Any, b: Any) -> Any:
        return self.node("add", a, b.args[0]) if b.op == "neg" else None

    # -- casts --------------------------------------------------------------------------------------

    def _to(self, x: Any, dtype: Any) -> Any:
        # A cast of a result may be that of its parts. A cast of the turned tensor beside one of its rotated
        # copy is not that of a tensor cast once: each rounds a gradient.
        if dtype.op == "dtype_of" and x.op in ("join", "partly", "stacked", "on_end", "dense"):
            return self.node(x.op, *(self.node("to", p, dtype) if hasattr(p, "op") else p for p in x.args))
        if x.op in ("part", "head", "tail"):
            return self.node(x.op, self.node("to", x.args[0], dtype), *x.args[1:])
        own = dtype.op == "dtype_of" and dtype.args[0] is self.turned
        return x if own and self._is_own(x) else None

    def _is_own(self, x: Any) -> bool:
        """Whether a term has the dtype of the turned tensor whatever that is."""
        while x.op in ("neg", "part", "head", "tail"):
            x = x.args[0]
        return x is self.turned or (
            x.op == "to" and x.args[1].op == "dtype_of" and x.args[1].args[0] is self.turned
        )

    # -- parts --------------------------------------------------------------------------------------

    def _index(self, x: Any, index: Any) -> Any:
        at = _number(index)
        if at is not None and x.op == "parts" and -2 <= at < 2:
            return self.node("part", x.args[0], x.args[1], self.make("const", at % 2))
        if at is not None and x.op == "ends" and at in (0, 1):
            return self.node("head" if at == 0 else "tail", *x.args)
        if index.op != "tuple" or len(index.args) != 2 or index.args[0].args != (_DOTS,):
            return self._index_of_four(x, index)
        last = index.args[1]
        if x.op == "paired" and _number(last) in (0, 1):
            return self.node("part", x.args[0], "pair", last)
        return self._window(x, last) if last.op == "slice" else None

    def _index_of_four(self, x: Any, index: Any) -> Any:
        """``x[:, :, :, window]``."""
        items: Any = index.args if index.op == "tuple" else ()
        if x.op == "halved" and len(items) == 3 and items[0].args == (_DOTS,) and not _bounded(items[2]):
            known = _number(items[1]) in (0, 1)
            return self.node("part", x.args[0], "half", items[1]) if known else None
        if len(items) != 4 or any(map(_bounded, items[:3])):
            return None
        return self._window(x, items[3]) if items[3].op == "slice" else None

    def _window(self, x: Any, window: Any) -> Any:
        start, stop, step = window.args
        if _number(step) == 2 and stop is self.none and _number(start) in (None, 0, 1):
            if start is self.none or _number(start) is not None:
                return self.node("part", x, "pair", self.make("const", _number(start) or 0))
            return None
        if step is not self.none:
            return None
        if start is self.none and stop is not self.none and not self.depends(stop):
            return self._first(x, stop)
        if stop is self.none and start is not self.none and not self.depends(start):
            if self._is_half(start, x):
                return self.node("part", x, "half", self.make("const", 1))
            return self.node("tail", x, self.table(start))
        return None

    def _first(self, x: Any, stop: Any) -> Any:
        if self._is_half(stop, x):
            return self.node("part", x, "half", self.make("const", 0))
        return self.node("head", x, self.table(stop))

    def _part(self, x: Any, kind: str, at: Any) -> Any:
        # The second half of (-b, a) is a.
        return x.args[1 + _number(at)] if x.op == "join" and x.args[0] == kind else None

    def _chunk(self, x: Any, count: Any, dim: Any) -> Any:
        return self.make("parts", x, "half") if _number(count) == 2 and self._is_last(dim) else None

    _tensor_split = _chunk

    def _split(self, x: Any, size: Any, dim: Any) -> Any:
        if not self._is_last(dim):
            return None
        if size.op in ("tuple", "list"):
            if len(size.args) != 2 or self.depends(size):
                return None
            if self._is_half(size.args[0], x):
                return self.make("parts", x, "half")
            return self.make("ends", x, self.table(size.args[0]))
        return self.make("parts", x, "half") if self._is_half(size, x) else None

    def _unbind(self, x: Any, dim: Any) -> Any:
        at = _number(dim)
        if x.op == "paired" and at in (-1, 4):
            return self.make("parts", x.args[0], "pair")
        return self.make("parts", x.args[0], "half") if x.op == "halved" and at in (-2, 3) else None

    def _reshape(self, x: Any, sizes: Any) -> Any:
        if x.op in ("stacked", "summed", "view_as_real") and self._is_shape(sizes):
            return self._joined(x)
        if self._is_shape(sizes):
            whole = self.make("shape", self.turned)
            return x if x.op in ("join", "partly") else self.make("reshape", x, whole)
        if sizes.op != "tuple" or not self._leads(sizes.args[:-2]):
            return None
        return self._cut(x, *sizes.args[-2:])

    def _unflatten(self, x: Any, dim: Any, sizes: Any) -> Any:
        if not self._is_last(dim) or sizes.op not in ("tuple", "list") or len(sizes.args) != 2:
            return None
        return self._cut(x, *sizes.args)

    def _cut(self, x: Any, first: Any, second: Any) -> Any:
        rest = (first, second)
        if _number(second) == 2 and (_number(first) == -1 or self._is_half(first, x)):
            return self.make("paired", x)
        if _number(rest[0]) == 2 and (_number(second) == -1 or self._is_half(second, x)):
            return self.make("halved", x)
        return None

    def _einops(self, name: str, x: Any, pattern: Any, sizes: Any) -> Any:
        """``rearrange`` where it splits channels into pairs or halves, or joins such."""
        given = {axis: _number(size) for axis, size in sizes}
        move = move_of(pattern.args[0], given) if name == "rearrange" else None
        if move is None or move.lead not in (None, 3):
            return None  # with another number of axes the code raises
        if isinstance(move, Merge):
            return self._joined(x)
        if move.size != 2 or not self._is_alike(x):
            return None
        return self.make("paired" if move.at == 1 else "halved", x)

    # -- results ------------------------------------------------------------------------------------

    def _cat(self, parts: Any, dim: Any) -> Any:
        if parts.op not in ("tuple", "list") or len(parts.args) != 2 or not self._is_last(dim):
            return None
        first, second = parts.args
        if second.op == "tail":
            return self.node("partly", first, second)
        return self.node("join", "half", first, second)

    def _stack(self, parts: Any, dim: Any) -> Any:
        if parts.op not in ("tuple", "list") or len(parts.args) != 2:
            return None
        if _number(dim) in (-1, 4):
            return self.make("stacked", *parts.args)
        return self.make("on_end", *parts.args) if _number(dim) in (-2, 3) else None

    def _flatten(self, x: Any, start: Any, end: Any) -> Any:
        return self._joined(x) if _number(start) in (-2, 3) and _number(end) in (-1, 4) else None

    def _joined(self, x: Any) -> Any:
        """The last two of five axes as one."""
        if x.op == "stacked":
            return self.node("join", "pair", *x.args)
        if x.op == "on_end":
            return self.node("join", "half", *x.args)
        return self.make("flat", x if x.op == "summed" else x.args[0]) if x.op in _FLAT else None

    def _sum(self, x: Any, dim: Any, keepdim: Any, dtype: Any) -> Any:
        """The products of the rows of matrices with pairs, added."""
        if x.op != "mul" or _number(dim) not in (-1, 5) or keepdim.args != (False,) or dtype is not self.none:
            return None
        return self.make("summed", x)

    def _setitem(self, x: Any, index: Any, value: Any) -> Any:
        """``out[..., 0::2] = a; out[..., 1::2] = b`` in a new tensor like the turned one."""
        window = index.args[1] if index.op == "tuple" and len(index.args) == 2 else None
        if window is None or index.args[0].args != (_DOTS,) or window.op != "slice":
            return None
        place = self._window(self.turned, window)
        if place is None or place.op != "part":
            return None
        kind, at = place.args[1], _number(place.args[2])
        value = self.node("to", value, self.make("dtype_of", self.turned))
        if _is_empty_like(x, self.turned) and at == 0:
            return self.make("begun", kind, value)
        if x.op == "begun" and x.args[0] == kind and at == 1:
            return self.node("dense", self.node("join", kind, x.args[1], value))
        return None

    # -- sizes --------------------------------------------------------------------------------------

    def _is_last(self, dim: Any) -> bool:
        return _number(dim) in (-1, 3)

    def _is_shape(self, sizes: Any) -> bool:
        """Whether sizes are the shape of the turned tensor."""
        if sizes.op == "shape":
            return _bare(sizes.args[0]) is self.turned
        if sizes.op != "tuple":
            return False
        items = sizes.args
        if len(items) == 1 and items[0].op == "star":
            return self._is_shape(items[0].args[0])
        return self._leads(items[:-1]) and (_number(items[-1]) == -1 or self._is_width(items[-1]))

    def _leads(self, items: tuple[Any, ...]) -> bool:
        """Whether sizes are those of the turned tensor but for its channels."""
        if len(items) == 1 and items[0].op == "star":
            lead = items[0].args[0]
            if lead.op != "index" or lead.args[0].op != "shape" or lead.args[1].op != "slice":
                return False
            start, stop, step = lead.args[1].args
            alike = self._is_alike(lead.args[0].args[0])
            return alike and start is step is self.none and _number(stop) in (-1, 3)
        return len(items) == 3 and all(self._is_size(item, at) for at, item in enumerate(items))

    def _is_alike(self, x: Any) -> bool:
        """Whether all but the last dimension are those of the turned tensor."""
        found = self._of_shape(x)
        return found is self.turned or found.op in ("part", "head", "tail")

    def _is_size(self, item: Any, at: int) -> bool:
        if item.op != "index" or item.args[0].op != "shape" or _number(item.args[1]) not in (at, at - 4):
            return False
        x = item.args[0].args[0]
        return _bare(x) is self.turned if at == 3 else self._is_alike(x)

    def _is_width(self, item: Any) -> bool:
        return self._is_size(item, 3)

    def _is_half(self, size: Any, x: Any) -> bool:
        """Whether a size is half the channels of ``x``, which has those of the turned tensor."""
        while x.op in _EXACT:
            x = x.args[0]
        if size.op != "floordiv" or _number(size.args[1]) != 2:
            return False
        width = size.args[0]
        if x is self.turned:
            return self._is_width(width)
        known = width.op == "index" and width.args[0].op == "shape" and _number(width.args[1]) in (-1, 3)
        return known and x.op == "head" and self._of_shape(width.args[0].args[0]) is x

    def _of_shape(self, x: Any) -> Any:
        """The canonical form of what a shape is taken of."""
        found = self.of(x)
        while found.op in _EXACT:
            found = found.args[0]
        return found


def _inputs(value: Any) -> list[Any]:
    """The inputs whose values or sizes a term reads."""
    if isinstance(value, tuple):
        return list({id(found): found for item in value for found in _inputs(item)}.values())
    if not hasattr(value, "op"):
        return []
    return [value] if value.op == "input" else _inputs(value.args)


def _bare(x: Any) -> Any:
    while x.op in _EXACT:
        x = x.args[0]
    return x


def _number(term: Any) -> Any:
    return term.args[0] if term.op == "const" and type(term.args[0]) is int else None


def _bounded(item: Any) -> bool:
    return item.op != "slice" or any(part.args != (None,) for part in item.args)


def _is_empty_like(x: Any, turned: Any) -> bool:
    return x.op == "empty_like" and x.args[0] is turned and all(arg.args == (None,) for arg in x.args[1:])
