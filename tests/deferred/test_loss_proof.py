"""The loss without logits is compared before its first labels, and with a softcap before the first such."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near, terms
from torch.utils.flop_counter import FlopCounterMode

from twinkle.apply.layers import kernelize_layers
from twinkle.deferred import proof as loss
from twinkle.deferred.proof import prove_loss
from twinkle.deferred.verification import HeadType, Verifications, loss_verified, softcap_verified
from twinkle.errors import TwinkleWarning
from twinkle.ops import machine
from twinkle.ops.causal_lm_loss import linear_cross_entropy
from twinkle.ops.plain import at_every_size
from twinkle.proof import cache_key
from twinkle.runtime import runtime

transformers = pytest.importorskip("transformers")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from twinkle.registry import Registry

VOCAB, WIDTH = 4096, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def only_the_loss(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TWINKLE_CACHE", "off")
    runtime.options.kernels = ("causal_lm_loss",)
    with at_every_size():
        yield


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool, bool]]:
    """The comparisons that are made: dtype, with gradients, with a softcap."""
    made: list[tuple[torch.dtype, bool, bool]] = []

    def prove(weight: torch.Tensor, *given: Any, **named: Any) -> Any:
        made.append((named["dtype"], named["backward"], named["softcapped"]))
        return prove_loss(weight, *given, **named)

    monkeypatch.setattr(loss, "prove_loss", prove)
    return made


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gemma2(softcap: float | None = 30.0) -> nn.Module:
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=softcap)
    return transformers.Gemma2ForCausalLM(config)


def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (4, 128), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    tokens = ids()
    value = model(input_ids=tokens, labels=tokens).loss
    value.backward()
    return value.detach(), model.lm_head.weight.grad


def plant(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Spoil what computes the loss; ``spoil`` gets and gives ``(loss, …)``, the arguments are at its back."""
    real = linear_cross_entropy.loss_of_all_rows

    def planted(*args: Any) -> tuple[Any, ...]:
        return spoil(real(*args)) if not capped_alone[0] or args[8] else real(*args)

    capped_alone = [spoil is scaled_where_capped]
    monkeypatch.setattr(linear_cross_entropy, "loss_of_all_rows", planted)


def scaled(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return given[0] * 1.01, *given[1:]


def scaled_where_capped(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return scaled(given)


def wrong_gradient(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return given[0] + 0.05 * (given[0] - given[0].detach()), *given[1:]


@pytest.mark.parametrize("spoil", [scaled, wrong_gradient], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_loss_never_runs(
    spoil: Callable[..., Any], dtype: torch.dtype, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama().to(dtype)
    expected = step(model)
    plant(monkeypatch, spoil)
    kernelize_layers(model)
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        found = step(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert "failed" in [binding.state for binding in clean_registry.bindings]


@pytest.mark.parametrize("where", ["model", "program"])
def test_a_loss_that_is_wrong_with_a_softcap_never_runs_with_one(
    where: str, clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gemma2() if where == "model" else llama()
    tokens = ids()

    def run() -> torch.Tensor:
        out = model(input_ids=tokens, labels=tokens)
        if where == "model":
            return out.loss
        capped = 5.0 * torch.tanh(out.logits[:, :-1].float() / 5.0)
        return torch.nn.functional.cross_entropy(capped.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))

    expected = run()
    plant(monkeypatch, scaled_where_capped)
    kernelize_layers(model)
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        found = run()
    assert_near(found, expected, 2 * terms(VOCAB) + 500)


def test_a_softcap_is_proven_where_there_is_one(proofs: list[tuple[torch.dtype, bool, bool]]) -> None:
    kept = [llama(), gemma2(None), gemma2()]
    for model in kept:
        # Heads of one shape share their proofs, so each begins anew.
        runtime.of(Verifications).outcomes.clear()
        proofs.append((torch.float64, False, False))
        kernelize_layers(model)
        step(model)
        step(model)
    plain, capped = (torch.float32, True, False), (torch.float32, True, True)
    mark = (torch.float64, False, False)
    assert proofs == [mark, plain, mark, plain, mark, plain, capped]


@pytest.mark.parametrize("multiplies", [True, False], ids=["products in half", "products in float32"])
def test_each_dtype_and_autocast_is_proven(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch, proofs: list[tuple[torch.dtype, bool, bool]]
) -> None:
    monkeypatch.setattr(machine, "multiplies", lambda dtype: multiplies)
    model = llama()
    kernelize_layers(model)
    with torch.no_grad():
        model(input_ids=ids(), labels=ids())
    for _ in range(2):
        step(model)
        with torch.autocast("cpu", torch.bfloat16):
            step(model)
    step(model.to(torch.float16))
    step(model)
    assert proofs == [
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, True, False),
        (torch.float16, True, False),
    ]


def test_a_step_under_a_mode_is_computed_with_its_logits_and_the_next_one_is_compared(
    clean_registry: Registry,
) -> None:
    model = llama()
    expected = step(model)
    kernelize_layers(model)
    with FlopCounterMode(display=False):
        found = step(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    proofs = [b.proof for b in clean_registry.bindings if b.kernel == "causal_lm_loss"]
    assert proofs == ["unproven"]
    step(model)
    proofs = [b.proof for b in clean_registry.bindings if b.kernel == "causal_lm_loss"]
    assert any(proof.startswith("proven") for proof in proofs)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_a_step_that_is_compiled_as_a_whole_is_proven_before_it_is_traced(
    make: Callable[[], nn.Module], proofs: list[tuple[torch.dtype, bool, bool]]
) -> None:
    model = make()
    tokens = ids()
    expected = model(input_ids=tokens, labels=tokens).loss
    kernelize_layers(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: model(input_ids=tokens, labels=tokens).loss, backend="eager")
    found = compiled()
    torch._dynamo.reset()
    assert_near(found, expected, 2 * terms(VOCAB) + 500)
    assert proofs[0] == (torch.float32, True, False)
    assert [capped for *_, capped in proofs[1:]] == ([True] if make is gemma2 else [])


def test_a_wrong_loss_is_left_out_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    tokens = ids()
    expected = model(input_ids=tokens, labels=tokens).loss
    plant(monkeypatch, scaled)
    kernelize_layers(model)
    torch._dynamo.reset()
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        found = torch.compile(lambda: model(input_ids=tokens, labels=tokens).loss, backend="eager")()
    torch._dynamo.reset()
    assert_near(found, expected, 2 * terms(VOCAB) + 500)


def test_a_head_that_no_model_reports_for_is_taken_as_verified() -> None:
    head = torch.nn.Linear(WIDTH, VOCAB)
    assert loss_verified(torch.nn.Identity(), head, 8)
    assert softcap_verified(head.weight, head.bias, 8)
    assert runtime.of(Verifications).outcomes == {}


def test_an_outcome_with_gradients_holds_without_them_and_not_the_other_way_round() -> None:
    kind = HeadType(torch.float32, torch.device("cpu"), torch.Size((VOCAB, WIDTH)), False)
    verifications = Verifications()
    verifications.outcomes[kind, False, False] = True
    assert verifications.known(kind, softcapped=False) is None
    with torch.no_grad():
        assert verifications.known(kind, softcapped=False) is True
    verifications.outcomes = {(kind, False, True): True}
    with torch.no_grad():
        assert verifications.known(kind, softcapped=False) is True
        assert verifications.known(kind, softcapped=True) is None


def test_the_report_names_the_op_of_the_kernel(clean_registry: Registry) -> None:
    kernelize_layers(llama())
    sources = {binding.target.partition(":")[2]: binding.source for binding in clean_registry.bindings}
    assert sources == {"LlamaForCausalLM": "embedded causal_lm_loss"}


def test_what_defers_is_part_of_the_version_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Path(cache_key.__file__).parent.parent
    for room in ("ops", "proof", "deferred"):
        shutil.copytree(package / room, tmp_path / room)
    shutil.copy(package / "codegen.py", tmp_path)
    monkeypatch.setattr(cache_key, "PACKAGE", tmp_path)

    def versions() -> tuple[str | None, ...]:
        cache_key.kernel_version.cache_clear()
        return tuple(cache_key.kernel_version(op) for op in ("causal_lm_loss", "rms_norm"))

    before = versions()
    with (tmp_path / "deferred" / "functions.py").open("a") as file:
        file.write("# changed\n")
    after = versions()
    cache_key.kernel_version.cache_clear()
    assert before[0] != after[0]
    assert before[1] == after[1]
