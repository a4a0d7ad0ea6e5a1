"""The embedded kernels: made for the variant and the attribute names that a target was recognised with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from twinkle.errors import SourceError
from twinkle.match.instance import Facts
from twinkle.ops.catalog import find_op
from twinkle.sources.specialised import SpecialisedSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twinkle.match.reads import Guard
    from twinkle.ops.backends import Backend
    from twinkle.records import Source

__all__ = ["EmbeddedFunction", "EmbeddedLayer"]


class _BackendSource:
    """The backend of an op as a source, where no registered class stands before it.

    Args:
        backend: The backend.
        maker: The function of its module that makes kernels.
    """

    kind = "embedded"

    def __init__(self, backend: Backend, maker: str) -> None:
        self.backend = backend
        self.maker = maker

    def describe(self) -> str:
        """The op and what computes it."""
        return f"embedded {self.backend.op}, {self.backend.label}"

    def load(self) -> object:
        """What makes its kernels, under the name that it has in a registered class.

        Raises:
            SourceError: The module cannot be imported.
        """
        try:
            module = self.backend.load()
        except ImportError as error:
            raise SourceError(
                f"the embedded {self.backend.op} cannot be imported", found=str(error)
            ) from error
        return SimpleNamespace(for_variant=getattr(module, self.maker))


class _Embedded(SpecialisedSource):
    """The kernel of an op for a variant and an instance; see the two classes below for the arguments."""

    facts: dict[str, Any]
    _maker: str

    def __init__(
        self,
        op: str,
        variant: Any,
        facts: Mapping[str, Any],
        original: Callable[..., Any] | None,
        backend: str,
        source: Source | None,
    ) -> None:
        found = find_op(op).backend(backend)
        super().__init__(source or _BackendSource(found, self._maker), op, variant, {}, original)
        self.facts = facts if isinstance(facts, Facts) else dict(facts)
        self.kind = "embedded"
        self.backend = backend
        self._label = found.label

    @property
    def guard(self) -> Guard | None:
        """What the facts rest on; numbers and layers are handed to the kernel at each call."""
        return self.facts.handed_guard if isinstance(self.facts, Facts) else None

    def _known(self) -> Mapping[str, Any]:
        return {**self.facts, **self.facts.paths} if isinstance(self.facts, Facts) else self.facts

    def describe(self) -> str:
        """The op, its variant and what computes it."""
        return f"embedded {self.op} ({self.variant.name}), {self._label}"


class EmbeddedLayer(_Embedded):
    """A layer class for a variant of an op.

    Args:
        op: The name of the op.
        variant: The variant that was recognised (``twinkle.ops.<op>.reference``).
        facts: From each argument of the definition to the attribute, the parameter or the number it is.
        backend: The name of the op's implementation (:mod:`twinkle.ops.backends`).
        source: As the embedded document registers it; by default the backend's module itself.
    """

    _maker = "layer_class"

    def __init__(
        self,
        op: str,
        variant: Any,
        facts: Mapping[str, Any],
        backend: str = "triton_backend",
        source: Source | None = None,
    ) -> None:
        super().__init__(op, variant, facts, None, backend, source)


class EmbeddedFunction(_Embedded):
    """A function for a variant of an op, with the arguments of the one it replaces.

    Args:
        op: The name of the op.
        variant: The variant that was recognised.
        facts: As for :class:`EmbeddedLayer`.
        original: The function that is replaced.
        backend: As for :class:`EmbeddedLayer`.
        source: As for :class:`EmbeddedLayer`.
    """

    _maker = "function_for"

    def __init__(
        self,
        op: str,
        variant: Any,
        facts: Mapping[str, Any],
        original: Callable[..., Any],
        backend: str = "triton_backend",
        source: Source | None = None,
    ) -> None:
        super().__init__(op, variant, facts, original, backend, source)
