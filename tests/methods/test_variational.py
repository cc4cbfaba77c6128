"""Variational inference: its gradients, its optimum, its draws, and what is not drawn."""

import copy
import math

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

import multilora as ml
from multilora.methods.tensors import flatten
from one_by_one import batch, forward_one, particle_model
from oracles import relative_error

N = 50


def own_draws(method):
    """ε (K, P) that the next `backward` draws."""
    return copy.deepcopy(method._noise).draw()


def made(K=3, **options):
    """In float64, with tensors of different σ."""
    method = ml.Variational(particle_model(K), num_data=N, **options)
    with torch.no_grad():
        for i, t in enumerate(method.log_std):
            t += 0.3 * i
    return method


def alike(method, K, **options):
    """A method of K particles with the same μ and σ."""
    other = made(K, **options)
    with torch.no_grad():
        for a, b in zip(other.parameters(), method.parameters(), strict=True):
            a.copy_(b)
    return other


def split_flat(flat, tensors):
    """(P,) -> tensors of the shapes of `tensors`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def noisy_indices(method, noise):
    """The adapters' lora_A come first in each pair of factors; the head's tensors are last."""
    return range(len(method.mean)) if noise == "all" else [0, 2]


def objective(method, epsilon, x, y, noise, prior_std, beta):
    """E_q[ℓ] at these ε, plus β KL, from leaves; torch.distributions has the KL."""
    mean = [m.detach().clone().requires_grad_() for m in method.mean]
    log_std = [t.detach().clone().requires_grad_() for t in method.log_std]
    noisy = noisy_indices(method, noise)
    losses = []
    for e in epsilon:
        theta = list(mean)
        for i, t in zip(noisy, log_std):
            theta[i] = mean[i] + t.exp() * split_flat(e, mean)[i]
        losses.append(cross_entropy(forward_one(method.model, theta, x), y))
    normal = torch.distributions.Normal
    kl = sum(
        torch.distributions.kl_divergence(
            normal(mean[i], t.exp()), normal(torch.zeros_like(t), prior_std)
        ).sum()
        for i, t in zip(noisy, log_std)
    )
    nll = torch.stack(losses).mean()
    return nll + beta * kl, nll, kl, [*mean, *log_std]


def test_gradients_of_a_posterior_are_not_those_of_particles():
    model = particle_model()
    method = ml.Variational(model, num_data=9)
    with pytest.raises(ValueError, match=r"clip_grad_norm_\(method.parameters\(\)"):
        ml.clip_grad_norm_(method, 1.0)


class TestGradients:
    @pytest.mark.parametrize("noise", ["all", "A"])
    @pytest.mark.parametrize("K", [1, 3])
    def test_they_are_those_of_the_objective_at_the_same_noise(self, noise, K):
        method = made(K, noise=noise, sigma=0.2, prior_std=0.7, kl_weight=3.0)
        x, y = batch()
        epsilon = own_draws(method)
        stats = method.backward(lambda: (method.model(x), y), scale=0.5)
        total, nll, kl, leaves = objective(method, epsilon, x, y, noise, 0.7, 3.0 / N)
        expected = torch.autograd.grad(0.5 * total, leaves)
        for got, wanted in zip(method.parameters(), expected, strict=True):
            assert relative_error(got.grad, wanted) < 1e-10
        for name, value in (("loss", total), ("nll", nll), ("kl", kl)):
            torch.testing.assert_close(stats[name], value.detach())
        sigmas = torch.cat([t.detach().exp().flatten() for t in method.log_std])
        torch.testing.assert_close(stats["sigma"], sigmas.mean())
        assert all(p.grad is None for p in method.params)

    def test_the_kl_is_of_the_noisy_tensors_only(self):
        method = made(noise="A", sigma=0.2)
        x, y = batch()
        weights = [m.detach().clone() for m in method.mean]
        method.backward(lambda: (method.model(x), y))
        method.kl_weight = 0.0
        without = [t.grad.clone() for t in method.mean]
        for t in method.parameters():
            t.grad = None
        method._noise.generator.manual_seed(0)
        method.backward(lambda: (method.model(x), y))
        for i, (t, plain) in enumerate(zip(method.mean, without)):
            pull = plain - t.grad
            expected = weights[i] / N if i in (0, 2) else torch.zeros_like(pull)
            torch.testing.assert_close(pull, expected)

    @pytest.mark.parametrize("K", [1, 3])
    def test_rho_is_a_step_of_sam_from_each_draw(self, K):
        rho, x, y = 0.3, *batch()
        method = made(K, rho=rho, sigma=0.2, kl_weight=0.0)
        epsilon = own_draws(method)
        stds = [t.detach().exp() for t in method.log_std]
        method.backward(lambda: (method.model(x), y))
        grads = []
        for e in epsilon:
            noise = split_flat(e, stds)
            theta = [m.detach() + s * n for m, s, n in zip(method.mean, stds, noise)]
            for radius in (rho, None):
                leaves = [t.clone().requires_grad_() for t in theta]
                loss = cross_entropy(forward_one(method.model, leaves, x), y)
                g = torch.autograd.grad(loss, leaves)
                if radius is not None:
                    norm = torch.stack([t.square().sum() for t in g]).sum().sqrt()
                    theta = [t + radius * each / norm for t, each in zip(theta, g)]
            grads.append((g, noise))
        for i, (m, s) in enumerate(zip(method.mean, method.log_std)):
            of_mean = torch.stack([g[i] for g, _ in grads]).mean(0)
            of_std = torch.stack([g[i] * noise[i] for g, noise in grads]).mean(0) * stds[i]
            assert relative_error(m.grad, of_mean) < 1e-10
            assert relative_error(s.grad, of_std) < 1e-10
        # The particles are the draws, and not where they climbed to.
        draws = flatten(method.params).detach()
        flat = flatten([m.detach()[None] for m in method.mean])
        torch.testing.assert_close(draws, flat + flatten([s[None] for s in stds]) * epsilon)

    def test_parts_of_a_batch_have_the_mean_of_their_gradients(self):
        x, y = batch(12, ignored=())
        method = made(sigma=0.2, kl_weight=0.0)
        one = alike(method, 1, kl_weight=0.0)
        parts, targets = x.view(3, 4, 5), y.view(3, 4)
        epsilon = own_draws(method)
        method.backward(lambda: (method.model(parts, per_particle=True), targets))
        for k, e in enumerate(epsilon):
            one._noise.draw = lambda e=e: e[None]
            one.backward(lambda k=k: (one.model(parts[k]), targets[k]), scale=1 / 3)
        for got, expected in zip(method.parameters(), one.parameters(), strict=True):
            assert relative_error(got.grad, expected.grad) < 1e-10

    @pytest.mark.filterwarnings("ignore:.*skipped, the others go on")
    @pytest.mark.parametrize("rho", [0.0, 0.3])
    def test_a_broken_draw_takes_no_part_in_the_mean(self, rho):
        x, y = batch()
        method = made(nonfinite="skip", sigma=0.2, rho=rho)
        rest = alike(method, 2, rho=rho)
        epsilon = own_draws(method)
        rest._noise.draw = lambda: epsilon[[0, 2]]
        stats = method.backward(
            lambda: (method.model(x) * torch.tensor([1, math.nan, 1])[:, None, None], y)
        )
        expected = rest.backward(lambda: (rest.model(x), y))
        torch.testing.assert_close(stats, expected)
        for got, wanted in zip(method.parameters(), rest.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad)


def test_the_optimum_of_a_quadratic():
    # ℓ(θ) = ½ Σ h (θ − m)²: σ² = β/(h + β/τ²), μ = hm/(h + β/τ²).
    h, m = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, -2.0, 0.5])
    tau, beta = 0.5, 1 / 4
    theta = torch.randn(2000, 1, 3, dtype=torch.float64, requires_grad=True)
    method = ml.Variational(
        [theta],
        num_data=4,
        prior_std=tau,
        sigma=0.1,
        loss=lambda logits, _: (h * (logits[:, 0] - m) ** 2).sum(-1) / 2,
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        optimizer.zero_grad()
        method.backward(lambda: (theta * 1, torch.zeros(1)))
        optimizer.step()
        schedule.step()
    precision = h + beta / tau**2
    torch.testing.assert_close(method.mean[0][0].float(), h * m / precision, rtol=0.01, atol=0.005)
    std = method.log_std[0][0].exp().float()
    torch.testing.assert_close(std, (beta / precision).sqrt(), rtol=0.02, atol=0)


class TestDraws:
    def test_only_lora_A_differs_with_noise_A(self):
        method = made(noise="A", sigma=0.2)
        assert len(method.log_std) == 2 and len(method.mean) == len(method.params) == 6
        for i, p in enumerate(method.params):
            same = torch.equal(p[0], p[1])
            assert same == (i not in (0, 2)), i
            assert not same or torch.equal(p[0], method.mean[i])

    def test_particle_0_is_the_mean_and_all_are_overwritten_at_once(self):
        model = particle_model()
        before = [p.detach().clone() for p in model.particle_parameters()]
        method = ml.Variational(model, num_data=N, sigma=1e-6)
        for p, old, mean in zip(model.particle_parameters(), before, method.mean):
            assert torch.equal(mean, old[0]) and mean.shape == p.shape[1:]
            assert (p - old[0]).abs().max() < 1e-5 and not torch.equal(p[0], p[1])

    def test_they_have_the_mean_and_the_standard_deviation(self):
        p = torch.zeros(4000, 2, dtype=torch.float64, requires_grad=True)
        method = ml.Variational([p], num_data=N, sigma=0.5)
        with torch.no_grad():
            method.mean[0].copy_(torch.tensor([3.0, -1.0]))
            method.log_std[0][1] = math.log(2.0)
        method.sample()
        torch.testing.assert_close(p.mean(0), method.mean[0], rtol=0, atol=0.15)
        expected = torch.tensor([0.5, 2.0], dtype=torch.float64)
        torch.testing.assert_close(p.std(0), expected, rtol=0.05, atol=0)

    def test_evaluations_draw_anew_and_do_not_change_the_training(self):
        x, y = batch()
        method, twin = made(sigma=0.2), made(sigma=0.2)
        seen = []
        for step in range(3):
            for _ in range(step):
                method.sample()
                seen.append(method.params[0].detach().clone())
                assert not torch.equal(seen[-1][0], seen[-1][1])
            for each in (method, twin):
                each.backward(lambda each=each: (each.model(x), y))
            seen.append(method.params[0].detach().clone())
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
        for got, expected in zip(method.parameters(), twin.parameters()):
            assert torch.equal(got.grad, expected.grad)

    def test_what_was_drawn_is_predicted_with_and_saved(self, tmp_path):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        model = ml.get_particle_model(copy.deepcopy(base), config, 3, head_init="copy")
        method = ml.Variational(model, num_data=N, sigma=0.2)
        x = torch.randn(9, 5)
        method.sample()
        predicted = ml.predict(model, x)
        model.save_pretrained(tmp_path)
        loaded = ml.load_particle_model(base, tmp_path)
        torch.testing.assert_close(ml.predict(loaded, x), predicted)
        pairs = [(0, 1), (0, 2), (1, 2)]
        assert all((predicted[i] - predicted[j]).abs().max() > 1e-3 for i, j in pairs)

    def test_the_draws_go_on_after_resuming(self):
        method = made(sigma=0.2)
        x, y = batch()
        method.backward(lambda: (method.model(x), y))
        method.sample()
        state = copy.deepcopy(method.state_dict())
        other = ml.Variational(particle_model(seed=3), num_data=N, seed=9)
        other.load_state_dict(state)
        for act in (lambda m: m.backward(lambda: (m.model(x), y)), lambda m: m.sample()):
            act(method), act(other)
            for a, b in zip(method.params[:4], other.params[:4]):
                assert torch.equal(a, b)

    def test_a_state_of_another_shape_changes_nothing(self):
        method = made()
        before = method.state_dict()
        with pytest.raises(ValueError, match=r"log_std.0 has shape \(1,\) .* \(2, 5\) in this"):
            method.load_state_dict(before | {"log_std.0": torch.zeros(1)})
        after = method.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items() if k != "step")

    def test_another_seed_has_another_noise(self):
        one, other = made(seed=1), made(seed=2)
        assert not torch.equal(own_draws(one), own_draws(other))
        # Nor is the noise of the training that of the evaluations.
        assert not torch.equal(own_draws(one), copy.deepcopy(one._sampling).draw())


def test_half_precision_particles_have_a_float32_posterior():
    p = torch.randn(3, 8, 5).bfloat16().requires_grad_()
    method = ml.Variational([p], num_data=N, sigma=0.1)
    method.backward(lambda: (p * 1, torch.arange(8) % 5))
    assert p.dtype == torch.bfloat16 and p.grad is None
    for t in method.parameters():
        assert t.dtype == t.grad.dtype == torch.float32 and t.grad.abs().max() > 0


def test_autocast_sees_the_draws():
    x, y, start = torch.randn(3, 6, 8), torch.arange(6) % 5, torch.randn(3, 8, 5)
    grads = []
    for cached in (True, False):
        weight = start.clone().requires_grad_()
        method = ml.Variational([weight], num_data=N, sigma=1.0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            torch.bmm(x, weight)  # puts a copy into the cache
            method.backward(lambda weight=weight: (torch.bmm(x, weight), y))
        grads.append(method.mean[0].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_an_overflow_is_the_scalers_business(rho):
    p = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    huge = torch.tensor(1e308, dtype=torch.float64)
    method = ml.Variational([p], num_data=N, rho=rho)
    method.backward(lambda: (p * 1e3, torch.arange(8) % 5), scale=huge)
    assert not all(t.grad.isfinite().all() for t in method.parameters())
    assert method.step == 1


def test_blob_has_the_settings_of_its_paper():
    method = ml.BLoB(particle_model(), num_data=N)
    assert isinstance(method, ml.Variational)
    assert (method.noise, method.prior_std, method.sigma_init) == ("A", 0.2, 2e-3)
    assert ml.BLoB(particle_model(), num_data=N, sigma=0.1).sigma_init == 0.1


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="num_data must be an integer >= 1; got 0"):
        ml.Variational(particle_model(), num_data=0)
    with pytest.raises(ValueError, match="needs a ParticleModel"):
        ml.BLoB([torch.randn(3, 4, requires_grad=True)], num_data=N)
