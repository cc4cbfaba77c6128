"""Nets whose rows a test couples, and every coupling that the isolation check has to find."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

import multilora as ml
from models import perturb

PARTICLES = 4
DTYPES = [torch.float32, torch.bfloat16]
MODES = {"evaluation": False, "training": True}


class Mix(nn.Module):
    """A fault between two layers: function(module, h) of hidden states h (B, d)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.drop = nn.Dropout(0.3)
        # The state is as large as the hidden states, and not zero: it is read before it is written.
        self.register_buffer("state", 0.5 * torch.ones(12))
        self.last: Tensor | None = None
        self.queue: list[Tensor] = []
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


class Net(nn.Module):
    """x (B, 6) -> (B, 4), with something between the first layer and the last."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(6, 12), Mix(function), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(torch.tanh(self.first(x))))


COUPLINGS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {}


def coupling(function: Callable[[nn.Module, Tensor], Tensor]) -> Callable:
    COUPLINGS[function.__name__.replace("_", "-")] = function
    return function


@coupling
def attention_over_the_batch(mix, h):
    return (h @ h.T).softmax(-1) @ h


@coupling
def batch_mean(mix, h):
    return h - h.mean(0)


@coupling
def batch_maximum(mix, h):
    return h / h.abs().amax(0)


@coupling
def sorted_by_length(mix, h):
    return h[h.norm(dim=1).argsort()]


@coupling
def cumulative_buffer(mix, h):
    before = mix.state.clone()
    mix.state.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
    return h * before


@coupling
def cumulative_attribute(mix, h):
    before = 0.0 if mix.last is None else mix.last
    mix.last = h.detach().mean(0)
    return h + before


@coupling
def queue_of_earlier_rows(mix, h):
    queue = h if mix.last is None else torch.cat([mix.last, h])
    mix.last = queue[-8:].detach()
    return h - queue.mean(0)


@coupling
def queue_in_a_list(mix, h):
    before = sum(mix.queue, torch.zeros_like(h[0]))
    mix.queue.append(h.detach().mean(0))
    return h + before


@coupling
def conditional_write(mix, h):
    h = h.clone()
    long = h.norm(dim=1)
    h[long >= long.mean()] -= 0.5 * long.mean()
    return h


@coupling
def softmax_over_the_batch(mix, h):
    return h.softmax(0)


@coupling
def running_sum_over_the_batch(mix, h):
    return h.cumsum(0)


@coupling
def running_sum_from_the_end(mix, h):
    return h.flip(0).cumsum(0).flip(0)


@coupling
def rolled_rows(mix, h):
    return h.roll(1, 0)


@coupling
def row_after(mix, h):
    return h + 0.5 * nn.functional.pad(h, (0, 0, 0, 1))[1:]


@coupling
def row_before(mix, h):
    return h + 0.5 * nn.functional.pad(h, (0, 0, 1, 0))[:-1]


@coupling
def first_row_as_reference(mix, h):
    return h - h[:1]


@coupling
def last_row_as_reference(mix, h):
    return h - h[-1:]


@coupling
def scale_of_the_batch_size(mix, h):
    return h * (len(h) / 6)


@coupling
def mask_by_place_in_the_batch(mix, h):
    generator = torch.Generator().manual_seed(0)
    return h * torch.rand(h.shape, generator=generator).to(h)


@coupling
def contrast(mix, h):
    return (h @ h.T).softmax(-1).square().sum(1, keepdim=True) * h


@coupling
def pairs_of_rows(mix, h):
    return h + 0.5 * h.roll(len(h) // 2, 0)


@coupling
def one_scale_for_all_rows(mix, h):
    return h / h.norm()


@coupling
def best_rows_only(mix, h):
    length = h.norm(dim=1, keepdim=True)
    best = length.topk((len(h) + 1) // 2, dim=0).values
    return h * (length - best.mean())


@coupling
def reversed_batch(mix, h):
    return 0.7 * h + 0.3 * h.flip(0)


@coupling
def rows_drawn_in_training(mix, h):
    return 0.7 * h + 0.3 * h[torch.randperm(len(h))] if mix.training else h


@coupling
def rows_drawn_by_numpy_in_training(mix, h):
    return 0.7 * h + 0.3 * h[np.random.permutation(len(h))] if mix.training else h


@coupling
def rows_by_random_numbers_in_training(mix, h):
    return 0.7 * h + 0.3 * h[torch.rand(len(h)).argsort()] if mix.training else h


@coupling
def mean_beside_noise_in_training(mix, h):
    return h * torch.empty_like(h).exponential_() - h.mean(0) if mix.training else h


@coupling
def batch_norm_in_training(mix, h):
    if mix.training:
        return (h - h.mean(0)) * (h.var(0, correction=0) + 1e-2).rsqrt()
    return h


@coupling
def mean_beside_dropout_in_training(mix, h):
    return mix.drop(h) - h.mean(0) if mix.training else mix.drop(h)


@coupling
def statistics_for_evaluation(mix, h):
    if mix.training:
        mix.state.lerp_(h.detach().mean(0), 0.1)
        return h
    return h - mix.state


@coupling
def four_bits_with_one_scale(mix, h):
    scale = h.abs().mean()
    return (h / scale).round() * scale


@coupling
def halt_together(mix, h):
    for _ in range(100):
        if h.norm(dim=1).mean() < 0.5:
            break
        h = 0.95 * h
    return h


@coupling
def norm_over_rows(mix, h):
    return nn.functional.layer_norm(h.T, (len(h),)).T + 0.5 * h


#: In training mode these draw random numbers.
DRAWN = {
    "mean-beside-noise-in-training",
    "rows-drawn-in-training",
    "rows-drawn-by-numpy-in-training",
    "rows-by-random-numbers-in-training",
}
#: Only where this mode runs is there anything to see.
ONLY_TRAINING = {
    "batch-norm-in-training",
    "mean-beside-dropout-in-training",
    "statistics-for-evaluation",
    *DRAWN,
}
#: Where all particles still compute the same, nothing shows; see CANNOT_SEE["other inputs"].
ONLY_TRAINED = {"halt-together"}
UNSEEN_IN = {("halt-together", torch.bfloat16)}
#: What these compute for a particle depends on the forwards before.
STATEFUL = {
    "cumulative-buffer",
    "cumulative-attribute",
    "queue-of-earlier-rows",
    "queue-in-a-list",
    "statistics-for-evaluation",
}


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, lora_alpha=3, target_modules=["first", "last"], **options)


def built(net: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net().to(dtype)


def particles(
    base: nn.Module, trained: bool = True, training: bool = False, **options: Any
) -> ml.ParticleModel:
    model = ml.get_particle_model(copy.deepcopy(base), config(), PARTICLES, **options)
    if trained:
        perturb(model)
    return model.train(training)


def rows_of(batch: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6, generator=generator).to(dtype)
