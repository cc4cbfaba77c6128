"""transformers' encoders with decoders: translation, experts, speech to text."""

from typing import Any

import torch

from zoo.entry import BATCH, FLOAT32_PARTS, VOCABULARY, Models
from zoo.of_transformers import NO_CACHE, SPECIAL, from_config, padded, random_ids

MODELS = Models()
add = MODELS.add

_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _translation() -> dict[str, Any]:
    return {**padded(), "decoder_input_ids": random_ids(BATCH, 4), **NO_CACHE}


def _sparse() -> dict[str, Any]:
    # Layers without experts have a number in place of the logits, before transformers 5.
    return {**_translation(), "output_router_logits": False}


for _name, _prefix in (("bart", "Bart"), ("pegasus", "Pegasus"), ("mbart", "MBart")):
    add(
        _name,
        from_config(f"{_prefix}ForConditionalGeneration", f"{_prefix}Config", **_SEQ2SEQ),
        _translation,
        "q_proj v_proj fc1",
    )
add(
    "marian",
    from_config("MarianMTModel", "MarianConfig", **_SEQ2SEQ),
    _translation,
    "q_proj v_proj fc2",
)
add(
    "t5",
    from_config("T5ForConditionalGeneration", "T5Config", **_T5),
    _translation,
    "q v wi",
    tolerance=FLOAT32_PARTS,
)
# Its experts see the tokens that the router sends to them: their number depends on the tokens.
add(
    "switch-transformers",
    from_config(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        **_T5,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    _sparse,
    "q v",
    tolerance=FLOAT32_PARTS,
)
add(
    "switch-transformers-experts",
    from_config(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        **_T5,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    _sparse,
    "q wi wo",
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="Each expert receives a different number of tokens per particle.",
)
add(
    "whisper",
    from_config(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=16,
    ),
    lambda: {
        "input_features": torch.randn(BATCH, 4, 20),
        "decoder_input_ids": random_ids(BATCH, 3),
        **NO_CACHE,
    },
    "q_proj v_proj fc1",
)
