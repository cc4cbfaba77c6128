"""SVGD against closed forms and a loop over pairs of particles in plain autograd."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multilora as ml
import oracles
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


def features(tensors) -> list[Tensor]:
    """The tensors by which SVGD compares particles: both layers' ΔW, and the head's weights."""
    A1, B1, A2, B2, head_weight, head_bias = tensors
    head = torch.cat([head_weight.flatten(), head_bias])
    return [(1.5 * B1 @ A1).flatten(), (1.5 * B2 @ A2).flatten(), head]


def naive_svgd(
    model, x, y, gamma, scope="layer", bandwidth="median", drive="own", repulse="own",
    normalise="particles", floor=1e-3, prior_precision=0.0,
) -> list[Tensor]:  # fmt: skip
    """SVGD's direction, one pair of particles at a time."""
    particles = split(model.particle_parameters())
    K = len(particles)
    drives = []
    for t in particles:
        prior = prior_precision / 2 * sum(p.square().sum() for p in t)
        loss = F.cross_entropy(forward_one(model, t, x), y) + prior
        drives.append(torch.autograd.grad(loss, t))

    def distances(i_tensors, j_tensors) -> Tensor:
        pairs = zip(features(i_tensors), features(j_tensors))
        return torch.stack([(f - g).square().sum() for f, g in pairs])

    D = torch.stack([torch.stack([distances(a, b) for b in particles]) for a in particles]).detach()
    if bandwidth == "median":
        apart = [D[i, j] for i, j in itertools.combinations(range(K), 2)]
        width = torch.stack(apart).quantile(0.5, dim=0) / math.log(K + 1)
        for group in range(3):
            norms = [
                t[4].square().sum() + t[5].square().sum()
                if group == 2
                else (1.5 * t[2 * group]).square().sum()
                for t in particles
            ]
            width[group] = max(width[group], floor * torch.stack(norms).mean().item())
    else:
        width = torch.full((3,), 2.0 * bandwidth**2, dtype=torch.float64)

    def kernel_of(D) -> Tensor:
        u = D / width
        return torch.exp(-u) if scope == "layer" else torch.exp(-u.mean(-1, True)).expand_as(u)

    kernel = kernel_of(D)  # (K, K, 3 groups)

    result = []
    for i in range(K):
        total = [torch.zeros_like(t) for t in particles[i]]
        for j in range(K):
            frozen = [t.detach() for t in particles[j if repulse == "own" else i]]
            moving = particles[i if repulse == "own" else j]
            # The sum over groups: of one kernel for all, three times its gradient.
            pull = torch.autograd.grad(kernel_of(distances(moving, frozen)).sum(), moving)
            sign = 1 if repulse == "own" else -1
            for p in range(6):
                driven = drives[i if drive == "own" else j][p]
                terms = kernel[:, :, p // 2].sum(1)[i] if normalise == "density" else K
                total[p] += (kernel[i, j, p // 2] * driven + sign * gamma * pull[p]) / terms
        result.append(total)
    return stack(result)


class TestSVGD:
    @pytest.mark.parametrize("repulse", ["own", "stein"])
    @pytest.mark.parametrize("drive", ["own", "mix"])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("K, bandwidth", [(3, "median"), (4, "median"), (4, 2.0)])
    def test_direction_is_the_naive_one(self, K, bandwidth, scope, drive, repulse):
        model = particle_model(K)
        x, y = batch()
        options = {"scope": scope, "bandwidth": bandwidth, "drive": drive, "repulse": repulse}
        got = gradients_of(ml.SVGD(model, gamma=3.0, **options), lambda: (model(x), y))
        assert_same(got, naive_svgd(model, x, y, 3.0, **options))

    @pytest.mark.parametrize(
        "options",
        [
            {"normalise": "density"},
            {"normalise": "density", "drive": "mix", "repulse": "stein", "scope": "global"},
            {"floor": 100.0},
            {"floor": 100.0, "scope": "global"},
            {"prior_precision": 0.3},
            {"prior_precision": 0.3, "drive": "mix", "normalise": "density"},
        ],
        ids=str,
    )
    def test_options_are_those_of_the_naive_loop(self, options):
        model = particle_model(4)
        x, y = batch()
        plain = gradients_of(ml.SVGD(model, gamma=3.0), lambda: (model(x), y))
        got = gradients_of(ml.SVGD(model, gamma=3.0, **options), lambda: (model(x), y), scale=0.5)
        assert_same(got, [g / 2 for g in naive_svgd(model, x, y, 3.0, **options)])
        assert all(relative_error(2 * g, p) > 1e-3 for g, p in zip(got[:4], plain))

    def test_density_without_repulsion_is_an_ensemble(self):
        # The drive is the plain gradient, whatever K is; "particles" shrinks it.
        model = particle_model(8)
        x, y = batch()
        ensemble = gradients_of(ml.Ensemble(model), lambda: (model(x), y))
        options = {"gamma": 0.0, "bandwidth": 0.05}
        got = gradients_of(ml.SVGD(model, normalise="density", **options), lambda: (model(x), y))
        assert_same(got, ensemble)
        shrunk = gradients_of(ml.SVGD(model, **options), lambda: (model(x), y))
        assert all(s.norm() < 0.2 * e.norm() for s, e in zip(shrunk, ensemble))

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_no_burst_of_repulsion_near_the_start(self, scope):
        # One step away from B = 0, the median alone would make the repulsion explode.
        model = particle_model(5)
        x, y = batch()
        with torch.no_grad():
            for adapter in model.adapters():
                adapter.lora_B.mul_(1e-5)

        def ratio(**options):
            both, drive = (
                gradients_of(ml.SVGD(model, gamma=g, scope=scope, **options), lambda: (model(x), y))
                for g in (0.01, 0.0)
            )
            repulsion = torch.cat([(a - b).flatten() for a, b in zip(both[:4], drive)])
            return (repulsion.norm() / torch.cat([d.flatten() for d in drive[:4]]).norm()).item()

        assert ratio(floor=0.0) > 100
        assert ratio() < 0.1

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_no_burst_between_heads_that_were_copied(self, scope):
        model = particle_model(5)
        x, y = batch()
        with torch.no_grad():
            for p in model.particle_parameters()[4:]:
                p.copy_(p[:1] + 1e-5 * torch.randn_like(p))

        def ratio(**options):
            both, drive = (
                gradients_of(ml.SVGD(model, gamma=g, scope=scope, **options), lambda: (model(x), y))
                for g in (0.01, 0.0)
            )
            repulsion = torch.cat([(a - b).flatten() for a, b in zip(both[4:], drive[4:])])
            return (repulsion.norm() / torch.cat([d.flatten() for d in drive[4:]]).norm()).item()

        assert ratio(floor=0.0) > 100
        assert ratio() < 0.1

    def test_a_global_kernel_repels_adapters_as_their_own_do(self):
        # Heads that are far apart do not swamp adapters that are close together.
        model = particle_model(5)
        x, y = batch()
        with torch.no_grad():
            for adapter in model.adapters():
                adapter.lora_B.mul_(0.1)

        def repulsion(scope):
            method = ml.SVGD(model, scope=scope, floor=0.0)
            got = gradients_of(method, lambda: (0 * model(x), y))
            return torch.cat([g.flatten() for g in got[:4]]).norm()

        D = [oracles.pairwise_frobenius(a.lora_A, a.lora_B, 1.5).mean() for a in model.adapters()]
        head = torch.cat([t.flatten(1) for t in model.particle_parameters()[4:]], 1)
        assert torch.cdist(head, head).square().mean() > 10 * max(D)
        assert 0.5 < repulsion("global") / repulsion("layer") < 1.5

    @pytest.mark.parametrize("bandwidth", [1.5, "median"])
    def test_own_repulsion_is_the_gradient_of_half_the_kernel_sum(self, bandwidth):
        model = particle_model(5)
        x, y = batch()
        method = ml.SVGD(model, gamma=0.3, bandwidth=bandwidth)
        got = gradients_of(method, lambda: (0 * model(x), y))
        lora = method.params[:2]
        A, B = (t.detach().clone().requires_grad_() for t in lora)
        D = oracles.pairwise_frobenius(A, B, 1.5)
        width = 2 * 1.5**2
        if bandwidth == "median":
            i, j = torch.triu_indices(5, 5, 1)
            width = D[i, j].detach().quantile(0.5) / math.log(6)
        energy = 0.5 * torch.exp(-D / width).sum()
        expected = [0.3 / 5 * g for g in torch.autograd.grad(energy, (A, B))]
        assert_same(got[:2], expected)

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_repulsion_drives_particles_apart(self, scope):
        # The sign: eq. 4 as printed would draw them together. Many draws, because a wrong form can
        # be right half of the time.
        for seed in range(40):
            model = particle_model(4, seed)
            x, y = batch()
            method = ml.SVGD(model, gamma=1.0, scope=scope)
            grads = gradients_of(method, lambda: (0 * model(x), y))  # noqa: B023

            def sum_of_distances():
                adapters = model.adapters()  # noqa: B023
                return sum(
                    oracles.pairwise_frobenius(a.lora_A, a.lora_B, a.scaling).sum().item()
                    for a in adapters
                )

            before = sum_of_distances()
            with torch.no_grad():
                for p, g in zip(method.params, grads):
                    p -= 1e-3 * g
            assert sum_of_distances() > before, seed

    @pytest.mark.parametrize("repulse", ["own", "stein"])
    def test_moments_of_a_gaussian(self, repulse):
        mean, std = torch.tensor([[1.0, -2.0], [1.0, 0.5]], dtype=torch.float64)
        K = 40
        theta = (3 * torch.randn(K, 2, dtype=torch.float64)).requires_grad_()

        def energy(z, _):
            return 0.5 * ((z - mean) / std).square().sum(-1)

        method = ml.SVGD([theta], gamma=1.0, drive="mix", repulse=repulse, loss=energy)
        optimizer = torch.optim.SGD([theta], lr=1.0)
        for _ in range(300):
            optimizer.zero_grad()
            method.backward(lambda: (theta, None))
            optimizer.step()
        theta = theta.detach()
        # Summed over particles, the repulsions cancel (∇k is antisymmetric), so at the fixed point
        # Σ_j w_j (θ_j − mean) = 0 with w_j = Σ_i k_ij: exact for any K, up to convergence.
        D = torch.cdist(theta, theta).square()
        i, j = torch.triu_indices(K, K, 1)
        weight = torch.exp(-D * math.log(K + 1) / D[i, j].median()).sum(0)
        weighted = (weight[:, None] * theta).sum(0) / weight.sum()
        assert ((weighted - mean).abs() < 5e-3 * std).all()
        # K points stand for a density: K independent draws have standard errors of std/√K in the
        # mean and of std/√(2K) in the standard deviation, and SVGD must beat them.
        assert ((theta.mean(0) - mean).abs() < std / math.sqrt(K) / 4).all()
        assert ((theta.std(0, correction=0) - std).abs() < std / math.sqrt(2 * K)).all()

    @pytest.mark.parametrize("options", [{}, {"drive": "mix", "repulse": "stein"}], ids=str)
    def test_one_particle_is_an_ensemble_of_one(self, options):
        model = particle_model(1)
        x, y = batch()
        expected = gradients_of(ml.Ensemble(model), lambda: (model(x), y))
        got = gradients_of(ml.SVGD(model, gamma=1.0, **options), lambda: (model(x), y))
        assert_same(got, expected)

    def test_before_the_first_step_all_delta_weights_are_zero(self):
        # B = 0: D = 0, the bandwidth is at its floor, and nothing may become NaN. The kernel is 1
        # between all particles of a layer, so the own-index form is the ensemble's gradient.
        model = particle_model(3, seeds=[1, 2, 3])
        x, y = batch()
        expected = gradients_of(ml.Ensemble(model), lambda: (model(x), y))
        got = gradients_of(ml.SVGD(model, gamma=1.0), lambda: (model(x), y))
        assert_same(got[:4], expected[:4])
        assert all(g.isfinite().all() for g in got)

    def test_stats(self):
        model = particle_model(3)
        x, y = batch()
        stats = ml.SVGD(model, scope="global", bandwidth=2.0).backward(lambda: (model(x), y))
        particles = [features(t) for t in split(model.particle_parameters())]
        D = torch.tensor(
            [
                [(f - g).square().sum() for f, g in zip(a, b)]
                for a, b in itertools.combinations(particles, 2)
            ],
            dtype=torch.float64,
        )
        assert relative_error(stats["distance"], D.mean()) < FP64
        assert relative_error(stats["kernel"], torch.exp(-D.mean(1) / 8).mean()) < FP64
