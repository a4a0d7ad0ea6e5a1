"""Tiny models of any family, from the default configuration of its class, offline.

Every number of a configuration that is a size shrinks by what its name says it counts, equal things to
equal numbers, in the configuration and those inside it. Lists with an entry a layer keep one entry of each
kind. What a family wants besides is in `REPAIRS`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

__all__ = ["MOST_PARAMETERS", "classes", "inputs", "tiny_config", "tiny_model"]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 4, 2, 32, 512
MOST_PARAMETERS = 30_000_000
# What counts what, by name: the first that fits decides. A number below the given one stays.
_SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"^(id2label|label2id|num_labels|seed|.*rate|.*iters|max_distance)$", None),
        (r"vocab_size|_vocab$|^ngram_vocab_size_base$|codebook_size$", VOCAB),
        (r"(query_groups|kv_heads?|key_value_heads?|key_heads?)($|_)", KV_HEADS),
        (r"^(linear_num_value_heads|linear_num_heads|index_n_heads)$", HEADS),
        (r"^mamba_(n|num)_heads$", 8),
        (r"(^|_)(heads?|n_head)(_per_layer)?$", HEADS),
        (r"^qk_head_dim$", 2 * HEAD_DIM),
        (r"head_?dim$|head_size$|dim_head$|d_head$|^d_kv$|kv_channels$", HEAD_DIM),
        (r"^rotary_dim$", HEAD_DIM // 2),
        (r"experts?$|expert_num$", 4),
        (r"per_tok(en)?$|top_?k", 2),
        (r"^upsample_groups$", HIDDEN),
        (r"^(n_group|n_groups|num_groups?|num_expert_group|mamba_n_groups|mamba_ngroups|topk_group)$", 2),
        (r"^(lru_width|vision_output_dim|hidden_size_global)$", HIDDEN),
        (r"^(mamba_d_ssm|d_inner)$", 2 * HIDDEN),
        (r"intermediate|ffn|^d_ff$|dim_ff|^dff$|n_inner|mlp_dim|feed_forward|mid_dim", 2 * HIDDEN),
        (r"rank$", 16),
        (r"state(_size)?$", 16),
        (r"position|seq_len|model_max_length|^n_ctx$|context_length", 256),
        (r"window|chunk|local_attention", 16),
        (r"per_layer_input$", HEAD_DIM),
        (r"^(image_size|crop_size)$", 56),
        (
            r"hidden|d_model|n_embd|embd?_dim|embed_dim|embedding_(dim|size)|^dim$|proj_dim|(in|out)put_(dim|size)",
            HIDDEN,
        ),
    )
)
_DEPTH = re.compile(
    r"^(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_|num_hidden_)?(layers?|blocks)$|^depth$|_hidden_layers$|^num_mem_blocks$"
)
_SPECIAL = re.compile(r"token_(id|index)$|token_ids$")

_THETA = {"rope_type": "default", "rope_theta": 10000.0}
_COMPASS = {
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": _THETA, "sliding_attention": _THETA},
}
_HYBRID = ["linear_attention", "hybrid"] * 2
# What a family wants besides, by model type: values, or a function of the shrunk dictionary.
REPAIRS: dict[str, Any] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "chameleon": {"vocabulary_map": {"<image>": 500}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 500, "<|extra_200|>": 501}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_ssm": 256},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [2 * HIDDEN] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "glm5_next": {"text_config": {"index_kpool": 1}},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 32},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD_DIM, "rope_parameters": {"mrope_section": [4, 4, 4, 4]}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 2},
    "ministral": {"head_dim": HEAD_DIM},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "reformer": {"axial_pos_embds_dim": [32, 96], "axial_pos_shape": [4, 8]},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xlnet": {"d_head": HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
    },
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 32,
        "n_mamba_heads": 8,
    },
    **{
        name: {"decoder_start_token_id": 0}
        for name in ("udop", "switch_transformers", "t5", "longt5", "pop2piano")
    },
    **{
        name: {"text_config": {"rope_parameters": {"mrope_section": [4, 6, 6]}}}
        for name in (
            "glm46v",
            "glm4v",
            "glm_ocr",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}},
}


def classes() -> dict[str, str]:
    """Every class with a causal language model's loss, and its family's model type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for family in sorted(causal, key=lambda family: ("-" in family, family)):
        found.setdefault(causal[family], family)
    tables = [
        vars(modeling_auto)[name]
        for name in sorted(vars(modeling_auto))
        if re.fullmatch(r"MODEL_.*_MAPPING_NAMES", name)
    ]
    for table in tables:
        for family, names in table.items():
            for name in (names,) if isinstance(names, str) else names or ():
                if name and name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
                    found.setdefault(name, family)
    return found


def _depths(data: dict[str, Any]) -> set[int]:
    return {
        value
        for key, value in data.items()
        if _DEPTH.search(key) and isinstance(value, int) and not isinstance(value, bool) and value > 1
    }


def shrink(data: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of a configuration with small numbers in the place of large ones."""
    depths = _depths(data)
    lists = {
        key: value
        for key, value in data.items()
        if isinstance(value, list | tuple) and len(value) in depths and len(value) > 2
    }
    # One layer of each kind, where lists say the kinds; two where all are alike.
    kinds: dict[str, int] = {}
    depth = max(map(len, lists.values()), default=0)
    for at in range(depth):
        kinds.setdefault(repr([value[at] for value in lists.values() if len(value) == depth]), at)
    chosen = sorted(kinds.values())[:4] if len(kinds) > 1 else [0, 1]
    small: dict[str, Any] = {}
    used: dict[int, int] = {}
    for key, value in data.items():
        if key == "per_layer_config":
            small[key] = {
                f"{new:02d}": {
                    name: 2 * HEAD_DIM if name == "head_dim" else item for name, item in each.items()
                }
                for new, old in enumerate(chosen)
                if (each := (value or {}).get(f"{old:02d}"))
            }
        elif isinstance(value, dict):
            small[key] = _rope(value) if "rope" in key else shrink(value) if _is_config(value) else value
        elif key in lists and len(value) == depth:
            small[key] = [_number(key, value[at]) for at in chosen]
        elif key == "num_kv_shared_layers":
            small[key] = 0
        elif _SPECIAL.search(key):
            small[key] = _special(value, used)
        elif _DEPTH.search(key) and isinstance(value, int) and value > 1:
            small[key] = len(chosen) if not lists or value == depth else 2
        else:
            small[key] = _number(key, value)
    return small


def _is_config(value: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in value)


def _number(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in _SIZES:
        if pattern.search(key):
            return value if size is None else min(value, size)
    return value


def _special(value: Any, used: dict[int, int]) -> Any:
    """Distinct tokens to distinct tokens, above those that `inputs` draws."""
    if isinstance(value, list | tuple):
        return [_special(item, used) for item in value]
    if not isinstance(value, int) or value < 3:
        return value
    return used.setdefault(value, VOCAB - 1 - len(used))


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections and factors of half a rotated head."""
    made: dict[str, Any] = {}
    half = int(HEAD_DIM * (value.get("partial_rotary_factor") or 1)) // 2
    for key, item in value.items():
        if isinstance(item, dict):
            made[key] = _rope(item)
        elif key == "mrope_section" and item:
            sizes = [half * part // sum(item) for part in item]
            sizes[0] += half - sum(sizes)
            made[key] = sizes
        elif key in ("long_factor", "short_factor") and item:
            made[key] = item[:half]
        else:
            made[key] = item
    return made


def tiny_config(name: str, family: str) -> Any:
    """A small configuration for the model class of that name."""
    import transformers

    cls = getattr(transformers, name)
    config_class = cls.config_class
    data = config_class().to_dict()
    data = shrink({key: value for key, value in data.items() if key not in _DROPPED})
    for part in _parts(data):
        if "kv_lora_rank" in part and "num_key_value_heads" in part:  # latent attention: a head has its own
            part["num_key_value_heads"] = HEADS
    if "is_decoder" in data:
        data["is_decoder"] = True
    repair = REPAIRS.get(name, REPAIRS.get(family, {}))
    data = repair(data) if callable(repair) else _merged(data, repair)
    for part in _parts(data):
        for key in part:
            if "dropout" in key or key in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop"):
                part[key] = 0.0 if isinstance(part[key], float) else part[key]
        if "use_cache" in part:
            part["use_cache"] = False
    return config_class.from_dict(data)


_DROPPED = ("transformers_version", "architectures", "dtype", "_name_or_path", "torch_dtype")


def _merged(data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    made = dict(data)
    for key, value in more.items():
        inside = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = _merged(made[key], value) if inside else value
    return made


def _parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    found = [data]
    for value in data.values():
        if isinstance(value, dict) and _is_config(value):
            found += _parts(value)
    return found


def tiny_model(name: str, family: str) -> Any:
    """A model of that class on the CPU in float32, the same one every time.

    Raises:
        ValueError: It stays too large.
    """
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(tiny_config(name, family)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters from the small configuration")
    torch.manual_seed(0)
    model = cls(tiny_config(name, family)).float().train()
    with torch.no_grad():
        for parameter in model.parameters():  # norms begin as ones, and biases as zeros
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def inputs(model: Any, batch: int = 2, length: int = 32) -> dict[str, Any]:
    """Tokens and labels, and pixels where the ``forward`` of that class cannot do without."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 250, (batch, length), generator=generator)
    given = {"input_ids": tokens, "labels": tokens}
    required = [
        name
        for name, parameter in inspect.signature(type(model).forward).parameters.items()
        if parameter.default is parameter.empty
    ]
    if "pixel_values" in required:
        size = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(batch, 3, size, size, generator=generator)
    if model.config.model_type == "molmo2":
        given["mm_token_type_ids"] = torch.zeros_like(tokens)
    if "qformer_input_ids" in required:
        given["qformer_input_ids"] = tokens
    return given
