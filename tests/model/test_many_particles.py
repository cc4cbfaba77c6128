"""Chunks of particles: less memory, the same gradients; particles that are not finite."""

import copy

import peft
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

import multilora as ml
from documents import block
from models import FAMILIES, logits_of, particles_of
from multilora.methods.tensors import gradients
from one_by_one import trained

K = 5
METHODS = {
    "ensemble": (ml.Ensemble, {}),
    "svgd": (ml.SVGD, {}),
    "svgd-stein": (ml.SVGD, {"drive": "mix", "repulse": "stein", "scope": "global"}),
    "ibdr": (ml.IBDR, {}),
    "ibdr-noise": (
        ml.IBDR,
        {"sigma": 0.01, "learn_sigma": True, "beta": 0.1, "cost": "output", "ascent": "sam"},
    ),
    "ibdr-cross": (ml.IBDR, {"divergence": "cross", "loss": "ensemble", "alpha": 1}),
    "mutual": (ml.MutualLearning, {"start": 0, "beta": 0.0}),
    "mutual-features": (ml.MutualLearning, {"start": 0, "beta": 100.0}),
    "sam": (ml.SAM, {}),
    "sgld": (ml.SGLD, {"num_data": 50, "lr": 0.1, "prior_std": 0.5}),
    "variational": (ml.Variational, {"num_data": 50, "sigma": 0.01, "rho": 0.05}),
}
#: Those whose particles stay what they were; `test_variational` breaks draws.
KEPT = [name for name, (kind, _) in METHODS.items() if kind.trains_particles]


def problem(name, particles=K, **lora):
    """A model of the family in training mode, and the closure of a step."""
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(**lora), particles).train()
    inputs = family.inputs(batch=4)
    if name in ("llama", "gpt2"):
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    else:
        targets = torch.arange(4) % 3
    return model, lambda: (logits_of(model(**inputs)), targets)


def step(model, method, closure):
    """Everything that a step gives: gradients, logged scalars, the method's state."""
    for p in trained(method):
        p.grad = None
    stats = method.backward(closure, scale=0.5)
    grads = [p.grad.clone() for p in trained(method)]
    state = [v for v in method.state_dict().values() if isinstance(v, torch.Tensor)]
    return grads, [*stats.values(), method.particle_nll, *state]


def assert_same(got, expected, tolerance):
    for a, b in zip(got[0], expected[0], strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.cover
@pytest.mark.parametrize("family", ["vit", "llama", "cnn"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_have_the_gradients_of_the_whole(family, method, chunk):
    if family == "cnn" and "features" in method:
        pytest.skip("the network has no two maps of one width")
    kind, options = METHODS[method]
    model, closure = problem(family)
    expected = step(model, kind(model, **options), closure)
    model, closure = problem(family)
    got = step(model, kind(model, **options, particle_chunk=chunk), closure)
    assert_same(got, expected, max(FAMILIES[family].tolerance, 1e-9))


@pytest.mark.parametrize("method", ["ensemble", "svgd", "ibdr", "variational"])
@pytest.mark.filterwarnings("ignore:IBDR. every particle has its own")
def test_chunks_of_particles_with_their_own_batches(method):
    family = FAMILIES["vit"]
    x = family.particle_inputs(K, batch=4)["x"]
    y = torch.randint(5, (K, 4))
    kind, options = METHODS[method]

    def of(chunk):
        model = particles_of(family.build(), family.config(), K).train()
        method = kind(model, **options, particle_chunk=chunk)
        return step(model, method, lambda: (model(x, per_particle=True), y))

    assert_same(of(2), of(None), 1e-9)


def test_chunks_repeat_their_own_dropout():
    # The second run of a chunk must draw the masks of its first.
    model, closure = problem("mlp", lora_dropout=0.5)
    torch.manual_seed(7)
    logits, targets = [], None
    for start in range(0, K, 2):
        with model.particles(start, min(start + 2, K)):
            z, targets = closure()
        logits.append(z.detach())
    state = torch.get_rng_state()
    logits = torch.cat(logits)

    torch.manual_seed(7)
    passes = ml.IBDR(model, particle_chunk=2).passes
    with passes.running(True):
        (z,), _ = passes.predict(closure)
        torch.testing.assert_close(z.detach(), logits)
        (dz,) = torch.autograd.grad(cross_entropy(z.flatten(0, 1), targets.repeat(K)), z)
        got = passes.pull_back(closure, [dz])
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(7)
    for start in range(0, K, 2):
        stop = min(start + 2, K)
        with model.particles(start, stop):
            z, _ = closure()
            expected = torch.autograd.grad(z, model.particle_parameters(), dz[start:stop])
        for whole, part in zip(got, expected):
            torch.testing.assert_close(whole[start:stop], part)


def test_particles_share_memory_and_are_put_back():
    model, closure = problem("vit")
    before = model.particle_parameters()
    whole = closure()[0]
    with pytest.raises(RuntimeError, match="inside"), model.particles(1, 3):
        assert model.num_particles == 2
        for part, p in zip(model.particle_parameters(), before):
            assert part.is_leaf and part.data_ptr() == p[1].data_ptr()
        torch.testing.assert_close(closure()[0], whole[1:3])
        with model.particles(1, 2):
            torch.testing.assert_close(closure()[0], whole[2:3])
        raise RuntimeError("inside")
    assert all(a is b for a, b in zip(model.particle_parameters(), before))
    assert model.num_particles == K
    for start, stop in ((-1, 2), (2, 2), (3, K + 1)):
        with pytest.raises(ValueError, match=rf"stop <= {K}; got {start}, {stop}"):
            model.particles(start, stop).__enter__()


def test_chunk_errors():
    model, closure = problem("mlp")
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="particle_chunk must be an integer >= 1; got"):
            ml.Ensemble(model, particle_chunk=chunk)
    with pytest.raises(ValueError, match="particle_chunk needs a ParticleModel"):
        ml.Ensemble(model.particle_parameters(), particle_chunk=2)
    calls = []

    def growing():
        logits, targets = closure()
        calls.append(None)
        return (logits, targets) if len(calls) <= 3 else (logits[:, :2], targets[:2])

    with pytest.raises(ValueError, match=r"same batch at each of its calls.*\(2, 2, 4\) after"):
        ml.IBDR(model, particle_chunk=2).backward(growing)
    assert model.num_particles == K


def test_predictions_in_chunks():
    model, _ = problem("vit")
    inputs = FAMILIES["vit"].inputs()
    expected = ml.predict(model, inputs)
    torch.testing.assert_close(ml.predict(model, inputs, particle_chunk=2), expected)
    with pytest.raises(ValueError, match="particle_chunk must be an integer >= 1; got 0"):
        ml.predict(model, inputs, particle_chunk=0)


def test_gradients_are_contiguous():
    # Processes average them in place, which an expanded one would not survive.
    p = torch.ones(3, 4, requires_grad=True)
    assert not torch.autograd.grad(p.sum(), p)[0].is_contiguous()
    (gradient,) = gradients(p.sum(), [p])
    assert gradient.is_contiguous()


# --- particles that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_broken_particle_is_named_and_nothing_is_changed(method, chunk):
    model, closure = problem("vit")
    kind, options = METHODS[method]
    method = kind(model, **options, particle_chunk=chunk)
    step(model, method, closure)
    grads = [p.grad.clone() for p in model.particle_parameters()]
    state = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        model.adapters()[0].lora_B[3] = torch.nan
    values = [p.detach().clone() for p in model.particle_parameters()]
    with pytest.raises(FloatingPointError, match=r"of particle 3 \(losses \[nan\]\)"):
        method.backward(closure)
    for p, grad, value in zip(model.particle_parameters(), grads, values):
        assert torch.equal(p.grad, grad)
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_others_go_on_as_if_it_were_not_there(method, chunk):
    model, closure = problem("vit")
    kind, options = METHODS[method]
    rest = [0, 1, 2, 4]
    small, _ = problem("vit", particles=len(rest))
    with torch.no_grad():
        for p, q in zip(small.particle_parameters(), model.particle_parameters()):
            p.copy_(q[rest])
        model.adapters()[0].lora_B[3] = torch.nan
    inputs = FAMILIES["vit"].inputs(batch=4)
    reference = kind(small, **options)
    spread = "_spread" if hasattr(reference, "_spread") else "_noise"
    if hasattr(reference, spread):
        # The noise of the same particles.
        noise = getattr(kind(model, **options), spread).draw()[rest]
        getattr(reference, spread).draw = lambda: noise
    expected = reference.backward(lambda: (small(**inputs), torch.arange(4) % 3), scale=0.5)
    method = kind(model, **options, particle_chunk=chunk, nonfinite="skip")
    with pytest.warns(UserWarning, match=r"of particle 3 .*; skipped, the others go on"):
        stats = method.backward(closure, scale=0.5)
    torch.testing.assert_close(stats, expected)
    assert method.particle_nll[3].isnan()
    for p, q in zip(model.particle_parameters(), small.particle_parameters()):
        torch.testing.assert_close(p.grad[rest], q.grad)
        assert not p.grad[3].any()
    for p, q in zip(method.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad[rest], q.grad)
        assert p.grad[3] == 0


def test_a_particle_that_breaks_on_its_climb_is_not_in_the_others_climb():
    theta = torch.randn(K, 6, 5, dtype=torch.float64, requires_grad=True)
    y, calls = torch.arange(6) % 5, []

    def closure(broken=None):
        calls.append(None)
        logits = 1 * theta
        if broken is not None and not torch.equal(theta[broken], start[broken]):
            logits = logits.index_fill(0, torch.tensor(broken), torch.nan)
        return logits, y

    start = theta.detach().clone()
    method = ml.IBDR([theta], alpha=0.5, nonfinite="skip")
    with pytest.warns(UserWarning, match="particle 3 "):
        method.backward(lambda: closure(3))
    # The pass at θ and the one at θ' that breaks, and both again without the particle.
    assert len(calls) == 4
    rest = [0, 1, 2, 4]
    small = theta.detach()[rest].clone().requires_grad_()
    ml.IBDR([small], alpha=0.5).backward(lambda: (small * 1, y))
    torch.testing.assert_close(theta.grad[rest], small.grad)
    assert not theta.grad[3].any() and torch.equal(theta, start)


def test_autocast_sees_the_particles_that_climbed():
    weight = torch.randn(3, 8, 5, requires_grad=True)
    x, y = torch.randn(3, 6, 8), torch.arange(6) % 5
    grads = []
    for cached in (True, False):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            ml.IBDR([weight], clip=10.0).backward(lambda: (torch.bmm(x, weight), y))
        grads.append(weight.grad)
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:.*skipped, the others go on")
@pytest.mark.parametrize("method", METHODS)
def test_the_same_scalars_are_logged_when_one_particle_is_left(method):
    kind, options = METHODS[method]
    model, closure = problem("vit", 2)
    method = kind(model, **options, nonfinite="skip")
    whole = method.backward(closure)
    broken = torch.tensor([torch.nan, 1.0], dtype=torch.float64)[:, None, None]
    left = method.backward(lambda: (closure()[0] * broken, closure()[1]))
    assert left.keys() == whole.keys()
    assert all(torch.isfinite(value) for value in left.values())


@pytest.mark.parametrize("method", ["ensemble", "svgd", "ibdr"])
def test_a_gradient_that_overflows_is_the_scalers_business(method):
    # Finite losses with a tensor for a scale: GradScaler must see the infinite gradient.
    model, closure = problem("vit")
    kind, options = METHODS[method]

    def sharper(logits, targets):
        return 1e3 * logits, targets

    huge = torch.tensor(1e308, dtype=torch.float64)
    kind(model, **options).backward(lambda: sharper(*closure()), scale=huge)
    assert not all(p.grad.isfinite().all() for p in model.particle_parameters())
    with pytest.raises(FloatingPointError, match="particles 0, 1, 2, 3, 4"):
        kind(model, **options).backward(lambda: sharper(*closure()), scale=huge.item())


def test_nonfinite_choices():
    model, _ = problem("mlp")
    with pytest.raises(ValueError, match='"raise", "skip" or "ignore"; got \'stop\''):
        ml.Ensemble(model, nonfinite="stop")


def test_trainable_numbers_of_bellas_clip():
    # CLIP's ViT-B/32, its MLPs, r = 4: 12 blocks of two linears with r (768 + 3072) numbers each.
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch32_clip_224", pretrained=False)
    config = peft.LoraConfig(r=4, target_modules=["mlp.fc1", "mlp.fc2"])
    model = ml.get_particle_model(base, config, 2)
    assert sum(p[0].numel() for p in model.particle_parameters()) == 368_640


@pytest.mark.slow
def test_the_loop_that_the_guide_shows():
    family = FAMILIES["mlp"]
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    scope = {
        "ml": ml,
        "torch": torch,
        "base": family.build(torch.float32),
        "config": family.config(),
    }
    scope["loader"] = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)] * 8
    exec(block("docs/guides/many_particles.md", "## With many particles", "python"), scope)
    model, p = scope["model"], scope["probabilities"]
    assert p.shape == (100, 8, 4) and model.num_particles == 100
    untrained = ml.get_particle_model(family.build(torch.float32), family.config(), 100)
    before = ml.metrics.evaluate(ml.predict(untrained, x).log(), y)["nll"]
    assert ml.metrics.evaluate(ml.predict(model, x).log(), y)["nll"] < 0.9 * before
    torch.testing.assert_close(p, ml.predict(model, scope["x"]))
