"""Every optimizer takes K particles the steps of K runs."""

import pytest
import timm.optim
import torch
import transformers
from torch import nn

from models import values
from multilora.optim import EachParticle, clip_grad_norm_, is_elementwise, separate_parameters
from separate_runs import STEPS, K, alone, assert_equal_runs, start, train, train_alone
from tiers import sampled

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


@pytest.mark.slow
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


@pytest.mark.parametrize(("name", "form"), sampled(FORMS, 3))
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
