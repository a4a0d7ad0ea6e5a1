"""One spelling for the halves of a fused projection."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["rewritten"]


def rewritten(term: Any, make: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """A term in which halves of the result of a layer are those of ``chunk``.

    On a width that is even, ``split``, ``tensor_split``, slices and a dimension of 2 give the same halves.
    The fact ``half`` is what the width of one has to be: ``even`` for half of what there is, a number, or
    the path of an attribute. An instance of another width is left alone.

    Args:
        term: With ``op`` and ``args``.
        make: Makes a term of an operation and its arguments.
    """
    writer = _Halves(make)
    made = writer.of(term)
    if len(writer.halves) > 1:
        return term, {}
    return made, dict(zip(("half",), writer.halves, strict=False))


class _Halves:
    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.halves: dict[Any, None] = {}
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """The canonical form of a term, or of each in a tuple."""
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if not hasattr(value, "op"):
            return value
        made = self._made.get(id(value))
        if made is None:
            args = self.of(value.args)
            half = self._half(*args) if value.op == "index" else None
            made = self._made[id(value)] = self.make(value.op, *args) if half is None else half
        return made

    def _half(self, x: Any, index: Any) -> Any:
        at = _number(index)
        if at in (0, 1, -1, -2) and x.op in ("split", "tensor_split", "unbind"):
            found: tuple[Any, Any] | None = getattr(self, f"_of_{x.op}")(*x.args)
            return None if found is None else self._chunk(found[0], found[1], at % 2)
        if index.op != "tuple" or len(index.args) < 2 or index.args[0].args != (Ellipsis,):
            return None
        last = index.args[-1]
        if len(index.args) == 3 and _is_full(last) and _number(index.args[1]) in (0, 1):
            cut = self._in_two(x)
            return None if cut is None else self._chunk(cut[0], cut[1], _number(index.args[1]))
        if len(index.args) != 2 or last.op != "slice" or last.args[2].args != (None,):
            return None
        start, stop, _ = last.args
        if (start.args == (None,)) is (stop.args == (None,)):
            return None
        half = self._size(start if stop.args == (None,) else stop, x)
        return None if half is None else self._chunk(x, half, int(stop.args == (None,)))

    def _chunk(self, x: Any, half: Any, at: int) -> Any:
        of_layer = x.op == "call" and x.args[0].op == "attr"
        if not of_layer and not (x.op == "input" and half == "even"):
            return None
        self.halves[half] = None
        halves = self.make("chunk", x, self.make("const", 2), self.make("const", -1))
        return self.make("index", halves, self.make("const", at))

    def _of_split(self, x: Any, size: Any, dim: Any) -> tuple[Any, Any] | None:
        if _number(dim) != -1:
            return None
        if size.op in ("tuple", "list"):
            if len(size.args) != 2 or size.args[0] is not size.args[1]:
                return None
            size = size.args[0]
        half = self._size(size, x)
        return None if half is None else (x, half)

    def _of_tensor_split(self, x: Any, count: Any, dim: Any) -> tuple[Any, Any] | None:
        return (x, "even") if _number(count) == 2 and _number(dim) == -1 else None

    def _of_unbind(self, x: Any, dim: Any) -> tuple[Any, Any] | None:
        return self._in_two(x) if _number(dim) == -2 else None

    def _in_two(self, x: Any) -> tuple[Any, Any] | None:
        """``unflatten(-1, (2, -1))``, or a reshape to that."""
        if x.op == "unflatten" and _number(x.args[1]) == -1 and x.args[2].op in ("tuple", "list"):
            sizes = x.args[2].args
        elif x.op == "reshape" and x.args[1].op == "tuple" and _leads(x.args[0], x.args[1].args[:-2]):
            sizes = x.args[1].args[-2:]
        else:
            return None
        if len(sizes) != 2 or _number(sizes[0]) != 2:
            return None
        half = "even" if _number(sizes[1]) == -1 else self._size(sizes[1], x.args[0])
        return None if half is None else (x.args[0], half)

    def _size(self, size: Any, x: Any) -> Any:
        """What a size is as the fact ``half``; None where that cannot be told."""
        number = _number(size)
        if number is not None:
            return number if number > 0 else None
        if size.op == "floordiv" and _number(size.args[1]) == 2:
            width = size.args[0]
            last = width.op == "index" and width.args[0].op == "shape" and _number(width.args[1]) == -1
            return "even" if last and width.args[0].args[0] is x else None
        names: list[str] = []
        while size.op == "attr":
            names.append(size.args[1])
            size = size.args[0]
        return "self." + ".".join(reversed(names)) if size.op == "self" and names else None


def _leads(x: Any, items: tuple[Any, ...]) -> bool:
    """Whether sizes are those of ``x`` but for the last one."""
    if len(items) != 1 or items[0].op != "star" or items[0].args[0].op != "index":
        return False
    shape, window = items[0].args[0].args
    start, stop, step = window.args if window.op == "slice" else (window,) * 3
    whole = shape.op == "shape" and shape.args[0] is x
    return whole and start.args == (None,) == step.args and _number(stop) == -1


def _number(term: Any) -> Any:
    return term.args[0] if term.op == "const" and type(term.args[0]) is int else None


def _is_full(item: Any) -> bool:
    return item.op == "slice" and all(part.args == (None,) for part in item.args)
