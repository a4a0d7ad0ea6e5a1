"""The references: what is recognised is executed, so each must be a mere computation, and a distinct one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from twinkle.match.spelled import form_template
from twinkle.match.symbolic.terms import show
from twinkle.match.templates import template_ops, templates
from twinkle.ops.causal_lm_loss.reference import CausalLMLossVariant, causal_lm_loss
from twinkle.ops.experts.reference import VARIANTS as EXPERTS
from twinkle.ops.experts.reference import experts
from twinkle.ops.qk_norm_rotary.reference import QKNormRotaryVariant, qk_norm_rotary
from twinkle.ops.residual_norm.reference import ResidualNormVariant, residual_norm
from twinkle.ops.rms_norm.reference import VARIANTS as NORMS
from twinkle.ops.rms_norm.reference import rms_norm
from twinkle.ops.rotary.reference import VARIANTS as ROTARY
from twinkle.ops.rotary.reference import rotary

LLAMA = next(variant for variant in NORMS if variant.name == "llama")


@pytest.mark.parametrize("op", template_ops(), ids=lambda op: op.name)
def test_every_variant_is_distinct_for_the_matcher(op):
    seen = {}
    by_form = op.hook("by_form") or (lambda variant: False)
    forms = [form_template(op, variant) for variant in op.variants if by_form(variant)]
    for template in (*templates(op), *forms):
        seen.setdefault(show(template.term, 30) if template in forms else id(template.term), set()).add(
            template.variant.name
        )
    assert all(len(names) == 1 for names in seen.values())
    assert {name for names in seen.values() for name in names} == {variant.name for variant in op.variants}


@pytest.mark.parametrize("op", template_ops(), ids=lambda op: op.name)
def test_names_of_variants_are_unique(op):
    assert len({variant.name for variant in op.variants}) == len(op.variants)


@pytest.mark.parametrize("op", template_ops(), ids=lambda op: op.name)
def test_variants_are_frozen(op):
    variant = op.variants[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.name = "other"


def test_the_norm_has_unit_mean_square():
    x = torch.randn(3, 64, dtype=torch.float64) * 7
    y = rms_norm(
        x, torch.ones(64), 0.0, variant=next(variant for variant in NORMS if variant.name == "input")
    )
    assert torch.allclose(y.pow(2).mean(-1), torch.ones(3, dtype=torch.float64))


def test_a_rotation_keeps_lengths():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    angle = torch.randn(1, 4, 4).repeat(1, 1, 2)
    out, _ = rotary(q, k, angle.cos(), angle.sin(), variant=ROTARY[0])
    assert torch.allclose(out.norm(dim=-1), q.norm(dim=-1), atol=1e-5)


def test_experts_are_a_weighted_sum_of_mlps():
    torch.manual_seed(0)
    x, up, down = torch.randn(6, 8), torch.randn(3, 20, 8), torch.randn(3, 8, 10)
    indices, weights = torch.randint(0, 3, (6, 1)), torch.rand(6, 1)
    y = experts(x, indices, weights, up, down, 3, variant=EXPERTS[0])
    gate, other = torch.einsum("th,tih->ti", x, up[indices[:, 0]]).chunk(2, -1)
    expected = (
        torch.einsum("ti,thi->th", torch.nn.functional.silu(gate) * other, down[indices[:, 0]]) * weights
    )
    assert torch.allclose(y, expected, atol=1e-4)


def test_ignored_labels_do_not_count_in_the_loss():
    hidden, weight = torch.randn(1, 5, 8), torch.randn(11, 8)
    labels = torch.tensor([[1, 2, -100, 3, 4]])
    loss, logits = causal_lm_loss(hidden, weight, None, labels, variant=CausalLMLossVariant("plain"))
    rows = logits[0, [0, 2, 3]].log_softmax(-1)
    assert torch.allclose(loss, -(rows[0, 2] + rows[1, 3] + rows[2, 4]) / 3)


def test_a_softcap_bounds_the_logits():
    variant = CausalLMLossVariant("softcap", steps=("softcap",))
    labels = torch.ones(1, 3, dtype=torch.long)
    _, logits = causal_lm_loss(
        torch.randn(1, 3, 8) * 99, torch.randn(4, 8), None, labels, variant=variant, factors=(2.0,)
    )
    assert logits.abs().max() <= 2.0


def test_the_residual_norm_returns_sum_and_norm():
    x, residual = torch.randn(2, 8), torch.randn(2, 8)
    variant = ResidualNormVariant("rms_norm_llama", LLAMA)
    total, normed = residual_norm(x, residual, torch.ones(8), 1e-6, variant=variant)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, torch.ones(8), 1e-6, variant=LLAMA))


def test_queries_and_keys_are_normed_before_they_are_turned():
    q, k, w = torch.randn(1, 3, 16), torch.randn(1, 3, 8), torch.rand(8)
    angle = torch.randn(1, 3, 4).repeat(1, 1, 2)
    variant = QKNormRotaryVariant("llama_half_head", LLAMA, ROTARY[0])
    q_out, _ = qk_norm_rotary(q, k, w, w, 1e-6, 1e-6, angle.cos(), angle.sin(), head_dim=8, variant=variant)
    heads = rms_norm(q.view(1, 3, 2, 8), w, 1e-6, variant=LLAMA).transpose(1, 2)
    expected, _ = rotary(heads, heads, angle.cos(), angle.sin(), variant=ROTARY[0])
    assert torch.equal(q_out, expected)
