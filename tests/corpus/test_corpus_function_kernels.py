"""The functions of the corpus as functions of triton: what their own facts make of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import euclidean_norms
import functions
import layer_norms
import norms
import pytest
import torch
from spelling import DTYPES, Call, by_itself

from twinkle.match.structure import recognise
from twinkle.ops import plain
from twinkle.ops.catalog import find_op

if TYPE_CHECKING:
    from spelling import Spelling

CORPORA = (*functions.CORPORA, *norms.CORPORA, *euclidean_norms.CORPORA, *layer_norms.CORPORA)
SPELLINGS = [
    spelling
    for corpus in CORPORA
    for spelling in corpus.spellings.values()
    if not isinstance(spelling.code, type)
]
NODES = {"_RMSNormBackward", "_LayerNormBackward", "_ActivationBackward", "_GatedBackward", "_FusedBackward"}


@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name != "mixed"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_the_kernel_of_a_function_gives_its_results(
    kernels: torch.device, spelling: Spelling, dtypes: str
) -> None:
    call = Call.of(spelling.code, spelling.make, spelling, dtypes)
    found = recognise(spelling.code)
    backend = find_op(spelling.op).module("triton_backend")
    if backend.supports(found.variant, "cuda", found.facts) is not None:
        return
    function = backend.function_for(found.variant, found.facts, spelling.code)
    used = set()

    def kernel(given: dict[str, Any]) -> torch.Tensor:
        with plain.at_every_size():
            y: torch.Tensor = function(**given)
        used.add(type(y.grad_fn).__name__)
        return y

    call.arguments = {
        name: x.detach().to(kernels).requires_grad_() if isinstance(x, torch.Tensor) else x
        for name, x in call.arguments.items()
    }
    made, expected = call.run(kernel), by_itself(spelling.code, call)
    # A norm that rounds in between is torch's to compute in half precision.
    assert used & NODES or dtypes != "float32"
    for name, value in expected.items():
        assert made[name].dtype == value.dtype, name
        apart, size = (made[name] - value).float().norm(dim=-1), value.float().norm(dim=-1)
        room = 64 if name.startswith("gradient") else 8
        assert bool((apart <= room * torch.finfo(DTYPES[dtypes][0]).eps * size + 1e-30).all()), name
