"""The step of a rewritten forward that normalises queries and keys and rotates them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from twinkle.fuse.norms import (
    UNGUARDED,
    described,
    hooked,
    norm_from,
    norm_of,
    norm_variant,
    numbers_of,
)
from twinkle.fuse.rotations import plain_rotation, rotation_of, rotation_variant
from twinkle.fuse.steps import SLOWER, Comparison, FusedStep, layer_copies, reason_against, size_key
from twinkle.match.reads import CHANGED, Guard
from twinkle.match.structure import recognise
from twinkle.ops.launch import CUSTOM_OP, EAGER, REFERENCE
from twinkle.ops.qk_norm_rotary import triton_backend as op
from twinkle.ops.qk_norm_rotary.heads import joined, path_for, run, split
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryVariant
from twinkle.ops.rms_norm.reference import RMSNormVariant
from twinkle.ops.rotary.reference import VARIANTS
from twinkle.proof.first_use import proof_tokens
from twinkle.proof.inputs import fewer_of
from twinkle.sources.embedded import EmbeddedLayer
from twinkle.swap.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from torch import Tensor, nn

    from twinkle.fuse.norms import Norm
    from twinkle.ops.rotary.reference import RotaryVariant

    Between = Literal["nothing", "transpose", "split"]

__all__ = ["PairStep", "pair_of", "variant_of_pair"]

_ROTATIONS = {variant.name: variant for variant in VARIANTS}
_compiling = torch.compiler.is_compiling
_recording = torch.is_grad_enabled


class Pair(NamedTuple):
    """Two norms of one variant and a rotation.

    Attributes:
        q, k: The norms of queries and keys.
        variant: The variant of the op.
        guard: Whether both norms, given as layer and class, and the rotation still are what they were.
    """

    q: Norm
    k: Norm
    variant: QKNormRotaryVariant
    guard: Guard


def pair_of(q_class: type, k_class: type, function: Any, between: Between) -> Pair | str:
    """The two norms and the rotation that a kernel is for, or in words why there is none.

    Args:
        q_class: The class of the norm of the queries.
        k_class: The class of the norm of the keys.
        function: The rotation.
        between: What stands between the norms and the rotation.
    """
    q, k = norm_of(q_class), norm_of(k_class)
    rotation = rotation_of(function)
    for found in (q, k, rotation):
        if isinstance(found, str):
            return found
    assert not isinstance(q, str)
    assert not isinstance(k, str)
    assert not isinstance(rotation, str)
    pair = _pair(q, k, rotation.name, between)
    if isinstance(pair, str):
        return pair
    of_k = (read.at("{cls}") for read in k.guard.reads)
    return pair._replace(guard=Guard((*q.guard.reads, *of_k, *recognise(plain_rotation(function)).reads)))


def _pair(q: Norm, k: Norm, rotation: str, between: Between) -> Pair | str:
    if q.variant is not k.variant:
        return "the norms of queries and keys differ"
    if not isinstance(q.variant, RMSNormVariant):
        return f"there is no kernel for a {q.op} before a rotation"
    if between == "split" and q.weight is None:
        return "without a weight nobody can tell what the norm is over"
    variant = _variant(q.variant, _ROTATIONS[rotation], between)
    return op.supports(variant) or Pair(q, k, variant, UNGUARDED)


def variant_of_pair(
    q_class: type, k_class: type, function: Any, between: Between
) -> QKNormRotaryVariant | None:
    """The variant of two norms and a rotation, whether or not there is a kernel; None where they are none.

    Args:
        q_class: As for :func:`pair_of`, with all that follows.
        k_class: The class of the norm of the keys.
        function: The rotation.
        between: What stands between the norms and the rotation.
    """
    q, k, rotation = norm_variant(q_class), norm_variant(k_class), rotation_variant(function)
    if not isinstance(q, RMSNormVariant) or q is not k or rotation is None:
        return None
    return _variant(q, rotation, between)


def _variant(norm: RMSNormVariant, rotation: RotaryVariant, between: Between) -> QKNormRotaryVariant:
    over: Literal["head", "all"] = "all" if between == "split" else "head"
    return QKNormRotaryVariant(f"{norm.name}_{rotation.name}_{over}", norm, rotation, over)


class PairStep(FusedStep):
    """Queries and keys through a norm each and a rotation at one place of a forward, from one kernel.

    The forward asks :meth:`ready` ahead of the norms. Where the answer is True it leaves the norms out and
    calls :meth:`fused` in the place of the rotation. The kernel runs once it is proven for the classes of
    the norms, the function and the dtypes (:attr:`proven`); until then :meth:`first_call` decides.

    Args:
        source: What the forward comes from; its candidate tells the report.
        between: What stands between the norms and the rotation.
        rotation_now: Gives the function that the forward would call.
        proofs: How many calls are compared with the original steps before the kernel runs alone.
        recall: A verdict from an earlier process will do.
    """

    op = "qk_norm_rotary"

    def __init__(
        self,
        source: Any,
        between: Between,
        rotation_now: Callable[[], Any],
        *,
        proofs: int,
        recall: bool,
    ) -> None:
        super().__init__(source, proofs=proofs, recall=recall)
        self.between = between
        self.rotation_now = rotation_now
        self._pairs: dict[Any, Pair | str] = {}

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the forward calls: :meth:`ready`, then :meth:`fused`."""
        return self.ready, self.fused

    def ready(self, owner: nn.Module, q_layer: Any, k_layer: Any, function: Any) -> bool:
        """Whether the forward may leave both norms out, since :meth:`fused` computes them.

        Args:
            owner: The layer whose forward it is.
            q_layer: The norm of the queries.
            k_layer: The norm of the keys.
            function: The rotation.
        """
        if _compiling():
            return bool(described(type(q_layer)) and described(type(k_layer))) and not (
                hooked(q_layer) or hooked(k_layer)
            )
        key = (type(q_layer), type(k_layer), function)
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = pair_of(*key, self.between)
        if isinstance(pair, str):
            self.note(owner, pair)
            return False
        if not pair.guard.holds(q_layer, k_layer):
            self.note(owner, f"a norm or the rotation {CHANGED}")
            return False
        if not hooked(q_layer) and not hooked(k_layer):
            return True
        self.note(owner, reason_against((q_layer, k_layer)) or "hooks")
        return False

    def fused(
        self,
        owner: nn.Module,
        q: Any,
        k: Any,
        q_layer: Any,
        k_layer: Any,
        function: Any,
        cos: Any,
        sin: Any,
    ) -> tuple[Any, Any]:
        """Rotated queries and keys: from the kernel, or by the original steps.

        Args:
            owner: The layer whose forward it is.
            q: Queries that the norm was not applied to.
            k: Keys that the norm was not applied to.
            q_layer: The norm of the queries.
            k_layer: The norm of the keys.
            function: The rotation.
            cos: Its first table.
            sin: Its second.
        """
        if _compiling():
            return self.traced(q, k, q_layer, k_layer, function, cos, sin)
        if not (type(q) is type(k) is type(cos) is type(sin) is torch.Tensor):
            return self.unfused(q, k, q_layer, k_layer, function, cos, sin)
        key = (type(q_layer), type(k_layer), function, q.dtype, k.dtype, cos.dtype, size_key(q))
        pair = (self.proven_with_grad if _recording() else self.proven).get(key)
        if pair is SLOWER:
            return self.unfused(q, k, q_layer, k_layer, function, cos, sin)
        if pair is not None:
            u, v = numbers_of(pair.q, q_layer), numbers_of(pair.k, k_layer)
            if u is not None and v is not None:
                path = path_for(q, k, u[0], v[0], cos, sin, pair.variant)
                if path is EAGER:
                    try:
                        return run(path, q, k, u[0], v[0], u[1], v[1], cos, sin, pair.variant)
                    except Exception as error:
                        take_out = self.failed(owner, error)
                    both = self.unfused(q, k, q_layer, k_layer, function, cos, sin)
                    take_out()
                    return both
        else:
            done = self.first_call(owner, key, q, k, q_layer, k_layer, cos, sin)
            if done is not None:
                return done
        return self.unfused(q, k, q_layer, k_layer, function, cos, sin)

    def unfused(
        self, q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any]:
        """Rotated queries and keys, by the steps of the original forward."""
        both: tuple[Any, Any] = function(self._normed(q_layer, q), self._normed(k_layer, k), cos, sin)
        return both

    def _normed(self, layer: Any, x: Any) -> Any:
        if self.between == "nothing":
            return layer(x)
        if self.between == "transpose":
            return layer(x.transpose(1, 2)).transpose(1, 2)
        return split(layer(joined(x)), x.shape[-1])

    def traced(
        self, q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, cos: Any, sin: Any
    ) -> tuple[Any, Any]:
        """Rotated queries and keys while a compiler traces: the registered op, or the original steps."""
        q_text, k_text = described(type(q_layer)), described(type(k_layer))
        rotation = self.rotation_name(q_text, k_text)
        if rotation:
            q_norm, k_norm = norm_from(q_text), norm_from(k_text)
            u, v = numbers_of(q_norm, q_layer), numbers_of(k_norm, k_layer)
            assert isinstance(q_norm.variant, RMSNormVariant)  # else there is no name
            variant = _variant(q_norm.variant, _ROTATIONS[rotation], self.between)
            if u is not None and v is not None and path_for(q, k, u[0], v[0], cos, sin, variant) is CUSTOM_OP:
                return run(CUSTOM_OP, q, k, u[0], v[0], u[1], v[1], cos, sin, variant)
        return self.unfused(q, k, q_layer, k_layer, function, cos, sin)

    @constant
    def rotation_name(self, q_text: str, k_text: str) -> str:
        """The name of the rotation that the forward would call now; empty where there is no kernel.

        A compiler keeps the answer as a constant, and sees nothing of how it was found.

        Args:
            q_text: What :func:`twinkle.fuse.norms.described` says of the norm of the queries.
            k_text: The same for the keys.
        """
        rotation = rotation_of(self.rotation_now())
        if isinstance(rotation, str) or not q_text or not k_text:
            return ""
        pair = _pair(norm_from(q_text), norm_from(k_text), rotation.name, self.between)
        return "" if isinstance(pair, str) else rotation.name

    def first_call(
        self,
        owner: nn.Module,
        key: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        q_layer: nn.Module,
        k_layer: nn.Module,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Compare the kernel and run it; None, with a note in the report, where it cannot run.

        Args:
            owner: The layer whose forward it is.
            key: The classes of the norms, the rotation, the dtypes and the size.
            q: Queries, ``[batch, heads, tokens, head_dim]``.
            k: Keys of the same layout.
            q_layer: The norm of the queries.
            k_layer: The norm of the keys.
            cos: ``[batch, tokens, rotary_dim]``.
            sin: As ``cos``.
        """
        pair = self._pairs[key[:3]]
        assert isinstance(pair, Pair)
        u, v = numbers_of(pair.q, q_layer), numbers_of(pair.k, k_layer)
        reason = reason_against((q_layer, k_layer))
        if reason is not None or u is None or v is None:
            self.note(owner, reason or "a norm lacks its weight or eps")
            return None
        if path_for(q, k, u[0], v[0], cos, sin, pair.variant) is not EAGER:
            dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, cos))
            shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(cos.shape)}"
            self.note(owner, f"no kernel for {shapes} of {dtypes}")
            return None
        done: tuple[Tensor, Tensor] | None = self.compare_and_run(
            owner,
            key,
            pair,
            lambda: run(EAGER, q, k, u[0], v[0], u[1], v[1], cos, sin, pair.variant),
            lambda whole: self.comparison(pair, q, k, q_layer, k_layer, key[2], cos, sin, whole=whole),
        )
        if done is not None:
            self.note_taken_over(owner, (q_layer, k_layer), key[2])
        return done

    def comparison(
        self,
        pair: Pair,
        q: Tensor,
        k: Tensor,
        q_layer: nn.Module,
        k_layer: nn.Module,
        function: Any,
        cos: Tensor,
        sin: Tensor,
        *,
        whole: bool,
    ) -> Comparison:
        """Kernel and original steps on the first tokens of a call, or on all, and copies of its layers.

        Args:
            pair: The norms and the variant of the op.
            q: As for :meth:`first_call`, with all that follows.
            k: Keys.
            q_layer: The norm of the queries.
            k_layer: The norm of the keys.
            function: The rotation.
            cos: ``[batch, tokens, rotary_dim]``.
            sin: As ``cos``.
            whole: All of the call.
        """
        rotate = plain_rotation(function)
        tokens = slice(None if whole else fewer_of(q.shape[2], proof_tokens((q,))))
        sequences = slice(None if whole else 2)
        # No inputs of the comparison: the kernel takes no table that wants a gradient, and there every
        # input wants one.
        cos_, sin_ = (table.detach()[sequences, tokens] for table in (cos, sin))

        def original(layers: nn.Module, q: Tensor, k: Tensor) -> Any:
            q_copy, k_copy = layers.children()
            return self.unfused(q, k, q_copy, k_copy, rotate, cos_, sin_)

        def kernel(layers: nn.Module, q: Tensor, k: Tensor) -> Any:
            (q_weight, q_eps, _), (k_weight, k_eps, _) = _numbers(pair, *layers.children())
            path = path_for(q, k, q_weight, k_weight, cos_, sin_, pair.variant)
            if path is REFERENCE:
                raise TypeError("the kernel does not take copies of its inputs")
            return run(path, q, k, q_weight, k_weight, q_eps, k_eps, cos_, sin_, pair.variant)

        (_, q_eps, _), (_, k_eps, _) = _numbers(pair, q_layer, k_layer)
        return Comparison(
            EmbeddedLayer(self.op, pair.variant, {"q_eps": q_eps, "k_eps": k_eps, "table": cos.itemsize}),
            original,
            kernel,
            (q.detach()[sequences, :, tokens], k.detach()[sequences, :, tokens]),
            layer_copies((q_layer, k_layer)),
        )


def _numbers(
    pair: Pair, q_layer: nn.Module, k_layer: nn.Module
) -> tuple[tuple[Tensor | None, Any, Any], ...]:
    u, v = numbers_of(pair.q, q_layer), numbers_of(pair.k, k_layer)
    assert u is not None
    assert v is not None
    return u, v
