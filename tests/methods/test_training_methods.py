"""Refusals and skipped steps of a method, and its checks of parameters and chunks."""

import copy
import inspect
import math
import pickle
import random
import warnings
from functools import partial

import numpy as np
import peft
import pytest
import torch
from torch import nn

import multilora as ml
from one_by_one import trained

K = 4
METHODS = {
    "ensemble": (ml.Ensemble, {}),
    "svgd": (ml.SVGD, {}),
    "ibdr": (ml.IBDR, {}),
    "ibdr-noise": (ml.IBDR, {"sigma": 0.1, "learn_sigma": True, "beta": 1e-3, "noise": "A"}),
    "mutual": (ml.MutualLearning, {"beta": 0.0, "start": 0}),
    "mutual-noise": (
        ml.MutualLearning,
        {"beta": 0.0, "start": 0, "sigma": 0.1, "learn_sigma": True, "kl_weight": 1e-3},
    ),
    "map": (ml.Ensemble, {"prior_precision": 0.1}),
    "sam": (ml.SAM, {}),
    "sgld": (ml.SGLD, {"num_data": 50, "lr": 0.1, "prior_std": 0.5}),
    "variational": (ml.Variational, {"num_data": 50, "sigma": 0.1, "noise": "A"}),
    "variational-sam": (ml.Variational, {"num_data": 50, "sigma": 0.1, "rho": 0.1}),
}
every_method = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    """Classifies; `draw`, called once a forward, disturbs the hidden features."""

    def __init__(self, draw=None):
        super().__init__()
        self.a, self.head, self.draw = nn.Linear(6, 8), nn.Linear(8, 5), draw

    def forward(self, x):
        h = torch.relu(self.a(x))
        if self.draw is not None:
            h = h * self.draw(h.shape[-1])
        return self.head(h)


def make(draw=None):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    # The isolation check does not hold random numbers of all kinds, and is not what is tested.
    model = ml.get_particle_model(
        Net(draw), config, K, head_init="reset", check_isolation=draw is None
    )
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_()
    return model


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 5


def everything(model, method):
    """All that a step may change, as tensors; but draws of the particles are no part of it."""
    kept = [p for p in model.parameters() if method.trains_particles or not p.requires_grad]
    tensors = [*method.params, *method.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
    state = [v for k, v in method.state_dict().items() if k != "step"]
    return [t.clone() for t in (*kept, *grads, *state)]


def same(a, b):
    return all(map(torch.equal, a, b))


@every_method
def test_a_closure_that_returns_something_else(name):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()
    for returned, shown in (
        (lambda: ({"logits": model(x)}, y), "logits dict, targets (8,)"),
        (lambda: (model(x), [0] * 8), "logits (4, 8, 5), targets list"),
        (lambda: (model(x)[0], y), "logits (8, 5), targets (8,)"),
    ):
        with pytest.raises(ValueError, match="the closure must return logits") as error:
            method.backward(returned)
        assert shown in str(error.value)


# ----- ranges

# Other values than these mean nothing to any argument that is a number, a word or a flag.
NONSENSE = [math.nan, math.inf, -math.inf, -1.0, -1, 0, 0.0, "much", None, True, [1.0]]
# (argument): what of NONSENSE it takes. Everything else it must refuse by name.
ZERO = (0, 0.0)
TAKEN = {
    "alpha": ZERO,
    "clip": ZERO,
    "step_size": ZERO,
    "rho": ZERO,
    "lambda_lr": ZERO,
    "sigma": ZERO,
    "beta": ZERO,
    "gamma": ZERO,
    "seed": (0,),
    "learn_sigma": (True,),
    "particle_chunk": (None,),
    "divergence_of": (None,),
    "features": (None,),
    "start": ZERO,
    "total_steps": (None,),
    "prior_precision": ZERO,
    "floor": ZERO,
    "kl_weight": ZERO,
}
NEEDED = {
    ml.SGLD: {"num_data": 9, "lr": 0.1},
    ml.Variational: {"num_data": 9},
    # Without features, for which the network has no tokens.
    ml.MutualLearning: {"beta": 0.0, "start": 0, "total_steps": 9},
}
KINDS = [ml.Ensemble, ml.SVGD, ml.IBDR, ml.SAM, ml.SGLD, ml.Variational, ml.MutualLearning]
every_kind = pytest.mark.parametrize(
    "kind", [partial(kind, **NEEDED.get(kind, {})) for kind in KINDS], ids=lambda k: k.func.__name__
)


def taken(kind, argument, value):
    # A σ of zero has no logarithm to train.
    these = () if (kind, argument) == (ml.Variational, "sigma") else TAKEN.get(argument, ())
    these = ZERO if (kind, argument) == (ml.SGLD, "temperature") else these
    these = (math.inf,) if (kind, argument) == (ml.SGLD, "prior_std") else these
    return any(type(t) is type(value) and t == value for t in these)


@every_kind
def test_every_argument_has_a_range(kind):
    arguments = [p for p in inspect.signature(kind).parameters if p != "model"]
    assert {"particle_chunk", "nonfinite", "loss"} <= set(arguments)
    for argument in arguments:
        for value in NONSENSE:
            options = {argument: value} | ({"sigma": 0.1} if argument == "learn_sigma" else {})
            if taken(kind.func, argument, value):
                kind(make(), **options)
                continue
            with pytest.raises(ValueError, match=argument) as error:
                kind(make(), **options)
            assert repr(value) in str(error.value), (argument, value)


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_bounds": (1.0,)},
        {"lambda_bounds": (0.5, math.nan)},
        {"lambda_bounds": (-1.0, 5.0)},
        {"lambda_bounds": (5.0, 0.5)},
        {"lambda_init": 6.0},
        {"eps": 1e-13},
        {"eps": 1e7},
        {"seed": 2**63},
        {"seed": 1.5},
        {"particle_chunk": 2.0},
    ],
    ids=str,
)
def test_other_ranges_of_ibdr(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ml.IBDR(make(), **options)


def test_numbers_of_numpy_are_numbers():
    method = ml.IBDR(make(), rho=np.float32(0.5), seed=np.int64(3), clip=1)
    assert (type(method.rho), method.rho, method.clip) == (float, 0.5, 1.0)
    x, y = batch()
    method.backward(lambda: (method.model(x), y), scale=np.float64(0.5))


@every_method
def test_the_range_of_scale(name):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()
    wrong = [v for v in NONSENSE if v not in (0, None) or isinstance(v, bool)] + [None]
    wrong += [torch.ones(1), torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(True)]
    for scale in wrong:
        with pytest.raises(ValueError, match="scale must be"):
            method.backward(lambda: (model(x), y), scale=scale)
    assert all(p.grad is None for p in method.params) and method.step == 0
    # A micro-batch that counts nothing.
    method.backward(lambda: (model(x), y), scale=0)
    assert all(not p.grad.any() for p in trained(method)) and method.step == 1
    with pytest.raises(TypeError, match=r"needs a callable .* got Tensor"):
        method.backward(model(x))


# ----- a batch that breaks all particles


@every_method
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("broken", ["input", "gradient"])
def test_a_broken_batch_is_skipped(name, chunk, broken):
    kind, options = METHODS[name]
    model, twin = make(), make()
    method = kind(model, **options, particle_chunk=chunk, nonfinite="skip")
    other = kind(twin, **options, particle_chunk=chunk)
    x, y = batch()
    corrupt = x.clone()
    corrupt[3, 2] = math.nan

    def closure():
        if broken == "input":
            return model(corrupt), y
        logits = model(x)
        if logits.requires_grad:
            logits.register_hook(lambda g: g * math.inf)
        return logits, y

    whole = method.backward(lambda: (model(x), y))
    before = everything(model, method)
    with pytest.warns(UserWarning, match=r"particles 0, 1, 2, 3 .* the batch is skipped") as said:
        stats = method.backward(closure)
    assert said[0].filename == __file__
    assert same(before, everything(model, method)) and method.step == 2
    assert stats.keys() == whole.keys()
    for key, value in stats.items():
        assert value.isnan() == (key not in ("lambda", "sigma", "kl")), key
        assert value.shape == whole[key].shape, key
    # And the run goes on as one that never saw it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.backward(lambda: (model(x), y))
    for _ in range(2):
        other.backward(lambda: (twin(x), y))
    assert same(everything(model, method), everything(twin, other))


@every_method
def test_a_broken_particle_is_reported_where_backward_was_called(name):
    kind, options = METHODS[name]
    model, (x, y), calls = make(), batch(), []
    method = kind(model, **options, nonfinite="skip")
    broken = torch.tensor([1.0, 1.0, math.nan, 1.0])[:, None, None]

    def closure():
        calls.append(None)
        return model(x) * broken, y

    with pytest.warns(UserWarning, match="particle 2 .*; skipped, the others go on") as said:
        method.backward(closure)
    assert [w.filename for w in said] == [__file__]
    # Only where predictions interact has the pass that broke to run again.
    passes = 2 if name in ("variational-sam", "mutual", "mutual-noise") else 1
    assert len(calls) == (3 if isinstance(method, ml.IBDR) else passes)


@every_method
def test_raise_stays(name):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()
    with pytest.raises(FloatingPointError, match=r"particles 0, 1, 2, 3 .* nothing was changed"):
        method.backward(lambda: (model(x * math.nan), y))
    assert method.step == 0


@every_method
def test_a_model_that_is_broken_is_no_broken_batch(name):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options, nonfinite="skip"), batch()
    with torch.no_grad():
        trained(method)[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="parameters of all particles are not finite"):
        method.backward(lambda: (model(x), y))


# ----- parameters that are no longer those that run


def reload(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def reload_one_layer(model):
    head = model.heads()[0][1]["bias"]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p is head:
                setattr(module, name, nn.Parameter(p.detach().clone()))


def freeze_one(model):
    model.particle_parameters()[0].requires_grad_(False)


def train_the_base(model):
    model.base.a.base_layer.weight.requires_grad_(True)


@every_method
@pytest.mark.parametrize("change", [reload, reload_one_layer, freeze_one, train_the_base])
def test_parameters_that_were_exchanged(name, change):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()
    method.backward(lambda: (model(x), y))
    change(model)
    with pytest.raises(RuntimeError, match="are not those that the method was made with"):
        method.backward(lambda: (model(x), y))
    assert method.step == 1


@every_method
def test_inside_some_particles(name):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()
    with (
        model.particles(0, 2),
        pytest.raises(RuntimeError, match=r"inside model\.particles\(\.\.\.\)"),
    ):
        method.backward(lambda: (model(x), y))
    method.backward(lambda: (model(x), y))


@every_method
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("how", ["copy", "no_grad", "detached"])
def test_a_closure_that_reaches_no_parameter(name, chunk, how):
    kind, options = METHODS[name]
    model, other = make(), make()
    # A copy runs all of its particles; a chunk takes the first ones.
    method, (x, y) = kind(model, **options, particle_chunk=chunk), batch()
    before = everything(model, method)

    def closure():
        if how == "copy":
            k = model.num_particles
            return other(x)[:k], y
        if how == "no_grad":
            with torch.no_grad():
                return model(x), y
        return model(x).detach(), y

    with pytest.raises(RuntimeError, match="does not depend on any of the method's parameters"):
        method.backward(closure)
    assert same(before, everything(model, method))


@every_kind
def test_plain_tensors(kind):
    start = torch.randn(K, 8, 5)
    tensors, y = [start.clone().requires_grad_()], torch.arange(8) % 5
    method = kind(tensors)
    method.backward(lambda: (tensors[0] * 1, y))
    # An iterator is read once.
    once = kind(iter(tensors))
    once.backward(lambda: (tensors[0] * 1, y))
    tensors[0] = start.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="are not those that the method was made with"):
        method.backward(lambda: (tensors[0] * 1, y))
    with pytest.raises(RuntimeError, match="does not depend on any"):
        once.backward(lambda: (tensors[0] * 1, y))
    with pytest.raises(ValueError, match=r"require gradients; 1 of 1 do not, .*\(4, 8, 5\)"):
        kind([start])


@every_method
def test_another_dtype_after_the_method_was_made(name):
    kind, options = METHODS[name]
    model = make()
    method = kind(model, **options)
    model.double()
    reference = make().double()
    x, y = batch()
    x = x.double()
    method.backward(lambda: (model(x), y))
    other = kind(reference, **options)
    other.backward(lambda: (reference(x), y))
    for p, q in zip(trained(method), trained(other)):
        if method.trains_particles:
            assert p.grad.dtype == p.dtype and torch.equal(p.grad, q.grad)
        else:  # a posterior keeps its dtype
            assert p.grad.dtype == torch.float32
            torch.testing.assert_close(p.grad, q.grad.float())


# ----- copies


@every_method
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original(name, how):
    kind, options = METHODS[name]
    model = make()
    method, (x, y) = kind(model, **options), batch()

    def train(model, method):
        optimizer = torch.optim.SGD([*model.particle_parameters(), *method.parameters()], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            method.backward(lambda: (model(x), y))
            optimizer.step()

    train(model, method)
    other, its = how((model, method))
    assert its.model is other and its.params[0] is other.particle_parameters()[0]
    train(model, method)
    frozen = everything(other, its)
    train(other, its)
    assert same(everything(model, method), everything(other, its))
    assert not same(frozen, everything(other, its))


def test_a_copy_of_the_method_alone_has_a_model_of_its_own():
    model = make()
    method, (x, y) = ml.IBDR(model, sigma=0.1), batch()
    alone = copy.deepcopy(method)
    with pytest.raises(RuntimeError, match="not a copy of it"):
        alone.backward(lambda: (model(x), y))
    alone.backward(lambda: (alone.model(x), y))
    method.backward(lambda: (model(x), y))
    assert same([p.grad for p in method.params], [p.grad for p in alone.params])


def test_noise_on_factors_that_are_frozen():
    model = make()
    for adapter in model.adapters():
        adapter.lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        ml.IBDR(model, sigma=0.1, noise="A")


# ----- chunks


def mask(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


GENERATOR = torch.Generator().manual_seed(0)
DRAWS = {
    "numpy": lambda n: mask(np.random.rand(n)),
    "python": lambda n: mask([random.random() for _ in range(n)]),
    "torch": lambda n: torch.rand(n),
    "own": lambda n: 1 + 0.05 * torch.rand(n, generator=GENERATOR),
}


@pytest.mark.parametrize("drawn", ["numpy", "python", "torch"])
def test_a_chunk_runs_again_with_the_same_numbers(drawn):
    seen = []

    def draw(n):
        seen.append(DRAWS[drawn](n))
        return seen[-1]

    model = make(draw)
    x, y = batch()
    ml.IBDR(model, particle_chunk=2).backward(lambda: (model(x), y))
    # Two passes of two chunks, which run twice.
    assert len(seen) == 8
    for chunks in (seen[:4], seen[4:]):
        assert same(chunks[:2], chunks[2:])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[4])


def test_a_chunk_that_cannot_be_replayed_is_refused():
    model = make(DRAWS["own"])
    x, y = batch()
    method = ml.IBDR(model, particle_chunk=2)
    before = everything(model, method)
    with pytest.raises(RuntimeError, match="its own generator"):
        method.backward(lambda: (model(x), y))
    assert same(before, everything(model, method)) and method.step == 0
    # Without chunks there is nothing to replay, nor where particles run once.
    ml.IBDR(model).backward(lambda: (model(x), y))
    ml.SVGD(model, particle_chunk=2).backward(lambda: (model(x), y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_other_run(dtype):
    # A difference of this size is allowed between kernels with and without a graph.
    small = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    model = make(lambda n: 1 + small * torch.rand(n, generator=GENERATOR))
    model.to(dtype)
    x, y = batch()
    ml.IBDR(model, particle_chunk=2).backward(lambda: (model(x.to(dtype)), y))


def test_another_batch_for_the_second_run():
    model = make()
    x, y = batch()
    calls = iter(range(9))
    with pytest.raises(RuntimeError, match="the closure must use one batch"):
        ml.IBDR(model, particle_chunk=2).backward(lambda: (model(x + next(calls)), y))
