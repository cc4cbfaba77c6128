"""Stand-ins for what a page takes from its reader: models, batches, files.

Each function returns names for the code of a page; `<!-- test: with NAME -->` calls it.
"""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import multilora as ml
from models import FAMILIES


class _Blocks(nn.Module):
    """A model with a list of blocks, of which the last two are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def block_model() -> dict[str, Any]:
    config = peft.LoraConfig(r=2, target_modules=["blocks.2", "blocks.3"])
    return {
        "base": _Blocks(),
        "config": config,
        "x": torch.randn(8, 6),
        "y": torch.arange(8) % 4,
    }


def learnt_sigma() -> dict[str, Any]:
    """A small particle model, IBDR with a learnt σ, and torch."""
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(base, config, 2, head_init="reset")
    return {"torch": torch, "model": model, "method": ml.IBDR(model, sigma=1e-3, learn_sigma=True)}


def image_model() -> dict[str, Any]:
    """A tiny ViT, and two batches of normalised images."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    base = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4
    )
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"])
    x, y = torch.rand(8, 3, 8, 8) * 4 - 2, torch.arange(8) % 4
    return {"base": base, "config": config, "x": x, "y": y, "loader": [(x, y), (-x, y)]}


def unrelated_runs() -> dict[str, Any]:
    """A tiny ViT, and three loaders of unequal batches, one of which ends first."""
    made = image_model()
    x, y = made["x"], made["y"]
    loaders = [[(x[:n], y[:n])] * steps for n, steps in ((2, 4), (5, 4), (3, 2))]
    return {"base": made["base"], "loaders": loaders}


def unrelated_data() -> dict[str, Any]:
    """Two tiny ViTs of the same weights, and labelled images to train on and to evaluate."""
    made = image_model()
    pairs = list(zip(made["x"], made["y"].tolist()))
    another = copy.deepcopy(made["base"])
    return {"base": made["base"], "another_base": another, "dataset": pairs, "held_out": pairs[:4]}


def saved_particles() -> dict[str, Any]:
    """Three saved particles, and copies of the base that they were trained over."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(copy.deepcopy(base), config, 3, head_init="reset")
    for adapter in model.adapters():
        nn.init.normal_(adapter.lora_B)
    model.save_pretrained("particles")
    untouched = copy.deepcopy(base)
    return {"base": base, "base_again": lambda: copy.deepcopy(untouched)}


def language_model() -> dict[str, Any]:
    """Particles over a small random Llama, and two prompts with padding on the left."""
    torch.manual_seed(0)
    base = FAMILIES["llama"].build(torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    ids = torch.tensor([[0, 0, 5, 9], [3, 8, 21, 30]])
    return {
        "model": ml.get_particle_model(base, config, 3),
        "prompts": {"input_ids": ids, "attention_mask": (ids > 0).long()},
    }


def vqa_release() -> dict[str, Any]:
    """Two questions in the form of VQA v2's files."""
    questions = [{"question_id": i, "image_id": i, "question": "Is it?"} for i in (1, 2)]
    answers = [[{"answer": "yes"}] * n + [{"answer": "no"}] * (10 - n) for n in (9, 6)]
    annotations = [
        {"question_id": i, "image_id": i, "answer_type": "yes/no", "answers": answers[i - 1]}
        for i in (1, 2)
    ]
    Path("questions.json").write_text(json.dumps({"questions": questions}))
    Path("annotations.json").write_text(json.dumps({"annotations": annotations}))
    return {}


def soup_data() -> dict[str, Any]:
    """Inputs, labelled validation data, and two of the saved particles."""
    model = ml.load_particle_model(
        saved_particles()["base"], ["particles/particle_0", "particles/particle_1"]
    )
    x = torch.randn(8, 6)
    return {"model": model, "x": x, "validation": [(x, torch.arange(8) % 4)]}
