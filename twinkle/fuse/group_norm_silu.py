"""The step of a rewritten forward that computes a GroupNorm and the SiLU behind it."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from twinkle.fuse.norms import UNGUARDED, hooked, plainly_called
from twinkle.fuse.steps import (
    SLOWER,
    Comparison,
    FusedStep,
    at_any_size,
    check_norm,
    layer_copies,
    size_key,
    tensor_text,
)
from twinkle.match.instance import elementwise_of
from twinkle.match.reads import CHANGED, Guard, of_forward
from twinkle.match.structure import recognise
from twinkle.ops.group_norm import triton_backend
from twinkle.ops.group_norm.reference import VARIANTS, GroupNormVariant
from twinkle.ops.group_norm.triton_backend import path_for, run
from twinkle.ops.launch import CUSTOM_OP, EAGER, REFERENCE
from twinkle.sources.embedded import EmbeddedLayer
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["ActivatedNormStep", "GroupNormLayer", "activated", "group_norm_of"]

_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled
_path_for = at_any_size(path_for)
_PLAIN = next(variant for variant in VARIANTS if variant.activation == "none")
_BEHIND: dict[str, GroupNormVariant] = {
    variant.activation: variant for variant in VARIANTS if variant is not _PLAIN
}
_SIGMOIDS = frozenset({torch.sigmoid, torch.special.expit, torch.nn.functional.sigmoid})


class GroupNormLayer(NamedTuple):
    """A class of layers that are GroupNorms, and where an instance keeps what it computes with.

    Attributes:
        groups: The name of an attribute, or the number itself.
        weight: The name of its parameter, or None.
        bias: The name of its parameter, or None.
        eps: The name of an attribute, or the number itself.
        guard: Whether the class, and a layer of it, still compute it.
    """

    groups: str | int
    weight: str | None
    bias: str | None
    eps: str | float
    guard: Guard

    def numbers(self, layer: nn.Module) -> tuple[int, Tensor | None, Tensor | None, float] | None:
        """Groups, weight and bias ``[channels]`` (or None) and eps of a layer; None where they are others."""
        state = layer.__dict__
        groups = state.get(self.groups) if isinstance(self.groups, str) else self.groups
        eps = state.get(self.eps) if isinstance(self.eps, str) else self.eps
        if type(groups) is not int or type(eps) is not float:
            return None
        # A parameter that a hook keeps as a mere attribute (pruning, weight norm) is not among these.
        parameters = state["_parameters"]
        for name in (self.weight, self.bias):
            if name is not None and name not in parameters:
                return None
        weight, bias = (None if name is None else parameters[name] for name in (self.weight, self.bias))
        return groups, weight, bias, eps


def group_norm_of(cls: type) -> GroupNormLayer | str:
    """The GroupNorm that a class is, or in words why it is none that the kernel can compute."""
    plain = plainly_called(cls)
    if isinstance(plain, str):
        return plain
    found = recognise(plain)
    if found.op != "group_norm" or found.variant != _PLAIN or found.guards or found.facts.get("requires"):
        return f"{plain.__name__} is not recognised as a GroupNorm"
    groups, weight, bias, eps = map(found.facts.get, ("groups", "weight", "bias", "eps"))
    names = [value for value in (groups, weight, bias, eps) if isinstance(value, str)]
    if not all(map(str.isidentifier, names)) or isinstance(groups, bool) or isinstance(eps, bool):
        return f"the numbers of {plain.__name__} are not its own attributes"
    if not isinstance(groups, str | int) or not isinstance(eps, str | int | float):
        return f"the numbers of {plain.__name__} are computed"
    guard = Guard((of_forward(plain), *Guard(found.reads).of(plain).reads))
    return GroupNormLayer(groups, weight, bias, eps if isinstance(eps, str) else float(eps), guard)


class Activated(NamedTuple):
    """What follows a norm: the variant of the op that ends with it, and what that rests on.

    Attributes:
        variant: The variant.
        guard: Whether the function, or the class and a layer of it, still compute it.
    """

    variant: GroupNormVariant
    guard: Guard


def activated(function: Any, *, written: bool = False) -> Activated | str:
    """The variant of a norm before an activation, or in words why there is none.

    Args:
        function: A class of layers, or a function.
        written: The activation is the product of its argument and ``function`` of it, which is None where
            that is a method.
    """
    if written:
        if function is None or function in _SIGMOIDS:
            return Activated(_BEHIND["swish"], UNGUARDED)
        return f"{function!r} is not torch.sigmoid"
    plain = plainly_called(function) if isinstance(function, type) else function
    if isinstance(plain, str):
        return plain
    if not isinstance(plain, type | FunctionType):
        return f"{plain!r} is no function of Python"
    name, guard = elementwise_of(plain)
    if name not in _BEHIND:
        return f"{plain.__name__} is not recognised as a SiLU"
    return Activated(_BEHIND[name], guard)


class _Fused(NamedTuple):
    """What was proven: the norm and what follows it."""

    norm: GroupNormLayer
    behind: Activated


class ActivatedNormStep(FusedStep):
    """``h = norm(x)`` and ``act(h)`` at one place of a forward, from one kernel.

    The kernel runs once it is proven for the class of the norm, the activation and the dtype
    (:attr:`proven`); until then :meth:`first_call` decides.

    Args:
        written: The activation is the product of ``h`` and a sigmoid of it.
    """

    op = "group_norm"

    def __init__(self, source: Any, written: bool, *, proofs: int, recall: bool) -> None:
        super().__init__(source, proofs=proofs, recall=recall)
        self.written = written

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the forward calls: :meth:`begin`, and :meth:`whole` where the norm is inside a call."""
        return (self.begin, self.whole)

    def begin(self, owner: nn.Module, x: Any, norm: Any, act: Any) -> tuple[Any, bool]:
        """What the activation makes of the normed value and True, or the normed value and False.

        Args:
            owner: The layer whose forward it is.
            x: ``[samples, channels, ...]``.
            norm: What is called with it.
            act: What is called with the result, by itself or as the sigmoid of a product.
        """
        done, take_out = self._fused(owner, x, norm, act)
        if done is not None:
            return done, True
        normed = norm(x)
        if take_out is not None:
            take_out()
        return normed, False

    def whole(self, owner: nn.Module, x: Any, norm: Any, act: Any) -> Any:
        """What the activation makes of the normed value; see :meth:`begin`."""
        done, take_out = self._fused(owner, x, norm, act)
        if done is None:
            done = act(norm(x))
            if take_out is not None:
                take_out()
        return done

    def _fused(
        self, owner: nn.Module, x: Any, norm: Any, act: Any
    ) -> tuple[Tensor | None, Callable[[], None] | None]:
        """The kernel's result, or None; then what is to be done once the original steps have run, or None."""
        if _compiling():
            return self._traced(x, norm, act), None
        if type(x) is not torch.Tensor or not self.may_pay(x, triton_backend.LEAST):
            return None, None
        layer = isinstance(act, nn.Module)
        key = (type(norm), type(act) if layer else act, x.dtype, size_key(x))
        proven = self.proven_with_grad if _recording() else self.proven
        known: _Fused | None = proven.get(key)
        if known is SLOWER:
            return None, None
        if known is None:
            return self.first_call(owner, key, x, norm, act), None
        if not known.norm.guard.holds(norm) or not known.behind.guard.holds(act, type(act)):
            self.note(owner, f"the norm or its activation {CHANGED}")
        elif not (hooked(norm) or (layer and hooked(act))):
            numbers = known.norm.numbers(norm)
            if numbers is not None and _path_for(x, *numbers[:3]) is EAGER:
                try:
                    return run(EAGER, x, *numbers, known.behind.variant), None
                except Exception as error:
                    return None, self.failed(owner, error)
        return None, None

    def _traced(self, x: Any, norm: Any, act: Any) -> Tensor | None:
        """The registered op's result while a compiler traces, or None."""
        layer = isinstance(act, nn.Module)
        text = _norm_text(type(norm))
        kind = _variant_text(type(act) if layer else act, self.written)
        if text and kind and not (hooked(norm) or (layer and hooked(act))):
            numbers = _norm_from(text).numbers(norm)
            if numbers is not None and path_for(x, *numbers[:3]) is CUSTOM_OP:
                return run(CUSTOM_OP, x, *numbers, _BEHIND[kind])
        return None

    def first_call(self, owner: nn.Module, key: Any, x: Tensor, norm: Any, act: Any) -> Tensor | None:
        """Compare the kernel and run it; None, with a note in the report, where it cannot run."""
        group = group_norm_of(type(norm))
        behind = activated(key[1], written=self.written)
        numbers = None if isinstance(group, str) else group.numbers(norm)
        if isinstance(group, str) or isinstance(behind, str):
            self.note(owner, group if isinstance(group, str) else str(behind))
            return None
        layers = (norm, act) if isinstance(act, nn.Module) else (norm,)
        if any(map(hooked, layers)) or numbers is None:
            why = "lacks its numbers" if numbers is None else "has hooks or a forward of its own"
            self.note(owner, f"its norm or its activation {why}")
            return None
        if _path_for(x, *numbers[:3]) is not EAGER:
            self.note(owner, f"no kernel for {tensor_text(x)}")
            return None
        done: Tensor | None = self.compare_and_run(
            owner,
            key,
            _Fused(group, behind),
            lambda: run(EAGER, x, *numbers, behind.variant),
            lambda _whole: self.comparison(group, behind, x, layers, act),
        )
        if done is not None:
            self.note_taken_over(owner, layers)
        return done

    def comparison(
        self, group: GroupNormLayer, behind: Activated, x: Tensor, layers: tuple[nn.Module, ...], act: Any
    ) -> Comparison:
        """Kernel and original steps on the input of a call and copies of its layers."""

        def original(copies: nn.Module, x: Tensor) -> Tensor:
            norm: Any = copies._modules["0"]
            h = norm(x)
            if self.written:
                return h * torch.sigmoid(h)
            last: Any = copies._modules["1"] if len(layers) > 1 else act
            made: Tensor = last(h)
            return made

        def kernel(copies: nn.Module, x: Tensor) -> Tensor:
            own: Any = copies._modules["0"]
            check_norm(group, own)
            numbers = group.numbers(own)
            assert numbers is not None
            path = path_for(x, *numbers[:3])
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, x, *numbers, behind.variant)

        groups, _, _, eps = group.numbers(layers[0]) or (None, None, None, None)
        subject = EmbeddedLayer(self.op, behind.variant, {"groups": groups, "eps": eps})
        return Comparison(subject, original, kernel, (x,), layer_copies(layers), triton_backend.LEAST)


def _text_of(cls: type) -> str:
    norm = group_norm_of(cls)
    if isinstance(norm, str):
        return ""
    return "|".join("" if value is None else str(value) for value in norm[:4])


_norm_text: Callable[[type], str] = constant(_text_of)
"""The GroupNorm that a class is, as a text that a compiler can keep as a constant; empty for none."""


def _norm_from(text: str) -> GroupNormLayer:
    groups, weight, bias, eps = text.split("|")
    return GroupNormLayer(
        groups if groups.isidentifier() else int(groups),
        weight or None,
        bias or None,
        eps if eps.isidentifier() else float(eps),
        UNGUARDED,
    )


def _text_behind(function: Any, written: bool) -> str:
    found = activated(function, written=written)
    return "" if isinstance(found, str) else found.variant.activation


_variant_text: Callable[[Any, bool], str] = constant(_text_behind)
"""The activation that a class or a function is, as :func:`_norm_text`."""
