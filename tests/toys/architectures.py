"""Small models of transformers of kinds beside language models, and of those whose checkpoints have other names."""

from __future__ import annotations

import transformers
from torch import nn

BODY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
HEADS = {"vocab_size": 64, "num_key_value_heads": 1}
PARTS = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip


def gemma() -> nn.Module:
    """Its embedding scales what it looks up, and is tied."""
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**BODY, **HEADS, head_dim=8))


def phi() -> nn.Module:
    """Query, key and value in one layer."""
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**BODY, vocab_size=64, num_key_value_heads=2, pad_token_id=0)
    )


def gpt_oss() -> nn.Module:
    """Experts whose weights are stored the other way round."""
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**BODY, **HEADS, num_local_experts=3, num_experts_per_tok=1, head_dim=8)
    )


def vision() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**BODY, image_size=16, patch_size=8, num_labels=3)
    )


def speech() -> nn.Module:
    """Convolutions, a head that is tied, and positions that are computed."""
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **PARTS, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def sounds() -> nn.Module:
    """It reads no tokens, and one convolution is computed from other parameters."""
    return transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(
            **BODY, vocab_size=32, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip


def images_and_text() -> nn.Module:
    """Its checkpoint has other names than the model."""
    seen = transformers.CLIPVisionConfig(**BODY, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**BODY, **HEADS)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_index=5)
    )
