"""Small models of transformers whose loss is no causal language model's, and a batch for each."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FAMILIES", "VOCAB", "loss_model"]

VOCAB = 99
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
}
_BERT = {**_TEXT, "type_vocab_size": 2}
_SPEECH = {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64}
_LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 32}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 20,
}
_CONFORMER = {
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dim_head": 8,
    "input_dim": 16,
    "output_dim": 11,
    "feedforward_mult": 2,
    "context_size": 8,
    "max_pos_emb": 8,
    "conv_kernel_size": 3,
}
_PROJECTOR = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_hidden_size": 16,
}
_DROPOUTS = ("dropout", "layerdrop", "pdrop", "dropout_rate", "dropout_prob")

# By `model_type`: the name of the class, the configuration, and the kind of the input.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "t5": ("T5ForConditionalGeneration", _T5, "text"),
    "mt5": ("MT5ForConditionalGeneration", _T5, "text"),
    "bart": ("BartForConditionalGeneration", _BART, "text"),
    "mbart": ("MBartForConditionalGeneration", _BART, "text"),
    "pegasus": ("PegasusForConditionalGeneration", _BART, "text"),
    "marian": ("MarianMTModel", {**_BART, "decoder_vocab_size": VOCAB, "pad_token_id": 1}, "text"),
    "m2m_100": ("M2M100ForConditionalGeneration", _BART, "text"),
    "led": (
        "LEDForConditionalGeneration",
        {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 64},
        "text",
    ),
    "seamless_m4t": (
        "SeamlessM4TForTextToText",
        {**_BART, "hidden_size": 32, "speech_encoder_layers": 1, "decoder_start_token_id": 2},
        "text",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SPEECH, "pad_token_id": 0, "suppress_tokens": []},
        "whisper",
    ),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        {**_SPEECH, "input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 64},
        "speech",
    ),
    "bert": ("BertForMaskedLM", _BERT, "masked"),
    "bert with two heads": ("BertForPreTraining", _BERT, "two"),
    "roberta": ("RobertaForMaskedLM", {**_BERT, "pad_token_id": 1}, "masked"),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": VOCAB},
        "masked",
    ),
    "albert": ("AlbertForMaskedLM", {**_BERT, "embedding_size": 16}, "masked"),
    "electra": ("ElectraForMaskedLM", {**_BERT, "embedding_size": 16}, "masked"),
    "modernbert": ("ModernBertForMaskedLM", {**_TEXT, "pad_token_id": 0}, "masked"),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {"text_config": {**_TEXT, **_LLAMA4}, "vision_config": _VISION},
        "inner",
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {"audio_config": _AUDIO, "text_config": {**_TEXT, "model_type": "qwen2"}, "audio_token_index": 98},
        "inner",
    ),
    "granite_speech": (
        "GraniteSpeechForConditionalGeneration",
        {
            "encoder_config": _CONFORMER,
            "projector_config": _PROJECTOR,
            "text_config": {**_TEXT, "model_type": "granite", "logits_scaling": 4.0},
            "audio_token_index": 98,
            "downsample_rate": 2,
            "window_size": 4,
        },
        "inner",
    ),
}


def loss_model(family: str, vocab: int = VOCAB, tokens: int = 12) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, the same at each call, without dropout; and a batch with labels.

    Args:
        family: One of :data:`FAMILIES`.
        vocab: Of its text, with more than :data:`VOCAB` for those that have no model inside.
        tokens: Of each of the two rows of a text.
    """
    import transformers

    name, sizes, kind = FAMILIES[family]
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **sizes}
    ids |= {key: vocab for key in ("vocab_size", "decoder_vocab_size") if key in ids}
    config = transformers.AutoConfig.for_model(family.partition(" ")[0], **ids)
    for key, value in vars(config).items():
        if key.endswith(_DROPOUTS) and isinstance(value, float):
            setattr(config, key, 0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).train()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name == "final_logits_bias":
            torch.nn.init.normal_(buffer)
    return model, _batch(kind, tokens)


def _batch(kind: str, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (2, length), generator=generator)
    labels = torch.randint(3, VOCAB, (2, length - 2), generator=generator)
    labels[0, 7:] = -100
    if kind == "text":
        return {"input_ids": tokens, "labels": labels}
    if kind == "inner":
        mask = torch.ones_like(tokens)
        mask[1, -3:] = 0
        return {
            "input_ids": tokens.clamp(max=90),
            "labels": tokens.where(mask > 0, -100),
            "attention_mask": mask,
        }
    if kind in ("masked", "two"):
        picked = torch.rand(tokens.shape, generator=generator) < 0.15
        picked[0, 3] = True
        given = {"input_ids": tokens.masked_fill(picked, 3), "labels": tokens.where(picked, -100)}
        return given if kind == "masked" else {**given, "next_sentence_label": torch.tensor([0, 1])}
    frames = torch.randn(2, 40, 16, generator=generator)
    if kind == "whisper":
        return {"input_features": frames.transpose(1, 2).contiguous(), "labels": labels}
    return {"input_features": frames, "labels": labels}
