"""Where particles start: by seeds, apart from each other, at the base's head or beside it."""

import copy
import random
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import multilora as ml
from models import FAMILIES, logits_of, particle_tensors
from multilora.attach import particle_seeds

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def start(seed: Any = 0, particles: int = K, name: str = "vit", **kwargs: Any) -> dict[str, Tensor]:
    family = FAMILIES[name]
    model = ml.get_particle_model(family.build(), family.config(), particles, seed, **kwargs)
    return {key: tensor.detach() for key, tensor in particle_tensors(model).items()}


def redrawn(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that a seed decides: every A, and the matrices of heads."""
    return [t for key, t in tensors.items() if "lora_B" not in key and t.ndim > 2]


def test_same_seed_gives_same_start():
    first, second = start(4), start(4)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_seed_gives_other_start():
    for first, second in zip(redrawn(start(0)), redrawn(start(1))):
        for i in range(K):
            for j in range(K):
                assert not torch.equal(first[i], second[j])


def test_start_of_a_particle_does_not_depend_on_their_number():
    few, many = start(2, particles=2), start(2, particles=5)
    assert all(torch.equal(few[key], many[key][:2]) for key in few)


def test_seeds_name_particles():
    forward, backward = start([5, 8, 2]), start([2, 8, 5])
    assert all(torch.equal(forward[key], backward[key].flip(0)) for key in forward)
    assert all(torch.equal(start(particle_seeds(3, K))[key], t) for key, t in start(3).items())


@pytest.mark.parametrize("name", FAMILIES)
def test_particles_start_apart(name):
    tensors = start(name=name)
    drawn = redrawn(tensors)
    assert len(drawn) >= 2
    for tensor in drawn:
        for i in range(K):
            for j in range(i):
                assert not torch.equal(tensor[i], tensor[j])
    assert all(not t.any() for key, t in tensors.items() if "lora_B" in key)


def test_reset_keeps_the_scale_and_the_vectors_of_a_head():
    head = nn.Sequential(nn.LayerNorm(90), nn.Linear(90, 80))
    nn.init.normal_(head[0].weight)
    nn.init.normal_(head[1].weight, std=0.7)
    original = copy.deepcopy(head.state_dict())
    base = nn.ModuleDict({"body": nn.Linear(4, 90), "head": head})
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    ((_, head),) = ml.get_particle_model(base, config, K).heads()
    for k in range(K):
        # Both standard deviations are of 7200 draws: 0.8 % each, five of their joint error.
        assert head["1.weight"][k].std().item() == pytest.approx(0.7, rel=0.06)
        assert not torch.equal(head["1.weight"][k], original["1.weight"])
        for key in ("0.weight", "0.bias", "1.bias"):
            assert torch.equal(head[key][k], original[key])


def test_reset_moves_a_head_of_zeros():
    base = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 10))
    nn.init.zeros_(base[1].weight)
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    ((_, head),) = ml.get_particle_model(base, config, K).heads()
    # The deviation of nn.Linear's own start, to 5 errors of 3000 draws.
    expected = nn.Linear(300, 10).weight.std().item()
    assert head["weight"][0].std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_copied_heads_start_at_the_base_model(name):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    expected = logits_of(base(**inputs))
    model = ml.get_particle_model(base, family.config(), K, head_init="copy").eval()
    logits = logits_of(model(**inputs))
    assert logits.shape == (K, *expected.shape)
    for k in range(K):
        torch.testing.assert_close(
            logits[k], expected, rtol=family.tolerance, atol=family.tolerance
        )


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", ["lm_head", "embed_tokens"]), ("gpt2", ["wte"])]
)
@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_vocabularies_are_copied(name, heads):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    expected = base(**inputs).logits
    model = ml.get_particle_model(base, family.config(modules_to_save=heads), K).eval()
    assert len(model.heads()) == len(heads)
    logits = model(**inputs).logits
    torch.testing.assert_close(
        logits, expected.expand_as(logits), rtol=family.tolerance, atol=family.tolerance
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_only_stacked_tensors_train(name):
    family = FAMILIES[name]
    base = family.build()
    frozen = {id(p) for p in base.parameters()}
    model = ml.get_particle_model(base, family.config(), K)
    trainable = model.particle_parameters()
    assert {id(p) for p in trainable} == {id(p) for p in particle_tensors(model).values()}
    assert not frozen & {id(p) for p in trainable}
    assert all(p.shape[0] == K and p.is_leaf for p in trainable)
    logits_of(model(**family.inputs())).sum().backward()
    # B is zero, so A's gradient is exactly zero; but there must be one.
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_random_state_is_untouched():
    def state():
        return torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    before = state()
    start(7)
    after = state()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_model_without_a_vocabulary():
    # transformers' vision models have no input embeddings to ask for.
    base = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = base(x).logits
    config = peft.LoraConfig(
        r=2, target_modules=["convolution"], modules_to_save=["classifier"], task_type=None
    )
    logits = ml.get_particle_model(base, config, K, head_init="copy").eval()(x).logits
    # float32 convolutions in another order of sums.
    torch.testing.assert_close(logits, expected.expand_as(logits), rtol=1e-4, atol=1e-5)
