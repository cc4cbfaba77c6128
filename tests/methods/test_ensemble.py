"""Ensemble against runs of one particle in plain autograd."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
from multilora.attach import particle_seeds
from multilora.methods import METHODS
from one_by_one import (
    FP64,
    assert_same,
    batch,
    forward_one,
    gradients_of,
    particle_model,
    split,
    stack,
)
from oracles import relative_error

# Particles that do not see each other; SVGD too, where its kernel is one and nothing repels.
no_interaction = pytest.mark.parametrize(
    "make",
    [ml.Ensemble, partial(ml.SVGD, gamma=0.0, bandwidth=1e9)],
    ids=["ensemble", "svgd"],
)


class TestEnsemble:
    def test_is_independent_runs(self):
        K, steps = 3, 4
        batches = [batch() for _ in range(steps)]

        def train(model):
            method = ml.Ensemble(model)
            optimizer = torch.optim.AdamW(model.particle_parameters(), 0.05, weight_decay=0.1)
            for x, y in batches:
                optimizer.zero_grad()
                method.backward(lambda x=x, y=y: (model(x), y))
                optimizer.step()
            return [p.detach() for p in model.particle_parameters()]

        seeds = particle_seeds(0, K)
        together = train(particle_model(K, seeds=seeds))
        for k in range(K):
            alone = train(particle_model(1, seeds=[seeds[k]]))
            # Adam divides by the root of its second moment: rounding grows, to 1e-12 at most.
            assert_same([p[k : k + 1] for p in together], alone)

    def test_is_independent_runs_bit_for_bit(self):
        # A model whose rows are computed one by one, so that no sum depends on K.
        K, N, C = 4, 6, 5
        x, y = torch.randn(N, C), torch.randint(C, (N,))
        start = torch.randn(K, N, C)

        def train(start):
            theta = start.clone().requires_grad_()
            method = ml.Ensemble([theta])
            optimizer = torch.optim.AdamW([theta], 0.05)
            for _ in range(5):
                optimizer.zero_grad()
                method.backward(lambda: (theta * x, y))
                optimizer.step()
            return theta.detach()

        together = train(start)
        assert not torch.equal(together, start)
        for k in range(K):
            assert torch.equal(together[k : k + 1], train(start[k : k + 1]))

    def test_gradient_is_every_particles_own(self):
        model = particle_model()
        x, y = batch()
        method = ml.Ensemble(model)
        got = gradients_of(method, lambda: (model(x), y))
        expected, losses = [], []
        for tensors in split(method.params):
            losses.append(F.cross_entropy(forward_one(model, tensors, x), y))
            expected.append(torch.autograd.grad(losses[-1], tensors))
        assert_same(got, stack(expected))
        stats = method.backward(lambda: (model(x), y))
        assert relative_error(stats["loss"], torch.stack(losses).mean()) < FP64
        assert method.step == 2

    @no_interaction
    def test_own_mini_batches(self, make):
        model = particle_model()
        x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(4, (3, 6))
        y[0, :4] = -100  # means are over each particle's own valid targets
        method = make(model)
        got = gradients_of(method, lambda: (model(x, per_particle=True), y))
        expected = [
            torch.autograd.grad(F.cross_entropy(forward_one(model, t, x[k]), y[k]), t)
            for k, t in enumerate(split(method.params))
        ]
        assert_same(got, stack(expected))

    def test_half_precision_logits(self):
        # The loss is taken in float32: of bfloat16's 8 bits it would keep two digits.
        theta = (8 * torch.randn(3, 50, 4)).bfloat16().requires_grad_()
        y = torch.randint(4, (50,))
        loss = ml.Ensemble([theta]).backward(lambda: (theta, y))["loss"]
        exact = F.cross_entropy(theta.detach().double().flatten(0, 1), y.repeat(3))
        assert loss.dtype == torch.float32
        assert relative_error(loss, exact) < 1e-6
        assert theta.grad.dtype == torch.bfloat16

    @no_interaction
    def test_callable_loss(self, make):
        theta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        # Only the loss looks at what the closure returns: here no logits, and a number.
        method = make([theta], loss=lambda z, c: (c * z**2).sum(-1))
        assert_same(gradients_of(method, lambda: (theta, 0.5)), [theta])
        with pytest.raises(ValueError, match=r"\(3,\); got \(3, 4\)"):
            make([theta], loss=lambda z, _: z).backward(lambda: (theta, None))


class TestPrior:
    @pytest.mark.parametrize("K", [1, 3])
    def test_the_optimum_is_that_of_ridge_regression(self, K):
        # Σ_n (x_nᵀθ − y_n)²/2v + ‖θ‖²/2τ² has the minimum (XᵀX + (v/τ²) I)⁻¹ Xᵀy.
        N, v, tau = 12, 0.5, 0.3
        torch.manual_seed(0)
        X, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
        gram = X.T @ X + v / tau**2 * torch.eye(3, dtype=torch.float64)
        exact = torch.linalg.solve(gram, X.T @ y)
        theta = exact.repeat(K, 1).requires_grad_()
        loss = ml.losses.GaussianNLL(variance=v)
        method = ml.Ensemble([theta], prior_precision=1 / (N * tau**2), loss=loss)

        def closure():
            return (theta @ X.T)[..., None], y[:, None]

        (grad,) = gradients_of(method, closure)
        assert grad.abs().max() < 1e-14
        # The objective is a quadratic, so that its gradient elsewhere is known too.
        with torch.no_grad():
            theta += 1
        assert_same(gradients_of(method, closure), [(gram.sum(1) / (N * v)).expand(K, 3)])

    def test_it_is_scaled_as_the_loss_and_logged_apart(self):
        model, (x, y) = particle_model(), batch()
        plain = gradients_of(ml.Ensemble(model), lambda: (model(x), y), 0.25)
        method = ml.Ensemble(model, prior_precision=0.1)
        got = gradients_of(method, lambda: (model(x), y), 0.25)
        pull = [0.25 * 0.1 * p.detach() for p in model.particle_parameters()]
        assert_same([a - b for a, b in zip(got, plain)], pull)
        stats = ml.Ensemble(model).backward(lambda: (model(x), y))
        torch.testing.assert_close(method.backward(lambda: (model(x), y)), stats)

    @pytest.mark.filterwarnings("ignore:.*skipped, the others go on")
    def test_it_does_not_pull_a_particle_that_is_left_out(self):
        model, (x, y) = particle_model(), batch()
        method = ml.Ensemble(model, prior_precision=0.1, nonfinite="skip")
        factor = torch.tensor([1.0, torch.nan, 1.0])[:, None, None]
        grads = gradients_of(method, lambda: (model(x) * factor, y))
        assert all(not g[1].any() and g[0].any() for g in grads)

    def test_a_method_by_name_has_the_precision_of_its_prior(self):
        method = METHODS["map"].make(particle_model(), num_data=50, prior_std=0.2)
        assert method.prior_precision == pytest.approx(1 / (50 * 0.2**2))
