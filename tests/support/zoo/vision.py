"""transformers' models of images and videos."""

import torch

from zoo.entry import BATCH, FLOAT32_PARTS, Models
from zoo.of_transformers import QUERIES, WIDTHS, from_config, pixels

MODELS = Models()
add = MODELS.add

_IMAGE = {**WIDTHS, "image_size": 16, "patch_size": 8, "num_labels": 3}
_IMAGE_LORA = {"target_modules": QUERIES, "modules_to_save": ["classifier"]}
for _name, _prefix in (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")):
    add(
        f"{_name}-transformers",
        from_config(f"{_prefix}ForImageClassification", f"{_prefix}Config", **_IMAGE),
        pixels(),
        _IMAGE_LORA,
    )
add(
    "beit-transformers",
    from_config(
        "BeitForImageClassification", "BeitConfig", **_IMAGE, use_shared_relative_position_bias=True
    ),
    pixels(),
    _IMAGE_LORA,
)
_WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 3,
}
# Attention folds the windows of all images into the batch.
add(
    "swin-transformers",
    from_config("SwinForImageClassification", "SwinConfig", **_WINDOWS),
    pixels(),
    _IMAGE_LORA,
)
add(
    "swinv2-transformers",
    from_config("Swinv2ForImageClassification", "Swinv2Config", **_WINDOWS),
    pixels(),
    _IMAGE_LORA,
    tolerance=FLOAT32_PARTS,
)
add(
    "convnext-transformers",
    from_config(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        num_labels=3,
    ),
    pixels(),
    {"target_modules": ["pwconv1", "pwconv2"], "modules_to_save": ["classifier"]},
)
add(
    "resnet-transformers",
    from_config(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=4,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    ),
    pixels(),
    {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]},
)
add(
    "segformer",
    from_config(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    ),
    pixels(),
    {"target_modules": [*QUERIES, "sr"], "modules_to_save": ["decode_head.classifier"]},
)
add(
    "videomae",
    from_config(
        "VideoMAEForVideoClassification", "VideoMAEConfig", **_IMAGE, num_frames=4, tubelet_size=2
    ),
    lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 16, 16)},
    {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
)
