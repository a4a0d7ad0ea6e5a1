"""The stacks that models of transformers have in the tiny configurations of ``benchmarks/tiny_models.py``."""

from __future__ import annotations

EXPECTED: dict[str, dict[str, tuple[str, int]]] = {
    # decoders
    "LlamaForCausalLM": {"model.layers": ("LlamaDecoderLayer", 2)},
    "Qwen3ForCausalLM": {"model.layers": ("Qwen3DecoderLayer", 2)},
    "MistralForCausalLM": {"model.layers": ("MistralDecoderLayer", 2)},
    "Gemma2ForCausalLM": {"model.layers": ("Gemma2DecoderLayer", 2)},
    "GPT2LMHeadModel": {"transformer.h": ("GPT2Block", 2)},
    "OPTForCausalLM": {"model.decoder.layers": ("OPTDecoderLayer", 2)},
    "BloomForCausalLM": {"transformer.h": ("BloomBlock", 2)},
    "FalconForCausalLM": {"transformer.h": ("FalconDecoderLayer", 2)},
    "PhiForCausalLM": {"model.layers": ("PhiDecoderLayer", 2)},
    "Phi3ForCausalLM": {"model.layers": ("Phi3DecoderLayer", 2)},
    "GPTNeoXForCausalLM": {"gpt_neox.layers": ("GPTNeoXLayer", 2)},
    "StableLmForCausalLM": {"model.layers": ("StableLmDecoderLayer", 2)},
    "Starcoder2ForCausalLM": {"model.layers": ("Starcoder2DecoderLayer", 2)},
    "SmolLM3ForCausalLM": {"model.layers": ("SmolLM3DecoderLayer", 2)},
    # experts, and what is no attention
    "MixtralForCausalLM": {"model.layers": ("MixtralDecoderLayer", 2)},
    "Qwen3MoeForCausalLM": {"model.layers": ("Qwen3MoeDecoderLayer", 2)},
    "GptOssForCausalLM": {"model.layers": ("GptOssDecoderLayer", 2)},
    "DeepseekV3ForCausalLM": {"model.layers": ("DeepseekV3DecoderLayer", 2)},
    "MambaForCausalLM": {"backbone.layers": ("MambaBlock", 2)},
    "Mamba2ForCausalLM": {"backbone.layers": ("Mamba2Block", 2)},
    "RwkvForCausalLM": {"rwkv.blocks": ("RwkvBlock", 2)},
    # encoders
    "BertModel": {"encoder.layer": ("BertLayer", 2)},
    "RobertaModel": {"encoder.layer": ("RobertaLayer", 2)},
    "ModernBertModel": {"layers": ("ModernBertEncoderLayer", 2)},
    "DistilBertModel": {"transformer.layer": ("TransformerBlock", 2)},
    "DebertaV2Model": {"encoder.layer": ("DebertaV2Layer", 2)},
    "XLNetModel": {"layer": ("XLNetLayer", 2)},
    "FNetModel": {"encoder.layer": ("FNetLayer", 2)},
    "LongformerModel": {"encoder.layer": ("LongformerLayer", 2)},
    "AlbertModel": {},  # one layer, which is called again and again
    # a list of attentions and one of the layers between them
    "XLMWithLMHeadModel": {
        "transformer.attentions": ("MultiHeadAttention", 2),
        "transformer.ffns": ("TransformerFFN", 2),
    },
    # lists of lists of layers
    "FunnelModel": {"encoder.blocks": ("FunnelLayer", 12), "decoder.layers": ("FunnelLayer", 2)},
    "PvtModel": {"encoder.block": ("PvtLayer", 8)},
    # encoder and decoder
    "T5ForConditionalGeneration": {"encoder.block": ("T5Block", 2), "decoder.block": ("T5Block", 2)},
    "BartForConditionalGeneration": {
        "model.encoder.layers": ("BartEncoderLayer", 2),
        "model.decoder.layers": ("BartDecoderLayer", 2),
    },
    "PegasusForConditionalGeneration": {
        "model.encoder.layers": ("PegasusEncoderLayer", 2),
        "model.decoder.layers": ("PegasusDecoderLayer", 2),
    },
    "LEDForConditionalGeneration": {
        "led.encoder.layers": ("LEDEncoderLayer", 2),
        "led.decoder.layers": ("LEDDecoderLayer", 2),
    },
    # vision
    "ViTModel": {"layers": ("ViTLayer", 2)},
    "DeiTModel": {"layers": ("DeiTLayer", 2)},
    "SwinModel": {"encoder.layers": ("SwinStage", 4)},
    "ConvNextModel": {"encoder.stages": ("ConvNextStage", 4)},
    "ResNetModel": {"encoder.stages": ("ResNetStage", 4)},
    "SegformerModel": {"stages": ("SegformerStage", 4)},
    "CvtModel": {"encoder.stages": ("CvtStage", 3)},
    "MobileNetV2Model": {"layer": ("MobileNetV2InvertedResidual", 16)},
    "VideoMAEModel": {"encoder.layer": ("VideoMAELayer", 2)},
    "SamModel": {
        "vision_encoder.layers": ("SamVisionLayer", 2),
        "mask_decoder.transformer.layers": ("SamTwoWayAttentionBlock", 2),
    },
    # audio
    "WhisperForConditionalGeneration": {
        "model.encoder.layers": ("WhisperEncoderLayer", 2),
        "model.decoder.layers": ("WhisperDecoderLayer", 2),
    },
    "MoonshineForConditionalGeneration": {
        "model.encoder.layers": ("MoonshineEncoderLayer", 2),
        "model.decoder.layers": ("MoonshineDecoderLayer", 2),
    },
    "Wav2Vec2Model": {"encoder.layers": ("Wav2Vec2EncoderLayer", 2)},
    "HubertModel": {"encoder.layers": ("HubertEncoderLayer", 2)},
    "ASTModel": {"layers": ("ASTLayer", 2)},
    "EncodecModel": {  # not its quantisers
        "encoder.layers": ("EncodecResnetBlock", 4),
        "decoder.layers": ("EncodecResnetBlock", 4),
    },
    "DacModel": {"encoder.block": ("DacEncoderBlock", 4), "decoder.block": ("DacDecoderBlock", 4)},
    "BarkModel": {
        "semantic.layers": ("BarkBlock", 2),
        "coarse_acoustics.layers": ("BarkBlock", 2),
        "fine_acoustics.layers": ("BarkBlock", 2),
        "codec_model.encoder.layers": ("EncodecResnetBlock", 4),
        "codec_model.decoder.layers": ("EncodecResnetBlock", 4),
    },
    # several models in one
    "CLIPModel": {
        "text_model.encoder.layers": ("CLIPEncoderLayer", 2),
        "vision_model.encoder.layers": ("CLIPEncoderLayer", 2),
    },
    "ClapModel": {
        "text_model.encoder.layer": ("ClapTextLayer", 2),
        "audio_model.audio_encoder.layers": ("ClapAudioStage", 4),
    },
    "LlavaForConditionalGeneration": {
        "model.vision_tower.encoder.layers": ("CLIPEncoderLayer", 2),
        "model.language_model.layers": ("LlamaDecoderLayer", 2),
    },
    "Qwen2VLForConditionalGeneration": {
        "model.visual.blocks": ("Qwen2VLVisionBlock", 2),
        "model.language_model.layers": ("Qwen2VLDecoderLayer", 2),
    },
    "Gemma3ForConditionalGeneration": {
        "model.vision_tower.encoder.layers": ("SiglipEncoderLayer", 2),
        "model.language_model.layers": ("Gemma3DecoderLayer", 2),
    },
    "Blip2ForConditionalGeneration": {
        "vision_model.encoder.layers": ("Blip2EncoderLayer", 2),
        "qformer.encoder.layer": ("Blip2QFormerLayer", 2),
        "language_model.model.decoder.layers": ("OPTDecoderLayer", 2),
    },
    "MusicgenForConditionalGeneration": {
        "text_encoder.encoder.block": ("T5Block", 2),
        "audio_encoder.encoder.layers": ("EncodecResnetBlock", 4),
        "audio_encoder.decoder.layers": ("EncodecResnetBlock", 4),
        "decoder.model.decoder.layers": ("MusicgenDecoderLayer", 2),
    },
}
"""By class: the number and class of the blocks, by the list that they stand in."""

LISTS_OF_KINDS: dict[str, tuple[str, list[tuple[str, int]]]] = {
    "JambaForCausalLM": ("model.layers", [("JambaMambaDecoderLayer", 7), ("JambaAttentionDecoderLayer", 1)]),
    "Gemma3ForCausalLM": ("model.layers", [("Gemma3DecoderLayer", 8)]),
    "MllamaForCausalLM": (
        "model.layers",
        [("MllamaSelfAttentionDecoderLayer", 7), ("MllamaCrossAttentionDecoderLayer", 1)],
    ),
    "OlmoHybridForCausalLM": (
        "model.layers",
        [("OlmoHybridLinearAttentionDecoderLayer", 6), ("OlmoHybridAttentionDecoderLayer", 2)],
    ),
    "BambaForCausalLM": ("model.layers", [("BambaDecoderLayer", 8)]),
    "Lfm2ForCausalLM": ("model.layers", [("Lfm2DecoderLayer", 8)]),
    "RecurrentGemmaForCausalLM": ("model.layers", [("RecurrentGemmaDecoderLayer", 8)]),
}
"""By class: the blocks in one list of eight layers of several kinds."""
