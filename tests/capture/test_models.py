"""Models of transformers whose blocks are replayed: training, evaluation, and the caches that come out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .emulated import put_in

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SEQ = {
    "d_model": 32,
    "vocab_size": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
IMAGE = {"image_size": 16, "patch_size": 8, **{name: SMALL[name] for name in list(SMALL)[:4]}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**SMALL, "attention_dropout": 0.1}),
    "Qwen3": ("Qwen3ForCausalLM", {**SMALL, "head_dim": 8}),
    "Gemma3Text": (
        "Gemma3ForCausalLM",
        {**SMALL, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "Mistral": ("MistralForCausalLM", {**SMALL, "sliding_window": 4}),
    "Phi3": ("Phi3ForCausalLM", {**SMALL, "resid_pdrop": 0.1}),
    "GPTNeoX": ("GPTNeoXForCausalLM", {**SMALL, "hidden_dropout": 0.1}),
    "GPT2": ("GPT2LMHeadModel", GPT),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bert": ("BertForMaskedLM", SMALL),
    "Roberta": ("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 70}),
    "ModernBert": ("ModernBertForMaskedLM", SMALL),
    "T5": ("T5ForConditionalGeneration", T5),
    "Bart": ("BartForConditionalGeneration", SEQ),
    "Pegasus": ("PegasusForConditionalGeneration", SEQ),
    "ViT": ("ViTForImageClassification", IMAGE),
    "Dinov2": ("Dinov2ForImageClassification", IMAGE),
}


def built(family: str) -> tuple[Any, Any, list[Any]]:
    """A plain model, the same with captured blocks, and the stacks of these."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    plain = getattr(transformers, name)(config)
    ours = copy.deepcopy(plain)
    lists, inside = [], set()
    for name, one in ours.named_modules():
        outer = any(name.startswith(f"{other}.") for other in inside)
        if isinstance(one, nn.ModuleList) and len(one) > 1 and len(list(one[0].modules())) > 3 and not outer:
            inside.add(name)
            lists.append(one)
    return plain, ours, [put_in(blocks) for blocks in lists]


def given(model: Any) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(1)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, torch.tensor([0, 1])
    ids = torch.randint(2, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}, ids


def trained(model: Any) -> list[Tensor]:
    inputs, labels = given(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(2)
    seen = []
    for _ in range(4):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@torch.no_grad()
def evaluated(model: Any) -> list[Tensor]:
    """Logits, and those of a token more, which reads the cache of the forward before."""
    inputs, ids = given(model)
    model.eval()
    seen = []
    for _ in range(4):
        made = dict(inputs)
        if model.config.is_encoder_decoder:
            made["decoder_input_ids"] = ids
        out = model(**made)
        seen.append(out.logits)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            continue
        if model.config.is_encoder_decoder:
            more = model(**inputs, decoder_input_ids=ids[:, :1], past_key_values=cache)
        else:
            more = model(input_ids=ids[:, :1], past_key_values=cache)
        seen += [more.logits, torch.tensor(cache.get_seq_length())]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computes(family: str) -> None:
    plain, ours, stacks = built(family)
    for work in (trained, evaluated):
        found, expected = work(ours), work(plain)
        assert len(found) == len(expected)
        if plain.config.is_encoder_decoder:
            # Gradients of what all blocks are given are summed block by block, where it was use by use.
            same = [torch.allclose(*both, 1e-4, 1e-5) for both in zip(found, expected, strict=True)]
        else:
            same = [torch.equal(*both) for both in zip(found, expected, strict=True)]
        assert all(same)
    for stack in stacks:
        blocks = stack.record.blocks
        assert stack.record.replays >= 4 * blocks, stack.record.calls
        assert not any("cannot be recorded" in reason for reason in stack.record.calls), stack.record.calls


def test_a_cache_with_tokens_is_left_to_the_block() -> None:
    plain, ours, (stack,) = built("Llama")
    ids = torch.arange(2, 10)[None]
    found = []
    for model in (plain, ours):
        model.eval()
        seen = []
        with torch.no_grad():
            for _ in range(5):
                cache = model(input_ids=ids).past_key_values
                for step in range(3):
                    out = model(input_ids=ids[:, step : step + 1], past_key_values=cache)
                    seen.append(out.logits)
                seen.append(torch.tensor(cache.get_seq_length()))
        found.append(seen)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert stack.record.calls["its cache holds tokens already"] == 5 * 3 * 3
    assert stack.record.replays == 3 * 3
    assert len(stack.record.signatures) == 1


def generated(model: Any, arguments: dict[str, Any]) -> Tensor:
    """Tokens of four generations."""
    ids = torch.arange(2, 10)[None].repeat(2, 1)
    torch.manual_seed(0)
    return torch.cat([model.eval().generate(ids, max_new_tokens=5, **arguments) for _ in range(4)])


@torch.no_grad()
def looked_at(model: Any) -> list[Tensor]:
    """Hidden states of a call that asks for them after others that do not, and the logits of one more."""
    inputs, _ = given(model)
    model.eval()
    for _ in range(4):
        model(**inputs)
    out = model(**inputs, output_hidden_states=True)
    return [*out.hidden_states, model(**inputs).logits]


def adapted(model: Any) -> list[Tensor]:
    """What is seen in training with adapters that come after some steps."""
    peft = pytest.importorskip("peft")
    trained(model)
    torch.manual_seed(3)
    return trained(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])))


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_generate(arguments: dict[str, Any]) -> None:
    plain, ours, _ = built("Llama")
    assert torch.equal(generated(ours, arguments), generated(plain, arguments))


@pytest.mark.parametrize("work", [looked_at, adapted])
def test_what_is_asked_for_later(work: Any) -> None:
    plain, ours, _ = built("Llama")
    assert all(map(torch.equal, work(ours), work(plain)))
