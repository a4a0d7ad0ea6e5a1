"""Symbolic execution: what a function computes, as one term.

Locals are substituted, helpers and methods inlined, branches merged into ``if`` terms, loops into
``loop`` terms. What cannot be followed becomes an ``unknown`` term, and what a call does besides
returning a value (writing an attribute, writing in place to an argument) is listed in ``effects``:
a function with effects is never a mere computation.

A call is a :class:`~twinkle.match.symbolic.statements.Frame`: names (``names.py``), calls (``calls.py``),
expressions (``expressions.py``) and statements (``statements.py``).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from twinkle.match import reads
from twinkle.match.symbolic import source
from twinkle.match.symbolic.idioms import Idioms
from twinkle.match.symbolic.names import TooLarge, Unsupported
from twinkle.match.symbolic.statements import CONTINUES, RAISES, Frame
from twinkle.match.symbolic.terms import Arena, Ref, Term

if TYPE_CHECKING:
    from types import FunctionType

    from twinkle.match.reads import Read

__all__ = ["Run", "Unsupported", "execute"]

_MOST_STATEMENTS = 2000  # the largest forward of transformers has 346


class Run:
    """One symbolic execution: its options, and what it met besides the result.

    Args:
        arena: Where the terms are made.
        inline: How many statements a helper may have to be inlined.
        assume: Parameters that are taken as ``"given"`` (not None) or ``"absent"`` (None), or as the one
            value in a tuple.
        instance: Read plain values (functions, flags, numbers) of ``self`` from this object.
        keep_casts: See :class:`~twinkle.match.symbolic.idioms.Idioms`.

    Attributes:
        effects: What the function does besides returning a value, in words.
        calls: The calls of attributes that stay calls: the attribute's name and the term.
        losses: The calls of torch's cross entropy.
        guards: The conditions under which it raises.
        reads: What of the program's objects it followed, each once (``None`` where nothing is to be noted).
        cls: The class whose methods ``self.name()`` is looked up in.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        inline: int = 60,
        assume: dict[str, Any] | None = None,
        instance: Any = None,
        keep_casts: bool = False,
    ) -> None:
        self.arena = arena
        self.idioms = Idioms(arena, keep_casts=keep_casts)
        self.inline = inline
        self.assume = assume or {}
        self.instance = instance
        self.effects: list[str] = []
        self.calls: list[tuple[str, Term]] = []
        self.losses: list[Term] = []
        self.guards: list[Term] = []
        self.reads: dict[Read | None, None] = {}
        self.none = self.idioms.none
        self.cls: type | None = None
        self.inside: list[FunctionType] = []
        self.loops = 0
        self.steps = 0

    def step(self) -> None:
        """Count a statement; code whose paths multiply is not followed to its end.

        Raises:
            TooLarge: There have been too many of them.
        """
        self.steps += 1
        if self.steps > _MOST_STATEMENTS:
            raise TooLarge("its paths are too many to follow")

    def function(self, function: FunctionType, args: list[Term], kwargs: dict[str, Term]) -> Term:
        """The term of a call of ``function``.

        Raises:
            NoSource: Its source is not there.
            Unsupported: Its parameters cannot be bound.
        """
        node = source.parse(function)
        self.reads[reads.of_code(function)] = None
        frame = Frame(self, function)
        frame.bind(node, args, kwargs)
        result = frame.block(node.body)
        if result is RAISES:
            return self.arena.term("raises")
        return self.none if result is None or result is CONTINUES else result

    def embed(self, value: Any, called: str | None = None) -> Term:
        """A Python object as a term; ``called`` is its name where it was found."""
        if value is None or isinstance(value, bool | int | float | str) or value is Ellipsis:
            return self.idioms.const(value)
        cls = type(value)
        if cls.__module__ == "torch" and cls.__name__ == "dtype":
            return self.arena.term("dtype", str(value).removeprefix("torch."))
        if isinstance(value, tuple | list) and len(value) <= 16:
            return self.arena.term("tuple", *(self.embed(item) for item in value))
        return self.arena.term("py", Ref(value, called if isinstance(value, dict) else None))

    def apply(self, value: Any, args: list[Term]) -> Term:
        """The term of a call of any Python object."""

        def caller() -> None: ...

        return Frame(self, caller).call(self.embed(value), args, {})  # type: ignore[arg-type]

    def unknown(self, why: str) -> Term:
        """A term for what is not followed: equal to no other term."""
        return self.arena.term("unknown", Ref(object()), why)

    def effect(self, what: str) -> None:
        """Record an effect, once."""
        if what not in self.effects:
            self.effects.append(what)


def execute(
    function: FunctionType, arena: Arena, *, owner: type | None = None, **options: Any
) -> tuple[Term, Run]:
    """What ``function`` returns, with its parameters as inputs.

    Args:
        function: A function, or the method of ``owner``.
        arena: Where the terms are made.
        owner: The class whose attributes ``self.name`` may be methods of.
        options: Those of :class:`Run`.

    Raises:
        NoSource: Its source is not there.
    """
    run = Run(arena, **options)
    run.cls = owner
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    args: list[Term] = []
    kwargs: dict[str, Term] = {}
    for at, parameter in enumerate(parameters):
        if owner is not None and at == 0:
            term = arena.term("self")
        elif run.assume.get(parameter.name) == "absent":
            term = run.none
        elif isinstance(run.assume.get(parameter.name), tuple):
            term = run.embed(*run.assume[parameter.name])
        else:
            term = arena.term("input", parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = term
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(term)
    return run.function(function, args, kwargs), run
