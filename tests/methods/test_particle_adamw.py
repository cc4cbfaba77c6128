"""ParticleAdamW against torch.optim.AdamW, one for each particle."""

import copy

import pytest
import torch
from transformers import get_scheduler

from multilora.optim import EachParticle, ParticleAdamW, clip_grad_norm_, separate_parameters
from separate_runs import (
    CLOSE,
    K,
    alone,
    assert_equal_runs,
    data,
    one_backward,
    start,
    train,
    train_alone,
)

OPTIONS = [
    {"lr": 1e-2, "weight_decay": 0.0},
    {"lr": 3e-3, "betas": (0.8, 0.99)},
    {"lr": 1e-3, "eps": 1e-4},
    {"lr": 2e-2, "weight_decay": 0.3},
]


def groups(model):
    leaves = separate_parameters(model)
    return [{"params": [p for p in leaves if p.particle == k], **OPTIONS[k]} for k in range(K)]


def steps(model, optimizer_of, count=12):
    """Particle k steps at every (k + 1)-th time."""
    for step in range(count):
        one_backward(model, scale=1 + step)
        for k in range(K):
            if step % (k + 1) == 0:
                optimizer_of(k).step()
                optimizer_of(k).zero_grad()
    return [p.detach().clone() for p in model.particle_parameters()]


def separate(model):
    made = [torch.optim.AdamW([group]) for group in groups(model)]
    return made.__getitem__


def test_each_particle_steps_as_with_an_optimizer_of_its_own():
    model, twin = start(), start()
    before = [p.detach().clone() for p in model.particle_parameters()]
    whole = ParticleAdamW(groups(model))
    for mine, theirs, first in zip(
        steps(model, whole.of), steps(twin, separate(twin)), before, strict=True
    ):
        torch.testing.assert_close(mine, theirs, **CLOSE)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(mine, first))


def test_the_state_goes_on():
    model = start()
    whole = ParticleAdamW(groups(model))
    steps(model, whole.of, 5)
    model.zero_grad()
    twin = copy.deepcopy(model)
    other = ParticleAdamW(twin, lr=1.0)
    with pytest.raises(ValueError, match="the state is of"):
        ParticleAdamW([{"params": separate_parameters(twin)[:1]}]).load_state_dict(
            whole.state_dict()
        )
    other.load_state_dict(whole.state_dict())
    for mine, theirs in zip(steps(model, whole.of, 4), steps(twin, other.of, 4), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_counts_for_tensors_that_have_a_gradient():
    """As in torch.optim.AdamW, whose bias correction counts the steps of each parameter."""
    model, twin = start(), start()
    whole, alone_of = ParticleAdamW(groups(model)), separate(twin)
    for step in range(7):
        for one, of in ((model, whole.of), (twin, alone_of)):
            one_backward(one, scale=1 + step)
            first = one.particle_parameters()[0]
            for leaf in separate_parameters(one):
                if leaf.stacked is first and (step < 4 if leaf.particle == 1 else step == 5):
                    leaf.grad = None
            for k in range(K):
                of(k).step()
                of(k).zero_grad()
        if step == 4:
            state, whole = whole.state_dict(), ParticleAdamW(groups(model))
            whole.load_state_dict(state)
    for mine, theirs in zip(model.particle_parameters(), twin.particle_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_all_with_gradients_step_by_default():
    model, twin = start(), start()
    whole, other = ParticleAdamW(model, lr=1e-2), ParticleAdamW(twin, lr=1e-2)
    for one in (model, twin):
        one_backward(one)
    whole.zero_grad(particles=[1])
    whole.step()
    other.step(particles=[0, 2, 3])
    for a, b in zip(model.particle_parameters(), twin.particle_parameters(), strict=True):
        assert torch.equal(a, b)
    whole.zero_grad()
    assert all(p.grad is None for p in model.particle_parameters())


def test_a_place_is_forgotten():
    model, twin = start(), start()
    whole, other = ParticleAdamW(groups(model)), separate(twin)
    steps(model, whole.of, 5)
    steps(twin, other, 5)
    leaves = separate_parameters(model)
    with pytest.raises(ValueError, match=r"particle 2 is due"):
        whole.replace(2, leaves)
    one_backward(model)
    whole.replace(2, [p for p in leaves if p.particle == 2], lr=5e-3)
    assert all(p.grad is None for p in leaves if p.particle == 2)
    made = [other(k) for k in range(K)]
    made[2] = torch.optim.AdamW(groups(twin)[2]["params"], lr=5e-3)
    one_backward(twin)
    made[2].zero_grad()
    for mine, theirs in zip(steps(model, whole.of), steps(twin, made.__getitem__), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


REFUSED = {
    "eps": ({"eps": 0.0}, ValueError, "eps"),
    "lr": ({"lr": -1.0}, ValueError, "lr"),
    "betas": ({"betas": (0.9, 1.0)}, ValueError, "betas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_out_of_range(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ParticleAdamW(start(), **options)


def test_stacked_parameters_are_refused():
    with pytest.raises(TypeError, match="separate parameters"):
        ParticleAdamW(start().particle_parameters())
    with pytest.raises(ValueError, match="there are the particles"):
        ParticleAdamW(start()).of(K)
    with pytest.raises(TypeError, match="no closure"):
        ParticleAdamW(start()).step(lambda: None)


def test_each_particle_is_clipped_at_its_own_norm():
    model = start()
    one_backward(model)
    norms = clip_grad_norm_(model, [0.01, float("inf"), 0.02, 1e9])
    after = clip_grad_norm_(model, float("inf"))
    expected = torch.tensor([0.01, norms[1], 0.02, norms[3]], dtype=norms.dtype)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=0)
    assert norms.min() > 0.02
    with pytest.raises(ValueError, match="2 numbers for 4 particles"):
        clip_grad_norm_(model, [1.0, 1.0])


def test_a_particle_that_pauses_is_clipped_and_does_not_move():
    model = start()
    whole = ParticleAdamW(model, lr=1e-2, weight_decay=0.1)
    one_backward(model)
    whole.step()  # it has momentum
    whole.zero_grad(particles=[1])
    before = [p.detach().clone() for p in model.particle_parameters()]
    assert clip_grad_norm_(model, 0.01).nonzero().flatten().tolist() == [0, 2, 3]
    assert all(p.grad is None for p in separate_parameters(model) if p.particle == 1)
    whole.step()
    for p, first in zip(model.particle_parameters(), before, strict=True):
        assert torch.equal(p[1], first[1]) and not torch.equal(p[0], first[0])


@pytest.mark.parametrize(
    ("kind", "own"),
    [("polynomial", {"lr_end": 1e-4}), ("cosine_with_min_lr", {"min_lr": 1e-4})],
)
def test_schedules_that_read_the_learning_rate_of_an_optimizer(kind, own):
    model = start()
    each = EachParticle(model, lambda groups: torch.optim.AdamW(groups, lr=2e-2))
    whole = ParticleAdamW(groups(model))
    for optimizer, k in [(whole.of(1), 1), (whole.of(3), 3), (each, 3)]:
        alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=OPTIONS[k]["lr"])
        mine, theirs = (
            get_scheduler(kind, one, 2, 9, scheduler_specific_kwargs=own)
            for one in (optimizer, alone)
        )
        for _ in range(9):
            assert mine.get_last_lr()[0] == theirs.get_last_lr()[0]
            one_backward(model)
            optimizer.step()
            alone.step()
            mine.step()
            theirs.step()


def test_a_whole_run_equals_those_of_peft():
    model = start()
    whole = ParticleAdamW(model, lr=1e-2, weight_decay=0.1)
    before = [p.detach().clone() for p in model.particle_parameters()]

    def step():
        whole.step()
        whole.zero_grad()

    train(model, step, data())
    expected = train_alone(
        alone(), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), steps=data()
    )
    assert_equal_runs(model, expected, before)
