"""timm's models."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.entry import BATCH, FLOAT32_PARTS, Models, targets_and_heads

MODELS = Models()
add = MODELS.add


def _timm(module: str, name: str, **fields: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(
            num_classes=5, **fields
        )

    return create


def _images(size: int = 16) -> Callable[[], tuple]:
    return lambda: (torch.randn(BATCH, 3, size, size),)


_PLAIN = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
add(
    "vit",
    _timm("vision_transformer", "VisionTransformer", **_PLAIN),
    _images(),
    targets_and_heads("qkv attn.proj patch_embed.proj"),
)
# In training mode its outputs are a pair.
add(
    "deit-distilled",
    _timm("deit", "VisionTransformerDistilled", **_PLAIN),
    _images(),
    targets_and_heads("qkv fc1", "head", "head_dist"),
)
_STAGES = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
add(
    "swin",
    _timm("swin_transformer", "SwinTransformer", **_STAGES),
    _images(),
    targets_and_heads("qkv fc1 reduction", "head.fc"),
)
# Its attention reads qkv.weight: an adapter there would not run.
add(
    "swinv2",
    _timm("swin_transformer_v2", "SwinTransformerV2", **_STAGES),
    _images(),
    targets_and_heads("attn.proj fc1 fc2", "head.fc"),
)
add(
    "beit",
    _timm("beit", "Beit", **_PLAIN, use_rel_pos_bias=True),
    _images(),
    targets_and_heads("attn.proj fc1"),
)
add(
    "eva",
    _timm("eva", "Eva", **_PLAIN, qkv_fused=False, use_rot_pos_emb=True, swiglu_mlp=True),
    _images(),
    targets_and_heads("q_proj v_proj attn.proj"),
    tolerance=FLOAT32_PARTS,
)
add(
    "convnext",
    _timm("convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2),
    _images(32),
    targets_and_heads("fc1 fc2 stem.0", "head.fc"),
)
add(
    "mixer",
    _timm("mlp_mixer", "MlpMixer", img_size=16, patch_size=8, num_blocks=2, embed_dim=16),
    _images(),
    targets_and_heads("fc1 fc2"),
)


def _resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(4, 4, 8, 8), stem_width=4)


add("resnet", _resnet, _images(32), targets_and_heads("conv1 conv2", "fc"))


def _efficientnet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c8_se0.25"]]
    return EfficientNet(decode_arch_def(stages), num_classes=5, num_features=16, stem_size=8)


add(
    "efficientnet",
    _efficientnet,
    _images(),
    targets_and_heads("conv_stem conv_pw conv_pwl conv_head", "classifier"),
)
add("cait", _timm("cait", "Cait", **_PLAIN), _images(), targets_and_heads("qkv proj_l attn.q fc1"))
# Its patches have a batch norm.
add("xcit", _timm("xcit", "Xcit", **_PLAIN), _images(), targets_and_heads("qkv fc1"))
add(
    "pit",
    _timm(
        "pit",
        "PoolingVisionTransformer",
        img_size=16,
        patch_size=4,
        stride=4,
        base_dims=(8, 8),
        depth=(1, 1),
        heads=(2, 2),
    ),
    _images(),
    targets_and_heads("qkv fc2"),
)
# In training mode its outputs are a pair with a list of boxes' numbers.
add(
    "volo",
    _timm(
        "volo",
        "VOLO",
        layers=[1, 1, 1, 1],
        img_size=32,
        stem_hidden_dim=4,
        embed_dims=[8, 16, 16, 16],
        num_heads=[2, 2, 2, 2],
    ),
    _images(32),
    targets_and_heads("qkv fc1 attn.v", "head"),
)
add(
    "levit",
    _timm(
        "levit",
        "Levit",
        img_size=32,
        embed_dim=(8, 8),
        depth=(1, 1),
        num_heads=(1, 1),
        key_dim=8,
    ),
    _images(32),
    targets_and_heads("qkv.linear ln1.linear", "head.linear"),
)
