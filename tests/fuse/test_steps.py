"""Single methods of the steps that a rewritten forward calls, without a forward around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from torch import nn

from twinkle.errors import TwinkleWarning
from twinkle.fuse import steps
from twinkle.fuse.norms import described
from twinkle.fuse.qk_norm_rotary import PairStep
from twinkle.fuse.residual_norm import SumStep, unfused
from twinkle.fuse.steps import SLOWER, Comparison, at_any_size, layer_copies, reason_against, size_key
from twinkle.ops.plain import at_every_size, pays
from twinkle.proof.clocks import Cost
from twinkle.proof.compare import Verdict
from twinkle.proof.speed import KERNEL, ORIGINAL, Speed, Unmeasured, size_of
from twinkle.records import Binding, LayerKernel
from twinkle.runtime import runtime
from twinkle.swap.candidate import Candidate

if TYPE_CHECKING:
    from collections.abc import Callable

transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb  # noqa: E402


class Planted(SumStep):
    """With a candidate of its own, and a comparison that comes to a given verdict."""

    def __init__(self, *, proofs: int = 1, right: bool = True) -> None:
        super().__init__("a source", proofs=proofs, recall=False)
        record = LayerKernel("residual_norm", self.source, origin="embedded")
        self.planted = Candidate(record, Binding("layer", "a:Block", "residual_norm", self.source))
        self.right = right
        self.compared: list[bool] = []
        self.verdicts: list[Verdict] = []
        self.asked: list[bool] = []

    def candidate(self, owner: nn.Module) -> Candidate | None:
        return self.planted if self.planted.rejected is None else None

    def _verdict(self, compared: Any, grad: bool) -> Verdict:
        self.compared.append(grad)
        if self.verdicts:
            return self.verdicts.pop(0)
        return Verdict(self.right, "right" if self.right else "wrong")


def pair(function: Callable[..., Any] = apply_rotary_pos_emb) -> PairStep:
    return PairStep("a source", "transpose", lambda: function, proofs=1, recall=False)


def never() -> NoReturn:
    raise AssertionError("not to be called")


def compare_and_run(step: Planted, kernel: Callable[[], Any] = lambda: "done") -> Any:
    return step.compare_and_run(nn.Identity(), "key", "needs", kernel, lambda _: None)  # type: ignore[arg-type,return-value]


def test_a_kernel_runs_alone_after_as_many_comparisons_as_asked_for() -> None:
    step = Planted(proofs=2)
    assert compare_and_run(step) == "done"
    assert step.proven_with_grad == {}
    assert compare_and_run(step) == "done"
    assert step.proven_with_grad == step.proven == {"key": "needs"}
    assert step.compared == [True, True]


def test_a_comparison_without_gradients_proves_nothing_for_calls_with_them() -> None:
    step = Planted()
    with torch.no_grad():
        compare_and_run(step)
    assert step.proven == {"key": "needs"}
    assert step.proven_with_grad == {}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, clean_registry: object) -> dict[tuple[int, bool], str]:
    """The way that is found at each size, with gradients or without: by default the kernel's."""
    ways: dict[tuple[int, bool], str] = {}

    def speed_at_call(subject: Any, args: Any, kwargs: Any, *, grad: bool) -> Speed:
        way = ways.setdefault((size_of(args[1]), grad), KERNEL)
        ratio = 0.5 if way == ORIGINAL else 2.0
        return Speed(way, ratio, ratio, Cost(1e-5, 1e-5), Cost(1e-5, 1e-5), f"{args[1].numel()} float32")

    monkeypatch.setattr(steps, "speed_at_call", speed_at_call)
    monkeypatch.setattr(steps, "measures", lambda subject: True)
    runtime.options.sizes = "auto"
    return ways


def run_at(step: Planted, count: int, least: int = 0) -> Any:
    x = torch.ones(count)

    def comparison(whole: bool) -> Comparison:
        step.asked.append(whole)
        return Comparison("a subject", never, never, (x,), nn.Identity(), least)  # type: ignore[arg-type]

    return step.compare_and_run(nn.Identity(), ("kind", size_key(x)), "needs", lambda: "done", comparison)


def test_each_size_is_compared_once_and_measured(measured: dict[tuple[int, bool], str]) -> None:
    step = Planted()
    step.planted.kernel.chosen_by = "twinkle"
    measured[3, True] = ORIGINAL
    assert [run_at(step, count) for count in (4, 8, 16)] == [None, "done", "done"]
    assert step.compared == [True]
    assert step.proven_with_grad == {("kind", 3): SLOWER, ("kind", 4): "needs", ("kind", 5): "needs"}
    assert step.proven == {}, "calls without gradients are measured for themselves"
    with torch.no_grad():
        assert run_at(step, 4) == "done"
    assert step.proven == {("kind", 3): "needs"}
    assert step.compared == [True]
    binding = step.planted.binding
    assert binding.state == "active"
    assert [figures["runs"] for figures in binding.speeds.values()] == [True, True, True]
    assert next(iter(binding.speeds)) == "residual_norm 4 float32"


def test_a_step_that_is_slower_calls_the_original_steps(
    measured: dict[tuple[int, bool], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LlamaRMSNorm(8)
    step = Planted()
    x = torch.ones(2, 8)
    key = (LlamaRMSNorm, torch.float32, torch.float32, size_of(x))
    step.proven_with_grad[key] = SLOWER
    monkeypatch.setattr(step, "first_call", never)
    given = step.fused(nn.Identity(), x, x, layer, None)
    assert torch.equal(given[1], layer(x + x))


def test_a_step_that_cannot_be_measured_runs(
    measured: dict[tuple[int, bool], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "speed_at_call", lambda *args, **kwargs: Unmeasured("no room", for_good=True))
    assert run_at(Planted(), 4) == "done"
    assert run_at(Planted(), 8, least=8) == "done"
    assert run_at(Planted(), 4, least=8) is None, "below the size in its code it may well be slower"


def test_a_part_of_a_call_is_compared_and_all_of_it_measured(
    measured: dict[tuple[int, bool], str],
) -> None:
    step = Planted()
    run_at(step, 4)
    run_at(step, 8)
    assert step.asked == [False, True, True]


def test_calls_that_are_to_be_recorded_are_not_measured(measured: dict[tuple[int, bool], str]) -> None:
    measured[3, True] = ORIGINAL
    step = Planted()
    with at_every_size():
        assert run_at(step, 4) == "done"
    assert step.asked == [False]
    assert run_at(step, 4) is None, "a call that the host issues is another matter"
    with at_every_size():
        assert step.proven_with_grad[("kind", size_key(torch.ones(4)))] == "needs"


def test_small_calls_are_measured_where_speeds_are(clean_registry: object) -> None:
    x = torch.ones(4)
    assert not Planted().may_pay(x, 8)
    runtime.options.sizes = "auto"
    assert Planted().may_pay(x, 8)
    assert not Planted(proofs=0).may_pay(x, 8), "what is not compared is not measured"


def test_a_path_is_found_at_any_size_where_speeds_are_measured(clean_registry: object) -> None:
    path = at_any_size(lambda x: pays(x, 8))
    x = torch.ones(4)
    assert not path(x)
    runtime.options.sizes = "auto"
    assert path(x)
    assert not pays(x, 8)


def test_a_kernel_that_is_wrong_is_not_called() -> None:
    step = Planted(right=False)
    with pytest.warns(TwinkleWarning, match="does not compute the same: wrong"):
        assert compare_and_run(step, never) is None
    assert step.proven == {}


def test_a_comparison_that_was_not_made_leaves_the_call_to_the_original_steps() -> None:
    step = Planted(proofs=2)
    verdict = Verdict.not_yet("under a mode")
    step.verdicts = [verdict, Verdict(True, "right"), verdict, Verdict(True, "right")]
    assert compare_and_run(step, never) is None
    assert step.planted.binding.proof == "not compared yet: under a mode"
    assert compare_and_run(step) == "done"
    assert compare_and_run(step) == "done", "compared once, and the same as in forward under a checkpoint"
    compare_and_run(step)
    assert step.proven == {"key": "needs"}


def test_without_comparisons_nothing_is_made_for_one() -> None:
    step = Planted(proofs=0)
    assert step.compare_and_run(nn.Identity(), "key", "needs", lambda: "done", never) == "done"
    assert step.compared == []


def test_a_kernel_that_raises_leaves_the_call_to_the_original_steps() -> None:
    def broken() -> NoReturn:
        raise ValueError("no such device")

    step = Planted()
    with pytest.warns(TwinkleWarning, match="no such device"):
        assert compare_and_run(step, broken) is None
    assert step.proven == {}


def test_a_step_whose_candidate_is_gone_runs_the_original_steps() -> None:
    step, norm = SumStep("a source", proofs=1, recall=False), LlamaRMSNorm(8)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for ours, theirs in zip(step.fused(nn.Identity(), x, y, norm), unfused(x, y, norm, None), strict=True):
        assert torch.equal(ours, theirs)


def test_the_factor_of_an_addend_is_applied_by_the_original_steps() -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    total, normed = unfused(x, y, nn.Identity(), 0.5)
    assert torch.equal(total, x + y * 0.5)
    assert normed is total


def test_a_pair_is_ready_with_two_norms_and_a_rotation_alone() -> None:
    q, k, owner = LlamaRMSNorm(8), LlamaRMSNorm(8), nn.Identity()
    assert pair().ready(owner, q, k, apply_rotary_pos_emb)
    assert not pair().ready(owner, q, nn.Linear(8, 8), apply_rotary_pos_emb)
    assert not pair().ready(owner, q, k, torch.add)
    k.register_forward_hook(lambda *_: None)
    assert not pair().ready(owner, q, k, apply_rotary_pos_emb)


def test_a_compiler_is_told_the_rotation_by_its_name() -> None:
    text = described(LlamaRMSNorm)
    assert pair().rotation_name(text, text)
    assert pair().rotation_name(text, "") == ""
    assert pair(torch.add).rotation_name(text, text) == ""


def test_the_reason_against_a_norm_names_its_class() -> None:
    norm = LlamaRMSNorm(8)
    assert reason_against((norm,)) is None
    norm.variance_epsilon = None
    assert reason_against((norm,)) == "LlamaRMSNorm has no weight or eps where its class promises them"


def test_copies_of_layers_share_their_parameters() -> None:
    norm = LlamaRMSNorm(8)
    [copy] = layer_copies((norm,)).children()
    assert copy is not norm
    assert copy.weight is norm.weight
