"""Kernels that were bound to an op, for what an instance of it is: its form, its names, its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twinkle.records import LayerKernel, Source

__all__ = ["specialise"]


class _Specialised:
    """The kernels that were made for instances, by class."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[type, dict[object, tuple[LayerKernel, ...]]] = WeakKeyDictionary()


def specialise(
    cls: type,
    kernels: tuple[LayerKernel, ...],
    facts: Mapping[str, Any] | str,
    source: Callable[[Source], Source],
    *,
    device: str | None = None,
    sizes: tuple[Any, ...] = (),
) -> tuple[LayerKernel, ...]:
    """The kernels as they are for one instance: the same ones for every instance with the same facts.

    Args:
        cls: Its class.
        kernels: As registered.
        facts: What was read from the instance, or in words why it is not what its class promises.
        source: From the source of a kernel to that of the same kernel for these facts.
        device: What the kernels are for where their registration does not say.
        sizes: Of the instance, where those of another size are to be told apart from it: each is proven at
            its own first call, or never where it has none.
    """
    said = facts if isinstance(facts, str) else tuple(sorted((name, repr(it)) for name, it in facts.items()))
    # By identity: the kernels stay alive in the key.
    key = (kernels, device, said, sizes)
    known = runtime.of(_Specialised).of.setdefault(cls, {})
    made = known.get(key)
    if made is None:
        made = known[key] = tuple(
            kernel.specialised(source(kernel.source), device=device) for kernel in kernels
        )
    return made
