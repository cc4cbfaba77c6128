"""What the pictures of a run show, read from matplotlib's objects."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import TensorDataset

import killed
import multilora as ml
from multilora.app import plots, raters, steps
from multilora.app import run as training
from multilora.app.evaluation import evaluate
from multilora.app.folders import PICTURES
from multilora.app.pictures import Entropies, write_pictures

PNG = b"\x89PNG"


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def problem(K=4, N=211, C=7):
    """Particles that agree in part and are right in part: log-probabilities and targets."""
    y = torch.randint(C, (N,))
    shared = torch.randn(N, C, dtype=torch.float64) + 1.5 * nn.functional.one_hot(y, C)
    return (shared + torch.randn(K, N, C, dtype=torch.float64)).log_softmax(-1), y


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, kept open."""
    monkeypatch.setattr(plt, "close", lambda _: None)
    yield lambda: [plt.figure(n) for n in plt.get_fignums()]
    monkeypatch.undo()
    plt.close("all")


@pytest.fixture
def axes(figures, monkeypatch):
    """The axes of the last figure, which is not saved, for this takes long."""
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)
    return lambda: figures()[-1].axes


def legend(figure):
    """The texts of the figure's only legend, which covers no data."""
    figure.draw_without_rendering()
    (found,) = figure.legends
    assert not any(axis.get_legend() for axis in figure.axes)
    box = found.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    return [text.get_text() for text in found.get_texts()]


def points(axis):
    """[(x, y), ...] and their opacities, of every set of points with its lines."""
    found = []
    for dots, lines in zip(axis.collections[1::2], axis.collections[::2]):
        where, alpha = np.array(dots.get_offsets()), dots.get_facecolors()[:, 3]
        ends = np.array([alpha[:-1], alpha[1:]]).min(0)
        np.testing.assert_allclose(lines.get_colors()[:, 3], ends)
        for segment, start, end in zip(lines.get_segments(), where, where[1:]):
            if not np.isnan([start, end]).any():  # otherwise nothing is drawn
                np.testing.assert_array_equal(segment, [start, end])
        found.append((where, alpha))
    return found


# --- reliability diagrams ------------------------------------------------------------------------


def test_the_bins_and_the_title_are_those_of_the_ece(axes, tmp_path):
    # .8 is the upper edge of its bin, and 1 of the last.
    p = float64(0.8, 0.86, 1, 0.95, 0.6)
    log_p = torch.stack([p, 1 - p], 1).log()[None]
    targets = torch.tensor([0, 1, 0, 1, 0])
    plots.reliability_diagram(log_p.exp(), targets, tmp_path / "a.png", method="map")
    top, bottom = axes()
    ((where, _),) = points(top)
    np.testing.assert_allclose(where, [[0.6, 1], [0.8, 1], [0.86, 0], [0.975, 0.5]])
    bars = [(bar.get_x() * 15, bar.get_width() * 15, bar.get_height()) for bar in bottom.patches]
    np.testing.assert_allclose(bars, [[8, 1, 1], [11, 1, 1], [12, 1, 1], [14, 1, 2]])
    ece = ml.metrics.evaluate(log_p, targets)["ece"]
    assert top.get_title() == f"map, K = 1, ECE = {ece:.3f}"


@pytest.mark.parametrize("combine", ["prob", "logit"])
def test_the_mean_is_that_of_the_measures(axes, tmp_path, combine):
    log_p, targets = problem()
    plots.reliability_diagram(log_p.exp(), targets, tmp_path / "a.png", combine=combine)
    ece = {c: ml.metrics.evaluate(log_p, targets, c)["ece"] for c in ("prob", "logit")}
    assert f"{ece['prob']:.3f}" != f"{ece['logit']:.3f}"
    assert axes()[0].get_title() == f"K = 4, ECE = {ece[combine]:.3f}"


def test_particles_are_drawn_beside_their_mean(axes, tmp_path):
    log_p, targets = problem()
    plots.reliability_diagram(log_p.exp(), targets, tmp_path / "a.png", 5)
    *members, mean = points(axes()[0])
    assert len(members) == 4
    for p, (where, _) in zip([*log_p.exp(), log_p.exp().mean(0)], [*members, mean]):
        confidence, predicted = p.max(-1)
        bins = ml.calibration.equal_width(confidence, predicted == targets, 5)
        np.testing.assert_allclose(where, torch.stack([bins.confidence, bins.accuracy], 1))
    assert legend(plt.gcf())[:3] == ["calibrated", "each particle", "mean of the particles"]


def test_one_particle_is_drawn_once(axes, tmp_path):
    log_p, targets = problem(K=1, N=4000, C=2)
    plots.reliability_diagram(log_p.exp(), targets, tmp_path / "a.png", 4)
    assert len(points(axes()[0])) == 1
    # Nothing is faint, so the legend does not say what that means.
    assert legend(plt.gcf()) == ["calibrated", "the only particle"]


def test_bins_of_few_examples_are_faint(axes, tmp_path):
    confidence = torch.cat([float64(0.55).expand(5), float64(0.75).expand(20), float64(0.95, 0.95)])
    confidence = torch.cat([confidence, float64(0.85).expand(300)])
    p = torch.stack([confidence, 1 - confidence], 1)[None]
    plots.reliability_diagram(p, torch.zeros(327).long(), tmp_path / "a.png", 10)
    top, bottom = axes()
    ((_, alpha),) = points(top)
    np.testing.assert_allclose(alpha, [0.5, 1, 1, 0.1**0.5])
    assert legend(plt.gcf())[-1] == "over fewer than 20 examples"
    assert [bar.get_height() for bar in bottom.patches] == [5, 20, 300, 2]
    assert bottom.get_yscale() == "log"
    # The smallest bar has a height, and the largest ends below the frame.
    assert bottom.get_ylim()[0] < 1 and bottom.get_ylim()[1] > 300


def test_a_single_example(axes, tmp_path):
    plots.reliability_diagram(float64([[0.3, 0.7]]), torch.tensor([1]), tmp_path / "a.png")
    top, bottom = axes()
    assert top.get_title() == "K = 1, ECE = 0.300"
    assert bottom.get_ylim() == (0.5, 10)


def test_probabilities_that_float32_rounds_to_zero(axes, tmp_path):
    """Two particles rule out each other's class: their mean logits are those of the others."""
    log_p = torch.tensor([[[0.0, -200.0]], [[-190.0, 0.0]]])
    assert log_p.exp().min() == 0
    plots.reliability_diagram(log_p.exp(), torch.tensor([0]), tmp_path / "a.png", combine="logit")
    *_, (where, _) = points(axes()[0])
    assert np.isfinite(where).all()


def test_ignored_targets(axes, tmp_path):
    log_p, targets = problem()
    ignored = targets.clone()
    ignored[::3] = -100
    kept = ignored != -100
    drawn = []
    for p, y in ((log_p, ignored), (log_p[:, kept], targets[kept])):
        plots.reliability_diagram(p.exp(), y, tmp_path / "a.png")
        top, bottom = axes()
        drawn.append([where.tolist() for where, _ in points(top)])
        assert sum(bar.get_height() for bar in bottom.patches) == int(kept.sum())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, y: (p[0], y), r"\(K, N, C\)"),
        (lambda p, y: (p, y[:-1]), r"targets \(210,\)"),
        (lambda p, y: (p, y.double()), "torch.float64"),
        (lambda p, y: (p, y + 7), r"targets in \[0, 7\)"),
        (lambda p, y: (p, y * 0 - 100), "at least one valid target"),
        (lambda p, y: (p.log(), y), "211 of 211 rows are not probabilities"),
        (lambda p, y: (p.index_fill(1, torch.tensor([3]), math.nan), y), "1 of 211 rows"),
        (lambda p, y: (p, y, 0), "bins must be an integer >= 1; got 0"),
        (lambda p, y: (p, y, 15, "map", "mean"), 'combine must be "prob" or "logit"'),
    ],
)
def test_what_reliability_diagrams_refuse(change, message, tmp_path):
    log_p, targets = problem()
    p, y, *more = change(log_p.exp(), targets)
    with pytest.raises(ValueError, match=message):
        plots.reliability_diagram(p, y, tmp_path / "a.png", *more)
    assert not (tmp_path / "a.png").exists()


# --- entropies -----------------------------------------------------------------------------------


def test_entropy_histograms(axes, tmp_path):
    groups = {
        "right": float64(0, 0.1, 0.1, 0.4),
        "wrong": float64(1),
        "shifted": torch.rand(100_000),
        "OOD": float64(),
    }
    plots.entropy_histograms(groups, tmp_path / "a.png", bins=4, title="svgd")
    figure, rows = plt.gcf(), axes()
    assert legend(figure) == ["mean of the group"] and figure.get_suptitle() == "svgd"
    assert [row.get_title("left") for row in rows] == [
        "right: 4 examples, mean 0.15",
        "wrong: 1 example, mean 1",
        f"shifted: 100000 examples, mean {groups['shifted'].double().mean():.3g}",
        "OOD: no example",
    ]
    heights = [row.patches[0].get_data().values for row in rows[:3]]
    np.testing.assert_array_equal(heights[0], [0.75, 0.25, 0, 0])
    np.testing.assert_array_equal(heights[1], [0, 0, 0, 1])
    assert heights[2].sum() == pytest.approx(1) and heights[2] == pytest.approx(0.25, abs=0.01)
    assert not rows[3].patches and not rows[3].lines
    for row, height, mean in zip(rows, heights, (0.15, 1)):
        np.testing.assert_allclose(row.lines[0].get_xdata(), mean)
        assert max(height) < row.get_ylim()[1] < 1.1 * max(height)  # each has its own scale
    for row in rows:
        assert row.get_xlim() == (0, 1)
    assert "(nats)" in rows[-1].get_xlabel()


def test_entropies_of_zero(axes, tmp_path):
    plots.entropy_histograms({"right": torch.zeros(3)}, tmp_path / "a.png")
    assert axes()[0].patches[0].get_data().values.tolist() == [1, *[0] * 29]


@pytest.mark.parametrize(
    "groups, message",
    [
        ({}, r"needs an example; got the groups \[\]"),
        ({"right": float64()}, r"got the groups \['right'\]"),
        ({"right": float64(1, -0.1)}, r"\(2,\) in 'right', from -0.1"),
        ({"right": float64(1), "wrong": float64(math.nan)}, "in 'wrong', from nan"),
        ({"right": float64([1, 2])}, r"\(1, 2\) in 'right'"),
    ],
)
def test_what_entropy_histograms_refuse(groups, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.entropy_histograms(groups, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# --- human confidence ----------------------------------------------------------------------------


def test_confidence_curve(axes, tmp_path):
    plots.confidence_curve([0.1, 0.2], [0.9, 0.8], [0.5, math.nan], tmp_path / "a.png")
    (low, alpha), (high, _) = points(axes()[0])
    np.testing.assert_array_equal(low, [[0.1, 0.9], [0.2, 0.8]])
    assert high[0].tolist() == [0.1, 0.5] and math.isnan(high[1, 1])
    assert alpha.tolist() == [1, 1] and len(legend(plt.gcf())) == 2
    assert "sure" in legend(plt.gcf())[0] and "unsure" in legend(plt.gcf())[1]
    with pytest.raises(ValueError, match="got 2 thresholds, 2 and 1 confidences"):
        plots.confidence_curve([0.1, 0.2], [0.9, 0.8], [0.5], tmp_path / "b.png")
    with pytest.raises(ValueError, match="at least one; got 0 thresholds"):
        plots.confidence_curve([], [], [], tmp_path / "b.png")


def test_means_over_few_raters_are_faint(axes, tmp_path):
    nan = math.nan
    examples = ([5, 100], [95, 0])
    plots.confidence_curve([0.1, 0.9], [0.9, 0.8], [0.5, nan], tmp_path / "a.png", examples, "who")
    (_, low), (_, high) = points(axes()[0])
    assert low.tolist() == [0.5, 1] and high.tolist() == [1, 0]
    assert legend(plt.gcf())[2:] == ["over fewer than 20 examples"]
    assert axes()[0].get_title() == "who"
    # A point over nothing is not drawn, so nothing is faint.
    plots.confidence_curve([1], [0.9], [nan], tmp_path / "a.png", ([100], [0]))
    assert len(legend(plt.gcf())) == 2


@pytest.mark.parametrize("combine", ["prob", "logit"])
def test_agreement_with_raters(combine):
    log_p, targets = problem(C=2)
    targets[::5] = -100
    confidence = torch.rand(len(targets)).mul(10).round().div(10)
    kept = targets != -100
    p = log_p.exp().mean(0) if combine == "prob" else log_p.mean(0).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)[kept]
    found = raters.agreement(log_p, targets, confidence, combine)
    assert found["thresholds"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    for i, threshold in enumerate(found["thresholds"]):
        low = entropy <= threshold
        mean = confidence[kept][low].double().mean().item()
        assert found["low"][i] == pytest.approx(mean, nan_ok=True)
        mean = confidence[kept][~low].double().mean().item()
        assert found["high"][i] == pytest.approx(mean, nan_ok=True)
        assert found["examples_low"][i] == low.sum() and found["examples_high"][i] == (~low).sum()
    assert math.isnan(found["high"][-1])  # two classes: no entropy above log 2
    assert found["spearman"] == pytest.approx(ml.ranking.spearman(entropy, -confidence[kept]))


def test_the_correlation_is_positive_where_the_model_is_unsure_with_people():
    p = float64(0.5, 0.7, 0.9, 0.99)
    log_p = torch.stack([p, 1 - p], 1).log()[None]
    targets = torch.zeros(4).long()
    assert raters.agreement(log_p, targets, float64(0.4, 0.6, 0.8, 1))["spearman"] == 1
    assert raters.agreement(log_p, targets, float64(1, 0.8, 0.6, 0.4))["spearman"] == -1
    with pytest.raises(ValueError, match=r"each of the 4 examples; got \(3,\), 0 of them"):
        raters.agreement(log_p, targets, torch.ones(3))
    for wrong in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\].*\(4,\), 1 of them outside"):
            raters.agreement(log_p, targets, float64(1, 1, 1, wrong))


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def task():
    """With two shifted sets, two of other classes and the confidences of raters."""
    task = killed.small_task()
    x, y = task.test.tensors
    return replace(
        task,
        shifted={n: TensorDataset(x[:k] + 1, y[:k]) for n, k in (("one", 10), ("two", 20))},
        ood={n: TensorDataset(9 * x[:k], y[:k] + 90) for n, k in (("a", 5), ("b", 7))},
        human_confidence=torch.linspace(0.5, 1, len(y)),
    )


@pytest.mark.parametrize("combine", ["prob", "logit"])
def test_entropies_are_those_of_the_predictions(task, combine):
    settings = killed.settings()
    model = steps.particle_model(task, settings).eval()
    for p in model.particle_parameters():
        nn.init.normal_(p)
    entropies, calls = Entropies(combine), []
    forward = task.predict

    def predict(model, x):
        calls.append(len(x))
        return forward(model, x)

    watched = replace(task, predict=predict)
    measures, p, y = evaluate(model, watched, combine=combine, on_predictions=entropies.add)
    assert calls == [60, 5, 7, 10, 20]  # every set once
    groups = entropies.groups()
    assert list(groups) == ["right", "wrong", "shifted", "OOD"]
    right = round(60 * measures["accuracy"])
    assert [len(group) for group in groups.values()] == [right, 60 - right, 30, 12]
    for name, key in (("right", "entropy_correct"), ("wrong", "entropy_incorrect")):
        assert groups[name].mean().item() == pytest.approx(measures[key])
    for name, part in zip(task.ood, groups["OOD"].split([5, 7])):
        assert part.mean().item() == pytest.approx(measures["ood"][name]["entropy"])
    x = torch.cat([data.tensors[0] for data in task.shifted.values()])
    expected = ml.metrics.predictive(ml.predict(model, x, log=True), combine).entropy
    torch.testing.assert_close(groups["shifted"], expected)
    agreement = raters.agreement(p.log(), y, task.human_confidence, combine)
    for name, value in measures["human_confidence"].items():
        assert value == pytest.approx(agreement[name], nan_ok=True)


def test_labels_that_are_left_out_have_no_entropy():
    log_p, y = problem(N=30)
    y[:10] = -100
    entropies = Entropies("prob")
    entropies.add("test", log_p, y)
    entropies.add("shifted", log_p, y)
    entropies.add("ood", log_p, y)
    groups = entropies.groups()
    assert len(groups["right"]) + len(groups["wrong"]) == len(groups["shifted"]) == 20
    assert len(groups["OOD"]) == 30


def test_the_pictures_of_a_run(task, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(training, "make_task", lambda *_: task)
    settings = killed.settings(steps=2, combine="logit")
    result = training.train(settings, tmp_path / "run", report=lambda _: None)
    written = {file.name for file in (tmp_path / "run").glob("*.png")}
    assert written == {"reliability.png", "entropies.png", "human_confidence.png", "history.png"}
    assert written == set(PICTURES)
    for name in written:
        assert (tmp_path / "run" / name).read_bytes().startswith(PNG)
    reliability, histograms, people, _ = figures()
    assert reliability.axes[0].get_title() == f"ibdr, K = 3, ECE = {result['ece']:.3f}"
    assert histograms.get_suptitle() == "Predictive entropy of ibdr, K = 3"
    assert [axis.get_title("left").split(":")[0] for axis in histograms.axes] == [
        *("right", "wrong", "shifted", "OOD")
    ]
    title = people.axes[0].get_title()
    assert "ibdr, K = 3" in title and f"{result['human_confidence']['spearman']:.2f}" in title
    (low, _), _ = points(people.axes[0])
    np.testing.assert_array_equal(low[:, 1], result["human_confidence"]["low"])
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())["human_confidence"]
    nothing = [None if math.isnan(c) else c for c in result["human_confidence"]["low"]]
    assert saved["low"] == nothing and saved["spearman"] == result["human_confidence"]["spearman"]


def test_without_raters_or_other_sets(task, tmp_path, monkeypatch, figures):
    bare = replace(task, shifted={}, ood={}, human_confidence=None)
    monkeypatch.setattr(training, "make_task", lambda *_: bare)
    settings = killed.settings(steps=1, method="single", particles=1)
    result = training.train(settings, tmp_path / "run", report=lambda _: None)
    assert "human_confidence" not in result
    assert not (tmp_path / "run" / "human_confidence.png").exists()
    assert len(figures()[1].axes) == 2


def test_a_correlation_that_is_undefined(tmp_path, figures):
    log_p, y = problem()
    measures = ml.metrics.evaluate(log_p, y) | {"method": "map"}
    measures["human_confidence"] = raters.agreement(log_p, y, torch.ones(len(y)))
    entropies = Entropies("prob")
    entropies.add("test", log_p, y)
    write_pictures(tmp_path, measures, log_p.exp(), y, entropies.groups(), [{"step": 1}])
    title = figures()[2].axes[0].get_title()
    assert title.endswith("disagreement: undefined")
