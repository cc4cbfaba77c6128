"""Separate parameters: leaves for each particle that follow the stacked tensors."""

import copy
import io

import pytest
import torch
from torch import nn

import multilora as ml
from models import values
from multilora.optim import EachParticle, clip_grad_norm_, separate_parameters
from separate_runs import CLOSE, K, data, one_backward, start


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
        # Cleared gradients leave nothing behind.
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
        # A gradient that overflows makes no step.
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
    with pytest.raises(TypeError, match="needs a non-empty list of separate parameters"):
        EachParticle(model.particle_parameters(), torch.optim.Adafactor)
    with pytest.raises(TypeError, match="needs a non-empty list of separate parameters"):
        EachParticle([], torch.optim.Adafactor)
    each = EachParticle(model, torch.optim.Adafactor)
    assert len(each.optimizers) == K == len(each.param_groups)
    with pytest.raises(TypeError, match="when it is made"):
        each.add_param_group({"params": separate_parameters(model)})
    with pytest.raises(TypeError, match="no closure"):
        each.step(lambda: None)
    each.train(), each.eval()
