"""Every particle is the model that PEFT makes of its adapter: same outputs, same gradients."""

import copy
import math

import peft
import pytest
import torch
from torch import Tensor, nn

import multilora as ml
from models import (
    FAMILIES,
    VOCABULARY,
    load_peft,
    logits_of,
    particle_tensors,
    particles_of,
    peft_tensors,
)

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PARTICLES = 3


def assert_equals_peft(base, config, inputs, path, tolerance=1e-11, per_particle=False):
    """Outputs and gradients, under a random cotangent, against PEFT on a copy of the base."""
    model = particles_of(base, config, PARTICLES)
    model.save_pretrained(path)
    logits = logits_of(model(**inputs, per_particle=per_particle))
    cotangent = torch.randn(
        logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7)
    )
    (logits * cotangent).sum().backward()
    ours = particle_tensors(model)
    assert len(ours) == len(model.particle_parameters())

    close = {"rtol": tolerance, "atol": tolerance}
    for k in range(PARTICLES):
        single = load_peft(base, path / f"particle_{k}")
        own_inputs = {n: t[k] for n, t in inputs.items()} if per_particle else inputs
        expected = logits_of(single(**own_inputs))
        (expected * cotangent[k]).sum().backward()
        torch.testing.assert_close(logits[k], expected, **close)
        theirs = peft_tensors(single)
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            gradient = ours[name].grad[k].reshape(parameter.shape)
            torch.testing.assert_close(gradient, parameter.grad, **close)
    # Particles that agree would hide that they are swapped.
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[1] - logits[2]).abs().max() > 1e-3


@pytest.mark.parametrize("per_particle", [False, True], ids=["shared", "per_particle"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, per_particle, tmp_path):
    family = FAMILIES[name]
    inputs = family.particle_inputs(PARTICLES) if per_particle else family.inputs()
    assert_equals_peft(
        family.build(), family.config(), inputs, tmp_path, family.tolerance, per_particle
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("vit", {"r": 4, "use_rslora": True}, id="rslora"),
        pytest.param(
            "vit", {"rank_pattern": {"blocks.1.attn.qkv": 5, "patch_embed.proj": 3}}, id="rank"
        ),
        pytest.param("vit", {"alpha_pattern": {"blocks.0.attn.proj": 7, "qkv": 2}}, id="alpha"),
        pytest.param(
            "cnn",
            {"rank_pattern": {"wide": 4}, "alpha_pattern": {"stem": 5}, "use_rslora": True},
            id="rank-alpha-rslora",
        ),
        pytest.param("llama", {"layers_to_transform": [1]}, id="layers"),
        pytest.param(
            "vit",
            {"target_modules": ["qkv"], "layers_to_transform": 0, "layers_pattern": "blocks"},
            id="layers-pattern",
        ),
        pytest.param("vit", {"exclude_modules": ["patch_embed.proj"]}, id="exclude"),
        pytest.param("vit", {"target_modules": r"blocks\.\d\.attn\.(qkv|proj)"}, id="regex"),
        pytest.param("llama", {"target_modules": "all-linear"}, id="all-linear"),
        pytest.param(
            "bert",
            {"target_modules": "all-linear", "modules_to_save": None, "task_type": "SEQ_CLS"},
            id="all-linear-seq-cls",
        ),
        pytest.param("bert", {"modules_to_save": None, "task_type": "SEQ_CLS"}, id="seq-cls"),
        pytest.param("llama", {"task_type": "CAUSAL_LM"}, id="causal-lm"),
        # PEFT corrects a wrong flag; so do particles.
        pytest.param("gpt2", {"fan_in_fan_out": False}, id="conv1d-flag"),
        pytest.param("mlp", {"fan_in_fan_out": True}, id="linear-flag"),
        pytest.param("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, id="conv1d-all"),
        pytest.param("mlp", {"init_lora_weights": "gaussian"}, id="gaussian"),
        pytest.param("vit", {"lora_dropout": 0.4}, id="dropout-eval"),
        pytest.param("mlp", {"modules_to_save": None}, id="no-head"),
        pytest.param("mlp", {"r": 1, "lora_alpha": 1}, id="rank-1"),
        # More ranks than the matrix has.
        pytest.param("mlp", {"r": 12}, id="rank-12"),
        pytest.param("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, id="vocabulary"),
        pytest.param("gpt2", {"modules_to_save": ["wte"]}, id="tied-embedding"),
        # A target inside a module to save belongs to the head.
        pytest.param("mlp", {"target_modules": ["0", "4"]}, id="target-in-head"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:.*tied.*")
def test_options(name, changes, tmp_path):
    family = FAMILIES[name]
    config = family.config(**changes)
    assert_equals_peft(family.build(), config, family.inputs(), tmp_path, family.tolerance)


class _Headed(nn.Module):
    """A body whose head the tests exchange; `call` says how the head is called."""

    def __init__(self, head, call=lambda head, x, h: head(h)):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = head
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.head, x, self.body(x))


class _Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        return self.out(hidden) * gate


class _Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.other = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(hidden), self.other(hidden)


class _Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 3)
        self.register_buffer("temperature", torch.tensor(2.5))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(hidden) / self.temperature


_HEADS = {
    "no-bias": lambda: _Headed(nn.Linear(8, 3, bias=False)),
    "mlp": lambda: _Headed(
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3))
    ),
    "embedding": lambda: _Headed(
        nn.Embedding(VOCABULARY, 8), lambda head, x, h: h * head((x > 0).long()).sum(1)
    ),
    "conv": lambda: _Headed(
        nn.Conv2d(2, 3, 2, padding=1), lambda head, x, h: head(h.view(-1, 2, 2, 2)).mean((2, 3))
    ),
    "tokens": lambda: _Headed(nn.Linear(4, 3), lambda head, x, h: head(h.view(-1, 2, 4)).sum(1)),
    "two-inputs": lambda: _Headed(_Gated(), lambda head, x, h: head(h, x[:, :1])),
    "keyword": lambda: _Headed(_Gated(), lambda head, x, h: head(hidden=h, gate=x[:, :1])),
    "pair": lambda: _Headed(_Pair(), lambda head, x, h: torch.cat(head(h), 1)),
    "buffer": lambda: _Headed(_Tempered()),
    "called-twice": lambda: _Headed(nn.Linear(8, 8), lambda head, x, h: head(head(h).tanh())),
}


@pytest.mark.parametrize("per_particle", [False, True], ids=["shared", "per_particle"])
@pytest.mark.parametrize("head", _HEADS)
def test_heads(head, per_particle, tmp_path):
    base = _HEADS[head]().double()
    shape = (PARTICLES, 4, 6) if per_particle else (4, 6)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    assert_equals_peft(base, config, {"x": x}, tmp_path, per_particle=per_particle)


@pytest.mark.parametrize("name", ["vit", "gpt2", "cnn"])
def test_adapters_give_peft_delta_weight(name, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    model = particles_of(base, family.config(), PARTICLES)
    model.save_pretrained(tmp_path)
    for k in range(PARTICLES):
        single = load_peft(base, tmp_path / f"particle_{k}")
        for adapter in model.adapters():
            delta = adapter.scaling * adapter.lora_B[k] @ adapter.lora_A[k]
            layer = single.base_model.model.get_submodule(adapter.name)
            expected = layer.get_delta_weight("default")
            # A Conv1D's weight is (d_in, d_out), a convolution's has four axes.
            expected = expected.T if name == "gpt2" else expected.flatten(1)
            torch.testing.assert_close(delta, expected, rtol=1e-13, atol=1e-13)


# Fourth moment over squared variance: 9/5 for a uniform distribution, 3 for a normal one.
@pytest.mark.parametrize(("init", "kurtosis"), [(True, 1.8), ("gaussian", 3.0)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_start_has_peft_distribution(init, kurtosis, kind):
    if kind == "linear":
        layer, fan_in = nn.Linear(1800, 3), 1800
    else:
        layer, fan_in = nn.Conv2d(200, 3, 3), 200 * 9
    base = nn.Sequential(layer)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)
    std = 1 / 4 if init == "gaussian" else 1 / math.sqrt(3 * fan_in)
    model = ml.get_particle_model(copy.deepcopy(base), config, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        single = peft.get_peft_model(base, config)
    draws = [*model.adapters()[0].lora_A, peft_tensors(single)["0.lora_A.weight"]]
    for draw in draws:
        n = draw.numel()
        z = draw.detach().double().flatten() / std
        # Five standard errors of each moment; the seeds are fixed.
        assert abs(z.mean()) < 5 / math.sqrt(n)
        assert abs(z.square().mean() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
        assert abs(z.pow(4).mean() - kurtosis) < 5 * math.sqrt(96 / n)
        assert (z.abs().max() <= math.sqrt(3) + 1e-6) == (init is True)


@pytest.fixture(params=["linear", "conv"])
def dropped(request):
    """1500 particles with the same adapter and p = 0.3, in training mode, and a shared input."""
    generator = torch.Generator().manual_seed(5)
    if request.param == "linear":
        base, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6, generator=generator)
    else:
        base = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
        x = torch.randn(3, 2, 3, 3, generator=generator)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_dropout=0.3)
    model = particles_of(base, config, 1500).train()
    with torch.no_grad():
        for parameter in model.particle_parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield base, model, x


def test_dropout_masks_differ_between_particles(dropped):
    _, model, x = dropped
    with torch.no_grad():
        y = model(x).flatten(1)
    assert len(torch.unique(y, dim=0)) > 1000


def test_dropout_is_unbiased(dropped):
    _, model, x = dropped
    with torch.no_grad():
        y = model(x)
        expected = model.eval()(x)[0]
    error = (y.mean(0) - expected).abs()
    # Five standard errors of the mean; outputs are sums of few masks, never constant.
    assert (error < 5 * y.std(0) / math.sqrt(len(y))).all()
    assert (y.std(0) > 0.01).all()


@pytest.mark.slow
def test_dropout_has_peft_variance(dropped, tmp_path):
    base, model, x = dropped
    model.save_pretrained(tmp_path)
    single = load_peft(base, tmp_path / "particle_0").train()
    with torch.no_grad():
        ours = model(x)
        theirs = torch.stack([single(x) for _ in range(1500)])
    # The ratio of two sample variances of 1500 has a relative error of about √(2·2/1500) = 5 %
    # for a normal distribution; five of them.
    torch.testing.assert_close(ours.var(0), theirs.var(0), rtol=0.26, atol=0)


def test_dropout_spares_the_base(dropped):
    base, model, x = dropped
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.zero_()
        y = model(x)
        expected = base(x)
    # float32 sums of at most 18 terms.
    torch.testing.assert_close(y, expected.expand_as(y), rtol=1e-5, atol=1e-6)
