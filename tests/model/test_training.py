"""Particles in training: none feels another, BatchNorm, checkpointing, compilation, modes."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import multilora as ml
from models import FAMILIES, SmallCnn, load_peft, logits_of, particles_of, perturb

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# --- particles do not leak into each other -------------------------------------------------------


def run_and_differentiate(model, inputs):
    model.zero_grad()
    logits = logits_of(model(**inputs, per_particle=True))
    cotangent = torch.randn(
        logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7)
    )
    (logits * cotangent).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.particle_parameters())]


@pytest.mark.parametrize("changed", ["parameters", "inputs"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_particle_feels_another(name, training, changed):
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K).train(training)
    inputs = family.particle_inputs(K)
    before = run_and_differentiate(model, inputs)
    if changed == "parameters":
        perturb(model, seed=9, particle=1)
    else:
        other = family.inputs(seed=55)
        # Not the mask alone: the rows that it hides are nobody's inputs.
        assert any(not torch.equal(inputs[key][1], other[key]) for key in inputs)
        for key in inputs:
            inputs[key][1] = other[key]
    after = run_and_differentiate(model, inputs)
    for old, new in zip(before, after):
        # Bit for bit: the same arithmetic on the same numbers.
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[2], new[2])
    # The change was felt where it was made. (The gradient of a last bias has no other.)
    differs = [not torch.equal(old[1], new[1]) for old, new in zip(before, after)]
    assert differs[0]
    assert sum(differs) >= len(differs) - 1


def test_dropout_in_a_head_is_a_mask_a_particle():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(9, 4))
    base = nn.ModuleDict({"body": nn.Linear(6, 9), "head": head}).double()
    base.forward = lambda x: base["head"](base["body"](x))
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    # Equal particles: what differs is the mask.
    model = ml.get_particle_model(base, config, K, head_init="copy")
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model.train()(x)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])
    y = model.eval()(x)
    torch.testing.assert_close(y, y[:1].expand_as(y), rtol=1e-12, atol=1e-12)


# --- BatchNorm and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("call_train", [False, True], ids=["as-made", "train()"])
def test_batchnorm_keeps_its_statistics(call_train, tmp_path):
    # A fresh module is in training mode, and so are those that users pass.
    base = SmallCnn().train()
    plain = copy.deepcopy(base).eval()
    model = ml.get_particle_model(base, FAMILIES["cnn"].config(), K)
    if call_train:
        model.train()
    assert model.training
    assert model.base.head.training
    statistics = copy.deepcopy(dict(model.base.norm.named_buffers()))
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    y.sum().backward()
    for key, buffer in model.base.norm.named_buffers():
        assert torch.equal(buffer, statistics[key])
    model.save_pretrained(tmp_path)
    for k in range(K):
        # A float32 network of four layers: sums of at most 54 terms of order one.
        torch.testing.assert_close(
            y[k], load_peft(plain, tmp_path / f"particle_{k}")(x), rtol=1e-4, atol=1e-5
        )


def test_predict_leaves_the_mode_alone():
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(lora_dropout=0.5), K).train()
    probabilities = ml.predict(model, **family.inputs())
    assert model.training
    assert not probabilities.requires_grad
    expected = model.eval()(**family.inputs()).softmax(-1)
    assert torch.equal(probabilities, expected)


# --- activation checkpointing --------------------------------------------------------------------


def _checkpoint_timm(model):
    model.base.set_grad_checkpointing(True)


def _checkpoint_hf(use_reentrant):
    def enable(model):
        model.base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    return enable


@pytest.mark.parametrize(
    ("name", "enable"),
    [
        pytest.param("vit", _checkpoint_timm, id="vit"),
        *(
            pytest.param(name, _checkpoint_hf(reentrant), id=f"{name}-reentrant={reentrant}")
            for name in ("llama", "gpt2", "bert")
            for reentrant in (False, True)
        ),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(name, enable, dropout):
    family = FAMILIES[name]
    config = family.config(lora_dropout=dropout)
    model = particles_of(family.build(), config, K).train()
    inputs = family.particle_inputs(K)
    torch.manual_seed(3)
    expected = run_and_differentiate(model, inputs)
    calls = []
    for _, layer in model.lora_layers():
        layer.register_forward_hook(lambda *_: calls.append(1))
    enable(model)
    torch.manual_seed(3)
    actual = run_and_differentiate(model, inputs)
    # It was on: layers ran again in the backward pass.
    assert len(calls) > len(model.adapters())
    for value, want in zip(actual, expected):
        assert torch.equal(value, want)


# --- torch.compile -------------------------------------------------------------------------------


def train(forward, model, batches):
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=1e-2)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.repeat(K), reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TinyVit(VisionTransformer):
    """One block: compilation is the slowest thing here, and it grows with the depth."""

    def __init__(self, head: nn.Module | None = None):
        super().__init__(
            img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5
        )
        self.head = self.head if head is None else head


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "backend", "sizes"),
    [
        # One batch size: its C++ compiler takes most of a minute for each graph.
        pytest.param(None, "inductor", (4, 4, 4), id="linear-head"),
        # Traced and differentiated as for inductor. The second size makes the graph dynamic, the
        # third uses it.
        pytest.param(
            lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)),
            "aot_eager",
            (4, 4, 6, 7),
            id="deep-head",
        ),
    ],
)
def test_compiled_vit_trains_as_eager(head, backend, sizes):
    base = TinyVit(head and head())
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    model = particles_of(base, config, K).train()
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]
    losses = train(compiled, model, batches)
    expected = train(eager, eager, batches)
    # Fused kernels sum in another order, and AdamW's first steps divide gradients by their size.
    assert losses == pytest.approx(expected, rel=1e-4)
    x = batches[-1][0]
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-3, atol=1e-3)
