"""Promises of all training methods: scaling, accumulation, statistics, state, refusals."""

import io

import pytest
import torch

import multilora as ml
from one_by_one import assert_same, batch, gradients_of, particle_model, trained
from oracles import relative_error

METHODS = {
    "ensemble": lambda m: ml.Ensemble(m),
    "svgd": lambda m: ml.SVGD(m, gamma=0.5),
    "svgd-textbook": lambda m: ml.SVGD(m, gamma=0.5, drive="mix", repulse="stein", scope="global"),
    "ibdr": lambda m: ml.IBDR(m, alpha=0.5),
    "ibdr-sigma": lambda m: ml.IBDR(m, sigma=2**-6, learn_sigma=True, beta=1e-3, seed=5),
    "ibdr-cross": lambda m: ml.IBDR(m, alpha=0.5, divergence="cross", ascent="sam", cost="output"),
    "ibdr-ensemble": lambda m: ml.IBDR(m, alpha=0.5, loss="ensemble", ascent="step"),
    # The features need tokens: tests/methods/test_mutual.py.
    "mutual": lambda m: ml.MutualLearning(m, alpha=5.0, beta=0.0, start=0),
    "mutual-sigma": lambda m: ml.MutualLearning(
        m, alpha=5.0, beta=0.0, start=0, sigma=2**-6, learn_sigma=True, kl_weight=1e-3, seed=5
    ),
    "map": lambda m: ml.Ensemble(m, prior_precision=0.1),
    "sam": lambda m: ml.SAM(m, rho=0.3),
    "sgld": lambda m: ml.SGLD(m, num_data=50, lr=0.1, prior_std=0.5, seed=5),
    "variational": lambda m: ml.Variational(m, num_data=50, sigma=0.1, seed=5),
    "variational-sam": lambda m: ml.Variational(m, num_data=50, sigma=0.1, rho=0.3),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
# The methods that take targets (K, N): a loss of the mean prediction, and one that compares all
# predictions, needs shared targets.
INDEPENDENT = {n: m for n, m in METHODS.items() if n != "ibdr-ensemble" and "mutual" not in n}
independent = pytest.mark.parametrize("make", INDEPENDENT.values(), ids=INDEPENDENT)


class TestEveryMethod:
    @every_method
    @pytest.mark.parametrize("scale", [1e-3, 4.0, 65536.0, torch.tensor(3.0)], ids=str)
    def test_scale_multiplies_the_gradient(self, make, scale):
        x, y = batch()
        plain, scaled = make(particle_model()), make(particle_model())
        expected = [scale * g for g in gradients_of(plain, lambda: (plain.model(x), y))]
        own = [scale * s.grad for s in plain.parameters()]
        # 1e-6: IBDR keeps σ, and so its gradient, in float32.
        assert_same(gradients_of(scaled, lambda: (scaled.model(x), y), scale), expected, 1e-6)
        for got, wanted in zip(scaled.parameters(), own):
            assert relative_error(got.grad, wanted) < 1e-6

    @every_method
    def test_backward_accumulates(self, make):
        batches = [batch(), batch()]

        def closures(model):
            return [lambda b=b: (model(b[0]), b[1]) for b in batches]

        once, twice = make(particle_model()), make(particle_model())
        each = [gradients_of(once, closure) for closure in closures(once.model)]
        for closure in closures(twice.model):
            twice.backward(closure)
        tensors = twice.params if twice.trains_particles else trained(twice)
        assert_same([p.grad for p in tensors], [a + b for a, b in zip(*each)])

    @pytest.mark.parametrize("name", ["ensemble", "map", "svgd", "svgd-textbook", "mutual"])
    def test_micro_batches_are_the_batch(self, name):
        # In the others every micro-batch has its own ascent or noise.
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
        x, y = batch(12)
        rows, sequences = make(particle_model()), make(particle_model())
        expected = gradients_of(rows, lambda: (rows.model(x), y))
        got = gradients_of(
            sequences, lambda: (sequences.model(x).unflatten(1, (3, 4)), y.view(3, 4))
        )
        assert_same(got, expected)

    @independent
    @pytest.mark.parametrize("axes", [(6,), (2, 3)], ids=["rows", "sequences"])
    @pytest.mark.filterwarnings("ignore:IBDR. every particle has its own mini-batch")
    def test_a_mini_batch_of_its_own_for_every_particle(self, make, axes):
        # Targets that happen to be shared, said once and said for every particle. No divergence:
        # IBDR has none between predictions of different examples.
        x, y = batch(6)

        def of(targets):
            method = make(particle_model())
            method.alpha = 0.0
            return gradients_of(method, lambda: (method.model(x).unflatten(1, axes), targets))

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
        method.gamma = method.alpha = method.beta = method.prior_precision = 0.0
        method.temperature = 1.0 if isinstance(method, ml.MutualLearning) else 0.0
        method.kl_weight = 0.0
        grads = gradients_of(method, lambda: (used[:, None], torch.tensor([1])))
        assert grads[0].abs().max() > 0
        assert grads[1].shape[-1:] == unused.shape[-1:] and not grads[1].any()

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
    def test_the_documented_loop_moves_what_gets_gradients(self, make):
        # Weight decay moves a tensor without a gradient in no optimizer of torch.optim.
        model = particle_model()
        method, (x, y) = make(model), batch()
        optimizer = torch.optim.AdamW(
            [*model.particle_parameters(), *method.parameters()], lr=0.1, weight_decay=0.5
        )
        for _ in range(2):
            optimizer.zero_grad()
            method.backward(lambda: (model(x), y))
            before = [p.detach().clone() for p in model.particle_parameters()]
            own = [p.detach().clone() for p in method.parameters()]
            optimizer.step()
            for p, old in zip(model.particle_parameters(), before):
                assert torch.equal(p, old) != method.trains_particles
                assert (p in optimizer.state) == method.trains_particles
            assert all(not torch.equal(p, old) for p, old in zip(method.parameters(), own))

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
        (ml.Ensemble, {"prior_precision": -1.0}, "prior_precision must be .* >= 0; got -1.0"),
        (ml.SAM, {"rho": -0.1}, "rho must be .* >= 0; got -0.1"),
        (ml.Variational, {"num_data": 9, "noise": "B"}, "noise must be"),
        (ml.Variational, {"num_data": 9, "noise": "A"}, "needs a ParticleModel"),
        (ml.Variational, {"num_data": 9, "sigma": 0.0}, "sigma must be .* > 0; got 0.0"),
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
    # They are accepted where they do not interact, or where something sets them apart.
    if cls is ml.SVGD:
        cls(alike, gamma=0.0)
    else:
        cls(alike, alpha=0.0)
        cls(alike, sigma=0.1)
    cls([p[:1] for p in alike])
    with torch.no_grad():
        alike[1][2] += 1
    cls(alike)
