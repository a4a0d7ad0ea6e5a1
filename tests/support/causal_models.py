"""Small causal language models of transformers, and how their logits are deferred."""

from __future__ import annotations

from typing import Any

import torch

from twinkle.deferred.install import install
from twinkle.match.structure import recognise

__all__ = ["causal_model", "deferring", "tokens_and_labels"]

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gptj": {"rotary_dim": 4},
}
_DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"),
    "activation_dropout",
)


def causal_model(family: str = "llama", **sizes: Any) -> Any:
    """A model with random weights, the same at each call, and no dropout.

    Args:
        family: Its ``model_type``.
        sizes: Of its configuration, ``vocab_size`` among them; the rest is as small as it can be.
    """
    import transformers

    torch.manual_seed(0)
    given = {**_SMALL, **_OF_A_FAMILY.get(family, {}), **sizes}
    config = transformers.AutoConfig.for_model(family, **given)
    for name in _DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def deferring(model: Any) -> Any:
    """The model itself, whose head defers from now on."""
    made = install(model, recognise(type(model)))
    assert not isinstance(made, str), made
    return model


def tokens_and_labels(vocab: int, rows: int = 2, tokens: int = 12, *, ignored: int = 4) -> dict[str, Any]:
    """A batch, the same at each call; the first labels of its first row are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": ids, "labels": labels}
