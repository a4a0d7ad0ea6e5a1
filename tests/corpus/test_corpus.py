"""The ways people write: each spelling is recognised, as exactly what it computes, and nothing near it is."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import euclidean_norms
import functions
import gated_mlps
import layer_norms
import norms
import pytest
import rotations
import rotations_by_einops
import rotations_by_pairs
import rotations_by_products
from spelling import DTYPES, Call, by_itself, by_reference, differences

from twinkle.match.structure import recognise

if TYPE_CHECKING:
    from spelling import LookAlike, Spelling

CORPORA = (
    *norms.CORPORA,
    *euclidean_norms.CORPORA,
    *layer_norms.CORPORA,
    *rotations.CORPORA,
    *rotations_by_pairs.CORPORA,
    *rotations_by_products.CORPORA,
    *rotations_by_einops.CORPORA,
    *gated_mlps.CORPORA,
    *functions.CORPORA,
)
SPELLINGS = tuple(chain.from_iterable(corpus.spellings.values() for corpus in CORPORA))
LOOK_ALIKES = tuple((of, other) for of in SPELLINGS for other in of.look_alikes)
LEAST = {"rms_norm": 55, "layer_norm": 18, "rotary": 54, "gated_mlp": 28, "activation": 3}
"""What the corpus holds of each op. It may grow and not shrink."""

each = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.op}-{s.name}")
each_other = pytest.mark.parametrize(
    ("spelling", "other"), LOOK_ALIKES, ids=[f"{of.op}-{of.name}-{o.code.__name__}" for of, o in LOOK_ALIKES]
)
in_each_dtype = pytest.mark.parametrize("dtypes", DTYPES)


@each
def test_a_spelling_is_recognised_as_its_variant(spelling: Spelling) -> None:
    found = recognise(spelling.code)
    assert found, "; ".join(map(str, found.near)) or found.reason
    assert (found.op, found.variant.name) == (spelling.op, spelling.variant)


@each
@in_each_dtype
def test_the_reference_gives_results_and_gradients_bit_for_bit(spelling: Spelling, dtypes: str) -> None:
    call = Call.of(spelling.code, spelling.make, spelling, dtypes)
    expected = by_itself(spelling.code, call)
    assert dtypes != "float32" or "raised" not in expected
    found = by_reference(recognise(spelling.code), call)
    assert differences(found, expected, spelling.regrouped, spelling.contracted) == []


@each_other
def test_a_look_alike_is_not_taken_for_the_spelling(spelling: Spelling, other: LookAlike) -> None:
    found = recognise(other.code)
    if not found:
        return
    assert (found.op, found.variant.name) != (spelling.op, spelling.variant)
    for dtypes in DTYPES:
        call = Call.of(other.code, other.make, spelling, dtypes)
        assert differences(by_reference(found, call), by_itself(other.code, call)) == []


@each_other
def test_a_look_alike_computes_something_else(spelling: Spelling, other: LookAlike) -> None:
    def results(code: object, make: object, dtypes: str) -> dict[str, object]:
        return by_itself(code, Call.of(code, make, spelling, dtypes))  # type: ignore[arg-type]

    assert any(
        differences(results(other.code, other.make, dtypes), results(spelling.code, spelling.make, dtypes))
        for dtypes in DTYPES
    )


def test_the_corpus_does_not_shrink() -> None:
    counted = Counter(spelling.op for spelling in SPELLINGS)
    assert counted == {**counted, **{op: max(n, counted[op]) for op, n in LEAST.items()}}
    assert all(spelling.look_alikes for spelling in SPELLINGS)
