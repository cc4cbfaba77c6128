"""Stand-ins for what a page takes from its reader: models, batches, files.

Each function returns names for the code of a page; `<!-- test: with NAME -->` calls it.
"""

import copy
from typing import Any

import peft
import torch
from torch import nn

import multilora as ml


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


def soup_data() -> dict[str, Any]:
    """Inputs, labelled validation data, and two of the saved particles."""
    model = ml.load_particle_model(
        saved_particles()["base"], ["particles/particle_0", "particles/particle_1"]
    )
    x = torch.randn(8, 6)
    return {"model": model, "x": x, "validation": [(x, torch.arange(8) % 4)]}
