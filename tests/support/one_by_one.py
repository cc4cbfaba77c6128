"""A small particle model in float64, and its particles one by one in plain autograd."""

import peft
import torch
from torch import Tensor, nn

import multilora as ml
from oracles import relative_error

# float64 and a few hundred operations: rounding is below 1e-13, a wrong term is not.
FP64 = 1e-10


def particle_model(K=3, seed=0, seeds=None):
    """Two adapted layers and a head in float64; B is drawn too, so that ΔW is not zero."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], modules_to_save=["4"])
    model = ml.get_particle_model(base.double(), config, K, seed=seed if seeds is None else seeds)
    if seeds is None:
        with torch.no_grad():
            for adapter in model.adapters():
                adapter.lora_B.normal_()
    return model


def batch(N=9, ignored=(2,)):
    y = torch.randint(4, (N,))
    y[list(ignored)] = -100
    return torch.randn(N, 5, dtype=torch.float64), y


def forward_one(model, tensors, x):
    """The model's forward with one particle's tensors, written out."""
    A1, B1, A2, B2, head_weight, head_bias = tensors
    (_, first), (_, second) = model.lora_layers()
    hidden = torch.tanh(first.base_layer(x) + 1.5 * x @ A1.T @ B1.T)
    hidden = torch.tanh(second.base_layer(hidden) + 1.5 * hidden @ A2.T @ B2.T)
    return hidden @ head_weight.T + head_bias


def split(params) -> list[list[Tensor]]:
    """Stacked tensors -> one list of leaves a particle."""
    K = params[0].shape[0]
    return [[p[k].detach().clone().requires_grad_() for p in params] for k in range(K)]


def stack(per_particle) -> list[Tensor]:
    """One list of tensors a particle -> stacked tensors."""
    return [torch.stack(tensors) for tensors in zip(*per_particle)]


def trained(method) -> list[Tensor]:
    """What gets gradients: the particles and the method's own tensors, or the latter alone."""
    return [*(method.params if method.trains_particles else ()), *method.parameters()]


def gradients_of(method, closure, scale=1.0) -> list[Tensor]:
    """The change of .grad by one backward: of the particles, or of the posterior they are from."""
    for p in trained(method):
        p.grad = None
    method.backward(closure, scale)
    return [p.grad for p in (method.params if method.trains_particles else trained(method))]


def assert_same(got, expected, tolerance=FP64):
    assert len(got) == len(expected) > 0
    for g, e in zip(got, expected):
        assert relative_error(g, e) < tolerance
