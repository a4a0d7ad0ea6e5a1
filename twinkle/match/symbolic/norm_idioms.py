"""Canonical terms of what norms are written with: Euclidean norms, deviations, normalised shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Protocol

    from twinkle.match.symbolic.terms import Term

    class Terms(Protocol):
        """Where the terms are made (``Idioms``), as these rules need it."""

        none: Term

        def term(self, op: str, *args: Any) -> Term: ...
        def const(self, value: Any) -> Term: ...
        def simplify(self, name: str, args: list[Term]) -> Term: ...
        def binary(self, op: str, left: Term, right: Term) -> Term: ...
        def index(self, x: Term, index: Term) -> Term: ...
        def shape(self, x: Term) -> Term: ...
        def slice(self, start: Term, stop: Term, step: Term) -> Term: ...


__all__ = ["NormIdioms"]


class NormIdioms:
    """Rules for calls of torch that are written in several ways: a part of ``Idioms``."""

    def _call_norm(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """``x.norm(2, dim=-1)``, ``torch.norm(x, dim=-1)`` and ``torch.linalg.vector_norm(x, dim=-1)``."""
        given = _bind(args, kwargs, ("p", "dim", "keepdim", "dtype"))
        if given is None or "dim" not in given:
            return None
        p, dim = given.get("p", self.const(2)), given["dim"]
        if p.op != "const" or p.args[0] not in (2, "fro") or isinstance(p.args[0], bool):
            return None
        keepdim, dtype = given.get("keepdim", self.const(False)), given.get("dtype", self.none)
        return self.simplify("vector_norm", [args[0], self.const(2), dim, keepdim, dtype])

    def _call_normalize(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """``F.normalize(x, dim=-1)`` is ``x / x.norm(2, -1, keepdim=True).clamp(min=eps)``."""
        given = _bind(args, kwargs, ("p", "dim", "eps", "out"))
        if given is None or given.get("out", self.none) is not self.none:
            return None
        p, dim = given.get("p", self.const(2)), given.get("dim", self.const(1))
        if p.op != "const" or p.args[0] != 2 or isinstance(p.args[0], bool):
            return None
        norm = self.simplify("vector_norm", [args[0], self.const(2), dim, self.const(True), self.none])
        least = self.simplify("clamp", [norm, given.get("eps", self.const(1e-12)), self.none])
        return self.binary("div", args[0], least)

    def _call_clamp_min(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        given = _bind(args, kwargs, ("min",))
        if given is None or "min" not in given:
            return None
        return self.simplify("clamp", [args[0], given["min"], self.none])

    def _call_expand_as(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        given = _bind(args, kwargs, ("other",))
        return (
            None if given is None or "other" not in given else self.term("expand_as", args[0], given["other"])
        )

    def _call_var(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._deviation("var", args, kwargs)  # type: ignore[attr-defined, no-any-return]

    def _call_std(self: Terms, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        return self._deviation("std", args, kwargs)  # type: ignore[attr-defined, no-any-return]

    def _deviation(self: Terms, name: str, args: list[Term], kwargs: dict[str, Term]) -> Term | None:
        """``correction=0`` is ``unbiased=False``, and 1 is True."""
        kwargs = dict(kwargs)
        kwargs.update((to, kwargs.pop(key)) for key, to in _NAMES.items() if key in kwargs)
        correction = kwargs.pop("correction", None)
        if correction is not None:
            if correction.op != "const" or correction.args[0] not in (0, 1) or "unbiased" in kwargs:
                return None
            kwargs["unbiased"] = self.const(bool(correction.args[0]))
        given = _bind(args, kwargs, ("dim", "unbiased", "keepdim"))
        if given is None:
            return None
        defaults = (("dim", self.none), ("unbiased", self.const(True)), ("keepdim", self.const(False)))
        return self.simplify(name, [args[0], *(given.get(key, value) for key, value in defaults)])

    def normalized_shape(self: Terms, x: Term, shape: Term) -> Term:
        """The shape that a norm is told: ``(x.size(-1),)`` is ``x.shape[-1:]``."""
        last = self.index(self.shape(x), self.const(-1))
        if shape.op in ("tuple", "list") and shape.args == (last,):
            return self.index(self.shape(x), self.slice(self.const(-1), self.none, self.none))
        return shape


_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def _bind(args: list[Term], kwargs: dict[str, Term], names: tuple[str, ...]) -> dict[str, Term] | None:
    """The arguments behind the tensor by name; None where they are not as these."""
    kwargs = {_NAMES.get(key, key): value for key, value in kwargs.items()}
    rest = args[1:]
    if len(rest) > len(names) or any(arg.op == "star" for arg in rest):
        return None
    given = dict(zip(names, rest, strict=False))
    if given.keys() & kwargs.keys() or kwargs.keys() - set(names):
        return None
    return {**given, **kwargs}
