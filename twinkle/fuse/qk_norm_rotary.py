"""Queries and keys through a norm each and then a rotary embedding, in a rewritten forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.fuse.absorbed import note_absorbed
from twinkle.fuse.norms import described, hooked, norm_form, norm_from, norm_of, numbers_of
from twinkle.fuse.rotations import plain_rotation, rotation_form, rotation_of
from twinkle.fuse.steps import stand_in, why_not
from twinkle.ops.launch import CUSTOM_OP, EAGER, REFERENCE
from twinkle.ops.qk_norm_rotary import triton_backend as op
from twinkle.ops.qk_norm_rotary.heads import joined, path_for, run, split
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryForm
from twinkle.ops.rms_norm.reference import RMSNormForm
from twinkle.ops.rotary.reference import FORMS
from twinkle.proof.first_use import proof_tokens
from twinkle.proof.inputs import fewer_of
from twinkle.sources.embedded import EmbeddedLayer
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from torch import Tensor, nn

    from twinkle.fuse.norms import Norm
    from twinkle.fuse.steps import Step
    from twinkle.ops.rotary.reference import RotaryForm

    Between = Literal["nothing", "transpose", "split"]

__all__ = ["form_of_pair", "pair_of", "pair_step"]

_ROTATIONS = {form.name: form for form in FORMS}
_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled


class Pair(NamedTuple):
    """Two norms of one form and a rotation.

    Attributes:
        q, k: The norms.
        form: The form of the op.
    """

    q: Norm
    k: Norm
    form: QKNormRotaryForm


def pair_of(q_class: type, k_class: type, function: Any, between: Between) -> Pair | str:
    """What the kernel takes the place of, or in words why there is none."""
    q, k = norm_of(q_class), norm_of(k_class)
    rotation = rotation_of(function)
    for found in (q, k, rotation):
        if isinstance(found, str):
            return found
    assert not isinstance(q, str)
    assert not isinstance(k, str)
    assert not isinstance(rotation, str)
    return _pair(q, k, rotation.name, between)


def _pair(q: Norm, k: Norm, rotation: str, between: Between) -> Pair | str:
    if q.form is not k.form:
        return "the norms of queries and keys differ"
    if between == "split" and q.weight is None:
        return "without a weight nobody can tell what the norm is over"
    form = _form(q.form, _ROTATIONS[rotation], between)
    return op.supports(form) or Pair(q, k, form)


def form_of_pair(q_class: type, k_class: type, function: Any, between: Between) -> QKNormRotaryForm | None:
    """What the steps are, whether or not there is a kernel; None where they are something else."""
    q, k, rotation = norm_form(q_class), norm_form(k_class), rotation_form(function)
    if not isinstance(q, RMSNormForm) or q is not k or rotation is None:
        return None
    return _form(q, rotation, between)


def _form(norm: RMSNormForm, rotation: RotaryForm, between: Between) -> QKNormRotaryForm:
    over: Literal["head", "all"] = "all" if between == "split" else "head"
    return QKNormRotaryForm(f"{norm.name}_{rotation.name}_{over}", norm, rotation, over)


def pair_step(
    step: Step, between: Between, rotation_now: Callable[[], Any]
) -> tuple[Callable[..., bool], Callable[..., tuple[Any, Any]]]:
    """The two functions for one place.

    Args:
        step: What is known of it.
        between: What stands between the norms and the rotation.
        rotation_now: Gives the function that the forward would call.

    The first takes ``(self, q_layer, k_layer, function)`` and says whether the layers may be left to the
    second; the second takes ``(self, q, k, q_layer, k_layer, function, cos, sin)`` with queries and keys
    that the layers were not applied to, and does all of it.
    """
    graded, plain = step.graded, step.plain
    known: dict[Any, Pair | str] = {}

    def covered(q_text: str, k_text: str) -> str:
        """The name of the rotation, empty where there is no kernel."""
        found = rotation_of(rotation_now())
        if isinstance(found, str) or not q_text or not k_text:
            return ""
        pair = _pair(norm_from(q_text), norm_from(k_text), found.name, between)
        return "" if isinstance(pair, str) else found.name

    # A compiler keeps the answer as a constant, and sees nothing of how it was found.
    rotated: Callable[[str, str], str] = constant(covered)

    def ready(owner: nn.Module, q_layer: Any, k_layer: Any, function: Any) -> bool:
        if _compiling():
            return bool(described(type(q_layer)) and described(type(k_layer))) and not (
                hooked(q_layer) or hooked(k_layer)
            )
        key = (type(q_layer), type(k_layer), function)
        pair = known.get(key)
        if pair is None:
            pair = known[key] = pair_of(*key, between)
        if type(pair) is str:
            step.note(owner, pair)
            return False
        if not hooked(q_layer) and not hooked(k_layer):
            return True
        step.note(owner, why_not((q_layer, k_layer)) or "hooks")
        return False

    def fused(
        owner: nn.Module, q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any]:
        if _compiling():
            return _traced(q, k, q_layer, k_layer, function, cos, sin)
        if not (type(q) is type(k) is type(cos) is type(sin) is torch.Tensor):
            return _original(q, k, q_layer, k_layer, function, cos, sin)
        key = (type(q_layer), type(k_layer), function, q.dtype, k.dtype, cos.dtype)
        pair = (graded if _recording() else plain).get(key)
        if pair is not None:
            u, v = numbers_of(pair.q, q_layer), numbers_of(pair.k, k_layer)
            if u is not None and v is not None:
                path = path_for(q, k, u[0], v[0], cos, sin, pair.form)
                if path is EAGER:
                    return run(path, q, k, u[0], v[0], u[1], v[1], cos, sin, pair.form)
        else:
            done = _first(owner, key, q, k, q_layer, k_layer, cos, sin)
            if done is not None:
                return done
        return _original(q, k, q_layer, k_layer, function, cos, sin)

    def _original(
        q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any]:
        both: tuple[Any, Any] = function(_applied(q_layer, q), _applied(k_layer, k), cos, sin)
        return both

    def _applied(layer: Any, x: Any) -> Any:
        if between == "nothing":
            return layer(x)
        if between == "transpose":
            return layer(x.transpose(1, 2)).transpose(1, 2)
        return split(layer(joined(x)), x.shape[-1])

    def _traced(
        q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any]:
        q_text, k_text = described(type(q_layer)), described(type(k_layer))
        rotation = rotated(q_text, k_text)
        if rotation:
            u, v = norm_from(q_text), norm_from(k_text)
            a, b = numbers_of(u, q_layer), numbers_of(v, k_layer)
            form = _form(u.form, _ROTATIONS[rotation], between)
            fits = a is not None and b is not None
            if fits and path_for(q, k, a[0], b[0], cos, sin, form) is CUSTOM_OP:  # type: ignore[index]
                return run(CUSTOM_OP, q, k, a[0], b[0], a[1], b[1], cos, sin, form)  # type: ignore[index]
        return _original(q, k, q_layer, k_layer, function, cos, sin)

    def _first(
        owner: Any, key: Any, q: Any, k: Any, q_layer: Any, k_layer: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any] | None:
        pair = known[key[:3]]
        assert isinstance(pair, Pair)
        u, v = numbers_of(pair.q, q_layer), numbers_of(pair.k, k_layer)
        why = why_not((q_layer, k_layer))
        if why is not None or u is None or v is None:
            step.note(owner, why or "a norm lacks its weight or eps")
            return None
        if path_for(q, k, u[0], v[0], cos, sin, pair.form) is not EAGER:
            dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, cos))
            step.note(
                owner, f"no kernel for {tuple(q.shape)}, {tuple(k.shape)}, {tuple(cos.shape)} of {dtypes}"
            )
            return None
        # Not a call of its own: a table that wants a gradient is none of the kernel's, and in a
        # comparison every input wants one.
        rotate, few = plain_rotation(key[2]), slice(fewer_of(q.shape[2], proof_tokens((q,))))
        some = slice(2)
        cos_, sin_ = (table.detach()[some, few] for table in (cos, sin))

        def original(holder: nn.Module, q: Tensor, k: Tensor) -> Any:
            q_bare, k_bare = holder.children()
            return _original(q, k, q_bare, k_bare, rotate, cos_, sin_)

        def kernel(holder: nn.Module, q: Tensor, k: Tensor) -> Any:
            q_bare, k_bare = holder.children()
            a, b = numbers_of(pair.q, q_bare), numbers_of(pair.k, k_bare)
            assert a is not None
            assert b is not None
            path = path_for(q, k, a[0], b[0], cos_, sin_, pair.form)
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, q, k, a[0], b[0], a[1], b[1], cos_, sin_, pair.form)

        done: tuple[Any, Any] | None = step.first(
            owner,
            key,
            pair,
            lambda: run(EAGER, q, k, u[0], v[0], u[1], v[1], cos, sin, pair.form),
            lambda: (
                EmbeddedLayer(step.op, pair.form, {"q_eps": u[1], "k_eps": v[1], "table": cos.itemsize}),
                original,
                kernel,
                (q.detach()[some, :, few], k.detach()[some, :, few]),
                stand_in((q_layer, k_layer)),
            ),
        )
        if done is not None:
            note_absorbed(step, owner, (q_layer, k_layer), key[2])
        return done

    return ready, fused
