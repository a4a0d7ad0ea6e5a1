"""Fused kernels inside the forward of a layer: where they fit, and the forward that calls them.

    >>> kernel = layer_kernel(module, type(module), "cuda", ("residual_norm", "qk_norm_rotary"))

The forward of the class is rewritten at the places found by :mod:`twinkle.fuse.places`, and put in place
as any layer kernel is. It computes what the original does where a kernel does not fit; that is decided at
each call, by the functions of :mod:`twinkle.fuse.residual_norm` and :mod:`twinkle.fuse.qk_norm_rotary`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from twinkle.fuse.norms import Norm, norm_of
from twinkle.fuse.places import SumThenLayer
from twinkle.fuse.qk_norm_rotary import pair_step
from twinkle.fuse.residual_norm import sum_step
from twinkle.fuse.rewrite import CannotRewrite, Draft
from twinkle.fuse.sites import OPS, layers_of, site_of
from twinkle.fuse.steps import Step
from twinkle.match.instance import read_path
from twinkle.ops import launch
from twinkle.ops.backends import backend_for
from twinkle.records import LayerKernel
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twinkle.fuse.places import Place
    from twinkle.fuse.sites import Site

__all__ = ["OPS", "FusedForward", "draft_of", "layer_kernel"]


def sites_of(draft: Draft, owner: nn.Module) -> list[Site]:
    """The places of a forward, as ops on the layers that an instance has now.

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
    """The layers that a forward calls by their names, and those in its lists."""
    for child in owner.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


class _Forwards:
    """What was worked out before, by class: forwards to be rewritten, and the kernels made of them."""

    def __init__(self) -> None:
        self.drafts: WeakKeyDictionary[type, Draft | str] = WeakKeyDictionary()
        self.kernels: WeakKeyDictionary[type, dict[Any, LayerKernel]] = WeakKeyDictionary()


def draft_of(cls: type) -> Draft | str:
    """The forward of a class to be rewritten, or in words why it cannot be; worked out once."""
    drafts = runtime.of(_Forwards).drafts
    found = drafts.get(cls)
    if found is None:
        try:
            found = Draft(getattr(cls, "forward", None))
        except CannotRewrite as error:
            found = str(error)
        drafts[cls] = found
    return found


def layer_kernel(owner: nn.Module, cls: type, where: str, ops: Sequence[str]) -> LayerKernel | None:
    """The forward of a layer with fused kernels, if there is a place for one.

    Args:
        owner: The layer.
        cls: Its class without Twinkle.
        where: The device the kernels are for.
        ops: Those that are wanted.
    """
    if not ops or ("cuda" if where == "rocm" else where) not in launch.DEVICE_TYPES:
        return None
    # Most layers hold no norm, and parsing their code is not for nothing.
    if not any(isinstance(norm_of(type(layer)), Norm) for layer in _layers(owner)):
        return None
    draft = draft_of(cls)
    if isinstance(draft, str):
        return None
    sites = [
        site
        for site in sites_of(draft, owner)
        if site.op in ops and site.reason is None and backend_for(site.op, site.form, where) is not None
    ]
    if not sites:
        return None
    known = runtime.of(_Forwards).kernels.setdefault(cls, {})
    key = (where, tuple((site.number, site.form.name) for site in sites))
    if key not in known:
        name = "+".join(op for op in OPS if any(site.op == op for site in sites))
        # Each place proves itself: the forward around it may not run twice.
        known[key] = LayerKernel(
            name, FusedForward(draft, sites), device=where, verify="off", origin="embedded"
        )
    return known[key]


class FusedForward:
    """Where a rewritten forward comes from.

    Args:
        draft: The original.
        sites: Which of its places are to be replaced.

    Attributes:
        guarded: A kernel that raises is caught where it is called: the rest is the program's own code.
    """

    kind = "embedded"
    guarded = True

    def __init__(self, draft: Draft, sites: Sequence[Site]) -> None:
        self.draft = draft
        self.sites = tuple(sites)
        self._made: type[nn.Module] | None = None

    def describe(self) -> str:
        """The ops and their forms."""
        shown = dict.fromkeys(f"{site.op} ({site.form.name})" for site in self.sites)
        return f"embedded {', '.join(shown)}"

    def load(self) -> object:
        """The layer class; the same one each time."""
        if self._made is None:
            proofs = runtime.options.proofs(None, kind="embedded")
            steps = {
                site.number: self._functions(
                    self.draft.places[site.number],
                    Step(self, site.op, proofs=proofs, recall=runtime.options.recalls(None)),
                )
                for site in self.sites
            }
            members = {
                "forward": self.draft.build(steps),
                "can_torch_compile": True,
                "has_backward": True,
                "__module__": __name__,
            }
            self._made = type("Fused", (nn.Module,), members)
        return self._made

    def _functions(self, place: Place, step: Step) -> tuple[Any, ...]:
        if isinstance(place, SumThenLayer):
            return (sum_step(step),)
        now = partial(self.draft.function.__globals__.get, place.function)
        return pair_step(step, place.between, now)
