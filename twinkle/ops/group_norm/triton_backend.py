"""GroupNorm and SiLU by Triton, as one function with the signature of its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.affine import affine_layers, fake_backward, gradients, launched_backward
from twinkle.ops.derivative import Derivative, define_op
from twinkle.ops.group_norm import reference
from twinkle.ops.group_norm.reference import VARIANTS, GroupNormVariant
from twinkle.ops.launch import EAGER, REFERENCE, DispatchPath, dispatch_path, lazy_module
from twinkle.ops.plain import pays
from twinkle.ops.plans import Planned, Settled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["LEAST", "group_norm", "layer_class", "path_for", "run", "supports"]

LEAST = 1 << 23
"""Elements of the input below which torch's kernels run: ours takes longer to launch than it saves."""

_kernels = lazy_module("twinkle.ops.group_norm.triton")
_VARIANTS = {variant.name: variant for variant in VARIANTS}
_BY_ACTIVATION: dict[str, GroupNormVariant] = {variant.activation: variant for variant in VARIANTS}


def supports(
    variant: GroupNormVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: there is one for each."""
    return None if variant.name in _VARIANTS else f"{variant.name} is no variant of its definition"


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    variant: GroupNormVariant,
) -> Tensor:
    """``silu(group_norm(x))`` in one kernel; see ``reference.group_norm`` for the arguments.

    Statistics and arithmetic are float32; the normed value is rounded before the activation, as the
    definition rounds it; gradients are rounded once.

    Returns:
        As ``x``, contiguous as torch's result is on a GPU.
    """
    path = path_for(x, groups, weight, bias)
    if path is not REFERENCE:
        return run(path, x, groups, weight, bias, eps, variant)
    return reference.group_norm(x, groups, weight, bias, eps, variant=variant)


def path_for(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> DispatchPath:
    """What computes with these tensors; see :func:`twinkle.ops.launch.dispatch_path`.

    Autocast makes float32 of everything, and mixed dtypes and wrong shapes are torch's to refuse.

    Args:
        x: As for :func:`group_norm`, with all that follows.
        groups: Of channels.
        weight: ``[channels]`` or None.
        bias: ``[channels]`` or None.
    """
    if not pays(x, LEAST) or x.dim() < 3 or groups < 1 or x.shape[1] % groups:
        return REFERENCE
    return _path.call(x, weight, bias)  # type: ignore[no-any-return]


def _path_for(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> DispatchPath:
    """The same for images of enough elements and groups that divide their channels."""
    path = dispatch_path(x, weight, bias)
    if path is REFERENCE:
        return path
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return REFERENCE
    for p in (weight, bias):
        if p is not None and (p.shape != x.shape[1:2] or p.dtype != x.dtype or not p.is_contiguous()):
            return REFERENCE
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        return REFERENCE
    return path


_path = Settled(_path_for, "(Tensor x, Tensor? weight, Tensor? bias) -> ")


def run(
    path: DispatchPath,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    variant: GroupNormVariant,
) -> Tensor:
    """The kernel, for what :func:`path_for` found (and not for `REFERENCE`)."""
    activation = variant.activation
    if path is not EAGER:
        return _op(x, weight, bias, groups, eps, activation)[0]
    if torch.is_grad_enabled():
        return _eager(x, weight, bias, groups, eps, activation)
    return _inference.call(x, weight, bias, groups, eps, activation)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    return _kernels().forward(x, groups, weight, bias, eps, activation)  # type: ignore[no-any-return]


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[0] * groups), dtype=torch.float32)


def _definition(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    return reference.group_norm(x, groups, weight, bias, eps, variant=_BY_ACTIVATION[activation])


def _without_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    return _kernels().forward(x, groups, weight, bias, eps, activation, stats=False)[0]


_inference = Planned(
    _without_stats,
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str activation) -> Tensor",
)
_eager, _op, _ = define_op(
    "_GroupNorm",
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str activation)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    Derivative(
        "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, int groups, "
        "str activation, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        launched_backward(_kernels),
        fake_backward(torch.empty_like),
        tensors=3,
        auxiliary=True,
        gradients=gradients(0, 2),  # not eps
        reference=_definition,
    ),
)


layer_class = affine_layers("GroupNorm", group_norm, "groups", "eps")
"""A layer for a variant whose attributes and arguments have the names that facts give."""
