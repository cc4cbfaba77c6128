"""transformers' models of text and images together."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from zoo.entry import BATCH, FLOAT32_PARTS, TOKENS, Models
from zoo.of_transformers import (
    GROUPED,
    NO_CACHE,
    TEXT,
    WIDTHS,
    from_config,
    padded,
    pixels,
    random_ids,
    without_dropout,
)

MODELS = Models()
add = MODELS.add

_TOWER = {**WIDTHS, "num_attention_heads": 2}
_CLIP = {
    "text_config": {**TEXT, "max_position_embeddings": 16},
    "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}


def _contrast(texts: int, images: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "input_ids": torch.cat([random_ids(texts, TOKENS), torch.full((texts, 1), 2)], 1),
        "pixel_values": torch.randn(images, 3, 16, 16),
    }


# Every image is compared with every text, (images, texts): all rows of the batch meet.
add(
    "clip",
    from_config("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(2, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-loss",
    from_config("CLIPModel", "CLIPConfig", **_CLIP),
    lambda: {**_contrast(2, 2)(), "return_loss": True},
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
# The number of prompts is that of the rows of K = 3 particles.
add(
    "clip-zero-shot",
    from_config("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(6, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-images-of-one-text",
    from_config("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(2, 6),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "siglip",
    from_config(
        "SiglipModel",
        "SiglipConfig",
        text_config={**TEXT, "max_position_embeddings": 16, "projection_size": 16},
        vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
    ),
    _contrast(2, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-vision",
    from_config("CLIPVisionModelWithProjection", "CLIPVisionConfig", **_CLIP["vision_config"]),
    pixels(),
    {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["visual_projection"]},
)
add(
    "siglip-vision",
    from_config(
        "SiglipForImageClassification",
        "SiglipConfig",
        num_labels=3,
        **{
            "text_config": {**TEXT, "projection_size": 16},
            "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
        },
    ),
    pixels(),
    {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
)
_IMAGE_TOKEN = 7


def _two_images() -> dict[str, Any]:
    """Two examples of two images each: pixel_values has four rows, and four patches an image."""
    image = torch.full((BATCH, 4), _IMAGE_TOKEN)
    parts = [random_ids(BATCH, 2), image, random_ids(BATCH, 1), image, random_ids(BATCH, 2)]
    return {
        "input_ids": torch.cat(parts, 1),
        "pixel_values": torch.randn(2 * BATCH, 3, 16, 16),
        **NO_CACHE,
    }


add(
    "llava-two-images",
    lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_CLIP["vision_config"]),
            text_config=transformers.LlamaConfig(**GROUPED),
            image_token_index=_IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    ),
    _two_images,
    {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="There are twice as many images as rows.",
)
add(
    "llava-one-image",
    MODELS["llava-two-images"].create,
    lambda: {
        "input_ids": torch.cat([torch.full((BATCH, 4), _IMAGE_TOKEN), random_ids(BATCH, 3)], 1),
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        **NO_CACHE,
    },
    "q_proj v_proj linear_1",
    tolerance=FLOAT32_PARTS,
    # Older transformers return them as one tensor, and the fold is right.
    fold="loop" if hasattr(LlavaModelOutputWithPast, "image_outputs") else "batch",
    why="The image features are a list with an entry for every row.",
)


def _patches() -> dict[str, Any]:
    """One image an example, of 4 × 4 and 4 × 8 patches, in one list; 2 × 2 patches make a token."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    ids = random_ids(BATCH, 12)
    kinds = torch.zeros_like(ids)
    mask = torch.ones_like(ids)
    for row, start, count in ((0, 2, 4), (1, 3, 8)):
        ids[row, start - 1] = 5
        ids[row, start : start + count] = _IMAGE_TOKEN
        kinds[row, start : start + count] = 1
    mask[0, 9:] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(16 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        **NO_CACHE,
    }
    # From transformers 5 on, what kind each token is comes with the ids.
    if transformers.__version__ >= "5":
        inputs["mm_token_type_ids"] = kinds
    return inputs


_ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
add(
    "qwen2-vl",
    from_config(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text_config={
            **TEXT,
            "num_key_value_heads": 1,
            "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling": _ROPE,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=_IMAGE_TOKEN,
        vision_start_token_id=5,
        vision_end_token_id=6,
    ),
    _patches,
    "q_proj v_proj qkv",
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="The patches of all images are one list.",
)
add(
    "blip-2",
    lambda: transformers.Blip2ForConditionalGeneration(
        without_dropout(
            transformers.Blip2Config(
                vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
                qformer_config={**TEXT, "encoder_hidden_size": 16},
                text_config={
                    "model_type": "opt",
                    **TEXT,
                    "ffn_dim": 24,
                    "word_embed_proj_dim": 16,
                },
                num_query_tokens=3,
                image_token_index=_IMAGE_TOKEN,
            )
        )
    ),
    lambda: {
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "input_ids": torch.cat([torch.full((BATCH, 3), _IMAGE_TOKEN), random_ids(BATCH, 3)], 1),
        "attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
        **NO_CACHE,
    },
    "q_proj v_proj query",
    tolerance=FLOAT32_PARTS,
)
add(
    "vilt",
    from_config(
        "ViltForQuestionAnswering",
        "ViltConfig",
        **TEXT,
        image_size=16,
        patch_size=8,
        num_labels=3,
    ),
    lambda: {
        **padded(),
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "pixel_mask": torch.ones(BATCH, 16, 16, dtype=torch.long),
    },
    "query value",
)
