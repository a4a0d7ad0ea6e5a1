"""The norms of the corpus as layers of triton: what a spelling's own facts make of the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import euclidean_norms
import layer_norms
import norms
import pytest
import torch
from spelling import Call, by_itself

from twinkle.match.structure import Reason, check_instance, recognise
from twinkle.ops.catalog import find_op
from twinkle.ops.layer_norm import triton_backend as layer_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spelling import Spelling

SPELLINGS = [
    spelling
    for corpus in (*norms.CORPORA, *euclidean_norms.CORPORA, *layer_norms.CORPORA)
    for spelling in corpus.spellings.values()
    if isinstance(spelling.code, type)
]
WITHOUT = {
    "DiffusersBias": "no kernel for an RMSNorm with a bias",
    "EpsBehindRootWeightFirst": "no kernel for gates, groups, or a weight before the norm (root_first)",
    "LayerAnnotated": "no kernel for an unbiased deviation, with eps on it (std_input_both_first)",
    "NormInverse": "no kernel for gates, groups, or a weight before the norm (norm_inverse_first)",
    "WeightFirst": "no kernel for gates, groups, or a weight before the norm (scaled_first)",
}
"""What is recognised and has no kernel, and why."""
USED = {"_RMSNormBackward", "_LayerNormBackward"}


def facts_of(spelling: Spelling, module: torch.nn.Module) -> Mapping[str, Any]:
    facts = check_instance(recognise(spelling.code), module)
    assert not isinstance(facts, Reason), str(facts)
    return facts


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_the_kernel_of_a_spelling_gives_its_results(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, spelling: Spelling
) -> None:
    monkeypatch.setattr(layer_norm, "LEAST", 0)
    call = Call.of(spelling.code, spelling.make, spelling, "float32")
    assert call.module is not None
    backend = find_op(spelling.op).module("triton_backend")
    facts = facts_of(spelling, call.module)
    reason = backend.supports(recognise(spelling.code).variant, "cuda", facts)
    assert reason == WITHOUT.get(spelling.name)
    if reason is not None:
        return
    forward = backend.layer_class(recognise(spelling.code).variant, facts).forward
    used = []

    def kernel(given: dict[str, Any]) -> torch.Tensor:
        y: torch.Tensor = forward(call.module, **given)
        used.append(type(y.grad_fn).__name__)
        return y

    call.module.to(kernels)
    call.arguments = {name: x.detach().to(kernels).requires_grad_() for name, x in call.arguments.items()}
    found, expected = call.run(kernel), by_itself(spelling.code, call)
    assert USED & {*used}
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name  # the gradient of a root of 0
        apart, size = (found[name] - value).nan_to_num().norm(dim=-1), value.nan_to_num().norm(dim=-1)
        # A gradient is what is left of the numbers along the input: eight times as much was there.
        room = 64 if name.startswith("gradient") else 8
        assert bool((apart <= room * torch.finfo(torch.float32).eps * size).all()), name


def test_all_that_has_no_kernel_is_there() -> None:
    assert WITHOUT.keys() <= {spelling.name for spelling in SPELLINGS}
