"""transformers' models of sound."""

from typing import Any

import torch

from zoo.entry import BATCH, Models
from zoo.of_transformers import QUERIES, WIDTHS, from_config

MODELS = Models()
add = MODELS.add


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 240)}


_SPEECH = {
    **WIDTHS,
    "vocab_size": 12,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
add("wav2vec2", from_config("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH), _waves, "q_proj v_proj")
add(
    "wav2vec2-conformer",
    from_config(
        "Wav2Vec2ConformerForCTC",
        "Wav2Vec2ConformerConfig",
        **_SPEECH,
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=3,
    ),
    _waves,
    "linear_q linear_v linear_pos",
    fold="loop",
    why="The projected positions are viewed as one row's.",
)
add("hubert", from_config("HubertForCTC", "HubertConfig", **_SPEECH), _waves, "q_proj v_proj")
add("wavlm", from_config("WavLMForCTC", "WavLMConfig", **_SPEECH), _waves, "intermediate_dense")
add(
    "audio-spectrogram-transformer",
    from_config(
        "ASTForAudioClassification",
        "ASTConfig",
        **WIDTHS,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=8,
        num_mel_bins=8,
        num_labels=3,
    ),
    lambda: {"input_values": torch.randn(BATCH, 8, 8)},
    {"target_modules": [*QUERIES, "dense"], "modules_to_save": ["classifier"]},
)
