"""The loops of docs/guides/loops.md as they stand there, and what loops put around a method."""

import types

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import multilora as ml
from documents import block, sides
from models import FAMILIES, particles_of
from multilora.optim import clip_grad_norm_

K = 3
METHODS = [ml.Ensemble, ml.SVGD, ml.IBDR]
GUIDE = "docs/guides/loops.md"
LOOPS = ["## In a PyTorch loop", "## With accelerate"]
# transformers' old names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate"),
]


# --- the guide's loops ---------------------------------------------------------------------------


def examples():
    x = 2 * torch.randn(480, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def names(base, **more):
    """The names that the guide's loops take from their reader: `base`, `config` and `loader`."""
    return {
        "torch": torch,
        "peft": peft,
        "ml": ml,
        "Accelerator": Accelerator,
        "base": base,
        "config": FAMILIES["mlp"].config(),
        "loader": DataLoader(TensorDataset(*examples()), batch_size=4),
    } | more


def mean_nll(model):
    x, y = examples()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x).flatten(0, -2), y.repeat(K + 1)).item()


@pytest.mark.parametrize("heading", LOOPS)
def test_the_loop_trains_particles(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = FAMILIES["mlp"]
    before = mean_nll(ml.get_particle_model(family.build(torch.float32), family.config(), K + 1))
    scope = names(family.build(torch.float32))
    exec(sides(block(GUIDE, heading, "diff"))[1], scope)
    assert mean_nll(scope["model"]) < 0.9 * before
    assert scope["stats"].keys() >= {"loss", "nll", "divergence", "lambda"}
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "multilora.json",
        *(f"particle_{k}" for k in range(K + 1)),
    ]
    loaded = ml.load_particle_model(family.build(torch.float32), tmp_path / "adapter")
    x, _ = examples()
    assert torch.equal(loaded.eval()(x), scope["model"].eval()(x))


@pytest.mark.parametrize("heading", LOOPS)
def test_an_ensemble_of_one_is_the_ordinary_loop(heading, tmp_path, monkeypatch):
    before, after = sides(block(GUIDE, heading, "diff"))
    for line, other in (
        ("num_particles=4", "num_particles=1"),
        ("ml.IBDR(model, alpha=0.02)", "ml.Ensemble(model)"),
    ):
        assert line in after
        after = after.replace(line, other)
    family = FAMILIES["mlp"]
    start = tmp_path / "start"
    ml.get_particle_model(family.build(torch.float32), family.config(), 1).save_pretrained(start)

    def from_the_start(base, config):
        return peft.PeftModel.from_pretrained(base, start / "particle_0", is_trainable=True)

    saved = {}
    for name, code in (("plain", before), ("particle", after)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ordinary = types.SimpleNamespace(get_peft_model=from_the_start)
        exec(code, names(family.build(torch.float32), peft=ordinary))
        saved[name] = tmp_path / name / "adapter"
    plain = load_file(saved["plain"] / "adapter_model.safetensors")
    particle = load_file(saved["particle"] / "particle_0" / "adapter_model.safetensors")
    assert plain.keys() == particle.keys()
    first = load_file(start / "particle_0" / "adapter_model.safetensors")
    for key, tensor in plain.items():
        # Some 40 steps of AdamW, whose first ones amplify the rounding of small gradients.
        torch.testing.assert_close(particle[key], tensor, rtol=1e-3, atol=1e-4)
        assert (tensor - first[key]).abs().max() > 0.01


# --- mixed precision, accumulation, compilation, checkpointing ---------------------------------


def gradients(model, method, closure, scale=1.0):
    model.zero_grad()
    method.backward(closure, scale=scale)
    return torch.cat([p.grad.flatten() for p in model.particle_parameters()])


def family_batch(name, dtype=torch.float64):
    """Particles of a family, its inputs, labels, and a function of a model to its logits."""
    family = FAMILIES[name]
    model = particles_of(family.build(dtype), family.config(), K).train()
    inputs = family.inputs(batch=4, dtype=dtype)
    y = inputs["input_ids"] if name == "llama" else torch.arange(4) % 3
    return model, y, lambda m: getattr(out := m(**inputs), "logits", out)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast(method):
    model, y, logits = family_batch("vit", torch.float32)
    exact = gradients(model, method(model), lambda: (logits(model), y))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, method(model), lambda: (logits(model), y))
    assert got.dtype == torch.float32
    # A rounding is 2⁻⁹ = 0.2 %, and some thirty of them lie between inputs and gradients.
    error = (got - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.06


@pytest.mark.parametrize("method", METHODS)
def test_float16_autocast_with_a_scaler_that_overflows(method):
    model, y, logits = family_batch("vit", torch.float32)
    method = method(model)
    optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.05)
    # Scaled by 2²⁴, gradients leave float16 until the scaler has come down.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-6)
    moved, losses = [], []
    for _ in range(12):
        before = [p.detach().clone() for p in model.particle_parameters()]
        scale = scaler.scale(torch.ones(()))
        with torch.autocast("cpu", torch.float16):
            stats = method.backward(lambda: (logits(model), y), scale=scale)
        scaler.unscale_(optimizer)
        clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pairs = zip(before, model.particle_parameters())
        moved.append(not all(torch.equal(a, b) for a, b in pairs))
        if moved[-1]:
            losses.append(stats["nll"].item())
    assert not moved[0] and moved[-1]
    assert moved == sorted(moved)  # skipped at first, then never again
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in model.particle_parameters())
    if isinstance(method, ml.IBDR):
        assert torch.isfinite(method.lambda_)


@pytest.mark.parametrize("method", [ml.Ensemble, ml.SVGD])
def test_accumulation_is_one_large_batch(method):
    x, y = (t.to(torch.float64) if t.is_floating_point() else t for t in examples())
    family = FAMILIES["mlp"]
    model = particles_of(family.build(), family.config(), K)
    method = method(model)
    whole = gradients(model, method, lambda: (model(x), y))
    model.zero_grad()
    for part, labels in zip(x.chunk(4), y.chunk(4)):
        method.backward(lambda part=part, labels=labels: (model(part), labels), scale=1 / 4)
    got = torch.cat([p.grad.flatten() for p in model.particle_parameters()])
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_closure_may_call_a_compiled_model(method):
    model, y, logits = family_batch("mlp")
    torch.compiler.reset()
    # Traced and differentiated as for inductor, without the minutes in its C++ compiler.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = gradients(model, method(model), lambda: (logits(model), y))
    got = gradients(model, method(model), lambda: (logits(compiled), y))
    torch.testing.assert_close(got, eager, rtol=1e-9, atol=1e-12)
    assert eager.abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations_give_the_same_gradients(method):
    model, y, logits = family_batch("llama")
    plain = gradients(model, method(model), lambda: (logits(model), y))
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = model.base.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    got = gradients(model, method(model), lambda: (logits(model), y))
    # Every forward of the closure is run again by its backward.
    assert len(calls) == (4 if method is ml.IBDR else 2)
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-9)
