"""Adaptive norms of the corpus: found inside a forward, and computed as it does, bit for bit.

The rewritten forward runs with the definition in the place of the kernel, so whatever it gets wrong shows:
the place, what stands for scale and shift, the variant, the rounding.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import adaptive_norms
import pytest
from spelling import DTYPES, Call, by_itself, differences

from twinkle.fuse import modulated_norm
from twinkle.fuse.forward import FusedForward, draft_of, sites_of
from twinkle.fuse.places import without_overlaps
from twinkle.ops import launch
from twinkle.ops.modulated_norm import reference, triton_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from spelling import LookAlike, Spelling

SPELLINGS = tuple(chain.from_iterable(corpus.spellings.values() for corpus in adaptive_norms.CORPORA))
LOOK_ALIKES = tuple((of, other) for of in SPELLINGS for other in of.look_alikes)
LEAST, LEAST_LOOK_ALIKES = 23, 53
"""What the corpus holds. It may grow and not shrink."""

in_each_dtype = pytest.mark.parametrize("dtypes", DTYPES)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants that the definition was asked for by rewritten forwards, on any machine."""
    found: list[str] = []

    def run(
        path: Any,
        x: Any,
        weight: Any,
        bias: Any,
        eps: float,
        scale: Any,
        shift: Any,
        variant: Any,
        dtype: Any,
    ) -> torch.Tensor:
        found.append(variant.name)
        bias = None if getattr(variant.norm, "affine", "none") != "both" else bias
        return reference.modulated_norm(x, weight, eps, scale, shift, variant=variant, bias=bias, dtype=dtype)

    step: Any = modulated_norm.ModulationStep
    monkeypatch.setattr(launch, "DEVICE_TYPES", frozenset({"cpu"}))
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    monkeypatch.setattr(modulated_norm, "run", run)
    monkeypatch.setattr(step, "compare_and_run", lambda self, owner, key, needs, kernel, comparison: kernel())
    monkeypatch.setattr(step, "note", lambda self, owner, reason: None)
    monkeypatch.setattr(step, "note_taken_over", lambda self, owner, layers: None)
    return found


def rewritten(call: Call) -> Callable[..., Any] | None:
    """The forward of a call's module with its modulations replaced; None where there is none."""
    module = call.module
    assert module is not None
    draft = draft_of(type(module))
    assert not isinstance(draft, str), draft
    sites = [site for site in sites_of(draft, module) if site.op == "modulated_norm" and site.reason is None]
    sites = [site for site in sites if site.variant is not None]
    if not sites:
        return None
    free = without_overlaps(draft.places, [site.number for site in sites])
    made: Any = FusedForward(draft, [site for site in sites if site.number in free]).load()
    forward: Callable[..., Any] = made.forward
    return forward


def check(code: Any, make: Any, spelling: Spelling, dtypes: str) -> None:
    call = Call.of(code, make, spelling, dtypes)
    forward = rewritten(call)
    if forward is not None:
        found = call.run(lambda given: forward(call.module, **given))
        assert differences(found, by_itself(code, call)) == []


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
@in_each_dtype
def test_a_spelling_is_computed_bit_for_bit(ran: list[str], spelling: Spelling, dtypes: str) -> None:
    check(spelling.code, spelling.make, spelling, dtypes)
    # Torch's norms of half precision with a float32 weight are left to it.
    assert ran == [spelling.variant] or (dtypes == "mixed" and not ran)


@pytest.mark.parametrize(
    ("spelling", "other"), LOOK_ALIKES, ids=[f"{of.name}-{o.code.__name__}" for of, o in LOOK_ALIKES]
)
def test_a_look_alike_keeps_what_it_computes(ran: list[str], spelling: Spelling, other: LookAlike) -> None:
    for dtypes in DTYPES:
        check(other.code, other.make, spelling, dtypes)
    results = [
        by_itself(code, Call.of(code, make, spelling, "float32"))
        for code, make in ((other.code, other.make), (spelling.code, spelling.make))
    ]
    half = [
        by_itself(code, Call.of(code, make, spelling, "bfloat16"))
        for code, make in ((other.code, other.make), (spelling.code, spelling.make))
    ]
    assert differences(*results) or differences(*half), "it computes the same"


UNCHANGED = (
    *("WithoutOne", "OneMinus", "MinusOne", "TwoPlus", "ShiftFirst", "OtherAxis", "NoAxis", "ShiftOfTokens"),
    *("Divided", "Between", "Squared", "OverTokens", "MoreArguments", "Negative", "UnsqueezedBefore"),
    *("FactorIndexedBefore", "FactorFlipped", "ScaleOnlyWithoutOne", "OfAllChannels", "WithLinear"),
    *("ReadTwice", "ReadAsShift", "InputChanges", "InputIsWritten", "NamedBetween", "Sometimes"),
    *("CalledTokens", "CalledWithoutOne", "CalledBefore", "CalledDoubled", "CalledByItself"),
    *("CalledByAGlobal", "CalledOrNot", "CalledWithShift", "CalledWithScaleAsShift", "CalledOfMore"),
    *("CalledLocal", "NormOfCondition", "WithBiasedNorm", "WithBufferedNorm", "WithNullableNormAfterwards"),
)
"""Look-alikes in which nothing is an adaptive norm; the others are one, with another scale or shift."""


@pytest.mark.parametrize("name", UNCHANGED)
def test_no_kernel_runs_in_what_is_none(ran: list[str], name: str) -> None:
    [(spelling, other)] = [(of, other) for of, other in LOOK_ALIKES if other.code.__name__ == name]
    for dtypes in DTYPES:
        check(other.code, other.make, spelling, dtypes)
    assert ran == []


def test_the_corpus_does_not_shrink() -> None:
    assert len(SPELLINGS) >= LEAST
    assert len(LOOK_ALIKES) >= LEAST_LOOK_ALIKES
    assert all(spelling.look_alikes for spelling in SPELLINGS)
