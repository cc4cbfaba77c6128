"""MC dropout: S masks in one pass, against their closed form."""

import math

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, perturb

pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save")


class OneLayer(nn.Module):
    """A linear, or a convolution that is one, or a linear that only its own forward computes."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Conv2d(6, 4, 1) if kind == "conv" else nn.Linear(6, 4)
        if kind == "opaque":
            # A layer with hooks is called, and not read.
            self.layer.register_forward_hook(lambda *_: None)

    def forward(self, x):
        return self.layer(x[..., None, None]).flatten(1) if self.kind == "conv" else self.layer(x)


def one_layer(kind="linear", p=0.3, particles=1):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], lora_dropout=p)
    model = ml.get_particle_model(OneLayer(kind).double(), config, particles).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("kind", ["linear", "conv", "opaque"])
def test_mean_and_variance_of_one_layer(kind):
    p, samples, rows = 0.3, 20, 2000
    model = one_layer(kind, p)
    [(_, layer)] = model.lora_layers()
    assert (
        type(layer).__name__
        == {
            "linear": "LoraLinear",
            "conv": "LoraConv2d",
            "opaque": "LoraOpaqueLinear",
        }[kind]
    )
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x[None])[0, 0]
        with ml.mc_dropout(model, samples, seed=0):
            y = model(x.expand(rows, -1))
    assert y.shape == (samples, rows, 4)
    draws = y.flatten(0, 1)
    update = layer.lora_B[0] @ layer.lora_A[0]
    variance = layer.scaling**2 * p / (1 - p) * (x * update).square().sum(1)
    error = (variance / len(draws)).sqrt()
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)
    # Every sample has its own masks.
    assert len(y[:, 0].unique(dim=0)) > samples / 2


def test_without_dropout_nothing_changes():
    model = one_layer(p=0.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        once = model(x)
        with ml.mc_dropout(model, 3):
            torch.testing.assert_close(model(x), once.expand(3, -1, -1), rtol=1e-14, atol=1e-14)


class Noisy(nn.Module):
    """Dropout outside of the adapters."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4)

    def forward(self, x):
        return self.last(self.dropout(self.first(x)))


@pytest.mark.parametrize("training", [False, True])
def test_everything_else_is_in_eval_mode(training):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first"], lora_dropout=0.5)
    model = ml.get_particle_model(Noisy().double(), config, 1).train(training)
    [(_, layer)] = model.lora_layers()
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad(), ml.mc_dropout(model, 4):
        # B is zero, so only the other dropout could be seen.
        y = model(x)
        assert torch.equal(y, y[:1].expand(4, -1, -1)) and not model.training
    assert all(m.training == training for m in model.modules())
    assert not layer.sampling and "dropout" in repr(model.base)


def test_masks_repeat_with_the_seed_and_leave_the_generators():
    model = one_layer()
    x = torch.randn(5, 6, dtype=torch.float64)
    state = torch.get_rng_state()

    def drawn(seed):
        with torch.no_grad(), ml.mc_dropout(model, 3, seed=seed):
            return torch.stack([model(x), model(x)])

    first = drawn(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(first[0], first[1]) and not torch.equal(drawn(1), first)
    assert not torch.equal(drawn(None), drawn(None))
    assert not torch.equal(torch.get_rng_state(), state)


def test_predict_and_chunks_have_the_masks():
    family = FAMILIES["vit"]
    model = ml.get_particle_model(family.build(), family.config(lora_dropout=0.4), 1).eval()
    perturb(model)
    x = family.inputs(batch=3)["x"]
    plain = ml.predict(model, x)
    with ml.mc_dropout(model, 5):
        for chunk in (None, 2):
            p = ml.predict(model, x, chunk)
            assert p.shape == (5, 3, 5)
            assert torch.pdist(p.flatten(1)).min() > 1e-6  # no two masks are the same
    assert torch.equal(ml.predict(model, x), plain)


def test_each_of_many_particles_has_its_masks():
    model = one_layer(particles=2)
    x = torch.randn(6, dtype=torch.float64).expand(4000, -1)
    with torch.no_grad():
        expected = model(x[:1])
        with ml.mc_dropout(model, 3, seed=0):
            y = model(x)
    assert y.shape == (6, 4000, 4)
    for k in range(2):
        mean = y[3 * k : 3 * k + 3].flatten(0, 1).mean(0)
        assert (mean - expected[k, 0]).abs().max() < 0.05 * y.std()
    assert (expected[0] - expected[1]).abs().max() > 0.5 * y.std()


def test_everything_is_restored_after_an_exception():
    model = one_layer().train()
    [(_, layer)] = model.lora_layers()
    with pytest.raises(KeyError), ml.mc_dropout(model, 3):
        assert layer.sampling
        raise KeyError
    assert not layer.sampling and model.training and model.num_particles == 1
    for samples in (0, 1.5, math.nan, "3"):
        with (
            pytest.raises(ValueError, match="samples must be an integer"),
            ml.mc_dropout(model, samples),
        ):
            pass
