"""The step of a rewritten forward that normalises and applies scale and shift of a condition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.fuse.modulated_functions import ModulatingFunction, modulating_function
from twinkle.fuse.norms import described, hooked, norm_from, norm_of, numbers_of
from twinkle.fuse.places import LayerThenModulation
from twinkle.fuse.steps import (
    SLOWER,
    Comparison,
    FusedStep,
    at_any_size,
    check_norm,
    layer_copies,
    reason_against,
    size_key,
    tensor_text,
)
from twinkle.match.reads import CHANGED
from twinkle.ops.launch import CUSTOM_OP, EAGER, REFERENCE
from twinkle.ops.modulated_norm.triton_backend import least_for, path_for, run, variant_of
from twinkle.sources.embedded import EmbeddedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from twinkle.fuse.norms import Norm
    from twinkle.fuse.places import CalledModulation
    from twinkle.ops.modulated_norm.reference import ModulatedNormVariant

__all__ = ["ModulationStep"]

_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled
_path_for = at_any_size(path_for)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS = 256
"""Tokens of a sample that a comparison is made on, where they share one condition."""


class Proven(NamedTuple):
    """A norm, and the variant of the op that begins with it."""

    norm: Norm
    variant: ModulatedNormVariant


class ModulationStep(FusedStep):
    """``layer(x) * (1 + scale) + shift`` at one place of a forward, from one kernel.

    The forward calls :meth:`fused`, or :meth:`called` where a function modulates. The kernel runs once it is
    proven for the class of the norm and the dtypes; until then :meth:`first_call` decides.

    Args:
        source: As for :class:`FusedStep`, with ``proofs`` and ``recall``.
        place: The place.
        function: Gives the function at the place, where one is called.
        proofs: How many calls are compared.
        recall: A verdict from an earlier process will do.

    Attributes:
        least: By class of norm, the elements of the input below which the original steps are the faster ones.
    """

    op = "modulated_norm"

    def __init__(
        self,
        source: Any,
        place: LayerThenModulation | CalledModulation,
        function: Callable[[], Any] | None = None,
        *,
        proofs: int,
        recall: bool,
    ) -> None:
        super().__init__(source, proofs=proofs, recall=recall)
        self.upcast, self.widened = place.upcast, place.widened
        self.one = place.one if isinstance(place, LayerThenModulation) else 1
        self._plain = None if function is None else function()
        found = None if function is None else modulating_function(self._plain)
        self.function: ModulatingFunction | None = found if isinstance(found, ModulatingFunction) else None
        self._direct = function is None
        self.least: dict[type, int] = {}

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the forward calls: :meth:`fused`, or :meth:`called`."""
        return (self.fused if self._direct else self.called,)

    def fused(self, owner: nn.Module, x: Any, layer: Any, like: Any, scale: Any, shift: Any) -> Any:
        """``layer(x) * (1 + scale) + shift``: from the kernel, or by the original steps.

        Args:
            owner: The layer whose forward it is.
            x: ``[..., hidden]``, before it is cast to float32 where the place does so.
            layer: What is called with it.
            like: A tensor to whose dtype the forward casts the result next: it may have it already.
            scale: What 1 is added to.
            shift: What is added, or None.
        """

        def original(normed: Any) -> Any:
            y = normed * (self.one + scale)
            return y if shift is None else y + shift

        return self.run(owner, x, layer, like, scale, shift, original)

    def called(
        self, owner: nn.Module, x: Any, layer: Any, like: Any, function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``function(layer(x), …)`` of a function that modulates; see :meth:`fused`."""

        def original(normed: Any) -> Any:
            return function(normed, *args, **kwargs)

        known = self.function
        found = None
        # A compiler follows the very function, and compares no defaults.
        if known is not None and (known.is_still(function) or (_compiling() and function is self._plain)):
            try:
                found = known.scale_and_shift(None, *args, **kwargs)
            except (AttributeError, TypeError, IndexError, RuntimeError):
                found = None  # the function will say what is wrong
        if found is None or type(found[1]) is not torch.Tensor:
            return original(self.normed(x, layer))
        return self.run(owner, x, layer, like, found[1], found[2], original)

    def normed(self, x: Any, layer: Any) -> Any:
        """The result of the norm by the original steps, with the casts of the place."""
        n = layer(x.float() if self.upcast else x)
        return n.float() if self.widened else n

    def run(
        self,
        owner: nn.Module,
        x: Any,
        layer: Any,
        like: Any,
        scale: Any,
        shift: Any,
        original: Callable[[Any], Any],
    ) -> Any:
        """The kernel where it fits, else the layer and ``original`` of its result."""
        if _compiling():
            found = self.traced(x, layer, like, scale, shift)
            return original(self.normed(x, layer)) if found is None else found
        if type(x) is not torch.Tensor or not _is_tensor(scale) or not (shift is None or _is_tensor(shift)):
            return original(self.normed(x, layer))
        dtype = _dtype_of(like, x)
        proven = self.proven_with_grad if _recording() else self.proven
        other = None if shift is None else shift.dtype
        key = (type(layer), x.dtype, scale.dtype, other, dtype, scale.numel() == x.numel(), size_key(x))
        known = proven.get(key)
        if known is None:
            least = self.least.get(type(layer))
            if least is None or self.may_pay(x, least):
                done = self.first_call(owner, key, x, layer, dtype, scale, shift, original)
                if done is not None:
                    return done
        elif known is SLOWER:
            pass
        elif not known.norm.guard.holds(layer):
            self.note(owner, f"the norm {CHANGED}")
        elif not hooked(layer):
            numbers = numbers_of(known.norm, layer, x.shape[-1:])
            if numbers is not None:
                weight, eps, bias = numbers
                if _path_for(x, weight, bias, scale, shift, known.variant) is EAGER:
                    try:
                        return run(EAGER, x, weight, bias, eps, scale, shift, known.variant, dtype)
                    except Exception as error:
                        take_out = self.failed(owner, error)
                    y = original(self.normed(x, layer))
                    take_out()
                    return y
        return original(self.normed(x, layer))

    def traced(self, x: Any, layer: Any, like: Any, scale: Any, shift: Any) -> Any:
        """The registered op, while a compiler traces; None where the original steps are to run."""
        text = described(type(layer))
        if (
            not text
            or hooked(layer)
            or not isinstance(x, torch.Tensor)
            or not isinstance(scale, torch.Tensor)
        ):
            return None
        if shift is not None and not isinstance(shift, torch.Tensor):
            return None
        norm = norm_from(text)
        numbers = numbers_of(norm, layer, x.shape[-1:])
        if numbers is None:
            return None
        weight, eps, bias = numbers
        variant = variant_of(norm.variant, upcast=self.upcast, widened=self.widened)
        if path_for(x, weight, bias, scale, shift, variant) is not CUSTOM_OP:
            return None
        dtype = None
        if isinstance(like, torch.Tensor) and like.device == x.device and like.dtype in _DTYPES:
            dtype = like.dtype
        return run(CUSTOM_OP, x, weight, bias, eps, scale, shift, variant, dtype)

    def first_call(
        self,
        owner: nn.Module,
        key: Any,
        x: Tensor,
        layer: nn.Module,
        dtype: torch.dtype | None,
        scale: Tensor,
        shift: Tensor | None,
        original: Callable[[Any], Any],
    ) -> Tensor | None:
        """Compare the kernel and run it; None, with a note in the report, where it cannot run."""
        norm, reason = norm_of(type(layer)), reason_against((layer,))
        numbers = None if isinstance(norm, str) else numbers_of(norm, layer, x.shape[-1:])
        if reason is not None or isinstance(norm, str) or numbers is None:
            self.note(owner, reason or "its norm lacks its weight or eps")
            return None
        variant = variant_of(norm.variant, upcast=self.upcast, widened=self.widened)
        weight, eps, bias = numbers
        self.least[type(layer)] = least_for(norm.variant)
        if _path_for(x, weight, bias, scale, shift, variant) is not EAGER:
            self.note(owner, f"no kernel for {tensor_text(x)} and a scale {tensor_text(scale)}")
            return None
        done: Tensor | None = self.compare_and_run(
            owner,
            key,
            Proven(norm, variant),
            lambda: run(EAGER, x, weight, bias, eps, scale, shift, variant, dtype),
            lambda whole: self.comparison(norm, variant, x, layer, dtype, scale, shift, whole=whole),
        )
        if done is not None:
            self.note_taken_over(owner, (layer,))
        return done

    def comparison(
        self,
        norm: Norm,
        variant: ModulatedNormVariant,
        x: Tensor,
        layer: nn.Module,
        dtype: torch.dtype | None,
        scale: Tensor,
        shift: Tensor | None,
        *,
        whole: bool,
    ) -> Comparison:
        """Kernel and original steps on the first tokens of a call, or on all, and a copy of its layer."""

        def original(layers: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
            y = self.normed(x, layers._modules["0"]) * (self.one + scale)
            y = y if shift is None else y + shift
            return y if dtype is None or x.dtype != given else y.to(dtype)

        def kernel(layers: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
            own: Any = layers._modules["0"]
            check_norm(norm, own)
            weight, eps, bias = _numbers(norm, own)
            path = path_for(x, weight, bias, scale, shift, variant)
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, x, weight, bias, eps, scale, shift, variant, dtype)

        given = x.dtype
        _, eps, _ = _numbers(norm, layer)
        subject = EmbeddedLayer(self.op, variant, {"eps": eps, "dtype": str(dtype), "one": self.one})
        if not whole and x.dim() > 2 and x.shape[-2] > _TOKENS and scale.shape[-2:-1] in ((1,), ()):
            x = x[..., :_TOKENS, :].contiguous()
        tensors = (x, scale) if shift is None else (x, scale, shift)
        least = least_for(norm.variant)
        return Comparison(subject, original, kernel, tensors, layer_copies((layer,)), least)


def _is_tensor(value: Any) -> bool:
    return type(value) is torch.Tensor or type(value) is torch.nn.Parameter


def _dtype_of(like: Any, x: Tensor) -> torch.dtype | None:
    """The dtype that the result may have at once; None where the forward is to cast it, or nobody does."""
    if type(like) is not torch.Tensor or like.device != x.device or like.dtype not in _DTYPES:
        return None
    return like.dtype


def _numbers(norm: Norm, layer: nn.Module) -> tuple[Tensor | None, Any, Tensor | None]:
    numbers = numbers_of(norm, layer)
    assert numbers is not None
    return numbers
