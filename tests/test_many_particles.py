"""Chunks of particles and the shared trunk: less memory and time, the same gradients."""

import copy

import peft
import pytest
import timm
import torch
from models import FAMILIES, logits_of, particles_of
from readme import block
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import multilora as ml
from multilora.methods.passes import gradients
from multilora.trunk import SharedForward

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
    "ibdr-cross": (ml.IBDR, {"divergence": "cross", "loss": "ensemble", "kind": "det", "alpha": 1}),
}


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
    model.zero_grad()
    if isinstance(method, ml.IBDR):
        method.sigma.grad = None
    stats = method.backward(closure, scale=0.5)
    grads = [p.grad.clone() for p in model.particle_parameters()]
    grads += [p.grad.clone() for p in method.parameters()]
    state = [v for v in method.state_dict().values() if isinstance(v, torch.Tensor)]
    return grads, [*stats.values(), method.particle_nll, *state]


def assert_same(got, expected, tolerance):
    for a, b in zip(got[0], expected[0], strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["vit", "llama", "cnn"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_have_the_gradients_of_the_whole(family, method, chunk):
    model, closure = problem(family)
    kind, options = METHODS[method]
    expected = step(model, kind(model, **options), closure)
    got = step(model, kind(model, **options, particle_chunk=chunk), closure)
    assert_same(got, expected, max(FAMILIES[family].tolerance, 1e-9))


@pytest.mark.parametrize("method", ["ensemble", "svgd", "ibdr"])
@pytest.mark.filterwarnings("ignore:IBDR. every particle has its own")
def test_chunks_of_particles_with_their_own_batches(method):
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(), K).train()
    x = family.particle_inputs(K, batch=4)["x"]
    y = torch.randint(5, (K, 4))

    def closure():
        return model(x, per_particle=True), y

    kind, options = METHODS[method]
    expected = step(model, kind(model, **options), closure)
    assert_same(step(model, kind(model, **options, particle_chunk=2), closure), expected, 1e-9)


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
        z, _ = passes.predict(closure)
        torch.testing.assert_close(z.detach(), logits)
        (dz,) = torch.autograd.grad(cross_entropy(z.flatten(0, 1), targets.repeat(K)), z)
        got = passes.pull_back(closure, dz)
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


# --- the shared trunk ----------------------------------------------------------------------------


class Counted(nn.Module):
    """Counts the rows that a module is given."""

    def __init__(self, module, rows):
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, x):
        self.rows.append(len(x))
        return self.module(x)


def tower(depth=4, between=None):
    """Blocks of which the last two are adapted, and the rows that each block was given."""
    rows = [[] for _ in range(depth)]
    blocks = [
        Counted(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), rows[i]).double() for i in range(depth)
    ]
    body = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = body

        def forward(self, x):
            for layer in self.blocks.values():
                x = layer(x) if between is None else between(layer(x))
            return x

    config = peft.LoraConfig(r=2, target_modules=r"blocks\.[23]\.module\.0")
    model = ml.get_particle_model(Tower(), config, K)
    for adapter in model.adapters():
        nn.init.normal_(adapter.lora_B)
    return model.train(), rows


def test_trunk_runs_once():
    model, rows = tower()
    x = torch.randn(3, 6, dtype=torch.float64)
    first = model(x)
    for r in rows:
        r.clear()
    assert torch.equal(model(x), first)
    assert rows == [[3], [3], [3 * K], [3 * K]]
    for r in rows:
        r.clear()
    model.share_trunk = False
    torch.testing.assert_close(model(x), first)
    assert rows == [[3 * K]] * 4
    for r in rows:
        r.clear()
    model.share_trunk = True
    model(x.expand(K, 3, 6), per_particle=True)
    assert rows == [[3 * K]] * 4


def test_trunk_runs_once_for_all_passes_and_chunks_of_a_step():
    model, rows = tower()
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.arange(3)
    method = ml.IBDR(model, particle_chunk=2)
    method.backward(lambda: (model(x), y))
    for r in rows:
        r.clear()
    method.backward(lambda: (model(x), y))
    assert rows[:2] == [[3], [3]]
    assert len(rows[2]) == 2 * 2 * 3
    # Nothing is remembered from one step to the next, or when the input changes.
    for r in rows:
        r.clear()
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            x.add_(1)
        return model(x), y

    ml.IBDR(model).backward(closure)
    assert rows[0] == [3, 3]


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "bert", "cnn"])
@pytest.mark.parametrize("method", ["ensemble", "svgd", "ibdr"])
def test_trunk_changes_nothing(family, method):
    lora = {
        "vit": {"target_modules": r"blocks\.1\..*(qkv|fc1)"},
        "llama": {"target_modules": r".*layers\.1.*(q_proj|down_proj)"},
        "gpt2": {"target_modules": r".*h\.1\..*c_attn"},
        "bert": {"target_modules": r".*layer\.1\..*query"},
        "cnn": {"target_modules": ["point"]},
    }[family]
    model, closure = problem(family, **lora)
    shared = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), SharedForward)]
    kind, options = METHODS[method]
    got = [step(model, kind(model, **options), closure) for _ in range(2)]
    used = {m for m in shared if any(v is not None for v in m.forward.known.values())}
    assert used
    model.share_trunk = False
    expected = step(model, kind(model, **options), closure)
    for g in got:
        assert_same(g, expected, max(FAMILIES[family].tolerance, 1e-9))
    chunked = step(model, kind(model, **options, particle_chunk=2), closure)
    model.share_trunk = True
    assert_same(step(model, kind(model, **options, particle_chunk=2), closure), chunked, 1e-6)


@pytest.mark.parametrize("drawn", ["module", "functional", "stochastic depth"])
def test_what_is_random_is_not_shared(drawn):
    # Particles that would each have their own mask must not get one mask for all.
    dropout = nn.Dropout(0.5)
    between = {
        "module": dropout,
        "functional": lambda x: nn.functional.dropout(x, 0.5, training=model.training),
        "stochastic depth": lambda x: x * (torch.rand(len(x), 1) > 0.5) if model.training else x,
    }[drawn]
    model, rows = tower(between=between)
    if drawn == "module":
        # One block holds the dropout, and would be shared as a whole.
        model, rows = tower()
        model.base.blocks["0"].module.append(dropout)
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(2):
        torch.manual_seed(3)
        got = model(x)
        model.share_trunk = False
        torch.manual_seed(3)
        assert torch.equal(got, model(x))
        model.share_trunk = True
    assert not torch.equal(got[0], got[1])
    for r in rows:
        r.clear()
    model.eval()
    dropout.eval()
    model(x)
    model(x)
    assert rows[1][-1] == 3


class Told(nn.Module):
    """A linear whose outputs depend on a flag."""

    def __init__(self):
        super().__init__()
        self.linear, self.always_both = nn.Linear(6, 6), False

    def forward(self, x, both=False, mix=False, sign=1.0):
        y = self.linear(x) * sign
        if mix:
            y = y - y.mean(0)
        return (y, x) if both or self.always_both else y


class Asked(nn.Module):
    """Hands on what it is told to a module of the trunk."""

    def __init__(self):
        super().__init__()
        self.told, self.last = Told(), nn.Linear(6, 4)

    def forward(self, x, plus=None, minus=None, **flags):
        x = x if plus is None else x + plus
        x = x if minus is None else x - minus
        y = self.told(x, **flags)
        return self.last(y[0] + y[1] if isinstance(y, tuple) else y)


def asked():
    model = ml.get_particle_model(Asked(), peft.LoraConfig(r=2, target_modules=["last"]), K)
    for adapter in model.adapters():
        nn.init.normal_(adapter.lora_B)
    return model, torch.randn(3, 6)


def unshared(model, *args, **kwargs):
    model.share_trunk = False
    try:
        return model(*args, **kwargs)
    finally:
        model.share_trunk = True


def test_modules_are_tried_again_with_other_flags():
    model, x = asked()
    for flags in ({}, {"both": True}, {"mix": True}, {"mix": False}, {"both": True}):
        torch.testing.assert_close(model(x, **flags), unshared(model, x, **flags))
    # Ever new numbers end the trials.
    for i in range(100):
        torch.testing.assert_close(model(x, sign=0.1 * i), unshared(model, x, sign=0.1 * i))
    assert 5 < len(model.base.told.forward.known) < 100


def test_a_module_whose_outputs_change_their_form_is_not_shared():
    model, x = asked()
    model(x)
    model.base.told.always_both = True
    torch.testing.assert_close(model(x), unshared(model, x))


def test_inputs_are_remembered_by_name():
    model, x = asked()
    z = torch.randn(3, 6)

    def closure():
        logits = torch.cat([model(x=x, plus=z), model(x=x, minus=z)], 1)
        return logits, torch.arange(6) % 4

    for chunk in (None, 2):
        shared = step(model, ml.IBDR(model, particle_chunk=chunk), closure)
        model.share_trunk = False
        assert_same(shared, step(model, ml.IBDR(model, particle_chunk=chunk), closure), 1e-5)
        model.share_trunk = True


def test_hooks_inside_the_trunk_see_all_rows():
    model, rows = tower()
    x = torch.randn(3, 6, dtype=torch.float64)
    seen = []
    # Of a module of the trunk itself and of one inside of it, before the first forward and after.
    model.base.blocks["1"].register_forward_hook(lambda m, args, y: seen.append(len(y)))
    model(x)
    hook = (
        model.base.blocks["0"]
        .module[1]
        .register_forward_hook(lambda m, args, y: seen.append(len(y)))
    )
    for r in rows:
        r.clear()
    model(x)
    assert seen == [3 * K] * 3 and rows[:2] == [[3 * K], [3 * K]]
    hook.remove()
    model(x)
    assert rows[:2] == [[3 * K, 3], [3 * K, 3]]


def test_attentions_are_those_of_all_particles():
    base = FAMILIES["llama"].build()
    base.set_attn_implementation("eager")
    config = FAMILIES["llama"].config(target_modules=r".*layers\.1.*(q_proj|down_proj)")
    model = particles_of(base, config, K)
    inputs = FAMILIES["llama"].inputs(batch=2)
    model(**inputs)
    first, second = (model(**inputs, output_attentions=True).attentions for _ in range(2))
    expected = unshared(model, **inputs, output_attentions=True).attentions
    assert len(first) == len(second) == len(expected) == 2
    for triple in zip(first, second, expected):
        assert all(t.shape == (K, 2, *t.shape[2:]) for t in triple)
        torch.testing.assert_close(triple[0], triple[2])
        torch.testing.assert_close(triple[1], triple[2])


def test_modules_that_mix_examples_or_write_into_their_input_are_not_shared():
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0)) * len(x)

    class Writing(nn.Linear):
        def forward(self, x):
            return super().forward(x.add_(1))

    for kind in (Mixing, Writing):
        base = nn.Sequential(kind(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["2"]), K)
        x = torch.randn(3, 6, dtype=torch.float64)
        got = [model(x.clone()) for _ in range(2)]
        model.share_trunk = False
        expected = model(x.clone())
        assert torch.equal(got[0], expected) and torch.equal(got[1], expected)


def test_trunk_in_inference_mode():
    model, _ = tower()
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        got = model(x)
        z = x.clone()
    torch.testing.assert_close(got, model(x))
    ml.IBDR(model, particle_chunk=2).backward(lambda: (model(z), torch.arange(3)))


def test_a_module_of_two_parents_is_shared_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(6, 6)
            self.inner = nn.Sequential(self.shared)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.inner(x) + self.shared(x))

    model = ml.get_particle_model(Twice(), peft.LoraConfig(r=2, target_modules=["head"]), K)
    x = torch.randn(3, 6)
    got = [model(x), model(x)]
    model.share_trunk = False
    for y in got:
        torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("how", ["mode", "rate"])
def test_dropout_that_begins_later_is_not_shared(how):
    model, _ = tower()
    dropout = nn.Dropout(0.5 if how == "mode" else 0.0)
    model.base.blocks["0"].module.append(dropout)
    model.train(how == "rate")
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x), model(x)
    if how == "mode":
        dropout.train()
    dropout.p = 0.5
    for _ in range(2):
        torch.manual_seed(3)
        got = model(x)
        model.share_trunk = False
        torch.manual_seed(3)
        assert torch.equal(got, model(x))
        model.share_trunk = True


def test_numbers_from_another_generator_are_seen():
    generator = torch.Generator()

    def noisy(x):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    model, _ = tower(between=noisy)
    # All blocks adapted but for the first, so that noise comes right before a particle layer.
    x = torch.randn(3, 6, dtype=torch.float64)
    model.base.blocks["1"] = nn.Identity()
    for _ in range(2):
        generator.manual_seed(0)
        got = model(x)
        model.share_trunk = False
        generator.manual_seed(0)
        torch.testing.assert_close(got, model(x))
        model.share_trunk = True


def test_a_module_that_counts_is_not_shared_and_counts_right():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    base = nn.Sequential(Counting(), nn.Linear(6, 4))
    model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["1"]), K)
    for _ in range(3):
        model(torch.randn(3, 6))
    assert base[0].calls == 3


@pytest.mark.parametrize("method", ["ensemble", "ibdr"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_trunk_under_checkpointing(method, chunk):
    # Inputs that require a gradient are those of one graph, and of no other chunk's.
    kind, options = METHODS[method]
    model, closure = problem("llama", target_modules=r".*layers\.1.*(q_proj|down_proj)")
    expected = step(model, kind(model, **options), closure)
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.base.enable_input_require_grads()
    assert_same(step(model, kind(model, **options, particle_chunk=chunk), closure), expected, 1e-6)


def test_checkpointed_tower_repeats_what_it_did():
    model, _ = tower()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    plain = model(x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    for layer in model.base.blocks.values():
        # Each runs under a checkpoint, whose second run is outside of the model's forward.
        layer.module = _Checkpointed(layer.module)
    got = model(x)
    torch.testing.assert_close(got, plain)
    (grad,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(grad, expected)


class _Checkpointed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


def test_the_base_can_be_called_by_itself():
    # Rows of one's own, outside of the particle model's forward: nothing is taken for shared.
    model, _ = tower()
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x)
    rows = torch.randn(3 * K, 6, dtype=torch.float64)
    expected = model(rows.view(K, 3, 6), per_particle=True)
    torch.testing.assert_close(model.base(rows).view(K, 3, 6), expected)


def test_a_shared_model_can_be_copied():
    model, _ = tower()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    twin = copy.deepcopy(model)
    twin.adapters()[0].lora_B.data.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)
    for module in twin.modules():
        shared = module.__dict__.get("forward")
        assert shared is None or (shared.module is module and shared.rows is twin.rows)


# --- particles that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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
    if "sigma" in options:
        # The noise of the same particles.
        noise = kind(model, **options)._draw_noise()[rest]
        reference._draw_noise = lambda: noise
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
    with torch.no_grad():
        model.adapters()[0].lora_B[0] = torch.nan
    left = method.backward(closure)
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


def test_the_loop_that_the_readme_shows():
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
    exec(block("### With many particles", "python"), scope)
    model, p = scope["model"], scope["probabilities"]
    assert p.shape == (100, 8, 4) and model.num_particles == 100
    untrained = ml.get_particle_model(family.build(torch.float32), family.config(), 100)
    before = ml.metrics.evaluate(ml.predict(untrained, x).log(), y)["nll"]
    assert ml.metrics.evaluate(ml.predict(model, x).log(), y)["nll"] < 0.9 * before
    torch.testing.assert_close(p, ml.predict(model, scope["x"]))
