"""The tests that transformers has for every model, over tiny models of families that Twinkle has kernels for.

The source distribution of transformers holds these tests (``tests/test_modeling_common.py``) and leaves out
the families' own files, which only give them a small configuration. `benchmarks/suites_setup.py` copies this
file to ``tests/models/test_families.py`` there.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any

import transformers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 32 and not 37: torch's grouped_mm wants strides of 16 bytes.
_MIXTURE = {
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# The loop over experts is what Twinkle replaces on a CPU; grouped_mm, the default, stays there.
_LOOP = {"experts_implementation": "eager"}
_HEAD = {"head_dim": 8}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": _HEAD,
    "Gemma": _HEAD,
    "Gemma2": {**_HEAD, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**_HEAD, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "Mixtral": {**_MIXTURE, **_LOOP},
    "Qwen3Moe": {**_MIXTURE, **_HEAD, **_LOOP},
    "GptOss": {**_MIXTURE, **_HEAD},
    "Olmo2": {},
    "Cohere": {},
    "Phi3": {},
    "Granite": {},
    "Glm4": _HEAD,
    "StableLm": {},
    "SmolLM3": {},
}
_HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")


class _Sizes:
    """What the tests ask of the ``model_tester`` of a family."""

    batch_size, seq_length, num_choices, num_labels, is_training = 3, 7, 4, 3, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, config_class: Any, extra: dict[str, Any]) -> None:
        self.config_class, self.extra = config_class, extra

    def get_config(self) -> Any:
        return self.config_class(**copy.deepcopy({**_SIZES, **self.extra}))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": random_attention_mask(ids.shape)}


def _tests(family: str, extra: dict[str, Any]) -> type:
    config_class = getattr(transformers, f"{family}Config")
    names = dict.fromkeys(stem + head for head in _HEADS for stem in (family, family.removesuffix("Text")))
    found = (getattr(transformers, name, None) for name in names)

    def set_up(self: Any) -> None:
        self.model_tester = _Sizes(config_class, extra)

    members = {
        "all_model_classes": tuple(
            one for one in found if getattr(one, "config_class", None) is config_class
        ),
        "test_all_params_have_gradient": "num_experts" not in extra,  # An expert may get no token.
        "setUp": set_up,
        "__module__": __name__,
    }
    return type(f"{family}Test", (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), members)


for _family, _extra in _FAMILIES.items():
    globals()[f"{_family}Test"] = _tests(_family, _extra)
