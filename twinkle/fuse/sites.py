"""Sites: places of a forward as ops, decided by the layers there, and whether a kernel computes them.

The decision is one for an instance, whose layers are there (:mod:`twinkle.fuse.forward`), and for the text
of a class, whose layers are those that ``__init__`` writes (:mod:`twinkle.fuse.survey`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle.fuse.group_norm_silu import ActivatedNormStep, activated, group_norm_of
from twinkle.fuse.modulated_functions import modulating_function
from twinkle.fuse.modulated_norm import ModulationStep
from twinkle.fuse.norms import Norm, norm_of, norm_variant
from twinkle.fuse.places import (
    CalledModulation,
    LayerThenActivation,
    LayerThenModulation,
    SumThenLayer,
)
from twinkle.fuse.qk_norm_rotary import PairStep, pair_of, variant_of_pair
from twinkle.fuse.residual_norm import SumStep, variants_of
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.modulated_norm.triton_backend import variant_of
from twinkle.ops.residual_norm import triton_backend as residual_norm
from twinkle.ops.residual_norm.reference import ResidualNormVariant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twinkle.fuse.places import Place, RotatedPair

__all__ = ["OPS", "Site", "global_at", "site_of"]

OPS = (SumStep.op, PairStep.op, ModulationStep.op, ActivatedNormStep.op)
"""The ops of places; ``group_norm`` is one of layers as well."""


class Site(NamedTuple):
    """A place of a forward as an op.

    Attributes:
        number: The index of the place in its forward.
        op: The op.
        variant: The variant of it; None where the layers or the function are something else.
        reason: Why there is no kernel for it, or None.
    """

    number: int
    op: str
    variant: Any
    reason: str | None = None


def global_at(names: Callable[[str], Any], path: str) -> Any:
    """What a dotted name of a module stands for, such as ``F.silu``; None for what is not there.

    Args:
        names: Looks a name up in the module.
        path: The dotted name.
    """
    first, *others = path.split(".")
    value = names(first)
    for name in others:
        value = getattr(value, name, None)
    return value


def site_of(
    number: int, place: Place, classes: Sequence[type | None], function: Callable[[str], Any]
) -> Site:
    """A place of a forward as an op, decided by the classes of its layers.

    Args:
        number: The index of the place in its forward.
        place: The place.
        classes: Those of its layers, None for a layer that is not there.
        function: Looks a function up by its name in the forward's module.
    """
    if isinstance(place, SumThenLayer):
        return _sum_site(number, place, classes[0])
    if isinstance(place, LayerThenModulation):
        return _modulated_site(number, place, classes[0])
    if isinstance(place, CalledModulation):
        found = modulating_function(function(place.function))
        if isinstance(found, str):
            return Site(number, ModulationStep.op, None, found)
        return _modulated_site(number, place, classes[0])
    if isinstance(place, LayerThenActivation):
        return _activation_site(number, place, classes, function)
    return _pair_site(number, place, classes[0], classes[1], function(place.function))


def _sum_site(number: int, place: SumThenLayer, cls: type | None) -> Site:
    norm = "its norm is not there" if cls is None else norm_of(cls)
    scaled = place.scale is not None
    if isinstance(norm, Norm):
        variants = variants_of(norm)
        variant = variants.scaled if scaled else variants.variant
        return Site(number, SumStep.op, variant, residual_norm.supports(variant))
    other = None if cls is None else norm_variant(cls)
    if other is None:
        return Site(number, SumStep.op, None, norm)
    op = "layer_norm" if isinstance(other, LayerNormVariant) else "rms_norm"
    name = f"{op}_{other.name}{'_scaled' * scaled}"
    return Site(number, SumStep.op, ResidualNormVariant(name, other, scaled), norm)


def _modulated_site(number: int, place: LayerThenModulation | CalledModulation, cls: type | None) -> Site:
    norm = "its norm is not there" if cls is None else norm_of(cls)
    other = norm.variant if isinstance(norm, Norm) else None if cls is None else norm_variant(cls)
    variant = None if other is None else variant_of(other, upcast=place.upcast, widened=place.widened)
    return Site(number, ModulationStep.op, variant, norm if isinstance(norm, str) else None)


def _activation_site(
    number: int,
    place: LayerThenActivation,
    classes: Sequence[type | None],
    function: Callable[[str], Any],
) -> Site:
    norm = "its norm is not there" if classes[0] is None else group_norm_of(classes[0])
    if isinstance(norm, str):
        return Site(number, ActivatedNormStep.op, None, norm)
    name = place.function_name
    behind = classes[1] if len(classes) > 1 else None if name is None else global_at(function, name)
    if behind is None and (len(classes) > 1 or name is not None):
        return Site(number, ActivatedNormStep.op, None, "its activation is not there")
    found = activated(behind, written=place.written)
    if isinstance(found, str):
        return Site(number, ActivatedNormStep.op, None, found)
    return Site(number, ActivatedNormStep.op, found.variant)


def _pair_site(number: int, place: RotatedPair, q: type | None, k: type | None, function: Any) -> Site:
    if q is None or k is None:
        return Site(number, PairStep.op, None, "its norms are not there")
    pair = pair_of(q, k, function, place.between)
    if isinstance(pair, str):
        return Site(number, PairStep.op, variant_of_pair(q, k, function, place.between), pair)
    return Site(number, PairStep.op, pair.variant)
