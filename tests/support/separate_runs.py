"""K particles in one model, and the same particles in K runs of PEFT's models."""

import copy
import functools
import tempfile

import torch
from torch import nn

import multilora as ml
from models import FAMILIES, load_peft, particle_tensors, particles_of, peft_tensors

K = 4
STEPS = 10
# In float64, ten steps that amplify roundings of 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def data(steps=STEPS, micro=2):
    """Micro-batches whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(steps):
        for m in range(micro):
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 4, (8,), generator=generator)
            y[: (3 * step + 5 * m) % 7] = -100
            made.append((x, y))
    return [made[i : i + micro] for i in range(0, len(made), micro)]


def start(family="mlp", only_matrices=False):
    """K particles of a family, the same at every call."""
    return copy.deepcopy(made(family, only_matrices)[0])


def alone(family="mlp", only_matrices=False):
    """The same particles, each as a separate PEFT model."""
    return copy.deepcopy(made(family, only_matrices)[1])


@functools.cache
def made(family, only_matrices):
    base = FAMILIES[family].build()
    # Adapters alone: every trainable tensor is a matrix, as Muon wants it.
    changes = {"modules_to_save": None} if only_matrices else {}
    model = particles_of(base, FAMILIES[family].config(**changes), K)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, [load_peft(base, f"{folder}/particle_{k}") for k in range(K)]


def train(model, step, steps=None):
    method = ml.Ensemble(model)
    for micro_batches in steps or data():
        labels = sum((y != -100).sum().item() for _, y in micro_batches)
        for x, y in micro_batches:
            share = (y != -100).sum().item() / labels
            method.backward(lambda x=x, y=y: (model(x), y), scale=share)
        step()


def train_alone(models, make, clip=None, steps=None):
    """PEFT models, each trained in a separate run -> their tensors, stacked."""
    each = []
    for model in models:
        optimizer = make(list(peft_tensors(model).values()))
        for micro_batches in steps or data():
            labels = sum((y != -100).sum().item() for _, y in micro_batches)
            for x, y in micro_batches:
                loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
                (loss / labels).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        each.append({name: t.detach() for name, t in peft_tensors(model).items()})
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def assert_equal_runs(model, expected, before):
    tensors = particle_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.detach(), expected[name].view(tensor.shape), **CLOSE)
    moved = [(a - b).abs().amax() for a, b in zip(tensors.values(), before)]
    assert max(moved) > 1e-4


def one_backward(model, scale=1.0):
    x, y = data()[0][0]
    ml.Ensemble(model).backward(lambda: (model(x), y), scale=scale)
