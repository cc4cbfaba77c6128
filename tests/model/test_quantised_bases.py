"""PEFT's names, values and files over quantised bases."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import multilora as ml
from documents import block
from models import load_peft, particle_tensors, particles_of, peft_tensors
from multilora.layers import LoraOpaqueLinear
from opaque_layers import (
    BATCH,
    D_IN,
    D_OUT,
    TOKENS,
    Int8Linear,
    K,
    Packed4Bit,
    Sharded,
    config,
    inputs,
    nets,
)
from oracles import relative_error


class Uncopied(Packed4Bit):
    def __deepcopy__(self, memo):
        raise AssertionError("a quantised layer must not be copied to resolve names")


def test_names_are_resolved_without_the_layers():
    base = nn.Sequential(Uncopied(nn.Linear(D_IN, D_OUT)), nn.Linear(D_OUT, 4))
    model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules="all-linear"), K)
    assert [name for name, _ in model.lora_layers()] == ["0", "1"]


def test_patterns_and_exclusions():
    changes = {
        "exclude_modules": ["last"],
        "rank_pattern": {"first": 5},
        "alpha_pattern": {"first": 10},
    }
    model = ml.get_particle_model(nets(Packed4Bit)[0], config(**changes), K)
    assert {a.name: (a.lora_A.shape[1], a.scaling) for a in model.adapters()} == {
        "first": (5, 2.0),
        "plain": (2, 1.5),
    }


def assert_peft_agrees(model, base, folder, x, tolerance) -> None:
    """Every particle's outputs and gradients are those of PEFT over the same base."""
    model.save_pretrained(folder)
    output = model(x)
    weights = torch.randn_like(output)
    stacked = particle_tensors(model)
    got = torch.autograd.grad((output * weights).sum(), list(stacked.values()))
    got = dict(zip(stacked, got))
    for particle in range(model.num_particles):
        theirs = load_peft(base, folder / f"particle_{particle}").train(model.training)
        value = theirs(x)
        assert relative_error(output[particle], value) < tolerance
        tensors = peft_tensors(theirs)
        right = torch.autograd.grad((value * weights[particle]).sum(), list(tensors.values()))
        assert got.keys() == tensors.keys()
        for name, gradient in zip(tensors, right):
            assert relative_error(got[name][particle], gradient) < tolerance


@pytest.mark.parametrize("stub", [Int8Linear, Sharded])
def test_peft_over_the_same_base(stub, tmp_path):
    # PEFT takes a subclass of nn.Linear as it is. Of others it knows those of installed packages.
    base = nets(stub, torch.float32)[0]
    assert_peft_agrees(
        particles_of(base, config(), K), base, tmp_path, inputs(torch.float32)[0], 1e-5
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    def quantise(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.plain = nn.Linear(64, 128), nn.Linear(128, 64)
            self.last, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.last(F.gelu(self.plain(F.gelu(self.first(x))))))

    base = Wide()
    base.first, base.last = quantise(base.first), quantise(base.last)
    assert base.first.weight.dtype in (torch.int8, torch.uint8)
    # In evaluation bitsandbytes rounds to bfloat16 on some CPUs, and has no gradient there.
    model = particles_of(base, config(), K).train()
    assert type(model.base.first) is type(model.base.last) is LoraOpaqueLinear
    assert_peft_agrees(model, base, tmp_path, torch.randn(BATCH, TOKENS, 64), 1e-5)


def test_the_quantised_base_of_the_guide(tmp_path, monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "MODEL_OR_FOLDER")
    monkeypatch.chdir(tmp_path)
    scope = {"peft": peft, "ml": ml}
    exec(block("docs/guides/quantised.md", "## QLoRA with particles", "python"), scope)
    model = scope["model"]
    layers = dict(model.lora_layers())
    assert len(layers) == 4 and model.num_particles == 4
    for layer in layers.values():
        assert type(layer.base_layer) is bnb.nn.Linear4bit
        assert layer.base_layer.weight.dtype == torch.uint8

    ids = torch.randint(64, (2, 8))
    model.train()
    method = ml.IBDR(model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        closure = lambda: (model(input_ids=ids).logits[:, :, :-1], ids[:, 1:])  # noqa: E731
        losses.append(method.backward(closure)["nll"])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1

    model.save_pretrained("particles")
    expected = model(input_ids=ids).logits
    assert relative_error(expected[0], expected[3]) > 0.1
    for k in (0, 3):
        base = AutoModelForCausalLM.from_pretrained(
            "MODEL_OR_FOLDER", quantization_config=scope["quantised"]
        )
        theirs = load_peft(base, f"particles/particle_{k}").train()
        # Some CPUs round to bfloat16 at other places where there are more rows.
        assert relative_error(expected[k], theirs(input_ids=ids).logits) < 1e-2


def test_files_and_soups_over_packed_weights(tmp_path):
    base = nets(Packed4Bit)[0]
    model = particles_of(base, config(), K)
    model.save_pretrained(tmp_path)
    x, _ = inputs()
    loaded = ml.load_particle_model(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    model.soup(tmp_path / "soup")
    soup = ml.load_particle_model(copy.deepcopy(base), [tmp_path / "soup"]).eval()
    mean, one = (dict(m.lora_layers()) for m in (model, soup))
    for name in mean:
        deltas = [layer.scaling * layer.lora_B @ layer.lora_A for layer in (mean[name], one[name])]
        assert relative_error(deltas[1][0], deltas[0].mean(0)) < 1e-6
