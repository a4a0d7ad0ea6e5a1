"""Deferred logits in models of transformers: the same losses and gradients, logits that still work."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from causal_models import causal_model, deferring, tokens_and_labels
from rounding import rounding_bound

transformers = pytest.importorskip("transformers")

from twinkle.deferred import forward  # noqa: E402
from twinkle.deferred.install import install, reason_against, uninstall  # noqa: E402
from twinkle.deferred.logits import DeferredLogits  # noqa: E402
from twinkle.match.structure import recognise  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
OPERATIONS = 1000
"""Behind a number of a model and its gradients: 16 products over 8 to 99 terms, there and back."""
SAME = 2 * rounding_bound(torch.float32, OPERATIONS)
PLAIN = (
    "llama mistral qwen2 qwen3 gemma gemma3_text phi phi3 gpt2 gpt_neox opt olmo olmo2 stablelm starcoder2 "
    "smollm3 nemotron glm helium exaone4 persimmon"
)
FAMILIES: dict[str, dict[str, object]] = {
    **{name: {} for name in PLAIN.split()},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def build(family="llama", **more):
    return causal_model(family, **{**SMALL, **FAMILIES.get(family, {}), **more})


def batch(rows=2, tokens=12):
    return tokens_and_labels(99, rows, tokens)


def step(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return output, output.loss.detach().float(), gradients


def distance(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_same_loss_and_gradients(family):
    model = build(family)
    inputs = batch()
    before, loss, gradients = step(model, **inputs)
    logits = before.logits.detach().clone()
    rounded = copy.deepcopy(model).bfloat16()
    exact = [t.clone() for t in step(copy.deepcopy(rounded).float(), **inputs)[1:]]
    plain = [t.clone() for t in step(rounded, **inputs)[1:]]

    output, our_loss, our_gradients = step(deferring(model), **inputs)
    assert output.logits.is_deferred
    assert distance(our_loss, loss) < SAME
    assert distance(our_gradients, gradients) < SAME
    assert torch.equal(output.logits.detach() + 0, logits)

    _, *ours = step(deferring(rounded), **inputs)
    for found, other, right in zip(ours, plain, exact, strict=True):
        # One number may be right by luck.
        assert distance(found, right) <= 2 * distance(other, right) + rounding_bound(torch.bfloat16, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": True},
        {"ignore_index": 5},
    ],
    ids=str,
)
def test_options_of_the_loss(family, options):
    model, inputs = build(family), batch()
    if "shift_labels" in options:
        options = {"shift_labels": torch.roll(inputs["labels"], -1, 1)}
    if "ignore_index" in options:
        inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 5)
    _, loss, gradients = step(model, **inputs, **options)
    output, our_loss, our_gradients = step(deferring(model), **inputs, **options)
    assert output.logits.is_deferred
    assert distance(our_loss, loss) < SAME
    assert distance(our_gradients, gradients) < SAME


def test_batch_of_ignored_labels():
    model, inputs = build(), batch()
    inputs["labels"].fill_(-100)
    _, loss, gradients = step(model, **inputs)
    _, our_loss, our_gradients = step(deferring(model), **inputs)
    assert loss.isnan()
    assert our_loss.isnan()
    assert torch.equal(gradients, our_gradients)


def test_accumulated_gradients():
    model, inputs = build(), batch(rows=4)

    def accumulate():
        model.zero_grad()
        for part in range(4):
            loss = model(**{k: v[part : part + 1] for k, v in inputs.items()}, num_items_in_batch=40).loss
            (loss / 2).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = accumulate()
    deferring(model)
    assert distance(accumulate(), expected) < SAME


def test_tied_weights():
    model, inputs = build(tie_word_embeddings=True), batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, _, gradients = step(model, **inputs)
    assert distance(step(deferring(model), **inputs)[2], gradients) < SAME


def test_gradient_checkpointing():
    model, inputs = build().train(), batch()
    _, _, gradients = step(model, **inputs)
    deferring(model).gradient_checkpointing_enable()
    assert distance(step(model, **inputs)[2], gradients) < SAME


def test_autocast():
    model, inputs = build(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss, gradients = step(model, **inputs)
        output, our_loss, our_gradients = step(deferring(model), **inputs)
    assert output.logits.is_deferred
    assert output.logits.dtype == torch.bfloat16
    assert distance(our_loss, loss) < rounding_bound(torch.bfloat16, 3)
    assert distance(our_gradients, gradients) < rounding_bound(torch.bfloat16, 8)


def test_a_user_loss_on_the_logits():
    model, inputs = build(), batch()

    def run():
        model.zero_grad()
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 99), inputs["labels"][:, 1:].reshape(-1)
        )
        (loss + 0.1 * logits.logsumexp(-1).pow(2).mean()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = run()
    deferring(model)
    assert distance(run(), expected) < SAME


def test_labels_given_by_position():
    model, inputs = build(), batch()
    deferring(model)
    output = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    assert output.logits.is_deferred


def test_without_labels_logits_are_plain():
    model = deferring(build())
    output = model(batch()["input_ids"])
    assert type(output.logits) is torch.Tensor


def test_generate_is_the_same():
    model, inputs = build().eval(), batch()
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(
        deferring(model).generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), expected
    )


def test_evaluation_with_labels():
    model, inputs = build().eval(), batch()
    with torch.no_grad():
        expected = model(**inputs)
        output = deferring(model)(**inputs)
    assert not output.logits.requires_grad
    assert torch.equal(output.logits.argmax(-1), expected.logits.argmax(-1))
    assert output.logits.is_deferred
    assert (output.logits.numpy() == expected.logits.numpy()).all()
    assert distance(output.loss, expected.loss) < SAME


def test_logits_read_after_the_optimizer_are_those_of_the_step():
    model, inputs = build(), batch()
    deferring(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expected = model(input_ids=inputs["input_ids"]).logits.detach().clone()
    output = model(**inputs)
    output.loss.backward()
    optimizer.step()
    assert torch.equal(output.logits.detach(), expected)
    assert not torch.equal(model(input_ids=inputs["input_ids"]).logits, expected)


def test_two_models_and_uninstall():
    model, other, inputs = build(), build(), batch()
    made = install(model, recognise(type(model)))
    assert type(other(**inputs).logits) is torch.Tensor
    uninstall(made)
    assert type(model(**inputs).logits) is torch.Tensor
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.lm_head) is torch.nn.Linear


def test_copies_and_pickles():
    # A family without functions that `kernels` decorates: with those, no model can be pickled.
    model, inputs = build("gpt2"), batch()
    expected = step(deferring(model), **inputs)[2]
    assert distance(step(copy.deepcopy(model), **inputs)[2], expected) < SAME
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is transformers.GPT2LMHeadModel
    assert distance(step(loaded, **inputs)[2], expected) < SAME


def test_a_model_built_on_meta_defers_when_it_has_weights(tmp_path):
    build().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = deferring(build())
    model.load_state_dict(transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict(), assign=True)
    model.model.rotary_emb = build().model.rotary_emb  # its buffers are not in the state
    expected = step(build(), **batch())[2]
    output, _, gradients = step(model, **batch())
    assert type(output.logits) is DeferredLogits
    assert distance(gradients, expected) < SAME


def test_without_recognition_the_output_embeddings_are_the_head():
    model = build()
    assert install(model).head == "lm_head"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: setattr(m.lm_head, "forward", m.lm_head.forward), "wrapped"),
        (lambda m: setattr(m.lm_head.weight, "ds_id", 1), "ZeRO-3"),
        (lambda m: setattr(m, "lm_head", torch.nn.Sequential(m.lm_head)), "forward of its own"),
    ],
    ids=["hooks", "wrapped", "zero3", "other"],
)
def test_head_that_is_left_alone(spoil, text):
    model = build()
    spoil(model)
    assert text in reason_against(model.lm_head)
    assert text in install(model, recognise(transformers.LlamaForCausalLM))


def test_head_that_gets_hooks_later_computes_logits():
    model, inputs = deferring(build()), batch()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert type(model(**inputs).logits) is torch.Tensor


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["off the head", "on the head"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_peft(targets, late):
    peft = pytest.importorskip("peft")
    inputs = batch()

    def tune(defer):
        torch.manual_seed(0)
        model = build()
        if defer and not late:
            deferring(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
        if defer and late:
            made = install(model, recognise(transformers.LlamaForCausalLM))
            assert isinstance(made, str) == ("lm_head" in targets)
        return step(wrapped, **inputs)

    _, loss, gradients = tune(False)
    output, our_loss, our_gradients = tune(True)
    assert isinstance(output.logits, DeferredLogits) == ("lm_head" not in targets)
    assert distance(our_loss, loss) < SAME
    assert distance(our_gradients, gradients) < SAME


@pytest.mark.slow
def test_trainer_trains_and_computes_metrics(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{k: v[0] for k, v in batch(rows=1).items()} for _ in range(4)]

    def metrics(prediction):
        shown = prediction.predictions.argmax(-1)[:, :-1]
        return {"accuracy": float((shown == prediction.label_ids[:, 1:]).mean())}

    def train(defer):
        model = build()
        if defer:
            deferring(model)
        options = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, options, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
        )
        loss = trainer.train().training_loss
        return loss, trainer.evaluate(), torch.cat([p.detach().flatten() for p in model.parameters()])

    loss, shown, weights = train(False)
    our_loss, our_shown, our_weights = train(True)
    assert our_loss == pytest.approx(loss, rel=1e-4)
    assert our_shown["eval_accuracy"] == shown["eval_accuracy"]
    assert our_shown["eval_loss"] == pytest.approx(shown["eval_loss"], rel=1e-3)
    assert distance(our_weights, weights) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_counts_labels_ahead_and_leaves_rows_out(monkeypatch):
    monkeypatch.setattr(forward, "LEAST_COUNTED", 0)
    model, inputs = build().cuda().bfloat16(), batch(rows=4, tokens=60)
    inputs = {k: v.cuda() for k, v in inputs.items()}
    inputs["labels"][:, :40] = -100
    _, loss, gradients = step(model, **inputs)
    output, our_loss, our_gradients = step(deferring(model), **inputs)
    assert output.logits.node.head.counted.bound(inputs["labels"], -100) == 80
    assert distance(our_loss, loss) < rounding_bound(torch.bfloat16, 3)
    assert distance(our_gradients, gradients) < rounding_bound(torch.bfloat16, 8)
