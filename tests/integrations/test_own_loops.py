"""Particles in the loops that users already have, and the traps that lie there."""

import math

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, particles_of

K = 3


def labelled(family, batch=4):
    """A family's inputs and labels for it, as a closure's pieces."""
    return family.inputs(batch=batch), torch.arange(batch) % 3


@pytest.mark.parametrize("method", [ml.Ensemble, ml.SVGD, ml.IBDR])
def test_grad_scaler(method):
    # scaler.scale(1) is what `scale` takes: it starts the scaler, which get_scale() does not.
    x, y = torch.randn(6, 5), torch.arange(6) % 4
    models = []
    for scaled in (False, True):
        base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        torch.manual_seed(0)
        for p in base.parameters():
            nn.init.normal_(p, std=0.3)
        config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
        model = ml.get_particle_model(base, config, K)
        optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        method_ = method(model)
        for _ in range(3):
            scale = scaler.scale(torch.ones(()))
            method_.backward(lambda model=model: (model(x), y), scale=scale)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        models.append(model)
    # A power of two scales without rounding; SVGD's and IBDR's divisions by it are exact too.
    for plain, scaled in zip(*(m.particle_parameters() for m in models)):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-7)
    assert not torch.equal(models[0].adapters()[0].lora_B, torch.zeros(K, 7, 2))


def test_reentrant_checkpointing_is_refused():
    # torch.autograd.grad would silently find no gradient for what such a checkpoint holds.
    family = FAMILIES["llama"]
    model = particles_of(family.build(), family.config(), K).train()
    model.base.gradient_checkpointing_enable({"use_reentrant": True})
    model.base.enable_input_require_grads()
    inputs = family.inputs()
    targets = inputs["input_ids"]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        ml.Ensemble(model).backward(lambda: (model(**inputs).logits, targets))
    assert all(p.grad is None for p in model.particle_parameters())


@pytest.mark.parametrize("particles", range(2, 11))
def test_equal_heads_do_not_repel(particles):
    # Equal rows have no direction to part in; rounding over a bandwidth at its floor must not
    # make one up.
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(base, config, particles, head_init="copy")
    x, y = torch.randn(6, 5), torch.arange(6) % 4
    ml.SVGD(model).backward(lambda: (model(x), y))
    got = {name: p.grad.clone() for name, p in model.heads()[0][1].items()}
    model.zero_grad()
    ml.Ensemble(model).backward(lambda: (model(x), y))
    # All kernels are one, so each gradient is the ensemble's.
    for name, p in model.heads()[0][1].items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [ml.SVGD, ml.IBDR])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_factor_can_be_frozen(method, frozen):
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]), K)
    for adapter in model.adapters():
        nn.init.normal_(adapter.lora_B)
        getattr(adapter, frozen).requires_grad_(False)
    x, y = torch.randn(6, 5), torch.arange(6) % 4
    method(model).backward(lambda: (model(x), y))
    for adapter in model.adapters():
        trained = adapter.lora_B if frozen == "lora_A" else adapter.lora_A
        assert getattr(adapter, frozen).grad is None
        assert trained.grad.abs().max() > 0


def test_seeds_that_the_generator_cannot_tell_apart():
    base = nn.Sequential(nn.Linear(5, 7))
    config = peft.LoraConfig(r=2, target_modules=["0"])
    with pytest.raises(ValueError, match="lower 32 bits"):
        ml.get_particle_model(base, config, 2, seed=[1, 1 + 2**32])


@pytest.mark.parametrize("particles", [1, 3, 7, 11])
def test_certain_predictions_are_calibrated(particles):
    # log mean_k 1 may round above zero, and a probability above one is read as a logit.
    logits = torch.zeros(particles, 50, 10)
    logits[..., 0] = 40
    result = ml.metrics.evaluate(logits, torch.zeros(50, dtype=torch.int64))
    assert result["ece"] == pytest.approx(0, abs=1e-6)
    assert 0 <= result["nll"] < 1e-6
    assert result["accuracy"] == 1


def test_predict_takes_any_mapping():
    from transformers import BatchEncoding

    family = FAMILIES["bert"]
    model = particles_of(family.build(), family.config(), K)
    inputs = family.inputs()
    expected = ml.predict(model, inputs)
    assert torch.equal(ml.predict(model, BatchEncoding(inputs)), expected)


def test_batch_on_the_second_axis_is_refused_for_any_number_of_tokens():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model = ml.get_particle_model(Inner(), peft.LoraConfig(target_modules=["layer"]), 4)
    # 8 tokens are a multiple of 4 particles × 1 example.
    with pytest.raises(ml.ParticleIsolationError, match=r"first at layer .*\(8, 4, 4\) together"):
        model(torch.randn(1, 8, 6))


def test_loss_of_a_model_is_one_mean():
    family = FAMILIES["bert"]
    model = particles_of(family.build(), family.config(), K)
    inputs, labels = labelled(family)
    output = model(**inputs, labels=labels)
    each = [nn.functional.cross_entropy(z, labels).item() for z in output.logits]
    assert output.loss.item() == pytest.approx(math.fsum(each) / K, rel=1e-6)
