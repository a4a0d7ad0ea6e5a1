"""Lists the fused ops in the forward of a class, from the source of the class alone.

    >>> from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    >>> [found] = recognise_places(LlamaDecoderLayer)
    >>> found.op, found.variant.name, found.facts["norm"], found.facts["wired"]
    ('residual_norm', 'rms_norm_llama', 'post_attention_layernorm', True)

The decision is the one made for a model that is there (:mod:`twinkle.fuse.sites`). Where only an instance
can tell, as for a layer that a config chooses, the layer counts that ``__init__`` writes.
"""

from __future__ import annotations

import ast
import importlib
from types import FunctionType
from typing import TYPE_CHECKING, Any

from twinkle.fuse.forward import draft_of
from twinkle.fuse.modulated_norm import ModulationStep
from twinkle.fuse.norms import norm_variant
from twinkle.fuse.places import (
    CalledModulation,
    LayerThenActivation,
    LayerThenModulation,
    SumThenLayer,
    find_places,
    layers_of,
    without_overlaps,
)
from twinkle.fuse.sites import OPS, site_of
from twinkle.match.attributes import attribute_classes
from twinkle.match.recognition import Recognition
from twinkle.match.structure import recognise
from twinkle.match.survey import candidates
from twinkle.match.symbolic import source
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from twinkle.fuse.places import Place

__all__ = ["recognise_all", "recognise_places", "survey_module"]


def survey_module(name: str) -> list[Recognition]:
    """What each layer and function that a module defines is recognised as.

    Args:
        name: The dotted name of the module.

    Raises:
        ImportError: The module cannot be imported.
    """
    module = importlib.import_module(name)
    return [found for _, value in candidates(module) for found in recognise_all(value)]


def recognise_all(obj: Any) -> list[Recognition]:
    """What a class or a function is recognised as: one op, or else the fused ops in its forward.

    Args:
        obj: As for :func:`twinkle.match.structure.recognise`.

    Returns:
        At least one; a single one that is false when nothing was recognised.
    """
    found = recognise(obj)
    return (recognise_places(obj) if not found and isinstance(obj, type) else []) or [found]


def recognise_places(cls: type) -> list[Recognition]:
    """The fused ops in the forward of a class, at most one recognition for each.

    Args:
        cls: A class of layers.

    Returns:
        Recognitions whose facts are those of the op's first place, and of one with a kernel where there
        is any: ``norm`` and ``scale``, or ``q_norm``, ``k_norm`` and ``rotary``, or ``norm`` and ``scale``
        (or ``function``) of a modulation, or ``norm`` and ``activation``; ``wired``, whether a kernel takes
        the place on a device that runs Triton's, with the ``reason`` where none does; ``instead``, the op
        whose kernel takes it where that op is on as well. If there are several, all are under ``sites``.
    """
    function, _ = source.unwrap(own_forward(cls))
    if not isinstance(function, FunctionType):
        return []
    try:
        places = find_places(source.parse(function))
    except source.NoSource:
        return []
    attributes = attribute_classes(cls) if places else {}
    found: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    sites = []
    for number, place in enumerate(places):
        at = _only_class_at if isinstance(place, LayerThenActivation) else _norm_at
        classes = [at(path, attributes) for path in layers_of(place)]
        sites.append(site_of(number, place, classes, function.__globals__.get))
    kernels = [site.number for site in sites if site.variant is not None and site.reason is None]
    free = without_overlaps(places, kernels)
    for site in sites:
        if site.variant is not None:
            reason = site.reason or _not_rewritten(cls)
            facts = _facts(places[site.number], reason, function)
            if site.number in kernels and site.number not in free:
                facts["instead"] = ModulationStep.op
            found.setdefault(site.op, []).append((site.variant, facts))
    return [_recognition(cls, op, found[op]) for op in OPS if op in found]


def _not_rewritten(cls: type) -> str | None:
    draft = draft_of(cls)
    return f"its forward stays as it is: {draft}" if isinstance(draft, str) else None


def _recognition(cls: type, op: str, sites: list[tuple[Any, dict[str, Any]]]) -> Recognition:
    variant, facts = next((site for site in sites if site[1]["wired"]), sites[0])
    if len(sites) > 1:
        facts = {**facts, "sites": tuple({"variant": one.name, **more} for one, more in sites)}
    layers = tuple(role for role in facts if role in ("norm", "q_norm", "k_norm"))
    return Recognition(f"{cls.__module__}:{cls.__qualname__}", op, variant, facts, layers)


def _facts(place: Place, reason: str | None, function: FunctionType) -> dict[str, Any]:
    facts: dict[str, Any]
    if isinstance(place, SumThenLayer):
        facts = {"norm": place.path, "scale": None if place.scale is None else ast.unparse(place.scale)}
    elif isinstance(place, LayerThenModulation):
        shift = None if place.shift is None else ast.unparse(place.shift)
        facts = {"norm": place.path, "scale": ast.unparse(place.factor), "shift": shift}
    elif isinstance(place, CalledModulation):
        facts = {"norm": place.path, "function": place.function}
    elif isinstance(place, LayerThenActivation):
        facts = {"norm": place.path, "activation": ast.unparse(place.activation)}
    else:
        rotation = function.__globals__.get(place.function)
        module = getattr(source.function_of_callable(rotation), "__module__", function.__module__)
        facts = {"q_norm": place.paths[0], "k_norm": place.paths[1], "rotary": f"{module}:{place.function}"}
    facts["wired"] = reason is None
    if reason is not None:
        facts["reason"] = reason
    return facts


def _norm_at(path: str, attributes: dict[str, set[type]]) -> type | None:
    """The norm that ``__init__`` assigns to an attribute; None for none, or for several variants of norm."""
    norms = {norm_variant(cls): cls for cls in attributes.get(path.partition("[")[0], ())}
    norms.pop(None, None)
    return next(iter(norms.values())) if len(norms) == 1 else None


def _only_class_at(path: str, attributes: dict[str, set[type]]) -> type | None:
    """The class that ``__init__`` assigns to an attribute; None for none, or for several."""
    classes = attributes.get(path.partition("[")[0], set())
    return next(iter(classes)) if len(classes) == 1 else None
