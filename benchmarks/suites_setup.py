"""Prepare the suites of transformers and PEFT, unpacked from their source distributions, to run offline.

    pip download --no-deps --no-binary :all: -d sources transformers==5.22.2 peft accelerate liger-kernel
    (cd sources; for each in *.tar.gz; do tar xf $each; done)
    python benchmarks/suites_setup.py sources

Adds what the distributions leave out of their ``tests``, and makes ``sources/hf``, a cache of the Hub with
tiny random models under the names that PEFT's tests load. Run the suites with ``HF_HOME=sources/hf``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_COMMIT = "0" * 39 + "1"
_VOCABULARY = 512
_IDS = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
_DECODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **_IDS,
}
_HEAD = {**_DECODER, "head_dim": 8}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4}
_PEFT, _HF, _TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
# PEFT's own file is not in its distribution. Its helper would go online for the first use of each model.
_CONFTEST = '''"""Every model is in the cache: none is looked up online first."""

from . import testing_utils


class _Known(dict):
    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return 1


testing_utils._HUB_MODEL_ACCESSES = _Known()


def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)
'''


def _configs() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """The name of each model, its configuration's class and arguments, and the class that builds it."""
    causal = "AutoModelForCausalLM"

    def opt(width: int, layers: int, **more: Any) -> dict[str, Any]:
        sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width, **more}
        return {**_DECODER, **sizes, "num_hidden_layers": layers}

    def gpt(width: int, layers: int, **more: Any) -> dict[str, Any]:
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512}
        return {"vocab_size": _VOCABULARY, **sizes, **_IDS, **more}

    for owner, name in (
        (_PEFT, "tiny-random-OPTForCausalLM"),
        (_HF, "tiny-random-OPTForCausalLM"),
        (_PEFT, "tiny-random-OPTForCausalLM-extended-vocab"),
    ):
        yield owner + name, "OPTConfig", opt(16, 5), causal
    yield _PEFT + "opt-125m", "OPTConfig", opt(64, 12), causal
    yield "facebook/opt-125m", "OPTConfig", opt(64, 12), causal
    projected = opt(64, 4, word_embed_proj_dim=32, do_layer_norm_before=False)
    yield "facebook/opt-350m", "OPTConfig", projected, causal
    for name in (_PEFT + "tiny-random-gpt2", _HF + "tiny-random-gpt2", _PEFT + "tiny-random-GPT2LMHeadModel"):
        yield name, "GPT2Config", gpt(32, 5), causal
    for name in ("gpt2", "openai-community/gpt2"):
        yield name, "GPT2Config", gpt(64, 12), causal
    yield _PEFT + "tiny-random-GPTJForCausalLM", "GPTJConfig", gpt(32, 5, rotary_dim=4), causal
    neox = {**_DECODER, "hidden_size": 32}
    yield _PEFT + "tiny-random-GPTNeoXForCausalLM", "GPTNeoXConfig", neox, causal
    bloom = {"vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_IDS}
    for name in (_PEFT + "tiny-random-BloomForCausalLM", "bigscience/bloomz-560m"):
        yield name, "BloomConfig", bloom, causal
    llama = {**_DECODER, "num_key_value_heads": 4}
    for owner in (_TRL, _PEFT, _HF):
        yield owner + "tiny-random-LlamaForCausalLM", "LlamaConfig", llama, causal
    longer = {**llama, "num_hidden_layers": 6}
    yield _PEFT + "zephyr-smol_llama-100m-sft-full", "LlamaConfig", longer, causal
    tied = {**_DECODER, "tie_word_embeddings": True}
    yield _PEFT + "tiny-dummy-qwen2", "Qwen2Config", tied, causal
    yield "Qwen/Qwen2-0.5B", "Qwen2Config", tied, causal
    yield _TRL + "tiny-Qwen2ForCausalLM-2.5", "Qwen2Config", _DECODER, causal
    yield _TRL + "tiny-Qwen3ForCausalLM", "Qwen3Config", _HEAD, causal
    for name in (_TRL + "tiny-Qwen3MoeForCausalLM", _HF + "tiny-qwen3-moe"):
        yield name, "Qwen3MoeConfig", {**_HEAD, **_MIXTURE}, causal
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    yield _HF + "tiny-random-Gemma3ForCausalLM", "Gemma3TextConfig", {**_HEAD, **kinds}, causal
    yield _HF + "tiny-random-MistralForCausalLM", "MistralConfig", _DECODER, causal
    yield _HF + "Mixtral-tiny", "MixtralConfig", {**_DECODER, **_LOCAL}, causal
    oss = {**_HEAD, **_LOCAL, "num_experts_per_tok": 2}
    yield _TRL + "tiny-GptOssForCausalLM", "GptOssConfig", oss, causal
    four = {"intermediate_size_mlp": 32, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    yield _TRL + "tiny-Llama4ForCausalLM", "Llama4TextConfig", {**_HEAD, **_LOCAL, **four}, causal
    yield (
        _TRL + "tiny-LlamaForSequenceClassification-3.2",
        "LlamaConfig",
        llama,
        "AutoModelForSequenceClassification",
    )
    yield from _encoders()


def _encoders() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    encoder = {**_DECODER, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
    relative = {**encoder, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    plain, labels = "AutoModel", "AutoModelForSequenceClassification"
    for name in (_PEFT + "tiny-random-BertModel", _HF + "tiny-random-BertModel"):
        yield name, "BertConfig", encoder, plain
    yield "bert-base-uncased", "BertConfig", encoder, "AutoModelForMaskedLM"
    yield _PEFT + "tiny-random-RobertaModel", "RobertaConfig", {**encoder, "pad_token_id": 1}, plain
    yield _PEFT + "tiny-random-DebertaModel", "DebertaConfig", relative, plain
    buckets = {**relative, "position_buckets": 32}
    yield _PEFT + "tiny-random-DebertaV2Model", "DebertaV2Config", buckets, plain
    yield _PEFT + "tiny-random-BertForSequenceClassification", "BertConfig", encoder, labels
    roberta = {**encoder, "pad_token_id": 1}
    yield _PEFT + "tiny-random-RobertaForSequenceClassification", "RobertaConfig", roberta, labels
    both = "AutoModelForSeq2SeqLM"
    t5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5["decoder_start_token_id"] = 0
    for name in (
        "tiny-random-t5",
        "tiny-random-T5ForConditionalGeneration",
        "tiny-random-T5ForConditionalGeneration-calibrated",
    ):
        yield _PEFT + name, "T5Config", t5, both
    gated = {**t5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    for name in ("google/flan-t5-base", "google/flan-t5-small"):
        yield name, "T5Config", gated, both
    halves = {f"{half}_{key}": size for half in ("encoder", "decoder") for key, size in _BART_HALF.items()}
    bart = {"vocab_size": _VOCABULARY, "d_model": 32, "max_position_embeddings": 512, **halves, **_IDS}
    bart |= {"pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    yield _PEFT + "tiny-random-BartForConditionalGeneration", "BartConfig", bart, both
    clip = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        **_IDS,
    }
    clip |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    yield _PEFT + "tiny-clip-text-2", "CLIPTextConfig", clip, "CLIPTextModel"


_BART_HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
_ADAPTERS = (
    ("tiny-OPTForCausalLM-lora", "tiny-random-OPTForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("tiny_T5ForSeq2SeqLM-lora", "tiny-random-t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    (
        "tiny_OPTForSequenceClassification-lora",
        "tiny-random-OPTForCausalLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    (
        "tiny_GPT2ForTokenClassification-lora",
        "tiny-random-gpt2",
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    (
        "tiny_OPTForQuestionAnswering-lora",
        "tiny-random-OPTForCausalLM",
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    ("tiny_OPTForFeatureExtraction-lora", "tiny-random-OPTForCausalLM", "AutoModel", "FEATURE_EXTRACTION"),
    ("tiny-random-BertModel-lora", "tiny-random-BertModel", "AutoModel", "FEATURE_EXTRACTION"),
    ("opt-125m-dummy-lora", "opt-125m", "AutoModelForCausalLM", "CAUSAL_LM"),
)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special)
    tokens.train_from_iterator(["This is a test prompt. Hello world, one two three."], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names, **more)


def _folder(home: Path, name: str) -> Path:
    """The folder of a repository's only commit, in the layout of huggingface_hub's cache."""
    base = home / "hub" / ("models--" + name.replace("/", "--"))
    for each in ("refs", "blobs", f"snapshots/{_COMMIT}"):
        (base / each).mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(_COMMIT)
    return base / "snapshots" / _COMMIT


def _model(build: Callable[[], Any]) -> Any:
    import torch

    torch.manual_seed(0)
    model = build()
    # With the usual 0.02 the first rows of a random model are all but zero, a padding row is zero: tests that
    # want an adapter to change the output fail then.
    for weight in model.parameters():
        if weight.dim() > 1 and 0 < weight.std() < 0.05:
            weight.data.mul_(8)
    for one in model.modules():
        if isinstance(one, torch.nn.Embedding) and one.padding_idx is not None:
            one.weight.data[one.padding_idx] = torch.randn(one.embedding_dim) * one.weight.std()
    return model


def models(home: Path) -> None:
    """Write the models, and PEFT's adapters to some of them, to the cache at ``home``."""
    import transformers

    tokenizer = _tokenizer()
    for name, kind, sizes, builder in _configs():
        config, build = getattr(transformers, kind)(**sizes), getattr(transformers, builder)
        model = _model(lambda config=config, build=build: getattr(build, "from_config", build)(config))
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(_folder(home, name))
        tokenizer.save_pretrained(_folder(home, name))
    try:
        import peft
    except ImportError:
        return
    for name, base, builder, task in _ADAPTERS:
        model = getattr(transformers, builder).from_pretrained(_PEFT + base)
        peft.get_peft_model(model, peft.LoraConfig(task_type=task)).save_pretrained(
            _folder(home, _PEFT + name)
        )
        tokenizer.save_pretrained(_folder(home, _PEFT + name))


def tests(sources: Path) -> None:
    """Add what the tests of PEFT and transformers import and their distributions leave out."""
    for tests in sources.glob("peft-*/tests"):
        (tests / "__init__.py").touch()
        (tests / "conftest.py").write_text(_CONFTEST)
    for tests in sources.glob("transformers-*/tests"):
        for folder in (".", "models", "exporters", "generation"):
            (tests / folder).mkdir(exist_ok=True)
            (tests / folder / "__init__.py").touch()
        for file, name in (
            ("exporters/test_export.py", "Export"),
            ("generation/test_utils.py", "Generation"),
        ):
            (tests / file).write_text(f"class {name}TesterMixin:\n    pass\n")
        shutil.copy(Path(__file__).with_name("suites_families.py"), tests / "models" / "test_families.py")


def main() -> int:
    """Prepare the folder that the command line names."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    sources = Path(sys.argv[1]).resolve()
    os.environ |= {"HF_HOME": str(sources / "hf"), "HF_HUB_OFFLINE": "1"}
    tests(sources)
    models(sources / "hf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
