"""IBDR against a loop over particles in plain autograd."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multilora as ml
import oracles
from multilora.methods import divergence
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


class NaiveIBDR:
    """IBDR one particle at a time, with the gradient of each one's own objective."""

    def __init__(self, model, **options):
        defaults = {
            "alpha": 0.02, "ascent": "prox", "clip": 0.15, "step_size": 0.05, "rho": 0.03,
            "lambda_init": 3.0, "lambda_bounds": (0.05, 5.0), "lambda_lr": 2.0,
            "cost": "output", "sigma": 0.0, "noise": "all", "learn_sigma": False, "beta": 0.0,
            "prior_std": 1.0, "divergence": "joint", "loss": "particle", "kind": "logdet",
            "eps": 1e-4, "seed": 0,
        }  # fmt: skip
        assert options.keys() <= defaults.keys()
        self.__dict__.update(defaults | options)
        self.model, self.lambda_ = model, self.lambda_init
        self.generator = torch.Generator().manual_seed(self.seed)

    def own_loss(self, i, logits, others, y) -> Tensor:
        if self.loss == "particle":
            return F.cross_entropy(logits, y)
        everyone = [logits if k == i else z for k, z in enumerate(others)]
        return len(others) * F.cross_entropy(torch.stack(everyone).mean(0), y)

    def volume(self, i, logits, others, y) -> Tensor:
        everyone = torch.stack([logits if k == i else z for k, z in enumerate(others)])
        values = oracles.gram_volume(everyone, y, self.eps, self.kind)
        return values.sum() / (y != -100).sum()

    def own_gradient(self, i, tensors, others_task, others_volume, x, y):
        logits = forward_one(self.model, tensors, x)
        loss = self.own_loss(i, logits, others_task, y)
        volume = self.volume(i, logits, others_volume, y)
        return torch.autograd.grad(loss + self.alpha * volume, tensors), volume.detach()

    def predictions(self, particles, x) -> list[Tensor]:
        return [forward_one(self.model, t, x).detach() for t in particles]

    def ascend(self, g) -> list[Tensor]:
        norm = torch.cat([t.flatten() for t in g]).norm()
        factor = {
            "prox": min(1.0, self.clip / norm.item()) / (2 * self.lambda_),
            "step": self.step_size,
            "sam": self.rho / norm,
        }[self.ascent]
        return [factor * t for t in g]

    def backward(self, x, y):
        """-> the gradients of the parameters and of σ, and what is logged."""
        params = [p.detach().clone() for p in self.model.particle_parameters()]
        K = params[0].shape[0]
        is_A = [True, False, True, False, False, False]
        epsilon = [torch.zeros_like(p) for p in params]
        for p, e, a in zip(params, epsilon, is_A):
            if self.sigma > 0 and (self.noise == "all" or a):
                e.copy_(torch.empty_like(p).normal_(generator=self.generator))
        noisy = sum(p[0].numel() for p, a in zip(params, is_A) if self.noise == "all" or a)

        theta = split([p + self.sigma * e for p, e in zip(params, epsilon)])
        z = self.predictions(theta, x)
        climbs = [self.ascend(self.own_gradient(i, theta[i], z, z, x, y)[0]) for i in range(K)]
        higher = split(stack([[t + c for t, c in zip(*pair)] for pair in zip(theta, climbs)]))
        z_higher = self.predictions(higher, x)
        grads, sigma_grads, volumes = [], [], []
        for i in range(K):
            others = z_higher if self.divergence == "joint" else z
            g, volume = self.own_gradient(i, higher[i], z_higher, others, x, y)
            along = sum((a * e[i]).sum() for a, e in zip(g, epsilon))
            variance = (self.sigma / self.prior_std) ** 2
            # d/d log σ of 2β·KL, of the noisy numbers only.
            pull = 2 * self.beta * noisy * (variance - 1)
            decay = 2 * self.beta / self.prior_std**2
            grads.append([a + decay * p[i] for a, p in zip(g, params)])
            sigma_grads.append(self.sigma * along + pull)
            volumes.append(volume)

        cost = sum(c.square().sum() for climb in climbs for c in climb) / K
        if self.cost == "output":
            change = [(a.softmax(-1) - b.softmax(-1)).norm(dim=-1) for a, b in zip(z, z_higher)]
            cost = torch.stack(change)[:, y != -100].mean()
        low, high = self.lambda_bounds
        moved = self.lambda_ - self.lambda_lr * (self.rho - cost.item())
        self.lambda_ = min(max(moved, low), high)
        # ℓ_i; the loss of the mean prediction is one number, shared by all.
        losses = [self.own_loss(i, z_higher[i], z_higher, y) for i in range(K)]
        nll = torch.stack(losses).mean() / (K if self.loss == "ensemble" else 1)
        stats = {"nll": nll, "divergence": torch.stack(volumes).mean()}
        if self.ascent == "prox":
            stats["cost"] = cost
        return stack(grads), torch.stack(sigma_grads), stats


class TestIBDR:
    @pytest.mark.cover
    @pytest.mark.parametrize("kind", ["logdet", "det"])
    @pytest.mark.parametrize("divergence", ["joint", "cross"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ascent": "prox", "clip": 1e9, "lambda_init": 0.5},
            {"ascent": "step", "step_size": 0.3},
            {"ascent": "sam", "rho": 0.2},
            {"cost": "parameter", "lambda_lr": 1.0, "rho": 0.001},
            {"loss": "ensemble"},
            {"beta": 0.01},
            {"sigma": 2**-4, "seed": 3},
            {"sigma": 2**-4, "noise": "A", "beta": 0.01},
            {"sigma": 2**-4, "learn_sigma": True, "beta": 0.01, "prior_std": 0.25},
            {"sigma": 2**-4, "learn_sigma": True, "noise": "A", "beta": 0.01, "ascent": "sam"},
            {"eps": 1e-2, "lambda_bounds": (2.9, 3.1), "lambda_lr": 10.0},
        ],
        ids=str,
    )
    def test_is_the_naive_loop(self, options, divergence, kind):
        # The divergence weighs more than by default, so that its gradient shows.
        options = {"alpha": 0.7, "divergence": divergence, "kind": kind} | options
        model = particle_model()
        method, naive = ml.IBDR(model, **options), NaiveIBDR(model, **options)
        for _ in range(3):
            x, y = batch()
            expected, sigma_grad, expected_stats = naive.backward(x, y)
            for p in (*method.params, *method.parameters()):
                p.grad = None
            stats = method.backward(lambda x=x, y=y: (model(x), y))
            assert_same([p.grad for p in method.params], expected)
            for name, value in expected_stats.items():
                assert relative_error(stats[name], value) < FP64, name
            loss = expected_stats["nll"] + 0.7 * expected_stats["divergence"]
            assert relative_error(stats["loss"], loss) < FP64
            if method.ascent == "prox":
                assert stats["lambda"].item() == pytest.approx(naive.lambda_, rel=1e-12)
            else:
                # λ has no part in these ascents.
                assert stats.keys().isdisjoint({"lambda", "cost"}) and method.lambda_ == 3.0
            if "learn_sigma" in options:
                # log σ and its gradient are float32.
                assert relative_error(method.parameters()[0].grad, sigma_grad) < 1e-6
                assert stats["sigma"].item() == pytest.approx(2**-4)
            with torch.no_grad():
                for p in method.params:
                    p -= 0.1 * p.grad
        assert method.step == 3

    def test_of_one_particle(self):
        # One particle has nobody to differ from: its volume is constant.
        model = particle_model(1)
        x, y = batch()
        got = gradients_of(ml.IBDR(model, alpha=5.0), lambda: (model(x), y))
        expected = gradients_of(ml.IBDR(model, alpha=0.0), lambda: (model(x), y))
        assert_same(got, expected)

    def test_without_interaction_and_ascent_it_is_an_ensemble(self):
        model = particle_model()
        x, y = batch()
        got = gradients_of(ml.IBDR(model, alpha=0.0, clip=0.0), lambda: (model(x), y))
        assert_same(got, gradients_of(ml.Ensemble(model), lambda: (model(x), y)))

    def test_lambda_stays_in_its_bounds(self):
        model = particle_model()
        x, y = batch()
        # ρ above the distance lowers λ, ρ below it raises λ.
        for rho, bound in ((1e9, 0.05), (0.0, 5.0)):
            method = ml.IBDR(model, rho=rho, lambda_lr=2.0 if rho else 1e9)
            stats = method.backward(lambda: (model(x), y))
            assert stats["lambda"].item() == method.lambda_.item() == bound

    @pytest.mark.parametrize("sigma", [0.0, 0.1])
    def test_parameters_are_where_they_were(self, sigma):
        # Bit for bit: θ' − (θ' − θ) would not be.
        model = particle_model().float()
        x, y = batch()
        x = x.float()
        method = ml.IBDR(model, sigma=sigma, ascent="step", step_size=10.0)
        before = [p.detach().clone() for p in method.params]
        seen = []

        def closure():
            seen.append([p.detach().clone() for p in method.params])
            return model(x), y

        method.backward(closure)
        moved = [not torch.equal(p, b) for p, b in zip(seen[1], before)]
        assert len(seen) == 2 and all(moved)
        assert all(torch.equal(p, b) for p, b in zip(method.params, before))

    @pytest.mark.parametrize("sigma", [0.0, 0.1])
    @pytest.mark.parametrize("call", [1, 2])
    def test_closure_that_raises(self, call, sigma):
        model = particle_model()
        x, y = batch()
        method = ml.IBDR(model, sigma=sigma, learn_sigma=sigma > 0)
        method.backward(lambda: (model(x), y))
        trained = [*method.params, *method.parameters()]
        before = [(p.detach().clone(), p.grad.clone()) for p in trained]
        state = method.state_dict()
        calls = []

        def closure():
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return model(x), y

        with pytest.raises(KeyboardInterrupt):
            method.backward(closure)
        for p, (value, grad) in zip(trained, before):
            assert torch.equal(p, value) and torch.equal(p.grad, grad)
        after = method.state_dict()
        assert after["step"] == state["step"] and after["lambda"] == state["lambda"]

    @pytest.mark.parametrize("kind", ["logdet", "det"])
    @pytest.mark.parametrize("ascent", ["prox", "step", "sam"])
    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_non_finite_step_does_not_touch_lambda(self, where, junk, ascent, kind):
        # GradScaler skips such a step; λ has no GradScaler.
        theta = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
        y = torch.randint(5, (6,))
        method = ml.IBDR([theta], ascent=ascent, kind=kind, rho=0.05, nonfinite="ignore")
        before = theta.detach().clone()

        def closure():
            logits = 1 * theta
            if where == "loss":
                return logits * junk, y
            # Some entries only: an infinite gradient, and not one that is NaN all over.
            logits.register_hook(lambda g: torch.where(g > 0, junk, g))
            return logits, y

        stats = method.backward(closure)
        assert method.lambda_.item() == 3.0 and stats.get("lambda", 3.0) == 3.0
        assert torch.equal(theta, before)
        # And the next step is as if nothing had been.
        got = gradients_of(method, lambda: (theta, y))
        fresh = ml.IBDR([theta], ascent=ascent, kind=kind, rho=0.05)
        assert_same(got, gradients_of(fresh, lambda: (theta, y)))

    def test_own_mini_batches_have_no_divergence(self, monkeypatch):
        monkeypatch.setattr(divergence, "_warned_own_batches", False)
        model = particle_model()
        x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(4, (3, 6))

        def closure():
            return model(x, per_particle=True), y

        with pytest.warns(UserWarning, match=r"contributes zero .*\(3, 6, 4\).*\(3, 6\)"):
            stats = ml.IBDR(model, alpha=5.0).backward(closure)
        assert stats["divergence"] == 0 and stats["loss"] == stats["nll"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = gradients_of(ml.IBDR(model, alpha=5.0), closure)
        # Three problems of one particle each.
        expected = []
        for k in range(3):
            single = particle_model(1)
            with torch.no_grad():
                for p, q in zip(single.particle_parameters(), model.particle_parameters()):
                    p.copy_(q[k : k + 1])
            method = ml.IBDR(single, alpha=0.0)
            grads = gradients_of(method, lambda k=k, m=single: (m(x[k]), y[k]))
            expected.append([g[0] for g in grads])
        assert_same(got, stack(expected))

    def test_loss_of_the_mean_needs_shared_targets(self):
        model = particle_model()
        method = ml.IBDR(model, loss="ensemble")
        x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(4, (3, 6))
        with pytest.raises(ValueError, match=r"targets \(N,\)"):
            method.backward(lambda: (model(x, per_particle=True), y))

    def test_learnt_sigma_is_offered_to_the_optimizer(self):
        model = particle_model()
        assert ml.IBDR(model, sigma=0.1).parameters() == []
        method = ml.IBDR(model, sigma=0.1, learn_sigma=True)
        (log_sigma,) = method.parameters()
        assert torch.equal(log_sigma, torch.full((3,), math.log(0.1))) and log_sigma.requires_grad
        torch.testing.assert_close(method.sigma, torch.full((3,), 0.1))

    def test_noise_is_drawn_anew_and_repeats_with_the_seed(self):
        model = particle_model()
        x, y = batch()
        first, again, other = (ml.IBDR(model, sigma=0.1, seed=s) for s in (0, 0, 1))
        a = gradients_of(first, lambda: (model(x), y))
        b = gradients_of(first, lambda: (model(x), y))
        c = gradients_of(again, lambda: (model(x), y))
        d = gradients_of(other, lambda: (model(x), y))
        assert all(torch.equal(g, h) for g, h in zip(a, c))
        assert not torch.equal(a[0], b[0]) and not torch.equal(a[0], d[0])


class TestTheBound:
    @pytest.mark.parametrize("cost, rho", [("output", 0.03), ("parameter", 1e-3)])
    def test_lambda_settles_where_the_cost_is_rho(self, cost, rho):
        # With 0.1's cost and radius, no climb could reach ρ, and λ fell whatever the data.
        model = particle_model()
        x, y = batch(40, ignored=())
        method = ml.IBDR(model, cost=cost, rho=rho, lambda_lr=3.0 if cost == "output" else 30.0)
        optimizer = torch.optim.SGD(model.particle_parameters(), 1e-3)
        seen = []
        for _ in range(120):
            optimizer.zero_grad()
            seen.append(method.backward(lambda: (model(x), y)))
            optimizer.step()
        low, high = method.lambda_bounds
        late = [stats["lambda"].item() for stats in seen[-40:]]
        assert low < min(late) and max(late) < high and max(late) / min(late) < 1.1
        assert abs(seen[0]["cost"] / rho - 1) > 0.3
        mean = sum(stats["cost"].item() for stats in seen[-40:]) / 40
        assert mean == pytest.approx(rho, rel=0.1)

    def test_a_bound_that_can_never_bind(self):
        model = particle_model()
        with pytest.warns(UserWarning, match=r"never bind: .* = 0.0225, .* rho = 0.03.*raise clip"):
            ml.IBDR(model, cost="parameter", lambda_bounds=(0.5, 5.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ml.IBDR(model, cost="parameter", lambda_bounds=(0.5, 5.0), rho=0.0225)
            ml.IBDR(model, lambda_bounds=(0.5, 5.0))
            ml.IBDR(model, cost="parameter", lambda_bounds=(0.5, 5.0), ascent="sam")


class TestLearntSigma:
    @pytest.mark.parametrize("prior_std", [1.0, 0.05])
    def test_settles_at_the_optimum_of_its_objective(self, prior_std):
        # ℓ = ½ h ‖θ‖²: E ℓ_i + β KL has its minimum at σ² = 2β / (h + 2β/τ²), and does not care
        # how far AdamW's step is beside σ.
        theta = torch.randn(16, 40, dtype=torch.float64, requires_grad=True)
        h, beta = 2.0, 1e-3
        method = ml.IBDR(
            [theta], alpha=0.0, clip=0.0, cost="parameter", rho=0.0, sigma=0.003, learn_sigma=True,
            beta=beta, prior_std=prior_std, loss=lambda z, _: h / 2 * z.square().sum((1, 2)),
        )  # fmt: skip
        groups = [{"params": [theta]}, {"params": method.parameters(), "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        settled = []
        for step in range(200):
            optimizer.zero_grad()
            stats = method.backward(lambda: (theta[:, None], None))
            optimizer.step()
            if step >= 140:
                settled.append(stats["sigma"].item())
        expected = math.sqrt(2 * beta / (h + 2 * beta / prior_std**2))
        assert sum(settled) / len(settled) == pytest.approx(expected, rel=0.05)


class TestNoDivergence:
    def test_without_alpha_no_volume_is_computed(self, monkeypatch):
        def refuse(*_):
            raise AssertionError("a volume was computed")

        monkeypatch.setattr(divergence, "particle_loss", refuse)
        monkeypatch.setattr(divergence, "gram_volume", refuse)
        model = particle_model()
        x, y = batch()
        for options in ({}, {"divergence": "cross"}, {"loss": "label_smoothing"}):
            stats = ml.IBDR(model, alpha=0.0, **options).backward(lambda: (model(x), y))
            assert "divergence" not in stats and stats["loss"] == stats["nll"]
        with pytest.raises(AssertionError, match="a volume was computed"):
            ml.IBDR(model).backward(lambda: (model(x), y))

    def test_a_determinant_that_is_always_zero(self):
        # Three particles span two dimensions at most, of three classes without the true one.
        theta = torch.randn(3, 6, 3, dtype=torch.float64, requires_grad=True)
        y = torch.randint(3, (6,))
        method = ml.IBDR([theta], kind="det")
        with pytest.raises(ValueError, match="3 particles and 3 classes is zero"):
            method.backward(lambda: (1 * theta, y))
        assert theta.grad is None
        ml.IBDR([theta]).backward(lambda: (1 * theta, y))
        ml.IBDR([theta], kind="det", alpha=0.0).backward(lambda: (1 * theta, y))
