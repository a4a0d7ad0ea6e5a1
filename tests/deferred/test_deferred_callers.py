"""Deferred logits in the hands of those who call models: trainers, accelerate, parallel wrappers."""

from __future__ import annotations

import multiprocessing
import socket

import numpy
import pytest
import torch
import torch.nn.functional as F
from causal_models import causal_model, deferring, tokens_and_labels
from memory import peak_bytes
from rounding import rounding_bound

transformers = pytest.importorskip("transformers")

from twinkle.deferred.logits import DeferredLogits  # noqa: E402
from twinkle.ops.causal_lm_loss import chunks  # noqa: E402
from twinkle.ops.plain import at_every_size  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB = 64


def build(family="llama", **more):
    return causal_model(family, **{"vocab_size": VOCAB, "max_position_embeddings": 128, **more})


def batch(rows=2, tokens=12):
    return tokens_and_labels(VOCAB, rows, tokens)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def both(run):
    """What a run gives with and without deferred logits."""
    return run(deferring(build())), run(build())


# Ten products over 8 to 64 terms, there and back.
SAME = 2 * rounding_bound(torch.float32, 600)


def assert_close(found, expected, bound=SAME):
    assert ((found - expected).norm() / expected.norm()).item() < bound


# -- transformers.Trainer -------------------------------------------------------------------------


def trained(model, directory, **options):
    pytest.importorskip("accelerate")
    arguments = {
        key: options.pop(key) for key in list(options) if key in ("compute_metrics", "metrics_input")
    }
    shrink = arguments.pop("metrics_input", None)
    given = transformers.TrainingArguments(
        str(directory),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = [{k: v[0] for k, v in batch(rows=1).items()} for _ in range(4)]
    trainer = transformers.Trainer(
        model, given, train_dataset=rows, eval_dataset=rows, preprocess_logits_for_metrics=shrink, **arguments
    )
    loss = trainer.train().training_loss
    shown = trainer.evaluate()
    return loss, shown["eval_loss"], shown.get("eval_accuracy", 0.0)


def test_trainer_shrinks_logits_before_it_gathers_them(tmp_path):
    seen = []

    def shrink(logits, labels):
        seen.append(isinstance(logits, DeferredLogits) and logits.is_deferred)
        return logits.argmax(-1)

    def metrics(prediction):
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    ours, expected = both(
        lambda model: trained(model, tmp_path, compute_metrics=metrics, metrics_input=shrink)
    )
    assert ours == pytest.approx(expected, rel=1e-4)
    assert seen[0]


def test_trainer_smooths_labels(tmp_path):
    ours, expected = both(lambda model: trained(model, tmp_path, label_smoothing_factor=0.1))
    assert ours == pytest.approx(expected, rel=1e-4)


def test_trainer_in_bfloat16_converts_outputs_to_float32(tmp_path):
    ours, expected = both(lambda model: trained(model, tmp_path, bf16=True, gradient_checkpointing=True))
    assert ours == pytest.approx(expected, rel=1e-2)


# -- accelerate -----------------------------------------------------------------------------------


def test_accelerate_prepares_gathers_and_converts():
    accelerate = pytest.importorskip("accelerate")

    def run(model):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        output = model(**batch())
        accelerator.backward(output.loss)
        optimizer.step()
        gathered = accelerator.gather_for_metrics((output.logits, batch()["labels"]))[0]
        assert gathered.dtype == torch.float32
        return torch.cat([gathered.detach().flatten(), gradients(model)])

    assert_close(*both(run), bound=2e-2)


def test_accelerate_leaves_deferred_logits_deferred_when_it_casts():
    accelerate = pytest.importorskip("accelerate")
    model = deferring(build())
    output = accelerate.utils.convert_outputs_to_fp32(model.forward)(**batch())
    assert type(output.logits) is DeferredLogits
    assert output.logits.is_deferred


# -- torch ----------------------------------------------------------------------------------------


def test_functional_call():
    def run(model):
        weights = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
        output = torch.func.functional_call(model, weights, (), batch())
        output.loss.backward()
        return torch.cat([output.logits.detach().flatten(), *(w.grad.flatten() for w in weights.values())])

    assert_close(*both(run))


def test_generate_while_training():
    def run(model):
        model.train()
        ids = batch()["input_ids"]
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        model(**batch()).loss.backward()
        again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        return torch.cat([made.flatten().float(), again.flatten().float(), gradients(model)])

    assert_close(*both(run))


def test_own_loss_without_labels():
    def run(model):
        logits = model(batch()["input_ids"]).logits
        assert type(logits) is torch.Tensor
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch()["labels"][:, 1:].reshape(-1)).backward()
        return gradients(model)

    assert_close(*both(run))


LOOKS = {
    "slice": lambda z: z[:, -1, :5],
    "argmax": lambda z: z.argmax(-1),
    "float": lambda z: z.float(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "array": lambda z: torch.from_numpy(numpy.asarray(z.detach())),
    "softmax": lambda z: torch.softmax(z, -1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "gather": lambda z: z.log_softmax(-1).gather(-1, batch()["input_ids"][..., None]),
    "topk": lambda z: z.topk(3).values,
    "comparison": lambda z: z == z.max(),
    "equality": lambda z: torch.tensor(torch.equal(z, z.clone())),
    "largest": lambda z: z.max(-1).values,
    "stack": lambda z: torch.stack([z, z]),
    "iteration": lambda z: torch.stack([row[0] for row in z]),
    "negation": lambda z: -z,
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "entropy": lambda z: torch.distributions.Categorical(logits=z).entropy(),
    "new": lambda z: z.new_zeros(2) + z.sum(),
    "permute": lambda z: z.permute(0, 2, 1),
    "len": lambda z: torch.tensor([len(z), z.shape[1], z.size(2), z.numel()]),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_of_a_model_can_be_looked_at(look, mode):
    def run(model):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            logits = model(**batch()).logits
        assert isinstance(logits, torch.Tensor)
        return LOOKS[look](logits).detach().double()

    ours, expected = both(run)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected)


# -- several processes ----------------------------------------------------------------------------


WRAPPERS = ("ddp", "fsdp1", "fsdp2", "fsdp2, head by itself")


def _parallel(rank, port, results):
    import os

    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        with at_every_size():
            results.put(
                {kind: [_wrapped_step(rank, kind, defer) for defer in (True, False)] for kind in WRAPPERS}
            )
    finally:
        dist.destroy_process_group()


def _wrapped_step(rank, kind, defer):
    model = deferring(build()) if defer else build()
    wrapped = _wrap(model, kind)
    output = wrapped(**{key: value[rank : rank + 1] for key, value in batch().items()})
    output.loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.grad is not None]
    full = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    kept = type(output.logits) is DeferredLogits
    flat = torch.cat([*(g.flatten() for g in full), output.logits.detach().flatten()])
    return output.loss.item(), flat.tolist(), kept


def _wrap(model, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if kind == "fsdp1":  # it frees the weights after the backward
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if kind == "fsdp2, head by itself":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def steps_of_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_parallel, args=(n, port, results)) for n in range(2)]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=250) for _ in processes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAPPERS)
def test_two_processes(steps_of_two_processes, kind):
    for found in steps_of_two_processes:
        ours, expected = found[kind]
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        assert_close(torch.tensor(ours[1]), torch.tensor(expected[1]))
        # A head that is sharded by itself has hooks that gather its weight for its forward alone.
        assert ours[2] == (kind != "fsdp2, head by itself")


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_step_of_a_model_never_holds_the_logits(monkeypatch, family, dtype):
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, *_, **__: min(rows, 16))
    vocab, tokens = 20000, 120
    softcap = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}

    def step(model):
        ids = torch.arange(tokens)[None] + 5
        model(input_ids=ids, labels=ids).loss.backward()

    model = deferring(build(family, vocab_size=vocab, **softcap).to(dtype))
    plain = build(family, vocab_size=vocab, **softcap).to(dtype)
    step(model)
    model.zero_grad()
    step(plain)
    plain.zero_grad()
    logits = tokens * vocab * 4
    # Gradients of head and embedding, the sum of the former in float32, and what a chunk needs.
    assert peak_bytes(lambda: step(model)) < 3 * vocab * 16 * 4 + 16 * vocab * 4 * 6 < 2 * logits
    assert peak_bytes(lambda: step(plain)) > 3 * logits
