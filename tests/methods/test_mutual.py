"""Mutual learning against loops over particles, pairs and examples in plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
from multilora.methods import pairs
from multilora.methods.features import Features
from one_by_one import FP64, assert_same, gradients_of, split, stack
from oracles import relative_error
from tokens import B, D, K, token_batch, token_model


def forward_one(model, tensors, x):
    """Logits, and the fused feature of each example, of one particle; written out."""
    A1, B1, A2, B2, weight, bias = tensors
    first, *layers = (block.fc for block in model.base.blocks)
    hidden = [x + torch.tanh(first(x))]
    for layer, A, up in zip(layers, (A1, A2), (B1, B2)):
        h = hidden[-1]
        hidden.append(h + torch.tanh(layer.base_layer(h) + 1.5 * h @ A.T @ up.T))
    z = []
    for shallow, deep in zip(hidden[1], hidden[2]):
        attention = torch.softmax(deep @ shallow.T / math.sqrt(D), -1)
        z.append((attention @ shallow).mean(0))
    return hidden[-1].mean(1) @ weight.T + bias, torch.stack(z)


def conditional(z, b):
    """P_{c|b} over the other examples c."""
    others = [c for c in range(len(z)) if c != b]
    similar = [0.5 * (F.cosine_similarity(z[b], z[c], dim=0) + 1) + 1e-7 for c in others]
    return torch.stack(similar) / sum(similar)


def feature_distance(z_i, z_j):
    total = 0
    for b in range(len(z_i)):
        p, q = conditional(z_i, b), conditional(z_j, b)
        total = total + 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    return total / len(z_i)


def updates(tensors):
    A1, B1, A2, B2, weight, bias = tensors
    return torch.cat([t.flatten() for t in (1.5 * B1 @ A1, 1.5 * B2 @ A2, weight, bias)])


def weight_distance(a, b, sigma_a, sigma_b, kind):
    size = sum(t.numel() for t in a)
    apart = (updates(a) - updates(b)).square().sum() + size * (sigma_a - sigma_b) ** 2
    if kind == "squared":
        return apart
    if kind == "root":
        return (apart + 1e-12).sqrt() / size**0.5
    norms = [updates(t).square().sum() + size * s**2 for t, s in ((a, sigma_a), (b, sigma_b))]
    return apart / sum(norms)


def naive_mutual(model, x, y, *, epsilon=None, log_sigma=None, **options):
    """-> the gradient of each particle's own term in its tensors and log σ, and what is logged."""
    o = {
        "alpha": 1.0, "beta": 2.0, "temperature": 3.0, "distance": "root", "kl_weight": 0.0,
        "prior_std": 1.0, "acts": True,
    } | options  # fmt: skip
    mu = split(model.particle_parameters())
    count = len(mu)
    if log_sigma is None:
        log_sigma = [torch.tensor(-math.inf, dtype=torch.float64)] * count
    log_sigma = [s.detach().clone().requires_grad_() for s in log_sigma]
    theta = mu
    if epsilon is not None:
        theta = [
            [t + s.exp() * e for t, e in zip(each, noise)]
            for each, s, noise in zip(mu, log_sigma, epsilon)
        ]
    outputs = [forward_one(model, t, x) for t in theta]
    valid = y != -100
    grads, sigma_grads, logged = [], [], []
    for i in range(count):
        logits, z = outputs[i]
        nll = F.cross_entropy(logits, y)
        log_p = (logits / o["temperature"]).log_softmax(-1)
        mutual = distance = disagreement = torch.zeros((), dtype=torch.float64)
        for j in range(count):
            if j == i:
                continue
            peer, peer_z = (t.detach() for t in outputs[j])
            p = (peer / o["temperature"]).softmax(-1)
            kl = (p * (p.log() - log_p)).sum(-1)[valid].mean()
            mutual = mutual + o["temperature"] ** 2 * kl / (count - 1)
            frozen = [t.detach() for t in mu[j]]
            s_i, s_j = log_sigma[i].exp(), log_sigma[j].detach().exp()
            if o["acts"]:
                W = weight_distance(mu[i], frozen, s_i, s_j, o["distance"])
                distance = distance + W / (count - 1)
                disagreement = disagreement + feature_distance(z, peer_z) / (count - 1)
        own = nll + mutual - o["alpha"] * distance - o["beta"] * disagreement
        prior = 0
        for t in mu[i]:
            v = (log_sigma[i].exp() / o["prior_std"]) ** 2
            prior = prior + 0.5 * (t.square() / o["prior_std"] ** 2 + v - 1 - v.log()).sum()
        term = own + o["kl_weight"] * prior if o["kl_weight"] else own
        inputs = [*mu[i], *([log_sigma[i]] if epsilon is not None else [])]
        each = torch.autograd.grad(term, inputs, retain_graph=True)
        grads.append(each[: len(mu[i])])
        sigma_grads += each[len(mu[i]) :]
        logged.append(torch.stack([own, nll, mutual, distance, disagreement]).detach())
    names = ("loss", "nll", "mutual", "weight_distance", "feature_distance")
    return stack(grads), sigma_grads, dict(zip(names, torch.stack(logged).mean(0)))


OFF = {"alpha": 0.0, "beta": 0.0}


class TestTheGradient:
    @pytest.mark.cover
    @pytest.mark.parametrize(
        "options",
        [
            OFF,
            {"alpha": 30.0, "beta": 0.0},
            {"alpha": 0.0, "beta": 300.0},
            {"alpha": 30.0, "beta": 300.0, "temperature": 1.5},
            {"alpha": 3.0, "distance": "squared"},
            {"alpha": 30.0, "distance": "relative"},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings('ignore:.*distance="squared" has no bound')
    def test_is_the_naive_loop(self, options):
        model = token_model()
        x, y = token_batch()
        expected, _, logged = naive_mutual(model, x, y, **options)
        for chunk in (None, 1, 2):
            method = ml.MutualLearning(model, start=0, particle_chunk=chunk, **options)
            model.zero_grad()
            stats = method.backward(lambda: (model(x), y))
            assert_same([p.grad for p in method.params], expected)
            weights = {"weight_distance": method.alpha, "feature_distance": method.beta}
            assert stats.keys() == logged.keys() - {name for name, w in weights.items() if w == 0}
            for name, value in stats.items():
                assert relative_error(value, logged[name]) < FP64, name

    @pytest.mark.parametrize("distance", ["root", "relative"])
    def test_of_noisy_peers_is_the_naive_loop(self, distance):
        model = token_model()
        options = {
            "alpha": 30.0, "beta": 300.0, "kl_weight": 0.01, "prior_std": 0.5, "distance": distance
        }  # fmt: skip
        method = ml.MutualLearning(model, start=0, sigma=0.1, learn_sigma=True, seed=4, **options)
        (log_sigma,) = method.parameters()
        with torch.no_grad():
            log_sigma.copy_(torch.tensor([0.1, 0.2, 0.05]).log())
        x, y = token_batch()
        generator = torch.Generator().manual_seed(4)
        noise = [torch.empty_like(p).normal_(generator=generator) for p in method.params]
        before = [p.detach().clone() for p in method.params]
        expected, expected_sigma, logged = naive_mutual(
            model, x, y, epsilon=split(noise), log_sigma=log_sigma.double(), **options
        )
        stats = method.backward(lambda: (model(x), y))
        # log σ is float32, and so are σ in θ and its gradient.
        assert_same([p.grad for p in method.params], expected, 1e-6)
        assert relative_error(log_sigma.grad, torch.stack(expected_sigma)) < 1e-5
        assert stats["loss"].item() == pytest.approx(logged["loss"].item(), rel=1e-6)
        assert stats["sigma"].item() == pytest.approx((0.1 + 0.2 + 0.05) / 3)
        assert all(torch.equal(p, b) for p, b in zip(method.params, before))

    def test_with_a_fixed_sigma_nothing_of_it_is_trained(self):
        model = token_model()
        x, y = token_batch()
        method = ml.MutualLearning(model, sigma=2**-6, start=0)
        generator = torch.Generator().manual_seed(0)
        noise = split([torch.empty_like(p).normal_(generator=generator) for p in method.params])
        log_sigma = torch.full((K,), 2**-6, dtype=torch.float64).log()
        expected = naive_mutual(model, x, y, epsilon=noise, log_sigma=log_sigma)[0]
        assert_same(gradients_of(method, lambda: (model(x), y)), expected, 1e-6)
        assert method.parameters() == []

    def test_of_one_particle_is_the_ensembles(self):
        model = token_model(1)
        x, y = token_batch()
        # A batch of two has no features to compare, and needs none.
        for rows in (slice(None), slice(2)):
            got = gradients_of(ml.MutualLearning(model, start=0), lambda: (model(x[rows]), y[rows]))  # noqa: B023
            expected = gradients_of(ml.Ensemble(model), lambda: (model(x[rows]), y[rows]))  # noqa: B023
            assert all(map(torch.equal, got, expected))
        # Nor does it need modules to compare.
        tensors = [torch.randn(1, B, 4, requires_grad=True)]
        assert ml.MutualLearning(tensors, start=0)._features is None

    def test_of_plain_tensors(self):
        # Every tensor is dense there: D is the distance of the weights themselves.
        torch.manual_seed(0)
        logits = torch.randn(K, B, 4, dtype=torch.float64, requires_grad=True)
        method = ml.MutualLearning([logits], alpha=5.0, beta=0.0, start=0)
        y = torch.arange(B) % 4
        stats = method.backward(lambda: (0 * logits, y))
        leaf = logits.detach().clone().requires_grad_()
        i, j = torch.triu_indices(K, K, 1)
        W = ((leaf[i] - leaf[j]).flatten(1).square().sum(1) + 1e-12).sqrt() / math.sqrt(B * 4)
        (expected,) = torch.autograd.grad(-5.0 / (K - 1) * W.sum(), leaf)
        assert relative_error(logits.grad, expected) < FP64
        assert relative_error(stats["weight_distance"], W.mean()) < FP64

    def test_frozen_factors_are_in_the_distance_and_get_nothing(self):
        model = token_model()
        for adapter in model.adapters():
            adapter.lora_A.requires_grad_(False)
        x, y = token_batch()
        options = {"alpha": 30.0, "beta": 0.0}
        method = ml.MutualLearning(model, start=0, **options)
        method.backward(lambda: (model(x), y))
        assert all(a.lora_A.grad is None and a.lora_B.grad is not None for a in model.adapters())
        size = method._weights.size
        assert size == sum(p[0].numel() for p in model.particle_parameters())
        # W's gradient is the difference to α = 0.
        grads = [p.grad.clone() for p in method.params]
        without = gradients_of(ml.MutualLearning(model, **OFF, start=0), lambda: (model(x), y))
        leaves = [[t.detach() for t in a[1:3]] for a in model.adapters()]
        B1 = leaves[0][1].clone().requires_grad_()
        D = sum(
            (1.5 * (up[:, None] @ A[:, None] - up @ A)).square().sum((-1, -2))
            for A, up in ((leaves[0][0], B1), leaves[1])
        )
        for p in model.heads()[0][1].values():
            flat = p.detach().flatten(1)
            D = D + (flat[:, None] - flat).square().sum(-1)
        i, j = torch.triu_indices(K, K, 1)
        W = (D[i, j] + 1e-12).sqrt().sum() / size**0.5
        (expected,) = torch.autograd.grad(-30.0 / (K - 1) * W, B1)
        assert relative_error(grads[0] - without[0], expected) < 1e-9

    @pytest.mark.parametrize(
        "options, name",
        [
            ({"alpha": 1.0, "beta": 0.0}, "weight_distance"),
            ({"alpha": 0.0, "beta": 1e3}, "feature_distance"),
        ],
    )
    def test_a_distance_rises_where_it_acts_alone(self, options, name):
        for seed in range(5):
            model = token_model(4, seed)
            x, y = token_batch(seed)
            method = ml.MutualLearning(model, start=0, **options)
            optimizer = torch.optim.SGD(method.params, 1e-3)
            seen = []
            for _ in range(3):
                optimizer.zero_grad()
                # Equal predictions: neither loss nor KL has a gradient.
                stats = method.backward(lambda: (0 * model(x), y))  # noqa: B023
                assert stats["mutual"] == 0
                optimizer.step()
                seen.append(stats[name].item())
            assert 0 < seen[0] < seen[1] < seen[2], seed

    def test_peers_pull_predictions_together(self):
        model = token_model()
        x, y = token_batch(ignored=())
        method = ml.MutualLearning(model, **OFF, loss=lambda z, _: 0 * z.sum((1, 2)), start=0)
        optimizer, seen = torch.optim.SGD(method.params, 1e-2), []
        for _ in range(3):
            optimizer.zero_grad()
            seen.append(method.backward(lambda: (model(x), y))["mutual"].item())
            optimizer.step()
        assert seen[0] > seen[1] > seen[2] > 0


class TestTheTerms:
    def test_equal_particles_are_at_no_distance(self):
        z = torch.randn(1, B, D).expand(K, -1, -1)
        assert pairs.disagreement(z) == 0
        logits = torch.randn(1, B, 4, dtype=torch.float64).expand(K, -1, -1)
        kl = pairs.distillation(logits, torch.zeros(B, dtype=torch.int64), 3.0)
        assert kl.shape == (K,) and kl.abs().max() < 1e-14

    def test_opposite_features_have_a_finite_gradient(self):
        z = torch.tensor(
            [[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], [[1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]]
        )
        z.requires_grad_()
        value = pairs.disagreement(z)
        value.backward()
        assert value > 0 and z.grad.isfinite().all()

    def test_small_differences_survive_half_precision_of_the_model(self):
        # All cosines are near 1, as in a real network.
        torch.manual_seed(0)
        z = 1 + 1e-2 * torch.randn(2, 8, 32)
        expected = pairs.disagreement(z.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(pairs.disagreement(z), expected) < 1e-4

    def test_the_relative_distance_is_bounded(self):
        theta = torch.randn(2, 7, dtype=torch.float64)
        weights = pairs.Weights([], [theta])
        opposite = torch.stack([theta[0], -theta[0]])
        assert weights.mean([opposite], None, "relative").item() == pytest.approx(2)
        zero = torch.zeros(2, 7, requires_grad=True)
        for kind in pairs.DISTANCES:
            value = weights.mean([zero], None, kind)
            (grad,) = torch.autograd.grad(value, zero)
            assert value.abs() < 1e-6 and grad.isfinite().all()


class TestTheSchedule:
    def test_without_diversity_there_is_none(self):
        assert ml.MutualLearning(token_model(), alpha=0.0, beta=0.0).start == 0

    def run(self, model, method, steps):
        x, y = token_batch()
        optimizer = torch.optim.SGD(method.params, 0.1)
        keys = []
        for _ in range(steps):
            optimizer.zero_grad()
            keys.append(method.backward(lambda: (model(x), y)).keys())
            optimizer.step()
        return ["feature_distance" in k and "weight_distance" in k for k in keys]

    @pytest.mark.parametrize(
        "start, total, first", [(2, None, 2), (2 / 3, 6, 4), (0.5, 5, 3), (1.0, 4, 4), (0.0, 9, 0)]
    )
    def test_nothing_is_fused_before_it(self, start, total, first, monkeypatch):
        calls = []
        fused = Features.__call__
        monkeypatch.setattr(Features, "__call__", lambda self: calls.append(1) or fused(self))
        model = token_model()
        method = ml.MutualLearning(model, start=start, total_steps=total)
        assert self.run(model, method, 5) == [step >= first for step in range(5)]
        assert len(calls) == max(0, 5 - first)

    def test_before_it_this_is_deep_mutual_learning(self):
        model = token_model()
        x, y = token_batch()
        early = gradients_of(ml.MutualLearning(model, start=1), lambda: (model(x), y))
        assert_same(early, naive_mutual(model, x, y, acts=False)[0])
        plain = ml.MutualLearning(model, features=None, **OFF, start=0)
        assert all(map(torch.equal, early, gradients_of(plain, lambda: (model(x), y))))

    def test_it_resumes(self):
        model = token_model()
        method = ml.MutualLearning(model, start=3)
        assert self.run(model, method, 2) == [False, False]
        other = token_model(seed=1)
        other.load_state_dict(model.state_dict())
        resumed = ml.MutualLearning(other, start=3)
        resumed.load_state_dict(method.state_dict())
        for m, which in ((model, method), (other, resumed)):
            assert self.run(m, which, 2) == [False, True]
        assert all(map(torch.equal, model.particle_parameters(), other.particle_parameters()))

    def test_a_graph_of_the_first_stage_is_refused(self, monkeypatch):
        model = token_model()
        x, y = token_batch()
        for name in ("mutual", "base"):
            monkeypatch.setattr(f"multilora.methods.{name}.is_captured", lambda _: True)
        method = ml.MutualLearning(model, start=2, nonfinite="ignore")
        with pytest.raises(RuntimeError, match="changes at call 2: capture from there on"):
            method.backward(lambda: (model(x), y))
        # In its last stage only the weights act: nothing of them needs the capturing device.
        method.step = 2
        method._require_capturable()


class TestRefusals:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({}, "start=0.667 is a fraction of total_steps"),
            ({"start": 1.5, "total_steps": 3}, "start .* in .0, 1.; got 1.5"),
            ({"start": -1}, "start must be an integer >= 0; got -1"),
            ({"start": True}, "start must be an integer >= 0; got True"),
            ({"total_steps": 0}, "total_steps must be an integer >= 1; got 0"),
            ({"temperature": 0.0}, "temperature must be .* > 0"),
            ({"distance": "cosine"}, 'distance must be "root", "squared" or "relative"'),
            ({"features": None}, "features=None needs beta=0; got beta=2.0"),
            ({"features": "blocks.1"}, "features must be .* two modules' names; got 'blocks.1'"),
            ({"features": ("blocks.1",)}, "features must be"),
            ({"features": ("blocks.1", "block.2")}, "no module 'block.2'; it has .*blocks.2"),
            ({"learn_sigma": True}, r"sigma \(with learn_sigma\) must be .* > 0"),
            ({"loss": "bce"}, "needs a loss with classes"),
        ],
        ids=str,
    )
    def test_of_settings(self, options, message):
        if options.keys().isdisjoint({"start", "total_steps"}) and options:
            options = {"start": 0} | options
        with pytest.raises(ValueError, match=message):
            ml.MutualLearning(token_model(), **options)

    def test_of_a_squared_distance_there_is_a_warning(self):
        with pytest.warns(UserWarning, match="no bound") as said:
            ml.MutualLearning(token_model(), start=0, distance="squared")
        assert said[0].filename == __file__

    def test_of_equal_particles(self):
        model = token_model()
        with torch.no_grad():
            for p in model.particle_parameters():
                p.copy_(p[:1].clone().expand_as(p))
        with pytest.raises(ValueError, match="identical, so mutual learning has zero gradient"):
            ml.MutualLearning(model, start=0)
        ml.MutualLearning(model, start=0, sigma=0.1)

    def test_of_batches(self):
        model = token_model()
        x, y = token_batch(ignored=())
        method = ml.MutualLearning(model, start=0)
        with pytest.raises(ValueError, match=r"batches of 3 or more; got features \(3, 2, 6\)"):
            method.backward(lambda: (model(x[:2]), y[:2]))
        own = y.repeat(K, 1)
        with pytest.raises(ValueError, match=r"class targets \(N,\) that they share; .*\(3, 5\)"):
            method.backward(lambda: (model(x), own))
        regression = ml.MutualLearning(
            model, start=0, loss=lambda z, t: (z - t).square().mean((1, 2))
        )
        with pytest.raises(ValueError, match=r"class targets \(N,\)"):
            regression.backward(lambda: (model(x), torch.randn(B, 4)))
        # Three are enough, and without β so are two.
        method.backward(lambda: (model(x[:3]), y[:3]))
        ml.MutualLearning(model, start=0, beta=0.0).backward(lambda: (model(x[:2]), y[:2]))
