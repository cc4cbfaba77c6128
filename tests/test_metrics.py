"""ml.metrics.evaluate against formulas in NumPy, and ml.predict."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import multilora as ml

# float64 logits give float64 measures, but for those that torchmetrics takes in float32 (6e-8).
FP64, FP32 = 1e-12, 1e-6
IN_FP32 = {"accuracy", "ece", "auroc_misclassification"}

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
    assert got.keys() == expected.keys()
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
    # Two particles, each sure of its own class: p̄ = ½, ½, 0; H[p̄] = log 2 and no member entropy.
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
    assert got.keys() - plain.keys() == expected.keys()
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
