"""ml.metrics.evaluate against formulas in NumPy, and ml.predict."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import multilora as ml

# float64 logits give float64 measures, but for those that torchmetrics computes in float32 (6e-8).
FP64, FP32 = 1e-12, 1e-6
IN_FP32 = {f"{name}_misclassification" for name in ("auroc", "fpr95", "aupr")}

both = pytest.mark.parametrize("combine", ["prob", "logit"])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def expected_calibration_error(p, y, bins=15):
    """Σ_b |B_b|/N · |accuracy(B_b) − confidence(B_b)| over bins of equal width."""
    confidence, hit = p.max(-1), p.argmax(-1) == y
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        abs(hit[which == b].mean() - confidence[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    )


def direct(logits, targets, combine):
    """The measures in their most direct form, from probabilities."""
    z, y = logits.double().numpy(), targets.numpy()
    members = softmax(z)
    mean = members.mean(0)
    p = mean if combine == "prob" else softmax(z.mean(0))
    rows = np.arange(len(y))
    wrong = p.argmax(-1) != y
    return {
        "accuracy": 1 - wrong.mean(),
        "nll": -np.log(p[rows, y]).mean(),
        "ece": expected_calibration_error(p, y),
        "brier": ((p - np.eye(p.shape[-1])[y]) ** 2).sum(-1).mean(),
        "entropy": entropy(p).mean(),
        "mutual_information": (entropy(mean) - entropy(members).mean(0)).mean(),
        "diversity": (mean * (np.log(mean) - np.log(members))).sum(-1).mean(),
        "member_accuracy": (members.argmax(-1) == y).mean(-1),
        "member_nll": -np.log(members[:, rows, y]).mean(-1),
        "auroc_misclassification": roc_auc_score(wrong, entropy(p)),
    }


def problem(K=4, N=211, C=7, dtype=torch.float64):
    """Particles that agree in part and are right in part."""
    y = torch.randint(C, (N,))
    shared = torch.randn(N, C, dtype=torch.float64) + 1.5 * nn.functional.one_hot(y, C)
    return (shared + torch.randn(K, N, C, dtype=torch.float64)).to(dtype), y


@both
@pytest.mark.parametrize("shape", [(4, 211, 7), (1, 50, 3), (9, 33, 2)], ids=str)
def test_measures(shape, combine):
    logits, targets = problem(*shape)
    got = ml.metrics.evaluate(logits, targets, combine)
    expected = direct(logits, targets, combine)
    assert got.pop("combine") == combine and got.pop("num_examples") == shape[1]
    for name, value in expected.items():
        tolerance = FP32 if name in IN_FP32 else FP64
        assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@both
def test_log_probabilities_do_as_well(combine):
    logits, targets = problem()
    got = ml.metrics.evaluate(logits.log_softmax(-1), targets, combine)
    expected = ml.metrics.evaluate(logits, targets, combine)
    assert got.keys() == expected.keys()
    for name in got.keys() - {"combine"}:
        tolerance = FP32 if name in IN_FP32 else FP64
        assert got[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype, combine):
    # They are exact in float32, and nothing may be computed in less.
    logits, targets = problem(dtype=dtype)
    ood = torch.randn(4, 31, 7).to(dtype)
    got = ml.metrics.evaluate(logits, targets, combine, ood)
    assert got == ml.metrics.evaluate(logits.float(), targets, combine, ood.float())


def test_values_by_hand():
    # Two particles, each sure of another class: p̄ = ½, ½, 0; H[p̄] = log 2, no member entropy.
    logits = torch.tensor([[[50.0, 0, 0]], [[0, 50.0, 0]]], dtype=torch.float64)
    got = ml.metrics.evaluate(logits, torch.tensor([0]))
    assert got["entropy"] == pytest.approx(math.log(2))
    assert got["mutual_information"] == pytest.approx(math.log(2))
    assert got["nll"] == pytest.approx(math.log(2))
    assert got["brier"] == pytest.approx(0.5)
    assert got["member_accuracy"] == [1, 0]
    # Half of p̄ lies where a particle has e⁻⁵⁰: ½ log ½ + ½ (log ½ + 50) for either.
    assert got["diversity"] == pytest.approx(25 - math.log(2))


@both
def test_probabilities_that_underflow(combine):
    # p_y = e⁻³⁰⁰ is zero in float32; its logarithm is an ordinary number.
    logits = torch.tensor([[[300.0, 0, 0]], [[310.0, 0, 0]]])
    got = ml.metrics.evaluate(logits, torch.tensor([1]), combine)
    expected = -np.log(np.mean(np.exp([-300.0, -310.0]))) if combine == "prob" else 305
    assert got["nll"] == pytest.approx(expected, rel=1e-6)
    assert got["entropy"] == got["mutual_information"] == 0
    assert all(math.isfinite(got[name]) for name in ("nll", "ece", "brier", "diversity"))


def test_mutual_information_is_never_negative():
    # The difference of two rounded entropies is, for every second draw of nearly equal particles.
    for gap in (0.0, 1e-7, 1e-4):
        logits, targets = problem(1, 500, 10, torch.float32)
        close = logits + gap * torch.randn(5, 500, 10)
        got = ml.metrics.evaluate(close, targets)
        # KL of distributions a relative `gap` apart is gap²/2; float32 rounds each of its ten
        # terms at 1e-8.
        assert 0 <= got["mutual_information"] < gap**2 + 1e-6
        assert 0 <= got["diversity"] < gap**2 + 1e-6


@both
def test_ignored_targets(combine):
    logits, targets = problem()
    ignored = torch.rand(len(targets)) < 0.3
    with_ignored = targets.masked_fill(ignored, -100)
    logits[:, ignored] = math.nan
    got = ml.metrics.evaluate(logits, with_ignored, combine)
    kept = ml.metrics.evaluate(logits[:, ~ignored], targets[~ignored], combine)
    assert got == kept
    assert got["num_examples"] == int((~ignored).sum()) < len(targets)


@both
def test_out_of_distribution(combine):
    logits, targets = problem()
    ood = torch.randn(4, 97, 7, dtype=torch.float64)
    got = ml.metrics.evaluate(logits, targets, combine, ood_logits=ood)
    plain = ml.metrics.evaluate(logits, targets, combine)
    assert {name: got[name] for name in plain} == plain

    def uncertainty(logits):
        z = logits.numpy()
        members = softmax(z)
        p = members.mean(0) if combine == "prob" else softmax(z.mean(0))
        return entropy(p), entropy(members.mean(0)) - entropy(members).mean(0)

    inside, outside = uncertainty(logits), uncertainty(ood)
    is_ood = np.repeat([0, 1], [211, 97])
    expected = {
        "ood_entropy": outside[0].mean(),
        "ood_mutual_information": outside[1].mean(),
        "auroc_ood": roc_auc_score(is_ood, np.concatenate([inside[0], outside[0]])),
        "auroc_ood_mi": roc_auc_score(is_ood, np.concatenate([inside[1], outside[1]])),
    }
    others = {f"{name}_{score}" for name in ("fpr95", "aupr") for score in ("ood", "ood_mi")}
    assert got.keys() - plain.keys() == expected.keys() | others
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-6), name


def test_auroc_with_ties():
    # Few different rows, so that many entropies are equal: a tie counts one half.
    rows = torch.randn(4, 5, 7, dtype=torch.float64)
    index, targets = torch.randint(5, (200,)), torch.randint(7, (200,))
    logits = rows[:, index]
    got = ml.metrics.evaluate(logits, targets)["auroc_misclassification"]
    # The same rows give the same entropies to the last bit only if computed alike: round them.
    p = softmax(logits.numpy()).mean(0)
    expected = roc_auc_score(p.argmax(-1) != targets.numpy(), entropy(p).round(9))
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_auroc_of_nothing_is_nan(right):
    targets = torch.arange(5)
    logits = 9 * nn.functional.one_hot(targets if right else targets + 1, 6).double()
    got = ml.metrics.evaluate(logits.expand(3, 5, 6), targets)
    assert got["accuracy"] == right
    assert math.isnan(got["auroc_misclassification"])


@pytest.mark.parametrize(
    "logits, targets, options, message",
    [
        ((4, 9), (9,), {}, r"logits \(K, N, C\).*\(4, 9\).*\(9,\)"),
        ((4, 9, 7), (8,), {}, r"\(4, 9, 7\).*\(8,\)"),
        ((0, 9, 7), (9,), {}, r"\(0, 9, 7\).*\(9,\)"),
        ((4, 9, 7), (4, 9), {}, r"\(4, 9, 7\).*\(4, 9\)"),
        ((4, 9, 7), (9,), {"combine": "mean"}, "combine must be.*'mean'"),
        ((4, 9, 7), (9,), {"ood_logits": torch.zeros(3, 9, 7)}, r"\(3, 9, 7\).*\(4, 9, 7\)"),
        ((4, 9, 7), (9,), {"ood_logits": torch.zeros(4, 9, 6)}, r"\(4, 9, 6\).*\(4, 9, 7\)"),
        ((4, 9, 7), (9,), {"ood_logits": torch.zeros(4, 0, 7)}, r"M >= 1.*\(4, 0, 7\)"),
        ((4, 0, 7), (0,), {}, r"at least one valid target.*\(4, 0, 7\)"),
    ],
)
def test_wrong_arguments(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        ml.metrics.evaluate(torch.zeros(logits), torch.zeros(targets).long(), **options)


@pytest.mark.parametrize("wrong, message", [(7, r"\[0, 7\)"), (-1, r"\[0, 7\)"), (-100, "valid")])
def test_wrong_targets(wrong, message):
    targets = torch.full((9,), wrong)
    with pytest.raises(ValueError, match=rf"{message}.*\(4, 9, 7\)"):
        ml.metrics.evaluate(torch.zeros(4, 9, 7), targets)


class Model(nn.Module):
    """Logits that show the mode, through dropout, and the way in which the input came."""

    def __init__(self, wrap=lambda z: z):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.dropout = nn.Dropout(0.5)
        self.wrap = wrap

    def forward(self, x, scale=1.0):
        z = torch.stack([self.linear(x), self.linear(2 * x)])
        return self.wrap(scale * self.dropout(z))


class TestPredict:
    def test_probabilities(self):
        model, x = Model(), torch.randn(5, 3)
        p = ml.predict(model, x)
        expected = torch.stack([model.linear(x), model.linear(2 * x)]).softmax(-1)
        # Not equal to a draw with dropout, so the mode was eval.
        torch.testing.assert_close(p, expected)
        assert not p.requires_grad

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_is_restored(self, training):
        model = Model().train(training)
        ml.predict(model, torch.randn(5, 3))
        assert model.training == model.dropout.training == training

    def test_the_mode_of_every_part_is_restored(self):
        # A user's frozen part stays in eval mode while the rest trains.
        model = Model().train()
        model.dropout.eval()
        ml.predict(model, torch.randn(5, 3))
        assert model.training and model.linear.training and not model.dropout.training

    def test_the_mode_is_restored_after_an_error(self):
        model = Model().train()
        with pytest.raises(RuntimeError):
            ml.predict(model, torch.randn(5, 2))
        assert model.training and model.dropout.training

    def test_dict_inputs(self):
        model, x = Model(), torch.randn(5, 3)
        p = ml.predict(model, {"x": x, "scale": 2.0})
        expected = torch.stack([model.linear(x), model.linear(2 * x)])
        torch.testing.assert_close(p, (2 * expected).softmax(-1))

    def test_outputs_with_logits(self):
        model, x = Model(lambda z: SimpleNamespace(logits=z, loss=None)), torch.randn(5, 3)
        plain = Model()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(ml.predict(model, x), ml.predict(plain, x))

    def test_half_precision_outputs(self):
        model, x = Model(lambda z: z.bfloat16()), torch.randn(5, 3)
        p = ml.predict(model, x)
        assert p.dtype == torch.float32
        # Rows of bfloat16 probabilities would not sum to one.
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 5), rtol=1e-6, atol=0)

    def test_logarithms(self):
        model, x = Model(), torch.randn(5, 3)
        log_p = ml.predict(model, x, log=True)
        torch.testing.assert_close(log_p.exp(), ml.predict(model, x))
        # Mistakes of any confidence keep their NLL.
        sure = Model(lambda z: 0 * z + torch.tensor([0.0, 1000.0, 0.0, 0.0]))
        log_p = ml.predict(sure, x, log=True)
        y = torch.tensor([0, 1, 1, 1, 1])
        assert ml.metrics.evaluate(log_p, y)["nll"] == pytest.approx(200, rel=1e-6)
        with pytest.raises(ValueError, match=r"1 of 5 targets .* no probability .*log=True"):
            ml.metrics.evaluate(ml.predict(sure, x).log(), y)

    @pytest.mark.parametrize("gap", [10.0, 95.0, 150.0, 700.0])
    def test_no_probability_is_rounded_to_zero(self, gap):
        model = Model(lambda z: 0 * z + torch.tensor([0.0, gap, -math.inf, 1.0]))
        p = ml.predict(model, torch.randn(5, 3))
        assert p.dtype == (torch.float32 if gap < 80 else torch.float64)
        y = torch.tensor([0, 0, 1, 3, 1])
        got = ml.metrics.evaluate(p.log(), y)["nll"]
        assert got == pytest.approx((2 * gap + gap - 1) / 5, rel=1e-4)
        assert (p[..., 2] == 0).all()

    @pytest.mark.parametrize("log", [False, True])
    def test_a_loader(self, log):
        model, x, y = Model().train(), torch.randn(11, 3), torch.arange(11)
        expected = ml.predict(model, x, log=log)
        data = torch.utils.data.TensorDataset(x, y)
        loaders = [
            torch.utils.data.DataLoader(data, batch_size=4),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4),
            [x[:4], x[4:]],
            ((x[i : i + 4], y[i : i + 4]) for i in range(0, 11, 4)),
            [{"x": x[:10]}, ({"x": x[10:]}, y[10:])],
        ]
        for loader in loaders:
            got = ml.predict(model, loader, log=log)
            torch.testing.assert_close(got, expected)
            assert got.device.type == "cpu" and model.training

    @pytest.mark.parametrize(
        "batches, error, message",
        [
            ([], ValueError, "at least one batch"),
            ((torch.zeros(5, 3), torch.zeros(5)), TypeError, "got a tuple"),
            ([(torch.zeros(5, 3), 1, 2)], TypeError, "got a tuple"),
            (["text"], TypeError, "got a str"),
        ],
    )
    def test_what_is_no_loader(self, batches, error, message):
        with pytest.raises(error, match=message):
            ml.predict(Model(), batches)

    def test_batches_of_different_lengths_of_sequences(self):
        model = Model(lambda z: z[:, :, None].expand(-1, -1, z.shape[1], -1))
        with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\), \(2, 3, 3, 4\)"):
            ml.predict(model, [torch.randn(4, 3), torch.randn(3, 3)], class_axis=-1)

    @pytest.mark.parametrize("axis, shape", [(1, (4, 6, 7)), (-3, (4, 6, 7)), (-1, (6, 4))])
    def test_dense_outputs(self, axis, shape):
        z = torch.randn(2, 5, *shape)
        model = Model(lambda _: z)
        p = ml.predict(model, torch.randn(5, 3), class_axis=axis)
        assert p.shape == z.shape
        torch.testing.assert_close(p, z.softmax(2 if axis == 1 else axis))
        with pytest.raises(ValueError, match="needs class_axis="):
            ml.predict(model, torch.randn(5, 3))

    def test_outputs_of_many(self):
        x, other = torch.randn(5, 3), torch.randn(2, 5, 9)
        plain = Model().eval()
        expected = ml.predict(plain, x)

        def of(wrap):
            model = Model(wrap)
            model.load_state_dict(plain.state_dict())
            return model

        tuples, logits = of(lambda z: (z, other)), of(lambda z: {"loss": other, "logits": z})
        dicts, alone = of(lambda z: {"out": z, "aux": other}), of(lambda z: {"out": z, "n": 3})
        for model in (tuples, logits, alone):
            assert torch.equal(ml.predict(model, x), expected)
        assert torch.equal(ml.predict(dicts, x, output="out"), expected)
        assert torch.equal(ml.predict(tuples, x, output=1), other.softmax(-1))
        named = of(lambda z: SimpleNamespace(logits=other, scores=z))
        assert torch.equal(ml.predict(named, x, output="scores"), expected)
        with pytest.raises(ValueError, match=r"output=.*\['aux', 'out'\]"):
            ml.predict(dicts, x)

    @pytest.mark.parametrize(
        "wrap, options, message",
        [
            (lambda z: z[..., :1], {}, r"two classes or more.*\(2, 5, 1\)"),
            (lambda z: z[..., 0], {}, r"logits \(K, B, C\).*\(2, 5\)"),
            (lambda z: z.long(), {}, r"torch.int64"),
            (lambda z: (None, z), {}, "gave a NoneType"),
            (lambda z: z, {"class_axis": 0}, "class_axis = 0 is the batch"),
            (lambda z: z, {"class_axis": -2}, "class_axis = -2 is the batch"),
            (lambda z: z, {"class_axis": 2}, r"class_axis must be an integer in \[-2, 1\]; got 2"),
            (lambda z: z, {"particle_chunk": 0}, "particle_chunk must be an integer >= 1"),
            (lambda z: z, {"log": 1}, "log must be True or False"),
        ],
    )
    def test_what_is_no_classification(self, wrap, options, message):
        with pytest.raises(ValueError, match=message):
            ml.predict(Model(wrap), torch.randn(5, 3), **options)


@pytest.mark.parametrize("junk", [math.nan, math.inf, "all classes masked"])
@pytest.mark.parametrize("where", ["logits", "ood_logits"])
def test_broken_rows_are_refused(junk, where):
    logits, targets = problem(N=200)
    ood = torch.randn(4, 31, 7, dtype=torch.float64)
    broken = logits if where == "logits" else ood
    if isinstance(junk, str):
        broken[1, 3:5] = -math.inf
    else:
        broken[1, 3, 2] = broken[2, 3, 0] = broken[0, 4, 1] = junk
    with pytest.raises(ValueError, match=rf"2 of {len(broken[0])} rows of {where} hold NaN"):
        ml.metrics.evaluate(logits, targets, ood_logits=ood)
    broken[:] = 0
    ml.metrics.evaluate(logits, targets, ood_logits=ood)


@both
def test_masked_classes(combine):
    # Minus infinity is log 0: as if the class did not exist.
    logits, targets = problem(C=6)
    masked = nn.functional.pad(logits, (0, 1), value=-math.inf)
    got = ml.metrics.evaluate(masked, targets, combine, masked.flip(1))
    expected = ml.metrics.evaluate(logits, targets, combine, logits.flip(1))
    # Another number of classes changes the order of its sum.
    assert got.pop("vendi_prediction") == pytest.approx(expected.pop("vendi_prediction"), rel=FP64)
    assert got == expected


def test_targets_of_another_dtype():
    with pytest.raises(ValueError, match=r"int64 targets; got torch\.float32"):
        ml.metrics.evaluate(torch.zeros(2, 3, 4), torch.zeros(3))


def test_probabilities_for_logits():
    logits, targets = problem()
    with pytest.warns(UserWarning, match="look like probabilities"):
        ml.metrics.evaluate(logits.softmax(-1), targets)


class TestPredictLoader:
    def test_pairs_and_mappings(self):
        model, x, y = Model().train(), torch.randn(11, 3), torch.arange(11) % 4
        expected = ml.predict(model, x, log=True)
        loaders = [
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4),
            # Model takes no `labels`: it is not given them.
            ({"x": x[i : i + 4], "labels": y[i : i + 4]} for i in range(0, 11, 4)),
            [({"x": x[:10]}, y[:10]), (x[10:], y[10:])],
        ]
        for loader in loaders:
            log_p, targets = ml.metrics.predict_loader(model, loader)
            torch.testing.assert_close(log_p, expected)
            assert torch.equal(targets, y)
            assert model.training and model.dropout.training and not log_p.requires_grad
        nll = ml.metrics.evaluate(log_p, targets)["nll"]
        assert nll == pytest.approx(ml.metrics.evaluate(expected, y)["nll"])

    @pytest.mark.parametrize("axis, shape", [(1, (4, 6, 7)), (-1, (6, 4))])
    def test_positions_of_dense_outputs_are_examples(self, axis, shape):
        z = torch.randn(2, 5, *shape)
        dense = Model(lambda out: z[:, -out.shape[1] :])
        y = torch.randint(4, (5, *(shape[1:] if axis == 1 else shape[:-1])))
        batches = [(torch.zeros(5, 3), y), (torch.zeros(2, 3), y[-2:])]
        log_p, targets = ml.metrics.predict_loader(dense, batches, class_axis=axis)
        expected = z.movedim(2, -1) if axis == 1 else z
        expected = torch.cat([expected, expected[:, -2:]], 1).flatten(1, -2).log_softmax(-1)
        torch.testing.assert_close(log_p, expected)
        assert torch.equal(targets, torch.cat([y, y[-2:]]).flatten())

    def test_a_forward_of_the_caller(self):
        model, x, y = Model(), torch.randn(6, 3), torch.arange(6) % 4

        def forward(model, inputs):
            return model(inputs["half"] * 2)

        log_p, _ = ml.metrics.predict_loader(model, [({"half": x / 2}, y)], forward=forward)
        torch.testing.assert_close(log_p, ml.predict(model, x, log=True))

    @pytest.mark.parametrize(
        "loader, message",
        [
            ([], "at least one batch"),
            ([torch.zeros(5, 3)], "needs labels with every batch"),
            ([{"x": torch.zeros(5, 3)}], "needs labels with every batch"),
            ([(torch.zeros(5, 3), torch.zeros(4))], r"\(4,\) do not fit .*\(2, 5, 4\).*\(5,\)"),
        ],
    )
    def test_wrong_batches(self, loader, message):
        model = Model().train()
        with pytest.raises(ValueError, match=message):
            ml.metrics.predict_loader(model, loader)
        assert model.training
