"""The step of a rewritten forward that adds a residual and normalises the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.fuse.norms import described, hooked, norm_from, norm_of, numbers_of
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
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.residual_norm.triton_backend import path_for, run
from twinkle.ops.residual_norm.triton_layer_norm import LEAST
from twinkle.sources.embedded import EmbeddedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from twinkle.fuse.norms import Norm

__all__ = ["SumStep", "variants_of"]

_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled
_path_for = at_any_size(path_for)


class NormVariants(NamedTuple):
    """A norm and the two variants of the op that end with it.

    Attributes:
        norm: The norm.
        variant: That of a sum and the norm.
        scaled: That of a sum with a factor and the norm.
    """

    norm: Norm
    variant: ResidualNormVariant
    scaled: ResidualNormVariant


def variants_of(norm: Norm) -> NormVariants:
    """The variants of a sum before that norm."""
    name = f"{norm.op}_{norm.variant.name}"
    return NormVariants(
        norm,
        ResidualNormVariant(name, norm.variant),
        ResidualNormVariant(f"{name}_scaled", norm.variant, True),
    )


class SumStep(FusedStep):
    """``total = left + right`` and ``layer(total)`` at one place of a forward, from one kernel.

    The forward calls :meth:`fused`. The kernel runs once it is proven for the class of the norm and the
    dtypes of the addends (:attr:`proven`); until then :meth:`first_call` decides.

    Attributes:
        least: By class of norm, the elements of the sum below which the original steps are the faster ones.
    """

    op = "residual_norm"

    def __init__(self, source: Any, *, proofs: int, recall: bool) -> None:
        super().__init__(source, proofs=proofs, recall=recall)
        self.least: dict[type, int] = {}

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the forward calls: :meth:`fused`, and :meth:`normed` where nothing else reads the sum."""
        return (self.fused, self.normed)

    def normed(self, owner: nn.Module, left: Any, right: Any, layer: Any, factor: Any = None) -> Any:
        """What the layer makes of the sum; see :meth:`fused`."""
        return self.fused(owner, left, right, layer, factor, wanted=False)[1]

    def fused(
        self,
        owner: nn.Module,
        left: Any,
        right: Any,
        layer: Any,
        factor: Any = None,
        wanted: bool = True,
    ) -> tuple[Any, Any]:
        """The sum and what the layer makes of it: from the kernel, or by the original steps.

        Args:
            owner: The layer whose forward it is.
            left: The first addend, ``[..., hidden]``.
            right: The second, without its factor.
            layer: What is called with the sum.
            factor: Of ``right``; None for none.
            wanted: Whether the forward reads the sum.
        """
        if _compiling():
            return self.traced(left, right, layer, factor)
        if factor is not None and type(factor) is not float:
            right, factor = right * factor, None
        if type(left) is not torch.Tensor or type(right) is not torch.Tensor:
            return unfused(left, right, layer, factor)
        proven = self.proven_with_grad if _recording() else self.proven
        variants = proven.get((type(layer), left.dtype, right.dtype, size_key(left)))
        if variants is None:
            least = self.least.get(type(layer))
            if least is not None and not self.may_pay(left, least):
                return unfused(left, right, layer, factor)
            done = self.first_call(owner, left, right, layer, factor)
            if done is not None:
                return done
        elif variants is SLOWER:
            pass
        elif not variants.norm.guard.holds(layer):
            self.note(owner, f"the norm {CHANGED}")
        elif not hooked(layer):
            numbers = numbers_of(variants.norm, layer, left.shape[-1:])
            if numbers is not None:
                weight, eps, bias = numbers
                variant = variants.variant if factor is None else variants.scaled
                path = _path_for(right, left, weight, variant, bias)
                if path is EAGER:
                    try:
                        return run(path, right, left, weight, eps, variant, factor, bias, wanted)
                    except Exception as error:
                        take_out = self.failed(owner, error)
                    both = unfused(left, right, layer, factor)
                    take_out()
                    return both
        return unfused(left, right, layer, factor)

    def traced(self, left: Any, right: Any, layer: Any, factor: Any) -> tuple[Any, Any]:
        """The sum and the layer of it while a compiler traces: the registered op, or the original steps."""
        if factor is not None and type(factor) is not float:
            right, factor = right * factor, None
        text = described(type(layer))
        if text and not hooked(layer):
            norm = norm_from(text)
            numbers = numbers_of(norm, layer, left.shape[-1:])
            if numbers is not None:
                weight, eps, bias = numbers
                variants = variants_of(norm)
                variant = variants.variant if factor is None else variants.scaled
                if path_for(right, left, weight, variant, bias) is CUSTOM_OP:
                    return run(CUSTOM_OP, right, left, weight, eps, variant, factor, bias)
        return unfused(left, right, layer, factor)

    def first_call(
        self, owner: nn.Module, left: Tensor, right: Tensor, layer: nn.Module, factor: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Compare the kernel and run it; None, with a note in the report, where it cannot run."""
        norm, reason = norm_of(type(layer)), reason_against((layer,))
        numbers = None if isinstance(norm, str) else numbers_of(norm, layer, left.shape[-1:])
        if reason is not None or isinstance(norm, str) or numbers is None:
            self.note(owner, reason or "its norm lacks its weight or eps")
            return None
        variants = variants_of(norm)
        variant = variants.variant if factor is None else variants.scaled
        weight, eps, bias = numbers
        if norm.op == "layer_norm":
            self.least[type(layer)] = LEAST
        if _path_for(right, left, weight, variant, bias) is not EAGER:
            self.note(owner, f"no kernel for {tensor_text(left)} + {tensor_text(right)}")
            return None
        done: tuple[Tensor, Tensor] | None = self.compare_and_run(
            owner,
            (type(layer), left.dtype, right.dtype, size_key(left)),
            variants,
            lambda: run(EAGER, right, left, weight, eps, variant, factor, bias),
            lambda _whole: self.comparison(norm, variant, left, right, layer, factor),
        )
        if done is not None:
            self.note_taken_over(owner, (layer,))
        return done

    def comparison(
        self,
        norm: Norm,
        variant: ResidualNormVariant,
        left: Tensor,
        right: Tensor,
        layer: nn.Module,
        factor: Any,
    ) -> Comparison:
        """Kernel and original steps on the addends of a call and a copy of its layer."""

        def original(layers: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return unfused(left, right, layers._modules["0"], factor)

        def kernel(layers: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            own: Any = layers._modules["0"]
            check_norm(norm, own)
            weight, eps, bias = _numbers(norm, own)
            path = path_for(right, left, weight, variant, bias)
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, right, left, weight, eps, variant, factor, bias)

        _, eps, _ = _numbers(norm, layer)
        subject = EmbeddedLayer(self.op, variant, {"eps": eps, "scale": factor})
        return Comparison(
            subject,
            original,
            kernel,
            (left, right),
            layer_copies((layer,)),
            self.least.get(type(layer), 0),
        )


def unfused(left: Any, right: Any, layer: Any, factor: Any) -> tuple[Any, Any]:
    """The sum and what the layer makes of it, by the steps of the original forward."""
    total = left + (right if factor is None else right * factor)
    return total, layer(total)


def _numbers(norm: Norm, layer: nn.Module) -> tuple[Tensor | None, Any, Tensor | None]:
    numbers = numbers_of(norm, layer)
    assert numbers is not None
    return numbers
