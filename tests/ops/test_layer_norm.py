"""Layers that write a LayerNorm out get torch's own kernel without triton: as near to the exact result."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, terms
from torch import nn

from twinkle.match.structure import check_instance, recognise
from twinkle.ops import machine
from twinkle.ops.backends import backend_for
from twinkle.ops.layer_norm import reference
from twinkle.ops.layer_norm.samples import cases
from twinkle.ops.layer_norm.torch_backend import layer_class, layer_norm, supports
from twinkle.proof.compare import compare

VARIANTS = {variant.name: variant for variant in reference.VARIANTS if supports(variant) is None}
COHERE = VARIANTS["cohere"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_as_near_to_the_exact_result_as_its_definition(name, dtype):
    for case in cases(VARIANTS[name], dtype, torch.device("cpu"), "torch_backend"):
        verdict = compare(case.original, case.kernel, case.args, {}, module=case.module, backward=True)
        assert verdict.ok, (case.shape, verdict)


def test_variants_that_measure_otherwise_or_call_torch_already_are_left_alone(monkeypatch):
    monkeypatch.setattr("twinkle.ops.launch.DEVICE_TYPES", frozenset())
    left = {
        variant.name for variant in reference.VARIANTS if backend_for("layer_norm", variant, "cpu") is None
    }
    assert {"fused", "fused_float32", "std_input_both_first"} <= left
    assert all(
        backend_for("layer_norm", variant, device)
        for variant in VARIANTS.values()
        for device in ("cpu", "cuda")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounds_in_between_is_computed_by_torch_in_float32_alone(dtype):
    variant = VARIANTS["out_float32_both_mean_square_divide_before_weight"]
    torch.manual_seed(0)
    x = torch.randn(2048, 32, dtype=dtype, requires_grad=True)
    w, b = torch.randn(2, 32, dtype=dtype)
    found = layer_norm(x, w, b, 1e-5, variant=variant)
    expected = reference.layer_norm(x, w, b, 1e-5, variant=variant)
    assert (type(found.grad_fn).__name__ == "NativeLayerNormBackward0") == (dtype == torch.float32)
    assert torch.equal(found, expected) == (dtype != torch.float32)


@pytest.mark.parametrize("case", ["a weight for each head", "a weight in float32", "float64", "autocast"])
def test_what_torch_computes_otherwise_goes_through_the_definition(case):
    x, w = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16)
    if case == "a weight for each head":
        w = torch.randn(4, 8, dtype=torch.bfloat16)
    if case == "a weight in float32":
        w = w.float()
    if case == "float64":
        x, w = x.double(), w.double()
    with torch.autocast("cpu", enabled=case == "autocast"):
        found = layer_norm(x, w, None, 1e-5, variant=COHERE)
        expected = reference.layer_norm(x, w, None, 1e-5, variant=COHERE)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("one_thread", [True, False])
def test_few_rows_wait_for_no_other_thread_in_their_backward(monkeypatch, one_thread):
    monkeypatch.setattr(machine, "one_thread", lambda: one_thread)
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    y = layer_norm(x, w, None, 1e-5, variant=COHERE)
    assert (type(y.grad_fn).__name__ == "NativeLayerNormBackward0") is one_thread
    assert_near(y, reference.layer_norm(x, w, None, 1e-5, variant=COHERE), 2 * terms(8) + 24)


def test_a_class_of_transformers_is_recognised_and_computes_the_same():
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    layer = modeling.CohereLayerNorm(32)
    nn.init.normal_(layer.weight)
    found = recognise(modeling.CohereLayerNorm)
    kernel = layer_class(found.variant, check_instance(found, layer)).forward
    x = torch.randn(3, 32)
    assert_near(kernel(layer, x), layer(x), 2 * terms(32) + 24)


def test_a_compiler_sees_no_break():
    x, w = torch.randn(4, 8), torch.randn(8)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    assert_near(
        compiled(x, w, None, 1e-5, variant=COHERE),
        layer_norm(x, w, None, 1e-5, variant=COHERE),
        2 * terms(32) + 24,
    )
