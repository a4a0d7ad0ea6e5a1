"""TRL's SFTTrainer logs and learns the same (TRL 0.29 reads the logits, 1.16 has a head of its own)."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from twinkle.deferred.install import install  # noqa: E402
from twinkle.match.structure import recognise  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is on a dog", "to sit is to ran"]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<unk>", "<eos>", *sorted({word for text in TEXTS for word in text.split()})]
    plain = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def build():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def trained(model, directory, **options):
    options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2, **options}
    given = trl.SFTConfig(
        str(directory),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_length=16,
        **options,
    )
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        model, given, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )
    trainer.train()
    trainer.evaluate()
    return [
        {k: v for k, v in entry.items() if k.endswith(("loss", "accuracy", "entropy", "grad_norm"))}
        for entry in trainer.state.log_history
    ], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "max_steps": 1},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": False},
        {"loss_type": "dft"},
    ],
    ids=["plain", "packed", "accumulated", "dft"],
)
def test_sft_trainer_logs_and_learns_the_same(tmp_path, options):
    model = build()
    made = install(model, recognise(type(model)))
    assert not isinstance(made, str), made
    logged, weights = trained(model, tmp_path, **options)
    expected_log, expected = trained(build(), tmp_path, **options)
    assert len(logged) == len(expected_log)
    for found, right in zip(logged, expected_log, strict=True):
        assert found == pytest.approx(right, rel=1e-3)
    assert ((weights - expected).norm() / expected.norm()).item() < 1e-4
