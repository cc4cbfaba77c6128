"""A small model over tokens in float64, with adapters in two of its three blocks, and a batch."""

import peft
import torch
from torch import nn

import multilora as ml

K, B, T, D = 3, 5, 4, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Tokens(nn.Module):
    """A stem of blocks over tokens, and a head on their mean."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(D, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def token_model(particles=K, seed=0, **options):
    """Adapters in the last two of three blocks, off their start."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=r"blocks\.[12]\.fc", modules_to_save=["head"]
    )
    base = Tokens().double()
    model = ml.get_particle_model(base, config, particles, head_init="reset", **options)
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_()
    return model


def token_batch(seed=1, ignored=(2,)):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (B,), generator=generator)
    y[list(ignored)] = -100
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64), y
