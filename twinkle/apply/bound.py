"""A module and the kernels that are for it: what matching finds and planning starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from twinkle.records import LayerKernel, LayerTarget, Source

__all__ = ["Bound", "specialise"]


class Bound(NamedTuple):
    """One module of a model, and the kernels that are registered for it.

    Attributes:
        module: The module; nothing of it was touched.
        cls: Its class without Twinkle.
        target: The class that the registration means: ``cls`` or one it inherits ``forward`` from.
        kernels: In registration order; those for an op are specialised for this module.
        entry: The registration that bound them; None where the class names its kernel itself
            (``kernel_layer_name``), and for embedded kernels.
        asked_for: Whether a user registered them; embedded kernels stand in where nobody did.
    """

    module: nn.Module
    cls: type
    target: type
    kernels: tuple[LayerKernel, ...]
    entry: LayerTarget | None = None
    asked_for: bool = True


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
    """Kernels that were registered for an op, as they are for one layer; layers with equal facts share them.

    Args:
        cls: Its class.
        kernels: As registered.
        facts: What was read from the instance, or in words why it is not what its class promises.
        source: From the source of a kernel to that of the same kernel for these facts.
        device: What the kernels are for where their registration does not say.
        sizes: Shapes and dtypes of the instance, where others are to be told apart from it: each is proven at
            its own first call, or never where it has none.
    """
    said = facts if isinstance(facts, str) else tuple(sorted((name, repr(it)) for name, it in facts.items()))
    # By identity: the kernels stay alive in the key.
    key = (kernels, device, said, sizes, getattr(facts, "guard", None))
    known = runtime.of(_Specialised).of.setdefault(cls, {})
    made = known.get(key)
    if made is None:
        made = tuple(kernel.specialised(source(kernel.source), device=device) for kernel in kernels)
        for kernel in made:
            kernel.alike = (said, sizes)
        known[key] = made
    return made
