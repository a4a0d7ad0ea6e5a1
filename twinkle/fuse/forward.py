"""Rewritten forwards as layer kernels: which layers get one, and how it is made.

    >>> kernel = layer_kernel(module, type(module), "cuda", ("residual_norm", "qk_norm_rotary"))

The forward of the class is rewritten at the places found by :mod:`twinkle.fuse.places`, and put in place
as any layer kernel is. Each place decides at each call whether its fused kernel or the original steps run
(:mod:`twinkle.fuse.residual_norm`, :mod:`twinkle.fuse.qk_norm_rotary`,
:mod:`twinkle.fuse.modulated_norm`, :mod:`twinkle.fuse.group_norm_silu`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from twinkle.fuse.group_norm_silu import ActivatedNormStep, GroupNormLayer, group_norm_of
from twinkle.fuse.modulated_norm import ModulationStep
from twinkle.fuse.norms import Norm, norm_of, unswapped
from twinkle.fuse.places import (
    CalledModulation,
    LayerThenActivation,
    LayerThenModulation,
    SumThenLayer,
    layers_of,
    without_overlaps,
)
from twinkle.fuse.qk_norm_rotary import PairStep
from twinkle.fuse.residual_norm import SumStep
from twinkle.fuse.rewrite import CannotRewrite, Draft
from twinkle.fuse.sequential import FusedSequential, is_sequential, variant_in
from twinkle.fuse.sites import OPS, site_of
from twinkle.match.attributes import attribute_classes
from twinkle.match.instance import read_path
from twinkle.match.reads import Guard
from twinkle.match.structure import recognise
from twinkle.ops import launch
from twinkle.ops.backends import backend_for
from twinkle.records import LayerKernel
from twinkle.runtime import runtime
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twinkle.fuse.places import Place
    from twinkle.fuse.sites import Site
    from twinkle.fuse.steps import FusedStep

__all__ = ["OPS", "FusedForward", "draft_of", "layer_kernel", "may_have_places", "serves"]

_NORMS = frozenset({"rms_norm", "layer_norm", "group_norm"})


def sites_of(draft: Draft, owner: nn.Module) -> list[Site]:
    """The places of a forward as ops, decided by the layers that an instance has now.

    Args:
        draft: The forward.
        owner: The instance.
    """
    names = draft.function.__globals__.get
    return [
        site_of(number, place, [_class_at(owner, path) for path in layers_of(place)], names)
        for number, place in enumerate(draft.places)
    ]


def _class_at(owner: nn.Module, path: str) -> type | None:
    try:
        layer = read_path(owner, path)
    except (AttributeError, LookupError, TypeError):
        return None
    return type(layer) if isinstance(layer, nn.Module) else None


def _layers(owner: nn.Module) -> Iterator[nn.Module]:
    """The direct children of a layer, and those in its lists."""
    for child in owner.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


class _Forwards:
    """Forwards that were read, and the kernels made of them, by class.

    Attributes:
        drafts: Each forward to be rewritten, or in words why it cannot be.
        kernels: By device and sites.
    """

    def __init__(self) -> None:
        self.drafts: WeakKeyDictionary[type, Draft | str] = WeakKeyDictionary()
        self.kernels: WeakKeyDictionary[type, dict[Any, LayerKernel]] = WeakKeyDictionary()


def draft_of(cls: type) -> Draft | str:
    """The draft of a class's forward, or in words why it cannot be rewritten; made once a forward."""
    drafts = runtime.of(_Forwards).drafts
    found = drafts.get(cls)
    method = own_forward(cls)
    if found is None or getattr(found, "method", method) is not method:
        try:
            found = Draft(method)
        except CannotRewrite as error:
            found = str(error)
        drafts[cls] = found
    return found


def may_have_places(cls: type) -> bool:
    """Whether layers of a class may have a place that there is a kernel for, for all that its code tells.

    Many classes call a layer with what another one gave. Of those whose ``__init__`` says which layer that
    is, few have a GroupNorm there.
    """
    draft = draft_of(cls)
    return is_sequential(cls) or (
        not isinstance(draft, str) and any(_may_have_kernel(cls, place) for place in draft.places)
    )


def _may_have_kernel(cls: type, place: Place) -> bool:
    if not isinstance(place, LayerThenActivation):
        return True
    classes = attribute_classes(cls).get(place.path.partition("[")[0])
    return not classes or any(isinstance(group_norm_of(one), GroupNormLayer) for one in classes)


def serves(device: str) -> bool:
    """Whether fused kernels run on a device, such as ``cuda`` or ``cpu``."""
    return ("cuda" if device == "rocm" else device) in launch.DEVICE_TYPES


def layer_kernel(owner: nn.Module, cls: type, where: str, ops: Sequence[str]) -> LayerKernel | None:
    """The kernel that is a layer's forward with fused kernels in it, or None without a place for one.

    Args:
        owner: The layer.
        cls: Its class without Twinkle.
        where: The device the kernels are for.
        ops: The ops that are wanted.
    """
    if not ops or not serves(where):
        return None
    # Most layers hold no norm, and parsing their code takes time.
    if not any(_is_norm(type(layer)) for layer in _layers(owner)):
        return None
    if is_sequential(cls):
        return _kernel_of_sequential(owner, cls, where, ops)
    draft = draft_of(cls)
    if isinstance(draft, str):
        return None
    sites = [
        site
        for site in sites_of(draft, owner)
        if site.op in ops and site.reason is None and backend_for(site.op, site.variant, where) is not None
    ]
    free = without_overlaps(draft.places, [site.number for site in sites])
    sites = [site for site in sites if site.number in free]
    if not sites:
        return None
    known = runtime.of(_Forwards).kernels.setdefault(cls, {})
    key = (where, draft, tuple((site.number, site.variant.name) for site in sites))
    if key not in known:
        name = "+".join(op for op in OPS if any(site.op == op for site in sites))
        known[key] = _kernel(name, FusedForward(draft, sites), where, key[2])
    return known[key]


def _kernel_of_sequential(owner: nn.Module, cls: type, where: str, ops: Sequence[str]) -> LayerKernel | None:
    variant = variant_in(owner)
    op = ActivatedNormStep.op
    if variant is None or op not in ops or backend_for(op, variant, where) is None:
        return None
    known = runtime.of(_Forwards).kernels.setdefault(cls, {})
    if where not in known:
        known[where] = _kernel(op, FusedSequential(variant), where, ((op, variant.name),))
    return known[where]


def _kernel(name: str, source: Any, where: str, alike: tuple[Any, ...]) -> LayerKernel:
    # Each place proves itself: the forward around it may not run twice.
    made = LayerKernel(
        name,
        source,
        device=where,
        verify="off",
        origin="embedded",
        chosen_by="twinkle",
        recognised=True,
    )
    made.alike = alike
    return made


def _is_norm(cls: type) -> bool:
    plain = unswapped(cls)
    if isinstance(plain, str) or recognise(plain).op not in _NORMS:
        return False
    return isinstance(norm_of(cls), Norm) or isinstance(group_norm_of(cls), GroupNormLayer)


class FusedForward:
    """The source of a rewritten forward.

    Args:
        draft: The original forward.
        sites: The places that are replaced.

    Attributes:
        guarded: True: a kernel that raises is caught at its place; the rest is the program's own code.
        guard: Nothing: the rest of the code reads what it reads, and each place asks for itself.
    """

    kind = "embedded"
    guarded = True

    def __init__(self, draft: Draft, sites: Sequence[Site]) -> None:
        self.draft = draft
        self.sites = tuple(sites)
        self.guard = Guard(())
        self._made: type[nn.Module] | None = None

    def describe(self) -> str:
        """The ops and their variants."""
        shown = dict.fromkeys(f"{site.op} ({site.variant.name})" for site in self.sites)
        return f"embedded {', '.join(shown)}"

    def load(self) -> object:
        """A layer class with the rewritten forward; the same one each time."""
        if self._made is None:
            steps = {site.number: self.step(self.draft.places[site.number]).functions for site in self.sites}
            members = {
                "forward": self.draft.build(steps),
                "can_torch_compile": True,
                "has_backward": True,
                "__module__": __name__,
            }
            self._made = type("Fused", (nn.Module,), members)
        return self._made

    def step(self, place: Place) -> FusedStep:
        """The step that the rewritten forward calls at a place, with nothing proven yet."""
        proofs = runtime.options.proofs(None, bound_by_name=False)
        recall = runtime.options.recalls(None)
        if isinstance(place, SumThenLayer):
            return SumStep(self, proofs=proofs, recall=recall)
        if isinstance(place, LayerThenModulation):
            return ModulationStep(self, place, proofs=proofs, recall=recall)
        if isinstance(place, LayerThenActivation):
            return ActivatedNormStep(self, place.written, proofs=proofs, recall=recall)
        now = partial(self.draft.function.__globals__.get, place.function)
        if isinstance(place, CalledModulation):
            return ModulationStep(self, place, now, proofs=proofs, recall=recall)
        return PairStep(self, place.between, now, proofs=proofs, recall=recall)
