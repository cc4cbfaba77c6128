"""State dicts, copies and pickles of particle models."""

import copy
import io

import peft
import pytest
import torch

import multilora as ml
from models import FAMILIES, SequenceFirst, logits_of, particles_of, perturb

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_round_trip(name):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), K, seed=1)
    other = particles_of(base, family.config(), K, seed=2)
    perturb(other, seed=3)
    expected = logits_of(model(**inputs))
    assert not torch.allclose(logits_of(other(**inputs)), expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits_of(other(**inputs)), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        particles_of(base, family.config(), K + 1).load_state_dict(model.state_dict())


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", ["vit", "llama", "cnn"])
def test_copies_are_whole_and_separate(name, used, duplicate):
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K)
    if used:
        model(**family.inputs(batch=4))
    twin = duplicate(model)
    expected = logits_of(model(**family.inputs()))
    assert torch.equal(logits_of(twin(**family.inputs())), expected)
    perturb(twin, seed=9)
    assert not torch.equal(logits_of(twin(**family.inputs())), expected)
    assert torch.equal(logits_of(model(**family.inputs())), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copy_still_checks_rows(duplicate):
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    twin = duplicate(ml.get_particle_model(SequenceFirst(), config, K))
    with pytest.raises(ml.ParticleIsolationError):
        twin(torch.randn(4, 5, 6))
    twin.check_isolation = False
    with pytest.raises(ValueError, match="multiple of 12"):
        twin(torch.randn(4, 5, 6))


def test_failing_forward_leaves_no_trace():
    family = FAMILIES["mlp"]
    model = particles_of(family.build(), family.config(), K)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(2, 5, dtype=torch.float64))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(pickled(model)(**family.inputs()), model(**family.inputs()))
