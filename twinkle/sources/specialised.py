"""Kernels of a recognised op, specialised for the variant and the attribute names of a target.

A kernel class may have a static method ``for_variant(variant, facts)``. It returns the layer class for a
variant of its op, or where it has none ``None`` or the reason. That of a function kernel also takes the
function that is replaced, ``for_variant(variant, facts, original)``, and returns a function with the same
arguments. A kernel without ``for_variant`` is taken for every variant.
"""

from __future__ import annotations

from types import MethodType

from twinkle.errors import SourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from twinkle.match.reads import Guard
    from twinkle.records import Source

__all__ = ["SpecialisedSource"]


class SpecialisedSource:
    """The kernel of another source, specialised for one variant of an op.

    Args:
        source: Where the kernel class comes from.
        op: The op that the target was recognised as.
        variant: The variant of it (``twinkle.ops.<op>.reference``).
        facts: From each argument of the op's definition to the attribute, the parameter or the value it
            is; or in words why the instance does not keep to the variant of its class.
        original: The function that is replaced; None for a layer.

    Attributes:
        kind: That of the underlying source.
        made: What :meth:`load` gives, once it is loaded.
    """

    def __init__(
        self,
        source: Source,
        op: str,
        variant: Any,
        facts: Mapping[str, Any] | str,
        original: Callable[..., Any] | None = None,
    ) -> None:
        self.source = source
        self.kind = source.kind
        self.op = op
        self.variant = variant
        self.facts = facts
        self.original = original
        self.made: Any = None

    def describe(self) -> str:
        """The description of the underlying source, and the variant."""
        return f"{self.source.describe()} for {self.op} ({self.variant.name})"

    @property
    def guard(self) -> Guard | None:
        """What the facts rest on, which is asked at each call; None where nothing is known of that."""
        guard: Guard | None = getattr(self.facts, "guard", None)
        return guard

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the underlying source on its loading."""
        return tuple(getattr(self.source, "notes", ()))

    @property
    def trace(self) -> list[tuple[str, bool, str]]:
        """The build variants that the underlying source looked at."""
        return list(getattr(self.source, "trace", ()))

    def load(self) -> object:
        """The layer class or the function; the same one each time.

        Raises:
            SourceError: It cannot be loaded, or has no kernel for the variant.
        """
        if self.made is None:
            loaded = self.source.load()
            # A function kernel may be the forward of a class, which has the method.
            owner = loaded.__self__ if isinstance(loaded, MethodType) else loaded
            maker = getattr(owner, "for_variant", None)
            self.made = loaded if maker is None else self._specialise(maker)
        made: object = self.made
        return made

    def _known(self) -> Mapping[str, Any]:
        """The facts as the maker of the kernel gets them."""
        assert not isinstance(self.facts, str)
        return self.facts

    def _specialise(self, maker: Any) -> object:
        if isinstance(self.facts, str):
            raise SourceError(
                f"this layer is no {self.op} ({self.variant.name}) after all",
                where=self.source.describe(),
                found=self.facts,
            )
        function = () if self.original is None else (self.original,)
        made = maker(self.variant, self._known(), *function)
        if made is None or isinstance(made, str):
            raise SourceError(
                f"there is no kernel for the variant {self.variant.name!r} of {self.op}",
                where=self.source.describe(),
                found=made,
                fix="nothing has to be done: the original runs",
            )
        return made
