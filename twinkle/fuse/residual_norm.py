"""``total = left + right`` and a norm of it, in a rewritten forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.fuse.absorbed import note_absorbed
from twinkle.fuse.norms import described, hooked, norm_from, norm_of, numbers_of
from twinkle.fuse.steps import shown, stand_in, why_not
from twinkle.ops.launch import CUSTOM_OP, EAGER, REFERENCE
from twinkle.ops.residual_norm.reference import ResidualNormForm
from twinkle.ops.residual_norm.triton_backend import path_for, run
from twinkle.sources.embedded import EmbeddedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from twinkle.fuse.norms import Norm
    from twinkle.fuse.steps import Step

__all__ = ["forms_of", "sum_step"]

_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled


class _Kind(NamedTuple):
    norm: Norm
    form: ResidualNormForm
    scaled: ResidualNormForm


def forms_of(norm: Norm) -> tuple[ResidualNormForm, ResidualNormForm]:
    """The form of a sum before that norm, and of one with a factor."""
    name = f"rms_norm_{norm.form.name}"
    return ResidualNormForm(name, norm.form), ResidualNormForm(f"{name}_scaled", norm.form, True)


def _kind_of(cls: type) -> _Kind | None:
    norm = norm_of(cls)
    return None if isinstance(norm, str) else _Kind(norm, *forms_of(norm))


def sum_step(step: Step) -> Callable[..., tuple[Any, Any]]:
    """The function for one place.

    It takes ``(self, left, right, layer)`` and perhaps a factor of ``right``, and returns the sum and what
    the layer makes of it: from one kernel, or exactly as the code it stands for computes them.
    """
    graded, plain = step.graded, step.plain

    def fused(owner: nn.Module, left: Any, right: Any, layer: Any, factor: Any = None) -> tuple[Any, Any]:
        if _compiling():
            return _traced(left, right, layer, factor)
        if factor is not None and type(factor) is not float:
            right, factor = right * factor, None
        if type(left) is not torch.Tensor or type(right) is not torch.Tensor:
            return _original(left, right, layer, factor)
        kind = (graded if _recording() else plain).get((type(layer), left.dtype, right.dtype))
        if kind is not None and not hooked(layer):
            found = numbers_of(kind.norm, layer)
            if found is not None:
                form = kind.form if factor is None else kind.scaled
                path = path_for(right, left, found[0], form)
                if path is EAGER:
                    return run(path, right, left, found[0], found[1], form, factor)
        elif kind is None:
            done = _first(owner, left, right, layer, factor)
            if done is not None:
                return done
        return _original(left, right, layer, factor)

    def _original(left: Any, right: Any, layer: Any, factor: Any) -> tuple[Any, Any]:
        total = left + (right if factor is None else right * factor)
        return total, layer(total)

    def _traced(left: Any, right: Any, layer: Any, factor: Any) -> tuple[Any, Any]:
        if factor is not None and type(factor) is not float:
            right, factor = right * factor, None
        text = described(type(layer))
        if text and not hooked(layer):
            norm = norm_from(text)
            found = numbers_of(norm, layer)
            if found is not None:
                form = forms_of(norm)[0 if factor is None else 1]
                if path_for(right, left, found[0], form) is CUSTOM_OP:
                    return run(CUSTOM_OP, right, left, found[0], found[1], form, factor)
        return _original(left, right, layer, factor)

    def _first(owner: Any, left: Any, right: Any, layer: Any, factor: Any) -> tuple[Any, Any] | None:
        why = why_not((layer,))
        if why is not None:
            step.note(owner, why)
            return None
        kind = _kind_of(type(layer))
        found = kind and numbers_of(kind.norm, layer)
        if kind is None or found is None:
            return None
        form = kind.form if factor is None else kind.scaled
        weight, eps = found
        if path_for(right, left, weight, form) is not EAGER:
            step.note(owner, f"no kernel for {shown(left)} + {shown(right)}")
            return None

        def original(holder: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return _original(left, right, holder.get_submodule("0"), factor)

        def kernel(holder: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            there = numbers_of(kind.norm, holder.get_submodule("0"))
            assert there is not None
            path = path_for(right, left, there[0], form)
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, right, left, *there, form, factor)

        done: tuple[Any, Any] | None = step.first(
            owner,
            (type(layer), left.dtype, right.dtype),
            kind,
            lambda: run(EAGER, right, left, weight, eps, form, factor),
            lambda: (
                EmbeddedLayer(step.op, form, {"eps": eps, "scale": factor}),
                original,
                kernel,
                (left, right),
                stand_in((layer,)),
            ),
        )
        if done is not None:
            note_absorbed(step, owner, (layer,))
        return done

    return fused
