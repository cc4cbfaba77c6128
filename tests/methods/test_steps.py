"""K particles step as K runs do: clipping, every optimizer, accumulation, copies of a model."""

import copy
import functools
import io
import tempfile

import pytest
import timm.optim
import torch
import torch.optim.swa_utils as swa
import transformers
from timm.utils import ModelEmaV3
from torch import nn

import multilora as ml
from models import FAMILIES, load_peft, particle_tensors, particles_of, peft_tensors
from multilora.optim import EachParticle, clip_grad_norm_, is_elementwise, separate_parameters

K = 4
STEPS = 10
# In float64, ten steps that amplify roundings of 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def data(steps=STEPS, micro=2):
    """Micro-batches whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(steps):
        for m in range(micro):
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 4, (8,), generator=generator)
            y[: (3 * step + 5 * m) % 7] = -100
            made.append((x, y))
    return [made[i : i + micro] for i in range(0, len(made), micro)]


def start(family="mlp", only_matrices=False):
    """K particles of a family, the same at every call."""
    return copy.deepcopy(made(family, only_matrices)[0])


def alone(family="mlp", only_matrices=False):
    """The same particles, each a PEFT model of its own."""
    return copy.deepcopy(made(family, only_matrices)[1])


@functools.cache
def made(family, only_matrices):
    base = FAMILIES[family].build()
    # Adapters alone: every trainable tensor is a matrix, as Muon wants it.
    changes = {"modules_to_save": None} if only_matrices else {}
    model = particles_of(base, FAMILIES[family].config(**changes), K)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, [load_peft(base, f"{folder}/particle_{k}") for k in range(K)]


def train(model, step, steps=None):
    method = ml.Ensemble(model)
    for micro_batches in steps or data():
        labels = sum((y != -100).sum().item() for _, y in micro_batches)
        for x, y in micro_batches:
            share = (y != -100).sum().item() / labels
            method.backward(lambda x=x, y=y: (model(x), y), scale=share)
        step()


def train_alone(models, make, clip=None, steps=None):
    """PEFT models, each in a run of its own -> their tensors, stacked."""
    each = []
    for model in models:
        optimizer = make(list(peft_tensors(model).values()))
        for micro_batches in steps or data():
            labels = sum((y != -100).sum().item() for _, y in micro_batches)
            for x, y in micro_batches:
                loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
                (loss / labels).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        each.append({name: t.detach() for name, t in peft_tensors(model).items()})
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def assert_equal_runs(model, expected, before):
    tensors = particle_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.detach(), expected[name].view(tensor.shape), **CLOSE)
    moved = [(a - b).abs().amax() for a, b in zip(tensors.values(), before)]
    assert max(moved) > 1e-4


def values(model):
    return [t.detach().clone() for t in particle_tensors(model).values()]


ELEMENTWISE = {
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}
PER_TENSOR = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers' adafactor": lambda p: transformers.Adafactor(
        p, lr=1e-2, scale_parameter=False, relative_step=False
    ),
    "relative adafactor": lambda p: transformers.Adafactor(p),
    "lamb": lambda p: timm.optim.Lamb(p, lr=1e-2, max_grad_norm=None),
    "lars": lambda p: timm.optim.Lars(p, lr=0.1, momentum=0.9),
    "novograd": lambda p: timm.optim.NvNovoGrad(p, lr=1e-2),
    "adamp": lambda p: timm.optim.AdamP(p, lr=1e-2),
    "sgdp": lambda p: timm.optim.SGDP(p, lr=1e-2, momentum=0.9),
}
# Over matrices alone.
OF_MATRICES = {
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "timm's muon": lambda p: timm.optim.Muon(p, lr=1e-2),
}
ALL = ELEMENTWISE | PER_TENSOR | OF_MATRICES


# --- clipping ------------------------------------------------------------------------------------


def with_gradients(scales=(1.0, 100.0, 1e-3, 1.0)):
    model = start()
    generator = torch.Generator().manual_seed(3)
    for p in model.particle_parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad *= torch.tensor(scales, dtype=p.dtype).view(-1, *[1] * (p.ndim - 1))
    return model


def torchs_own(model, max_norm, norm_type=2.0):
    """What torch makes of every particle's gradients, by itself."""
    norms, grads = [], []
    for k in range(K):
        alone = [nn.Parameter(p.detach()[k].clone()) for p in model.particle_parameters()]
        for q, p in zip(alone, model.particle_parameters()):
            q.grad = p.grad[k].clone()
        norms.append(nn.utils.clip_grad_norm_(alone, max_norm, norm_type))
        grads.append([q.grad for q in alone])
    return torch.stack(norms), [torch.stack(parts) for parts in zip(*grads)]


def grads_of(model):
    return [p.grad for p in model.particle_parameters()]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
def test_every_particle_is_clipped_as_torch_would(norm_type):
    model = with_gradients()
    norms, grads = torchs_own(model, 1.0, norm_type)
    assert (norms > 1).any() and (norms < 1).any()
    torch.testing.assert_close(clip_grad_norm_(model, 1.0, norm_type), norms, **CLOSE)
    for got, expected in zip(grads_of(model), grads):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_broken_particle_leaves_the_others_alone(bad):
    model = with_gradients()
    model.particle_parameters()[1].grad[2, 0, 0] = bad
    norms, grads = torchs_own(model, 1.0)
    before = [g.clone() for g in grads_of(model)]
    with pytest.raises(RuntimeError, match=r"particles \[2\] are \[(inf|nan)\]"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, grads_of(model)))
    torch.testing.assert_close(clip_grad_norm_(model, 1.0), norms, equal_nan=True)
    for got, expected in zip(grads_of(model), grads):
        torch.testing.assert_close(got, expected, equal_nan=True, **CLOSE)
        assert got[[0, 1, 3]].isfinite().all()


def test_what_can_be_clipped():
    model = with_gradients()
    expected = torchs_own(model, torch.inf)[0]
    before = [g.clone() for g in grads_of(model)]
    forms = [
        model,
        torch.compile(model, backend="eager"),
        ml.Ensemble(model),
        model.particle_parameters(),
        model.parameters(),
    ]
    for form in forms:
        torch.testing.assert_close(clip_grad_norm_(form, torch.inf), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, grads_of(model)))
    # Some tensors may have no gradient.
    model.particle_parameters()[0].grad = None
    clip_grad_norm_(model, 0.0)
    assert not any(g.any() for g in grads_of(model)[1:])
    model.zero_grad()
    assert torch.equal(clip_grad_norm_(model, 1.0), torch.zeros(K, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: clip_grad_norm_(m, -1.0), ValueError, "max_norm >= 0"),
        (lambda m: clip_grad_norm_(m, float("nan")), ValueError, "max_norm >= 0"),
        (lambda m: clip_grad_norm_(m, 1.0, 0), ValueError, "norm_type > 0"),
        (lambda m: clip_grad_norm_(nn.Sequential(), 1.0), TypeError, "got Sequential"),
        (lambda m: clip_grad_norm_([], 1.0), ValueError, "at least one"),
        (lambda m: clip_grad_norm_(separate_parameters(m), 1.0), TypeError, "no particle axis"),
    ],
)
def test_what_cannot(call, error, message):
    with pytest.raises(error, match=message):
        call(with_gradients())


def test_stacked_tensors_of_two_numbers_of_particles():
    tensors = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 2))]
    for t in tensors:
        t.grad = torch.ones_like(t)
    with pytest.raises(ValueError, match=r"one K; got .*\(3, 2\), \(2, 2\)"):
        clip_grad_norm_(tensors, 1.0)


# --- optimizers ----------------------------------------------------------------------------------


def test_every_optimizer_of_torch_is_known():
    """A new one has to be put in its place: on stacked tensors, or on separate ones."""
    names = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    names -= {"Optimizer", "LBFGS", "SparseAdam"}
    tried = {type(make([nn.Parameter(torch.ones(2, 2))])) for make in ALL.values()}
    assert {getattr(torch.optim, name) for name in names} <= tried
    for name, make in ALL.items():
        kind = type(make([nn.Parameter(torch.ones(2, 2))]))
        assert is_elementwise(kind) == (name in ELEMENTWISE)
    assert not is_elementwise(type("Own", (torch.optim.AdamW,), {}))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_optimizer_on_stacked_tensors(name):
    model, make = start(), ELEMENTWISE[name]
    before, expected = values(model), train_alone(alone(), make, clip=1.0)
    optimizer = make(model.particle_parameters())

    def step():
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    train(model, step)
    assert_equal_runs(model, expected, before)


FORMS = [(name, "one") for name in (*PER_TENSOR, *OF_MATRICES, "sgd", "adamw fused")]
FORMS += [(name, "each") for name in ("adafactor", "lamb", "muon", "adamw")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_an_optimizer_on_separate_parameters(name, form):
    model, make = start(only_matrices=name in OF_MATRICES), ALL[name]
    before = values(model)
    expected = train_alone(alone(only_matrices=name in OF_MATRICES), make, clip=1.0)
    leaves = separate_parameters(model)
    optimizer = make(leaves) if form == "one" else EachParticle(leaves, make)

    def step():
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in (*leaves, *model.particle_parameters()))

    train(model, step)
    assert_equal_runs(model, expected, before)


def test_what_an_optimizer_computes_over_all_its_parameters():
    """Lamb clips the norm of all that it is given: one for each particle is right."""
    model = start()
    before = values(model)

    def make(params):
        return timm.optim.Lamb(params, lr=1e-2, max_grad_norm=0.1)

    expected = train_alone(alone(), make)
    optimizer = EachParticle(model, make)

    def step():
        optimizer.step()
        model.zero_grad()

    train(model, step)
    assert_equal_runs(model, expected, before)


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_convolutions_have_the_shape_that_peft_gives_them(name):
    model, make = start("cnn").eval(), PER_TENSOR[name]
    images = torch.Generator().manual_seed(0)
    steps = [
        [(torch.randn(4, 3, 8, 8, generator=images, dtype=torch.float64), torch.arange(4))]
        for _ in range(STEPS)
    ]
    before, expected = values(model), train_alone(alone("cnn"), make, steps=steps)
    optimizer = make(separate_parameters(model))

    def step():
        optimizer.step()
        optimizer.zero_grad()

    train(model, step, steps)
    assert_equal_runs(model, expected, before)


def test_a_learning_rate_for_each_particle():
    model, rates = start(), [1e-1, 1e-2, 0.0, 1e-3]
    leaves, before = separate_parameters(model), values(model)
    assert [leaf.particle for leaf in leaves] == [*range(K)] * len(model.particle_parameters())
    groups = [{"params": leaves[k::K], "lr": rate} for k, rate in enumerate(rates)]
    optimizer = torch.optim.AdamW(groups)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    train(model, step)
    given = iter(rates)
    expected = train_alone(alone(), lambda p: torch.optim.AdamW(p, lr=next(given)))
    assert_equal_runs(model, expected, before)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, values(model)))


# --- separate parameters -------------------------------------------------------------------------


def one_backward(model, scale=1.0):
    x, y = data()[0][0]
    ml.Ensemble(model).backward(lambda: (model(x), y), scale=scale)


def test_leaves_are_parts_of_the_stacked_tensors():
    model = start()
    leaves = separate_parameters(model)
    stacked = model.particle_parameters()
    assert len(leaves) == K * len(stacked)
    for i, leaf in enumerate(leaves):
        part = stacked[i // K][i % K]
        assert leaf.stacked is stacked[i // K]
        assert leaf.data_ptr() == part.data_ptr() and leaf.shape == part.shape
        assert leaf.is_leaf and leaf.requires_grad and leaf.grad is None
        assert type(leaf + leaf) is torch.Tensor
    one_backward(model)
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, stacked[i // K].grad[i % K])
        leaf.grad.mul_(2)  # in place, as unscaling does it
        assert torch.equal(leaf.grad, stacked[i // K].grad[i % K])
    loose = separate_parameters([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))])
    assert [tuple(p.shape) for p in loose] == [(3,), (3,), (), ()]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_gradients_are_cleared_from_both_sides(set_to_none, of):
    model = start()
    leaves = separate_parameters(model)
    optimizer = torch.optim.Adafactor(leaves)
    for times in (1, 2, 2):
        for _ in range(times):
            one_backward(model)
        total = [leaf.grad.clone() for leaf in leaves]
        cleared = model if of == "model" else optimizer
        cleared.zero_grad(set_to_none=set_to_none)
        for p in (*model.particle_parameters(), *leaves):
            assert p.grad is None if set_to_none else not p.grad.any()
        # Nothing is left of what was cleared.
        for _ in range(times):
            one_backward(model)
        for leaf, grad in zip(leaves, total):
            torch.testing.assert_close(leaf.grad, grad, **CLOSE)
        model.zero_grad()


def test_gradients_of_some_particles_are_cleared():
    model = start()
    leaves = separate_parameters(model)
    one_backward(model)
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves[1::K]:
        leaf.grad = None
    assert all(leaf.grad is None for leaf in leaves[1::K])
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves[0::K], grads[0::K]))
    one_backward(model)
    for i, leaf in enumerate(leaves):
        torch.testing.assert_close(leaf.grad, grads[i] * (1 if i % K == 1 else 2), **CLOSE)
    # Cleared, then anew: what was once None must not stay so.
    leaves[0].grad = None
    model.zero_grad()
    for times in (1, 2):
        for _ in range(times):
            one_backward(model)
        torch.testing.assert_close(leaves[0].grad, grads[0] * times, **CLOSE)
        model.zero_grad()


def test_a_gradient_can_be_given():
    model = start()
    leaves = separate_parameters(model)
    leaves[1].grad = torch.ones_like(leaves[1])
    assert torch.equal(leaves[1].grad, torch.ones_like(leaves[1]))
    assert [leaf.grad is None for leaf in leaves[:3]] == [True, False, True]
    assert torch.equal(model.particle_parameters()[0].grad[1], leaves[1].grad)
    assert not model.particle_parameters()[0].grad[0].any()
    # A penalty on the leaf itself comes to the rest.
    one_backward(model)
    before = leaves[1].grad.clone()
    (leaves[1].square().sum() + leaves[2].square().sum()).backward()
    torch.testing.assert_close(leaves[1].grad, before + 2 * leaves[1].detach())
    assert torch.equal(model.particle_parameters()[0].grad[1], leaves[1].grad)


@pytest.mark.parametrize("form", ["one", "each"])
def test_a_gradient_scaler(form):
    results = []
    for scaled in (False, True):
        model = start()
        leaves = separate_parameters(model)

        def make(params):
            return torch.optim.Adafactor(params, lr=1e-2)

        optimizer = make(leaves) if form == "one" else EachParticle(leaves, make)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        method = ml.Ensemble(model)
        for (x, y), *_ in data(4):
            scale = scaler.scale(torch.ones(()))
            method.backward(lambda model=model, x=x, y=y: (model(x), y), scale=scale)
            scaler.unscale_(optimizer)
            clip_grad_norm_(model, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        # A gradient that overflows is no step.
        before = values(model)
        if scaled:
            one_backward(model)
            leaves[3].grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**11
            assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
        results.append(before)
    for plain, scaled in zip(*results):
        torch.testing.assert_close(plain, scaled, **CLOSE)


@pytest.mark.parametrize("form", ["one", "each"])
def test_the_state_of_an_optimizer(form):
    def make(params):
        return torch.optim.Adafactor(params, lr=1e-2)

    def optimizer_of(model):
        leaves = separate_parameters(model)
        return make(leaves) if form == "one" else EachParticle(leaves, make)

    def steps(model, optimizer, number):
        for _ in range(number):
            one_backward(model)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    model = start()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps(model, optimizer, 3)
    file, weights = io.BytesIO(), copy.deepcopy(model.state_dict())
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state, rate = torch.load(file, weights_only=True), optimizer.param_groups[0]["lr"]
    assert rate == 1e-2 / 8
    steps(model, optimizer, 3)

    other = start()
    other.load_state_dict(weights)
    resumed = optimizer_of(other)
    resumed.load_state_dict(state)
    assert {group["lr"] for group in resumed.param_groups} == {rate}
    scheduler = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.5)
    for group in resumed.param_groups:
        group["lr"] = rate
    steps(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other)))
    if form == "each":
        with pytest.raises(ValueError, match="1 particles' optimizers; this is of 4"):
            resumed.load_state_dict({"optimizers": state["optimizers"][:1]})


def moves(model, optimizer):
    before = values(model)
    one_backward(model)
    optimizer.step()
    optimizer.zero_grad()
    return not any(torch.equal(a, b) for a, b in zip(before, values(model)))


def test_leaves_follow_the_model():
    model = start()
    leaves = separate_parameters(model)
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    # New tensors under the same names, and new memory under the same tensors.
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert moves(model, optimizer)
    model.float()
    model.double()
    assert moves(model, optimizer)
    assert leaves[0].data_ptr() == model.particle_parameters()[0].data_ptr()
    with model.particles(0, 1), pytest.raises(RuntimeError, match="outside of model"):
        _ = leaves[0].grad
    assert moves(model, optimizer)
    del model
    with pytest.raises(RuntimeError, match="model of these separate parameters is gone"):
        optimizer.step()


@pytest.mark.parametrize("form", ["one", "each"])
def test_copies_with_and_without_the_model(form):
    def make(params):
        return torch.optim.Adafactor(params, lr=1e-2)

    model = start()
    leaves = separate_parameters(model)
    optimizer = make(leaves) if form == "one" else EachParticle(leaves, make)
    assert moves(model, optimizer)
    twin, its = copy.deepcopy((model, optimizer))
    before = values(model)
    assert moves(twin, its)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
    one_backward(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(twin), values(model)))
    with pytest.raises(TypeError, match="copy it with them"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(optimizer, io.BytesIO())


def test_one_optimizer_for_each_particle_refuses():
    model = start()
    with pytest.raises(TypeError, match="needs separate parameters"):
        EachParticle(model.particle_parameters(), torch.optim.Adafactor)
    with pytest.raises(TypeError, match="needs separate parameters"):
        EachParticle([], torch.optim.Adafactor)
    each = EachParticle(model, torch.optim.Adafactor)
    assert len(each.optimizers) == K == len(each.param_groups)
    with pytest.raises(TypeError, match="when it is made"):
        each.add_param_group({"params": separate_parameters(model)})
    with pytest.raises(TypeError, match="no closure"):
        each.step(lambda: None)
    each.train(), each.eval()


# --- copies and averages of a model --------------------------------------------------------------


def averages(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": torch.load(file, weights_only=False),
        "AveragedModel": swa.AveragedModel(model).module,
        "ModelEmaV3": ModelEmaV3(model).module,
    }


@pytest.mark.parametrize("family", ["mlp", "vit", "llama"])
def test_copies_are_models_of_their_own(family):
    model = start(family)
    inputs = FAMILIES[family].inputs(batch=3)
    expected = ml.predict(model, inputs, class_axis=-1)
    copies = averages(model)
    with torch.no_grad():
        for p in model.particle_parameters():
            p.zero_()
    assert not torch.allclose(ml.predict(model, inputs, class_axis=-1), expected, atol=1e-3)
    for other in copies.values():
        torch.testing.assert_close(ml.predict(other, inputs, class_axis=-1), expected, **CLOSE)


def test_a_copied_model_trains_with_a_separate_optimizer():
    model = start()
    twins = [model, *averages(model).values()]
    for twin in twins:
        for p in twin.parameters():
            p.requires_grad_(any(p is q for _, q in trainable(twin)))
        optimizer = torch.optim.Adafactor(separate_parameters(twin), lr=1e-2)
        for _ in range(3):
            one_backward(twin)
            optimizer.step()
            optimizer.zero_grad()
    for twin in twins[1:]:
        for a, b in zip(values(model), values(twin)):
            torch.testing.assert_close(a, b, **CLOSE)


def trainable(model):
    """Averaged models come frozen."""
    return particle_tensors(model).items()


def test_weight_averages_are_each_particles():
    model = start()
    average = swa.AveragedModel(model)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.5)
    first, seen = values(model), []
    for (x, y), *_ in data(3):
        ml.Ensemble(model).backward(lambda x=x, y=y: (model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        ema.update(model)
        seen.append(values(model))
    for i, p in enumerate(values(average.module)):
        torch.testing.assert_close(p, sum(s[i] for s in seen) / 3, **CLOSE)
    for i, p in enumerate(values(ema.module)):
        expected = first[i]
        for s in seen:
            expected = 0.9 * expected + 0.1 * s[i]
        torch.testing.assert_close(p, expected, **CLOSE)
    # The average of every particle's weights is a model that predicts by them.
    x = data()[0][0][0]
    torch.testing.assert_close(average(x), average.module(x), **CLOSE)
    assert average(x).shape == (K, 8, 4)


def test_update_bn_does_not_touch_frozen_statistics():
    model = start("cnn")
    average = swa.AveragedModel(model)
    inputs = FAMILIES["cnn"].inputs(batch=4)["x"]
    expected = ml.predict(average.module, inputs)
    # It resets what the base then never measures anew.
    with pytest.raises(RuntimeError, match="frozen"):
        swa.update_bn([inputs], average)
    torch.testing.assert_close(ml.predict(average.module, inputs), expected, **CLOSE)
    # Without BatchNorm there is nothing to measure.
    swa.update_bn([data()[0][0][0]], swa.AveragedModel(start()))
