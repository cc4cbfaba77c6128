"""SGLD: the distribution that its chains tend to, and what it is without noise."""

import copy
import math

import pytest
import torch

import multilora as ml
from one_by_one import assert_same, batch, gradients_of, particle_model
from oracles import relative_error


class TestStationaryDistribution:
    """θ ← (1 − ηh) θ + √(2ηT/N) ξ has the variance (T/N)/(h (1 − ηh/2)), exactly."""

    N, T, ETA = 20, 1.5, 0.3
    H = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)

    def variance(self, accumulation=1, steps=60, chains=2000, **options):
        # At the start each chain is a draw of that distribution if there is no prior.
        torch.manual_seed(0)
        theta = torch.randn(chains, 1, 3, dtype=torch.float64) * self.exact(self.H).sqrt()
        theta.requires_grad_()
        method = ml.SGLD(
            [theta],
            num_data=self.N,
            lr=self.ETA,
            temperature=self.T,
            accumulation=accumulation,
            loss=lambda logits, _: (self.H * logits[:, 0] ** 2).sum(-1) / 2,
            **options,
        )
        optimizer = torch.optim.SGD([theta], lr=self.ETA)
        seen = []
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(accumulation):
                method.backward(lambda: (theta * 1, torch.zeros(1)), scale=1 / accumulation)
            optimizer.step()
            seen.append(theta.detach().square().mean((0, 1)))
        assert theta.mean(0).abs().max() < 0.03
        return torch.stack(seen[steps // 3 :]).mean(0)

    def exact(self, h):
        return self.T / self.N / (h * (1 - self.ETA * h / 2))

    @pytest.mark.parametrize("accumulation", [1, 4])
    def test_of_a_quadratic(self, accumulation):
        # The standard error is about 1 %.
        got = self.variance(accumulation)
        torch.testing.assert_close(got, self.exact(self.H), rtol=0.03, atol=0)

    def test_under_a_prior(self):
        tau = 0.15
        got = self.variance(prior_std=tau)
        # The prior adds 1/(Nτ²) to the curvature: of 0.5, it is four times as large.
        torch.testing.assert_close(
            got, self.exact(self.H + 1 / (self.N * tau**2)), rtol=0.03, atol=0
        )


def test_the_noise_of_a_call():
    model, twin = particle_model(), particle_model()
    x, y = batch()
    method = ml.SGLD(model, num_data=30, lr=0.2, temperature=0.7, accumulation=4, seed=5)
    xi = copy.deepcopy(method._noise).draw()
    plain = gradients_of(ml.Ensemble(twin), lambda: (twin(x), y), 0.25)
    noisy = gradients_of(method, lambda: (model(x), y), 0.25)
    got = torch.cat([(a - b).flatten(1) for a, b in zip(noisy, plain)], 1)
    assert relative_error(got, 0.25 * math.sqrt(4) * math.sqrt(2 * 0.7 / (30 * 0.2)) * xi) < 1e-10


def test_without_noise_it_is_sgd_to_the_bit():
    weights = []
    for kind, options in (
        (ml.Ensemble, {}),
        (ml.SGLD, {"num_data": 7, "lr": 0.1, "temperature": 0}),
    ):
        model = particle_model()
        method = kind(model, **options)
        optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            x, y = batch()
            optimizer.zero_grad()
            method.backward(lambda model=model, x=x, y=y: (model(x), y))
            optimizer.step()
        weights.append(model.particle_parameters())
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_the_learning_rate_may_follow_a_schedule():
    x, y = batch()
    grads = []
    for lr in (0.4, lambda: 0.4, lambda: 0.1):
        model = particle_model()
        method = ml.SGLD(model, num_data=7, lr=lr)
        grads.append(gradients_of(method, lambda model=model: (model(x), y)))
    assert_same(grads[1], grads[0])
    model = particle_model()
    plain = gradients_of(ml.Ensemble(model), lambda: (model(x), y))
    # A quarter of the learning rate: twice the noise in the gradient, half of it in the step.
    assert_same(
        [a - p for a, p in zip(grads[2], plain)], [2 * (a - p) for a, p in zip(grads[0], plain)]
    )


def test_what_does_not_fit():
    model, (x, y) = particle_model(), batch()
    for options, message in (
        ({"num_data": 0, "lr": 0.1}, "num_data must be an integer >= 1; got 0"),
        ({"num_data": 9, "lr": 0.0}, "lr must be a finite number > 0; got 0.0"),
        ({"num_data": 9, "lr": -1}, "lr must be a finite number > 0; got -1"),
        ({"num_data": 9, "lr": 0.1, "prior_std": 0}, "prior_std must be .* > 0; got 0"),
        ({"num_data": 9, "lr": 0.1, "accumulation": 0}, "accumulation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.SGLD(model, **options)
    method = ml.SGLD(model, num_data=9, lr=lambda: 0.0)
    with pytest.raises(ValueError, match=r"lr must be a finite number > 0; got 0\.0"):
        method.backward(lambda: (model(x), y))
    assert method.step == 0 and all(p.grad is None for p in method.params)


@pytest.mark.filterwarnings("ignore:.*skipped, the others go on")
def test_a_broken_particle_gets_no_noise():
    model, (x, y) = particle_model(), batch()
    method = ml.SGLD(model, num_data=9, lr=0.1, nonfinite="skip")
    factor = torch.tensor([1.0, math.nan, 1.0])[:, None, None]
    grads = gradients_of(method, lambda: (model(x) * factor, y))
    assert all(not g[1].any() and g[0].any() and g[2].any() for g in grads)
