"""The training methods against closed forms and against loops over particles in plain autograd."""

import io
import itertools
import math
import warnings
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multilora as ml
import oracles
from multilora.attach import particle_seeds
from multilora.methods import ibdr
from oracles import relative_error

# float64 and a few hundred operations: rounding is below 1e-13, a wrong term is not.
FP64 = 1e-10


def particle_model(K=3, seed=0, seeds=None):
    """Two adapted layers and a head in float64; B is drawn too, so that ΔW is not zero."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], modules_to_save=["4"])
    model = ml.get_particle_model(base.double(), config, K, seed=seed if seeds is None else seeds)
    if seeds is None:
        with torch.no_grad():
            for adapter in model.adapters():
                adapter.lora_B.normal_()
    return model


def batch(N=9, ignored=(2,)):
    y = torch.randint(4, (N,))
    y[list(ignored)] = -100
    return torch.randn(N, 5, dtype=torch.float64), y


def forward_one(model, tensors, x):
    """The model's forward with one particle's tensors, written out."""
    A1, B1, A2, B2, head_weight, head_bias = tensors
    (_, first), (_, second) = model.lora_layers()
    hidden = torch.tanh(first.base_layer(x) + 1.5 * x @ A1.T @ B1.T)
    hidden = torch.tanh(second.base_layer(hidden) + 1.5 * hidden @ A2.T @ B2.T)
    return hidden @ head_weight.T + head_bias


def split(params) -> list[list[Tensor]]:
    """Stacked tensors -> one list of leaves a particle."""
    K = params[0].shape[0]
    return [[p[k].detach().clone().requires_grad_() for p in params] for k in range(K)]


def stack(per_particle) -> list[Tensor]:
    """One list of tensors a particle -> stacked tensors."""
    return [torch.stack(tensors) for tensors in zip(*per_particle)]


def gradients_of(method, closure, scale=1.0) -> list[Tensor]:
    """What one backward adds to .grad."""
    for p in method.params:
        p.grad = None
    method.backward(closure, scale)
    return [p.grad for p in method.params]


def assert_same(got, expected, tolerance=FP64):
    assert len(got) == len(expected) > 0
    for g, e in zip(got, expected):
        assert relative_error(g, e) < tolerance


METHODS = {
    "ensemble": lambda m: ml.Ensemble(m),
    "svgd": lambda m: ml.SVGD(m, gamma=0.5),
    "svgd-textbook": lambda m: ml.SVGD(m, gamma=0.5, drive="mix", repulse="stein", scope="global"),
    "ibdr": lambda m: ml.IBDR(m, alpha=0.5),
    "ibdr-sigma": lambda m: ml.IBDR(m, sigma=2**-6, learn_sigma=True, beta=1e-3, seed=5),
    "ibdr-cross": lambda m: ml.IBDR(m, alpha=0.5, divergence="cross", ascent="sam", cost="output"),
    "ibdr-ensemble": lambda m: ml.IBDR(m, alpha=0.5, loss="ensemble", ascent="step"),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
# Those that take targets (K, N): a loss of the mean prediction needs shared ones.
independent = pytest.mark.parametrize(
    "make",
    [make for name, make in METHODS.items() if name != "ibdr-ensemble"],
    ids=[name for name in METHODS if name != "ibdr-ensemble"],
)


class TestEveryMethod:
    @every_method
    @pytest.mark.parametrize("scale", [1e-3, 4.0, 65536.0, torch.tensor(3.0)], ids=str)
    def test_scale_multiplies_the_gradient(self, make, scale):
        model = particle_model()
        x, y = batch()
        plain, scaled = make(model), make(model)
        expected = [scale * g for g in gradients_of(plain, lambda: (model(x), y))]
        own = [scale * s.grad for s in plain.parameters()]
        # 1e-6: IBDR keeps σ, and so its gradient, in float32.
        assert_same(gradients_of(scaled, lambda: (model(x), y), scale), expected, 1e-6)
        for got, wanted in zip(scaled.parameters(), own):
            assert relative_error(got.grad, wanted) < 1e-6

    @every_method
    def test_backward_accumulates(self, make):
        model = particle_model()
        batches = [batch(), batch()]
        closures = [lambda b=b: (model(b[0]), b[1]) for b in batches]
        once = make(model)
        expected = [a + b for a, b in zip(*[gradients_of(once, c) for c in closures])]
        twice = make(model)
        for p in twice.params:
            p.grad = None
        for closure in closures:
            twice.backward(closure)
        assert_same([p.grad for p in twice.params], expected)

    @pytest.mark.parametrize("name", ["ensemble", "svgd", "svgd-textbook"])
    def test_micro_batches_are_the_batch(self, name):
        # Not IBDR: there every micro-batch has its own ascent.
        model = particle_model()
        x, y = batch(12, ignored=())
        method = METHODS[name](model)
        expected = gradients_of(method, lambda: (model(x), y))
        for p in method.params:
            p.grad = None
        for part in (slice(0, 6), slice(6, 12)):
            method.backward(lambda part=part: (model(x[part]), y[part]), scale=0.5)
        assert_same([p.grad for p in method.params], expected)

    @every_method
    def test_stats_are_detached_scalars(self, make):
        model = particle_model()
        x, y = batch()
        stats = make(model).backward(lambda: (model(x), y), scale=7.0)
        assert {"loss", "nll"} <= stats.keys()
        for value in stats.values():
            assert value.shape == () and not value.requires_grad and value.isfinite()

    @every_method
    def test_leading_axes_of_the_logits_are_rows(self, make):
        # A language model's (K, B, T, C) logits and (B, T) targets.
        model = particle_model()
        x, y = batch(12)

        def sequences():
            return model(x).unflatten(1, (3, 4)), y.view(3, 4)

        expected = gradients_of(make(model), lambda: (model(x), y))
        assert_same(gradients_of(make(model), sequences), expected)

    @independent
    @pytest.mark.parametrize("axes", [(6,), (2, 3)], ids=["rows", "sequences"])
    @pytest.mark.filterwarnings("ignore:IBDR. every particle has its own mini-batch")
    def test_a_mini_batch_of_its_own_for_every_particle(self, make, axes):
        # Targets that happen to be shared, said once and said for every particle. No divergence:
        # IBDR has none between predictions of different examples.
        model = particle_model()
        x, y = batch(6)

        def of(targets):
            def closure():
                return model(x).unflatten(1, axes), targets

            method = make(model)
            method.alpha = 0.0
            return gradients_of(method, closure)

        assert_same(of(y.view(axes).expand(3, *axes)), of(y.view(axes)))

    @every_method
    def test_state_dict_round_trip(self, make):
        # Through a file, as a checkpoint goes.
        x, y = batch()

        def train(model, method, steps):
            optimizer = torch.optim.SGD([*model.particle_parameters(), *method.parameters()], 0.1)
            for _ in range(steps):
                optimizer.zero_grad()
                method.backward(lambda: (model(x), y))
                optimizer.step()

        model = particle_model()
        method = make(model)
        train(model, method, 3)
        file = io.BytesIO()
        torch.save([model.state_dict(), method.state_dict()], file)
        train(model, method, 3)

        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        resumed_model = particle_model(seed=1)
        resumed_model.load_state_dict(weights)
        resumed = make(resumed_model)
        resumed.load_state_dict(state)
        train(resumed_model, resumed, 3)
        for got, expected in zip(resumed_model.particle_parameters(), model.particle_parameters()):
            assert torch.equal(got, expected)
        got, expected = resumed.state_dict(), method.state_dict()
        assert got.keys() == expected.keys() and got["step"] == 6
        for key in got.keys() - {"step"}:
            assert torch.equal(got[key], expected[key]), key

    @every_method
    def test_state_of_another_method(self, make):
        method = make(particle_model())
        with pytest.raises(ValueError, match=r"needs the keys \[.*'step'.*\]; got \['nonsense'\]"):
            method.load_state_dict({"nonsense": 1})

    @every_method
    def test_a_parameter_outside_the_loss_gets_zero(self, make):
        # Not None: an optimizer with momentum would treat that parameter as absent.
        used, unused = (torch.randn(3, n, dtype=torch.float64) for n in (4, 2))
        params = [used.requires_grad_(), unused.requires_grad_()]
        method = make(params)
        method.gamma = method.beta = 0.0
        grads = gradients_of(method, lambda: (used[:, None], torch.tensor([1])))
        assert grads[0].abs().max() > 0
        assert torch.equal(grads[1], torch.zeros_like(unused))

    @every_method
    @pytest.mark.parametrize(
        "logits, targets",
        [((2, 9, 4), (9,)), ((9, 4), (9,)), ((3, 9, 4), (8,)), ((3, 9, 4), (2, 9)), ((3, 4), ())],
        ids=str,
    )
    def test_wrong_closures(self, make, logits, targets):
        model = particle_model()
        method = make(model)
        y = torch.zeros(targets, dtype=torch.int64)
        with pytest.raises(ValueError, match="the closure must return") as error:
            method.backward(lambda: (torch.randn(logits, requires_grad=True), y))
        assert str(logits) in str(error.value) and str(targets) in str(error.value)

    @every_method
    def test_wrong_models(self, make):
        with pytest.raises(TypeError, match="got int"):
            make(3)
        for tensors in ([], [torch.randn(())], [torch.randn(2, 3), torch.randn(3, 3)]):
            with pytest.raises(ValueError, match=r"stacked tensors \(K, \.\.\.\)"):
                make(tensors)


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (ml.Ensemble, {"loss": "ensemble"}, "loss must be"),
        (ml.SVGD, {"loss": "ensemble"}, "loss must be"),
        (ml.SVGD, {"scope": "model"}, "scope must be"),
        (ml.SVGD, {"drive": "stein"}, "drive must be"),
        (ml.SVGD, {"repulse": "mix"}, "repulse must be"),
        (ml.SVGD, {"bandwidth": "mean"}, "bandwidth must be"),
        (ml.SVGD, {"bandwidth": 0.0}, "bandwidth must be"),
        (ml.IBDR, {"ascent": "up"}, "ascent must be"),
        (ml.IBDR, {"cost": "input"}, "cost must be"),
        (ml.IBDR, {"noise": "B"}, "noise must be"),
        (ml.IBDR, {"divergence": "none"}, "divergence must be"),
        (ml.IBDR, {"loss": "mean"}, "loss must be"),
        (ml.IBDR, {"sigma": -0.1}, "sigma must be .* >= 0; got -0.1"),
        (ml.IBDR, {"learn_sigma": True}, r"sigma \(with learn_sigma\) must be .* > 0"),
        (ml.IBDR, {"lambda_init": 6.0}, "lambda_bounds"),
        (ml.IBDR, {"lambda_bounds": (0.0, 5.0)}, "lambda_bounds"),
        (ml.IBDR, {"sigma": 0.1, "noise": "A"}, "needs a ParticleModel"),
    ],
    ids=str,
)
def test_wrong_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([torch.randn(3, 4, requires_grad=True)], **options)


@pytest.mark.parametrize("cls", [ml.SVGD, ml.IBDR])
def test_identical_particles(cls):
    alike = [torch.randn(1, n).repeat(3, 1).requires_grad_() for n in (4, 2)]
    with pytest.raises(ValueError, match="all 3 particles are identical"):
        cls(alike)
    # Nothing to be said where they do not interact, or where something sets them apart.
    if cls is ml.SVGD:
        cls(alike, gamma=0.0)
    else:
        cls(alike, alpha=0.0)
        cls(alike, sigma=0.1)
    cls([p[:1] for p in alike])
    with torch.no_grad():
        alike[1][2] += 1
    cls(alike)


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
        # What the closure returns is the loss's business alone: here, no logits and a number.
        method = make([theta], loss=lambda z, c: (c * z**2).sum(-1))
        assert_same(gradients_of(method, lambda: (theta, 0.5)), [theta])
        with pytest.raises(ValueError, match=r"\(3,\); got \(3, 4\)"):
            make([theta], loss=lambda z, _: z).backward(lambda: (theta, None))


def features(tensors) -> list[Tensor]:
    """What SVGD compares particles by: both layers' ΔW, and the head's weights."""
    A1, B1, A2, B2, head_weight, head_bias = tensors
    head = torch.cat([head_weight.flatten(), head_bias])
    return [(1.5 * B1 @ A1).flatten(), (1.5 * B2 @ A2).flatten(), head]


def naive_svgd(model, x, y, gamma, scope, bandwidth, drive, repulse) -> list[Tensor]:
    """SVGD's direction, one pair of particles at a time."""
    particles = split(model.particle_parameters())
    K = len(particles)
    drives = [
        torch.autograd.grad(F.cross_entropy(forward_one(model, t, x), y), t) for t in particles
    ]

    def distances(i_tensors, j_tensors) -> Tensor:
        pairs = zip(features(i_tensors), features(j_tensors))
        D = torch.stack([(f - g).square().sum() for f, g in pairs])
        return D if scope == "layer" else D.sum().expand(3)

    D = torch.stack([torch.stack([distances(a, b) for b in particles]) for a in particles]).detach()
    if bandwidth == "median":
        apart = [D[i, j] for i, j in itertools.combinations(range(K), 2)]
        width = torch.stack(apart).quantile(0.5, dim=0) / math.log(K + 1)
    else:
        width = torch.full((3,), 2.0 * bandwidth**2, dtype=torch.float64)
    kernel = torch.exp(-D / width)  # (K, K, 3 groups)

    result = []
    for i in range(K):
        total = [torch.zeros_like(t) for t in particles[i]]
        for j in range(K):
            frozen = [t.detach() for t in particles[j if repulse == "own" else i]]
            moving = particles[i if repulse == "own" else j]
            k = torch.exp(-distances(moving, frozen) / width)
            # One kernel for the whole model is a single number, whatever its copies are for.
            k = k.sum() if scope == "layer" else k[0]
            pull = torch.autograd.grad(k, moving)
            sign = 1 if repulse == "own" else -1
            for p in range(6):
                driven = drives[i if drive == "own" else j][p]
                total[p] += (kernel[i, j, p // 2] * driven + sign * gamma * pull[p]) / K
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
        particles = [torch.cat(features(t)).detach() for t in split(model.particle_parameters())]
        D = torch.stack([(a - b).square().sum() for a, b in itertools.combinations(particles, 2)])
        assert relative_error(stats["distance"], D.mean()) < FP64
        assert relative_error(stats["kernel"], torch.exp(-D / 8).mean()) < FP64


class NaiveIBDR:
    """IBDR one particle at a time, with the gradient of each one's own objective."""

    def __init__(self, model, **options):
        defaults = {
            "alpha": 0.02, "ascent": "prox", "clip": 0.15, "step_size": 0.05, "rho": 0.03,
            "lambda_init": 3.0, "lambda_bounds": (0.5, 5.0), "lambda_lr": 1e-2,
            "cost": "parameter", "sigma": 0.0, "noise": "all", "learn_sigma": False, "beta": 0.0,
            "divergence": "joint", "loss": "particle", "kind": "logdet", "eps": 1e-4, "seed": 0,
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
            pull = 2 * self.beta * noisy * (self.sigma - 1 / self.sigma) if self.sigma else 0.0
            grads.append([a + 2 * self.beta * p[i] for a, p in zip(g, params)])
            sigma_grads.append(along + pull)
            volumes.append(volume)

        cost = sum(c.square().sum() for climb in climbs for c in climb) / K
        if self.cost == "output":
            change = [(a.softmax(-1) - b.softmax(-1)).square().sum(-1) for a, b in zip(z, z_higher)]
            cost = torch.stack(change)[:, y != -100].mean()
        low, high = self.lambda_bounds
        moved = self.lambda_ - self.lambda_lr * (self.rho - cost.item())
        self.lambda_ = min(max(moved, low), high)
        # ℓ_i; the loss of the mean prediction is one number, shared by all.
        losses = [self.own_loss(i, z_higher[i], z_higher, y) for i in range(K)]
        nll = torch.stack(losses).mean() / (K if self.loss == "ensemble" else 1)
        stats = {"nll": nll, "divergence": torch.stack(volumes).mean(), "cost": cost}
        return stack(grads), torch.stack(sigma_grads), stats


class TestIBDR:
    @pytest.mark.parametrize("kind", ["logdet", "det"])
    @pytest.mark.parametrize("divergence", ["joint", "cross"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ascent": "prox", "clip": 1e9, "lambda_init": 0.5},
            {"ascent": "step", "step_size": 0.3},
            {"ascent": "sam", "rho": 0.2},
            {"cost": "output", "lambda_lr": 1.0},
            {"loss": "ensemble"},
            {"beta": 0.01},
            {"sigma": 2**-4, "seed": 3},
            {"sigma": 2**-4, "noise": "A", "beta": 0.01},
            {"sigma": 2**-4, "learn_sigma": True, "beta": 0.01},
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
            assert stats["lambda"].item() == pytest.approx(naive.lambda_, rel=1e-12)
            if "learn_sigma" in options:
                # σ and its gradient are float32.
                assert relative_error(method.sigma.grad, sigma_grad) < 1e-6
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
        for rho, bound in ((1e9, 0.5), (0.0, 5.0)):
            options = {"rho": rho, "lambda_lr": 1.0 if rho else 1e9}
            method = ml.IBDR(model, **options)
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
        assert stats["lambda"].item() == method.lambda_.item() == 3.0
        assert torch.equal(theta, before)
        # And the next step is as if nothing had been.
        got = gradients_of(method, lambda: (theta, y))
        fresh = ml.IBDR([theta], ascent=ascent, kind=kind, rho=0.05)
        assert_same(got, gradients_of(fresh, lambda: (theta, y)))

    def test_own_mini_batches_have_no_divergence(self, monkeypatch):
        monkeypatch.setattr(ibdr, "_warned_own_batches", False)
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
        (sigma,) = ml.IBDR(model, sigma=0.1, learn_sigma=True).parameters()
        assert torch.equal(sigma, torch.full((3,), 0.1)) and sigma.requires_grad

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
