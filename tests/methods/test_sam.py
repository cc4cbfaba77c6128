"""SAM against a step that is written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import multilora as ml
from multilora.methods import divergence
from one_by_one import FP64, batch, forward_one, gradients_of, particle_model, split
from oracles import relative_error


def written_out(model, x, y, rho):
    """∇ℓ(θ_i + ρ g_i/‖g_i‖) and ℓ there, particle by particle."""
    grads, losses = [], []
    for theta in split(model.particle_parameters()):
        g = torch.autograd.grad(cross_entropy(forward_one(model, theta, x), y), theta)
        norm = torch.stack([t.square().sum() for t in g]).sum().sqrt()
        higher = [(t + rho * d / norm).detach().requires_grad_() for t, d in zip(theta, g)]
        loss = cross_entropy(forward_one(model, higher, x), y)
        grads.append(torch.autograd.grad(loss, higher))
        losses.append(loss.detach())
    return [torch.stack(tensors) for tensors in zip(*grads)], torch.stack(losses)


@pytest.mark.parametrize("K", [1, 3])
def test_is_the_step_that_is_written_out(K, monkeypatch):
    def never(*_):
        raise AssertionError("a volume was computed")

    for name in ("particle_loss", "gram_volume"):
        monkeypatch.setattr(divergence, name, never)
    model = particle_model(K)
    x, y = batch()
    expected, losses = written_out(model, x, y, 0.3)
    method = ml.SAM(model, rho=0.3)
    for got, wanted in zip(gradients_of(method, lambda: (model(x), y)), expected, strict=True):
        assert relative_error(got, wanted) < FP64
    torch.testing.assert_close(method.particle_nll, losses)
    stats = method.backward(lambda: (model(x), y))
    assert stats.keys() == {"loss", "nll"}
    torch.testing.assert_close(stats["loss"], losses.mean())


def test_without_a_radius_it_is_the_ensemble():
    model, (x, y) = particle_model(), batch()
    expected = gradients_of(ml.Ensemble(model), lambda: (model(x), y))
    got = gradients_of(ml.SAM(model, rho=0.0), lambda: (model(x), y))
    assert all(relative_error(a, b) < FP64 for a, b in zip(got, expected))


def test_equal_particles_are_accepted():
    # They have no interaction that would be zero.
    alike = torch.randn(1, 4, 5).repeat(3, 1, 1).requires_grad_()
    ml.SAM([alike])
