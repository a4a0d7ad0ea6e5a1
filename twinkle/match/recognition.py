"""Records of a recognition: the op and its variant, the near misses, and the reason against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from twinkle.match.reads import Guard

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.match.reads import Read

__all__ = ["NearMiss", "Reason", "Recognition"]


@dataclass(frozen=True)
class NearMiss:
    """A variant of an op whose code differs little from the code at hand.

    Attributes:
        op: The op.
        variant: The nearest variant.
        difference: The first difference, as ``expected …, found …`` or in words.
    """

    op: str
    variant: Any
    difference: str


@dataclass(frozen=True)
class Reason:
    """Why an instance cannot take the kernel that its class was recognised for; false as a condition."""

    text: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Recognition:
    """The op that the code of a class or function computes; false as a condition where none was recognised.

    Attributes:
        target: ``module:Name``.
        op: The op, or None.
        variant: The frozen variant of that op (``twinkle.ops.<op>.reference``), or None.
        facts: Each argument of the variant's reference: the name of the attribute or of the parameter it
            is, or the number it is. ``requires`` in it lists the parameters that must be given or absent.
        instance_facts: The facts that only an instance can tell; :func:`check_instance` reads them.
        guards: Attributes that the code only reads to raise an error.
        reads: What of the program's objects the recognition rests on.
        reason: Why nothing was recognised, where there is more to say than that it is something else.
    """

    target: str
    op: str | None = None
    variant: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    instance_facts: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    reads: tuple[Read, ...] = field(default=(), repr=False, compare=False)
    reason: str | None = None
    # Comparing with every variant takes longer than recognising one, and only a reader asks for it.
    _nearest: Callable[[], tuple[NearMiss, ...]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def near(self) -> tuple[NearMiss, ...]:
        """The nearest variants, each with the first difference."""
        return () if self._nearest is None else self._nearest()

    @cached_property
    def guard(self) -> Guard:
        """Whether the code of the class or function still is what was recognised."""
        return Guard(read for read in self.reads if not read.of_layer)

    def rests_on(self, function: Any) -> bool:
        """Whether a function is a part of the code: another one in its place is a change of it."""
        return any(part is function for read in self.reads for part in read.objects)

    def __bool__(self) -> bool:
        return self.op is not None
