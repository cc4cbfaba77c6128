"""The measures of calibration, of errors and of particles' differences, by hand and by NumPy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_curve
from torch import nn

import multilora as ml
from multilora import calibration, ranking

KEYS = {
    *("accuracy", "nll", "brier", "entropy", "ece", "mce", "ece_adaptive"),
    *("entropy_correct", "entropy_incorrect", "mi_correct", "mi_incorrect", "aurc"),
    *(f"{name}_misclassification" for name in ("auroc", "fpr95", "aupr")),
    *("mutual_information", "diversity", "jensen_gap", "ambiguity", "disagreement"),
    *("vendi_prediction", "member_accuracy", "member_nll", "combine", "num_examples"),
}
FULL = {"ece_classwise", "kl_pairwise"}

both = pytest.mark.parametrize("combine", ["prob", "logit"])


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def problem(K=4, N=211, C=7, scale=1.0):
    """Particles that agree in part and are right in part."""
    y = torch.randint(C, (N,))
    shared = torch.randn(N, C, dtype=torch.float64) + 1.5 * nn.functional.one_hot(y, C)
    return scale * (shared + torch.randn(K, N, C, dtype=torch.float64)), y


def binary(confidence, right):
    """One particle's log-probabilities of two classes, and targets, with these confidences."""
    p = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], -1).log()[None], 1 - torch.as_tensor(right).long()


def in_the_notation_of_the_page(logits, y, combine):
    """The measures of docs/measures.md that test_metrics.py does not have, with loops."""
    z = logits.numpy()
    members = np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))
    mean = members.mean(0)
    mean_logits = z.mean(0)
    p = np.exp(mean_logits - np.logaddexp.reduce(mean_logits, -1, keepdims=True))
    p = mean if combine == "prob" else p
    K, N = members.shape[:2]
    y = y.numpy()
    right = p.argmax(-1) == y
    entropy = -(p * np.log(p)).sum(-1)
    mi = (members * np.log(members / mean)).sum(-1).mean(0)
    nll = -np.log(members[:, np.arange(N), y])
    choice = members.argmax(-1)
    pairs = [(i, j) for i in range(K) for j in range(i)]
    kl = [[(a * np.log(a / b)).sum(-1).mean() for b in members] for a in members]
    overlap = np.array([[np.sqrt(a * b).sum(-1).mean() for b in members] for a in members])
    eigenvalues = np.linalg.eigvalsh(overlap / K)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    errors = ~right[np.argsort(-p.max(-1))]
    fpr, tpr, _ = roc_curve(~right, entropy, drop_intermediate=False)
    return {
        "entropy_correct": entropy[right].mean(),
        "entropy_incorrect": entropy[~right].mean(),
        "mi_correct": mi[right].mean(),
        "mi_incorrect": mi[~right].mean(),
        "aurc": np.mean([errors[: n + 1].mean() for n in range(N)]),
        "fpr95_misclassification": fpr[tpr >= 0.95].min(),
        "aupr_misclassification": average_precision_score(~right, entropy),
        "jensen_gap": nll.mean() + np.log(mean[np.arange(N), y]).mean(),
        "ambiguity": ((members - mean) ** 2).sum(-1).mean(),
        "disagreement": np.mean([(choice[i] != choice[j]).mean() for i, j in pairs] or [np.nan]),
        "vendi_prediction": np.exp(-(eigenvalues * np.log(eigenvalues)).sum()),
        "kl_pairwise": kl,
    }


@both
@pytest.mark.parametrize("shape", [(4, 211, 7), (1, 50, 3), (9, 33, 2)], ids=str)
def test_against_numpy(shape, combine):
    logits, targets = problem(*shape)
    got = ml.metrics.evaluate(logits, targets, combine, full=True)
    assert got.keys() == KEYS | FULL
    assert ml.metrics.evaluate(logits, targets, combine).keys() == KEYS
    for name, value in in_the_notation_of_the_page(logits, targets, combine).items():
        tolerance = 1e-6 if "misclassification" in name else 1e-11
        np.testing.assert_allclose(got[name], value, tolerance, tolerance, err_msg=name)


# --- calibration ---------------------------------------------------------------------------------


def test_a_confidence_of_one_is_in_the_last_bin():
    # Half are at 1 and 90 % right, half at .94 and always right: both are in (14/15, 1], with the
    # mean confidence .97 and the accuracy .95. With a bin for 1 alone the ECE would be .08.
    confidence, right = [1.0] * 50 + [0.94] * 50, [1] * 45 + [0] * 5 + [1] * 50
    logits, targets = binary(confidence, right)
    logits[logits == -math.inf] = -300  # the wrong ones need a probability
    got = ml.metrics.evaluate(logits, targets)
    assert got["ece"] == pytest.approx(0.02, abs=1e-12)
    assert got["mce"] == pytest.approx(0.02, abs=1e-12)


def test_bins_are_open_below_and_closed_above():
    confidence = float64(0, 1 / 15, 1.0001 / 15, 0.2, 0.4, 1)
    bins = calibration.equal_width(confidence, torch.tensor([1, 0, 1, 1, 0, 1]))
    assert bins.examples.tolist() == [2, 1, 1, 1, 1]
    assert bins.accuracy.tolist() == [0.5, 1, 1, 0, 1]
    expected = float64(1 / 30, 1.0001 / 15, 0.2, 0.4, 1)
    torch.testing.assert_close(bins.confidence, expected, rtol=1e-15, atol=0)


def test_calibration_errors_by_hand():
    # Three bins of equal width are occupied, with gaps .45, .4 and .9 of 2, 1 and 1 examples.
    logits, targets = binary([0.94, 0.96, 0.6, 0.9], [1, 0, 1, 0])
    got = ml.metrics.evaluate(logits, targets)
    assert got["ece"] == pytest.approx((2 * 0.45 + 0.4 + 0.9) / 4)
    assert got["mce"] == pytest.approx(0.9)
    # Fewer examples than bins: one each.
    assert got["ece_adaptive"] == pytest.approx((0.06 + 0.96 + 0.4 + 0.9) / 4)


def test_bins_of_equal_mass_by_hand():
    # Five examples in two bins: the three least confident, then two. Two that are equal lie on
    # either side, and their accuracy, a half, is that of each.
    confidence, right = float64(0.9, 0.5, 0.7, 0.6, 0.7), torch.tensor([1, 0, 1, 1, 0])
    for order in (slice(None), [4, 3, 2, 1, 0]):
        bins = calibration.equal_mass(confidence[order], right[order], 2)
        assert bins.examples.tolist() == [3, 2]
        assert bins.confidence.tolist() == pytest.approx([0.6, 0.8])
        assert bins.accuracy.tolist() == pytest.approx([0.5, 0.75])
        assert bins.error() == pytest.approx(0.6 * 0.1 + 0.4 * 0.05)
    examples = calibration.equal_mass(torch.rand(47), torch.ones(47)).examples
    assert sorted(examples.tolist()) == [3] * 13 + [4] * 2


def test_the_classwise_error_by_hand():
    p = float64([0.7, 0.2, 0.1], [0.68, 0.3, 0.02], [0.1, 0.28, 0.62])
    # Class 0: the bin of .7 and .68 is right once of two, and .1 never. Class 1: .2; .3 and .28,
    # of which .3 is right. Class 2: .1; .02; .62, which is right.
    errors = [
        (2 * (0.69 - 0.5) + 0.1) / 3,
        (0.2 + 2 * (0.5 - 0.29)) / 3,
        (0.1 + 0.02 + 0.38) / 3,
    ]
    got = ml.metrics.evaluate(p.log()[None], torch.tensor([0, 1, 2]), full=True)
    assert got["ece_classwise"] == pytest.approx(sum(errors) / 3)


# --- temperature ---------------------------------------------------------------------------------


def drawn(temperature, N, K=3, C=5):
    """Equal particles, and targets from the softmax of their logits over the temperature."""
    logits = 3 * torch.randn(N, C, dtype=torch.float64)
    targets = torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(-1)
    return logits.expand(K, -1, -1), targets


@both
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature, combine):
    logits, targets = drawn(temperature, 20_000)
    got = ml.metrics.fit_temperature(logits, targets, combine)
    assert got == pytest.approx(temperature, rel=0.04)


@both
@pytest.mark.parametrize("N", [50, 400])
def test_the_temperature_minimises_its_objective(N, combine):
    logits, targets = problem(N=N, scale=3)
    members = logits.log_softmax(-1)
    log_p = members.exp().mean(0).log() if combine == "prob" else members.mean(0)

    def slope(log_t, prior):
        log_t = torch.tensor(log_t, dtype=torch.float64, requires_grad=True)
        nll = nn.functional.cross_entropy(log_p / log_t.exp(), targets)
        (nll + prior * log_t**2 / (2 * 0.5**2 * N)).backward()
        return log_t.grad.item()

    got = math.log(ml.metrics.fit_temperature(logits, targets, combine))
    assert abs(slope(got, 1)) < 1e-5
    # The prior has moved it towards T = 1.
    assert abs(got) > 0.1 and abs(slope(got, 0)) > 1e-3 / N
    assert math.copysign(1, slope(got, 0)) == -math.copysign(1, got)
    # -100 is left out.
    more = torch.cat([logits, logits + 1], 1), torch.cat([targets, targets * 0 - 100])
    assert math.log(ml.metrics.fit_temperature(*more, combine)) == pytest.approx(got, abs=1e-9)


@pytest.mark.parametrize("right, end", [(True, -2), (False, 2)])
def test_the_temperature_stays_in_its_range(right, end):
    # Always right, by little: no temperature is low enough. Always wrong: none is high enough.
    targets = torch.zeros(200_000, dtype=torch.int64)
    logits = torch.tensor([0.1, 0.0] if right else [0.0, 40.0]).double().expand(2, 200_000, 2)
    log_t = math.log(ml.metrics.fit_temperature(logits, targets))
    assert log_t == pytest.approx(end, abs=1e-5)


@both
def test_evaluate_with_a_temperature(combine):
    logits, targets = problem()
    ood = torch.randn(4, 31, 7, dtype=torch.float64)
    plain = ml.metrics.evaluate(logits, targets, combine, ood, full=True)
    got = ml.metrics.evaluate(logits, targets, combine, ood, temperature=2.0, full=True)
    # One particle with the logits log p̄ / T has the same predictive.
    members = logits.log_softmax(-1)
    log_p = members.exp().mean(0).log() if combine == "prob" else members.mean(0)
    one = ml.metrics.evaluate(log_p[None] / 2, targets, full=True)
    of_p = {"nll", "brier", "entropy", "ece", "mce", "ece_adaptive", "ece_classwise"}
    of_p |= {"entropy_correct", "entropy_incorrect", "auroc_misclassification"}
    for name in of_p:
        assert got[name] == pytest.approx(one[name], rel=1e-9), name
        if name != "auroc_misclassification":
            assert got[name] != pytest.approx(plain[name], rel=1e-3), name
    members = ood.log_softmax(-1)
    log_p = members.exp().mean(0).log() if combine == "prob" else members.mean(0)
    assert got["ood_entropy"] == pytest.approx(ml.metrics.predictive(log_p[None] / 2)[3].mean())
    of_particles = {"accuracy", "mi_correct", "auroc_ood_mi", "kl_pairwise", "diversity"}
    of_particles |= {"mutual_information", "jensen_gap", "ambiguity", "member_nll"}
    for name in of_particles:
        assert got[name] == plain[name], name


@both
def test_the_calibrated_nll_is_cross_fitted(combine):
    logits, targets = problem(N=301, scale=3)
    targets[7] = -100
    kept = torch.arange(301) != 7
    even = torch.arange(300) % 2 == 0
    total = 0
    for fitted in (even, ~even):
        t = ml.metrics.fit_temperature(logits[:, kept][:, fitted], targets[kept][fitted], combine)
        measured = logits[:, kept][:, ~fitted], targets[kept][~fitted]
        total += ml.metrics.evaluate(*measured, combine, temperature=t)["nll"] / 2
    got = ml.metrics.calibrated_nll(logits, targets, combine)
    assert got == pytest.approx(total, rel=1e-12)
    assert got < ml.metrics.evaluate(logits, targets, combine)["nll"]


def test_temperatures_need_examples():
    logits, targets = problem(N=99)
    with pytest.raises(ValueError, match=r"calibrated_nll needs at least 100 .* got 99"):
        ml.metrics.calibrated_nll(logits, targets)
    targets[49:] = -100
    with pytest.raises(ValueError, match=r"fit_temperature needs at least 50 .* got 49"):
        ml.metrics.fit_temperature(logits, targets)
    with pytest.raises(ValueError, match=r"fit_temperature needs logits .*\(4, 99, 7\).*\(50,\)"):
        ml.metrics.fit_temperature(logits, targets[:50])


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, math.inf, "1"])
def test_wrong_temperatures(wrong):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0; got"):
        ml.metrics.evaluate(*problem(), temperature=wrong)


# --- errors and uncertainty ----------------------------------------------------------------------


def test_right_and_wrong_by_hand():
    # Two particles: equal and half sure (right), sure of different classes (wrong by a hair), and
    # equal with one class (right).
    a, b = [0.5 + 1e-9, 0.5 - 1e-9], [1 - 1e-12, 1e-12]
    first, second = float64(a, [1e-12, 1 - 1e-12], b), float64(a, [1 - 2e-12, 2e-12], b)
    got = ml.metrics.evaluate(torch.stack([first, second]).log(), torch.tensor([0, 0, 0]))
    log2 = pytest.approx(math.log(2), abs=1e-9)
    assert got["entropy_correct"] == pytest.approx(math.log(2) / 2, abs=1e-9)
    assert got["mi_correct"] == pytest.approx(0, abs=1e-9)
    assert got["entropy_incorrect"] == log2 and got["mi_incorrect"] == log2
    assert got["disagreement"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("right", [True, False])
def test_measures_of_nothing_are_nan(right):
    targets = torch.arange(5)
    logits = 9 * nn.functional.one_hot(targets if right else targets + 1, 6).double()
    got = ml.metrics.evaluate(logits.expand(3, 5, 6), targets)
    empty, full = ("incorrect", "correct") if right else ("correct", "incorrect")
    assert math.isnan(got[f"entropy_{empty}"]) and math.isnan(got[f"mi_{empty}"])
    assert got[f"entropy_{full}"] == pytest.approx(got["entropy"])
    assert got[f"mi_{full}"] == pytest.approx(0, abs=1e-12)
    for name in ("auroc", "fpr95", "aupr"):
        assert math.isnan(got[f"{name}_misclassification"])
    assert got["aurc"] == 1 - right


@pytest.mark.parametrize("ties", [False, True])
def test_spearman(ties):
    a = torch.randn(101).round(decimals=0 if ties else 9)
    b = (a + torch.randn(101)).round(decimals=1 if ties else 9)
    expected = scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert ranking.spearman(a, b) == pytest.approx(expected, rel=1e-12)
    assert ranking.spearman(a, -b) == pytest.approx(-expected, rel=1e-12)
    assert math.isnan(ranking.spearman(a, torch.ones(101)))
    assert math.isnan(ranking.spearman(a[:1], b[:1]))


def test_aurc_by_hand():
    confidence, wrong = float64(0.9, 0.5, 0.8, 0.7), torch.tensor([False, True, True, False])
    assert ranking.aurc(confidence, wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    # Equal confidences: the mean over both orders.
    for order in ([0, 1, 2], [1, 0, 2]):
        got = ranking.aurc(float64(0.9, 0.9, 0.5), torch.tensor([True, False, False])[order])
        assert got == pytest.approx(((1 + 0) / 2 + 1 / 2 + 1 / 3) / 3)


def test_detection_by_hand():
    # Twenty positives: 95 % are the 19 with the highest scores, and two of the five negatives lie
    # above the lowest of these. (A tie at the threshold counts as above.)
    scores = float64(*range(81, 100), -50, 200, 81, 80, 3, 2)
    positive = torch.tensor([True] * 20 + [False] * 5)
    got = ranking.detection("x", scores, positive)
    assert got["fpr95_x"] == pytest.approx(2 / 5, abs=1e-6)
    # The precision where each positive is found, from the highest score down.
    precision = [n / (n + 1) for n in range(1, 19)] + [19 / 21, 20 / 25]
    assert got["aupr_x"] == pytest.approx(sum(precision) / 20, abs=1e-6)
    # Of the pairs, the negative at 200 wins all, 81 loses to 18 and draws with one, …
    assert got["auroc_x"] == pytest.approx((0 + 18.5 + 3 * 19) / 100, abs=1e-6)
    assert got.keys() == {"auroc_x", "fpr95_x", "aupr_x"}


def test_out_of_distribution_scores():
    logits, targets = problem()
    ood = torch.randn(4, 97, 7, dtype=torch.float64)
    got = ml.metrics.evaluate(logits, targets, ood_logits=ood)
    own, other = ml.metrics.predictive(logits), ml.metrics.predictive(ood)
    is_ood = np.repeat([0, 1], [211, 97])
    for end, a, b in (
        ("ood", own.entropy, other.entropy),
        ("ood_mi", own.mutual_information, other.mutual_information),
    ):
        score = torch.cat([a, b]).numpy()
        fpr, tpr, _ = roc_curve(is_ood, score, drop_intermediate=False)
        assert got[f"fpr95_{end}"] == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)
        assert got[f"aupr_{end}"] == pytest.approx(average_precision_score(is_ood, score), 1e-5)


@both
def test_predictive(combine):
    logits, targets = problem()
    got = ml.metrics.predictive(logits, combine, 2.0)
    measures = ml.metrics.evaluate(logits, targets, combine, temperature=2.0)
    assert got.entropy.mean().item() == pytest.approx(measures["entropy"])
    assert got.mutual_information.mean().item() == pytest.approx(measures["mutual_information"])
    torch.testing.assert_close(got.members, logits.log_softmax(-1))
    torch.testing.assert_close(got.mean, logits.softmax(-1).mean(0).log())
    nll = nn.functional.nll_loss(got.log_p, targets).item()
    assert nll == pytest.approx(measures["nll"])


def test_what_predictive_refuses():
    with pytest.raises(ValueError, match=r"logits \(K, N, C\); got \(9, 7\)"):
        ml.metrics.predictive(torch.zeros(9, 7))
    with pytest.raises(ValueError, match=r"logits \(K, N, C\); got \(0, 9, 7\)"):
        ml.metrics.predictive(torch.zeros(0, 9, 7))
    with pytest.raises(ValueError, match="1 of 9 rows of logits hold NaN"):
        ml.metrics.predictive(torch.zeros(2, 9, 7).index_fill(1, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match='combine must be "prob" or "logit"'):
        ml.metrics.predictive(torch.zeros(2, 9, 7), "mean")
