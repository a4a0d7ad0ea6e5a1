"""Recognises the norms that a fused kernel can compute, and reads their weight, bias and eps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.nn.modules import module as _torch

from twinkle.match.reads import Guard, of_forward
from twinkle.match.structure import recognise
from twinkle.ops.layer_norm import triton_backend as layer_norm
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.rms_norm import triton_backend as rms_norm
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS
from twinkle.ops.rms_norm.reference import RMSNormVariant
from twinkle.swap.class_tree import core_of
from twinkle.swap.front import MARK, USERS
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "UNGUARDED",
    "Norm",
    "described",
    "hooked",
    "norm_from",
    "norm_of",
    "norm_variant",
    "numbers_of",
    "plainly_called",
    "unswapped",
]

_VARIANTS: dict[tuple[str, str], RMSNormVariant | LayerNormVariant] = {
    **{("rms_norm", variant.name): variant for variant in RMS_NORMS},
    **{("layer_norm", variant.name): variant for variant in LAYER_NORMS},
}


UNGUARDED = Guard(())
"""Nothing to be asked, for what a compiler is told.

It is given by name: torch 2.11's compiler takes over no object that is a default of a tuple's class.
"""
_ROLES = ("weight", "bias", "eps", "normalized_shape", "with_weight")


class Norm(NamedTuple):
    """A class of norms: its variant, and where an instance keeps weight, bias and eps.

    Attributes:
        op: ``rms_norm`` or ``layer_norm``.
        variant: Where it rounds.
        weight: The name of its parameter, or None.
        eps: The name of an attribute, or the number itself.
        shape: The name of the attribute with the normalised shape, or None.
        switch: The name of a flag that must be True for the layer to use its weight, or None.
        bias: The name of its bias, or None.
        guard: Whether the class, and a layer of it, still compute it.
    """

    op: str
    variant: RMSNormVariant | LayerNormVariant
    weight: str | None
    eps: str | float
    shape: str | None
    switch: str | None
    bias: str | None
    guard: Guard


def norm_of(cls: type) -> Norm | str:
    """The norm that a class is, or in words why a fused kernel cannot compute it.

    Of a class that Twinkle put an embedded kernel in, the original class counts.
    """
    plain = plainly_called(cls)
    if isinstance(plain, str):
        return plain
    name = plain.__name__
    found = recognise(plain)
    if found.op not in ("rms_norm", "layer_norm"):
        return f"{name} is not recognised as a norm"
    variant, facts = found.variant, found.facts
    if found.op == "layer_norm":
        takes = layer_norm.takes_weight_and_eps(variant)
    else:
        takes = rms_norm.takes_weight_and_eps(variant, nullable=True)
    if not takes or getattr(variant, "groups", "none") != "none" or found.guards:
        return f"there is no kernel for {name} behind other steps ({variant.name})"
    if set(facts) - {"x", "weight", "bias", "eps", "normalized_shape", "with_weight"}:
        return f"{name} depends on more than its weight, its bias and its eps"
    weight, bias, eps, shape, switch = map(facts.get, _ROLES)
    if weight is not None and shape == f"{weight}.shape":
        shape = weight
    if isinstance(eps, bool) or not isinstance(eps, str | int | float):
        return f"the eps of {name} is not a number"
    if any(
        isinstance(value, str) and not value.isidentifier() for value in (weight, bias, eps, shape, switch)
    ):
        return f"the numbers of {name} are not its own attributes"
    if switch is not None and not isinstance(switch, str):
        return f"{name} has no attribute that says whether it has a weight"
    guard = Guard((of_forward(plain), *Guard(found.reads).of(plain).reads))
    number = eps if isinstance(eps, str) else float(eps)
    return Norm(found.op, variant, weight, number, shape, switch, bias, guard)


def norm_variant(cls: type) -> RMSNormVariant | LayerNormVariant | None:
    """The variant of the norm that a class is, whether or not a fused kernel can compute it."""
    plain = unswapped(cls)
    found = recognise(plain) if isinstance(plain, type) else None
    if found is None or found.op not in ("rms_norm", "layer_norm"):
        return None
    variant: RMSNormVariant | LayerNormVariant = found.variant
    return None if getattr(variant, "gate", "none") != "none" else variant


def unswapped(cls: type) -> type | str:
    """The class without the embedded kernel that Twinkle put in, or why the class is left alone."""
    core, wrappers = core_of(cls)
    if wrappers:
        return f"{cls.__name__} was made by torch"
    dispatch = vars(core).get("__twinkle__")
    if dispatch is None:
        return core
    if any(candidate.kernel.chosen_by != "twinkle" for candidate in dispatch.candidates):
        return f"{core.__name__} has a kernel of its own"
    plain: type = dispatch.target
    return plain


def plainly_called(cls: type) -> type | str:
    """The class without Twinkle where a call of a layer is its forward and hooks, or why it is more."""
    plain = unswapped(cls)
    if isinstance(plain, str):
        return plain
    if not issubclass(plain, nn.Module) or plain.__call__ is not nn.Module.__call__:
        return f"{plain.__name__} is called in a way of its own"
    if {"__getattr__", "__getattribute__"} & _defined(plain):
        return f"{plain.__name__} looks its attributes up in a way of its own"
    return plain


def _defined(cls: type) -> set[str]:
    return {name for base in cls.__mro__ if base not in (nn.Module, object) for name in vars(base)}


# The very dicts that torch's functions for hooks on all modules write to.
_EVERYWHERE = (
    _torch._global_forward_hooks,
    _torch._global_forward_pre_hooks,
    _torch._global_backward_hooks,
    _torch._global_backward_pre_hooks,
)
_forward, _forward_pre, _backward, _backward_pre = _EVERYWHERE


def hooked(layer: nn.Module) -> Any:
    """Whether hooks, a ``forward`` or a user's kernel are part of a call of the layer; truthy or falsy."""
    state = layer.__dict__
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or state.get(MARK, "").endswith(USERS)
        or _forward
        or _forward_pre
        or _backward
        or _backward_pre
    )


def numbers_of(
    norm: Norm, layer: nn.Module, last: Any = None
) -> tuple[Tensor | None, Any, Tensor | None] | None:
    """The weight ``[hidden]`` (or None), eps and bias of a layer; None where its class promises others.

    Args:
        norm: What its class is.
        layer: The layer.
        last: The shape that it is to normalise over, where that is known.
    """
    state = layer.__dict__
    if norm.switch is not None and state.get(norm.switch) is not True:
        return None
    weight = bias = None
    absent = False
    if norm.weight is not None:
        weight = state["_parameters"].get(norm.weight)
        absent = weight is None
    if norm.bias is not None:
        bias = state["_parameters"].get(norm.bias)
        absent = absent or bias is None
    if getattr(norm.variant, "nullable", "no") == "cast":
        if bias is not None or (weight is None and getattr(layer, norm.weight or "", None) is not None):
            return None  # no kernel adds one to an RMSNorm, and a weight that is no parameter is none
        absent = getattr(layer, norm.bias or "", None) is not None
    # Torch's own layer norm does without; one that is written out does not, nor do other RMSNorms.
    if absent and getattr(norm.variant, "written", "out") == "out":
        return None
    eps = state.get(norm.eps) if isinstance(norm.eps, str) else norm.eps
    if type(eps) is not float:
        return None
    if norm.shape is not None:
        # Some normalise over the shape of their weight, and have none without it.
        own = norm.shape == norm.weight
        shape = state.get(norm.shape, ()) if not own else () if weight is None else tuple(weight.shape)
        if not isinstance(shape, tuple | list) or len(shape) != 1:
            return None
        if last is not None and shape[0] != last[0]:
            return None
    return weight, eps, bias


def _described(cls: type) -> str:
    norm = norm_of(cls)
    if isinstance(norm, str):
        return ""
    eps = norm.eps if isinstance(norm.eps, str) else repr(norm.eps)
    names = (norm.weight, eps, norm.shape, norm.switch, norm.bias)
    return "|".join((norm.op, norm.variant.name, *(name or "" for name in names)))


described: Callable[[type], str] = constant(_described)
"""The norm that a class is, as a text that a compiler can keep as a constant; empty for none."""


def norm_from(text: str) -> Norm:
    """The norm of a text that :func:`described` gave."""
    op, variant, weight, eps, shape, switch, bias = text.split("|")
    number = eps if eps.isidentifier() else float(eps)
    names = (shape or None, switch or None, bias or None)
    return Norm(op, _VARIANTS[op, variant], weight or None, number, *names, UNGUARDED)
