"""The report of a comparison: verdicts, sentences, tables, files."""

import copy
import json
import re

import numpy as np
import pytest

from evidence import KEYS, make_evidence, realistic, row, runs
from multilora.app.compare import figure, report
from multilora.app.compare.analysis import PRIMARY, Analysis
from multilora.app.compare.report import summary, write


@pytest.fixture(autouse=True)
def without_figure(request, monkeypatch):
    """The tests of the texts draw nothing, which takes a second."""
    if "figure" not in request.node.name:
        monkeypatch.setattr(report, "pareto_diagram", lambda analysis, file: None)


SEEDS = 20
NOISE = np.random.default_rng(0).normal(0, 0.05, (12, SEEDS))
BASE = 0.4 + NOISE[0]


def better(gain, noise=1, sd=1.0):
    """Values that gain so much on the reference in all three measures."""
    spread = 0.2 * sd * (NOISE[noise] - NOISE[noise].mean())
    ends = {"nll": BASE - gain + spread, "auroc_ood": 0.8 + (BASE - 0.4) + gain - spread}
    return {
        "nll": ends["nll"],
        "calibrated_nll": ends["nll"] - 0.01,
        "auroc_ood": ends["auroc_ood"],
    }


REFERENCE = better(0, sd=0)


def evidence(task="digits", **options):
    rows = options.pop("values", {"sam": better(0.03)})
    return make_evidence({task: {"ensemble": REFERENCE, **rows}}, **options)


def verdicts(given, name="sam"):
    return [test.verdict for test in Analysis(given).tests[name]]


def sentence(given, name="sam"):
    (line,) = [
        s for s in summary(given).splitlines() if s.startswith(f"- **{name}** ") and "cost" in s
    ]
    return line


# --- verdicts ------------------------------------------------------------------------------------


def test_a_better_row_is_found_and_said():
    given = evidence(ratios={"ensemble": 2.0, "sam": 3.6})
    assert verdicts(given) == ["better"] * 3
    text = summary(given)
    assert text.startswith(
        "**Better than the ensemble:**\n\n"
        "- **sam** in NLL, calibrated NLL and OOD AUROC, at 1.8 × the training."
    )
    assert re.search(
        r"\*\*sam\*\* is better than the ensemble by \.030 \[\.02\d, \.03\d\] NLL, \.030 \[\.02\d, "
        r"\.03\d\] calibrated NLL and \.030 \[\.02\d, \.03\d\] OOD AUROC; it costs 1\.8 × the "
        r"reference's training\.",
        text,
    )


def test_a_worse_row_is_found_and_said_with_its_ends_in_order():
    given = evidence(values={"sam": better(-0.03, sd=2)})
    assert verdicts(given) == ["worse"] * 3
    said = re.search(
        r"is worse than the ensemble by \.030 \[(\.\d+), (\.\d+)\] NLL", sentence(given)
    )
    assert float(said[1]) < 0.03 < float(said[2])
    assert "**No row is shown to be better than the ensemble.**" in summary(given)


@pytest.mark.parametrize("i, measure", [*enumerate(PRIMARY)], ids=KEYS)
def test_the_direction_of_each_measure(i, measure):
    """A higher AUROC is a gain; a higher NLL is a loss."""
    values = {**REFERENCE, measure.path[0]: REFERENCE[measure.path[0]] + 0.05}
    expected = ["equal"] * 3
    expected[i] = "better" if measure.path[0] == "auroc_ood" else "worse"
    assert verdicts(evidence(values={"sam": values})) == expected


def test_two_equal_rows_are_not_told_apart_in_38_of_40():
    r = np.random.default_rng(3)
    found = 0
    for _ in range(40):
        finals = {"a": {"ensemble": runs(r.normal(size=20)), "sam": runs(r.normal(size=20))}}
        found += verdicts(make_evidence(finals))[0] != "equal"
    assert found <= 3


def test_holm_counts_all_rows():
    """A difference that one row alone would show is not one of twelve rows'."""
    others = {f"row {i}": better(0, i, sd=3) for i in range(2, 12)}
    weak = better(0.0035, 1)
    alone, among = (evidence(values=v) for v in ({"sam": weak}, {"sam": weak, **others}))
    assert verdicts(alone)[0] == "better"
    assert verdicts(among)[0] == "equal"
    test = Analysis(among).tests["sam"][0]
    assert test.p == pytest.approx(11 * test.difference.p)


def test_a_row_that_only_has_a_better_learning_rate_does_not_win():
    given = evidence(controls={"digits": {"sam": better(0.031, 2)}})
    assert verdicts(given) == ["control"] * 3
    text = summary(given)
    assert "**No row is shown to be better than the ensemble.**" in text
    said = sentence(given)
    assert re.search(
        r"ahead of the ensemble by \.030 \[.*\] NLL \(against the control −\.001 \[", said
    )
    assert "but its control takes that back" in said


def test_a_control_that_is_beaten_takes_nothing_back_and_one_that_is_missing_does():
    assert verdicts(evidence(controls={"digits": {"sam": better(0.01, 2)}})) == ["better"] * 3
    given = evidence(controls={"digits": {}})
    assert verdicts(given) == ["control"] * 3
    assert "(its control is missing)" in sentence(given)


def test_the_control_counts_the_pairs_of_seeds():
    """A control that beats the row on every seed but by little, under large noise of the seeds."""
    control = {k: v + (0.002 if k == "auroc_ood" else -0.002) for k, v in better(0.03).items()}
    given = evidence(controls={"digits": {"sam": control}})
    difference = Analysis(given).tests["sam"][0].control
    assert difference.interval == pytest.approx((0.002, 0.002))


def test_a_row_with_learning_rates_of_its_own_has_no_control():
    space = {"space": {"lr": {"log": [0.03, 3]}}}
    given = evidence(rows={"sam": space}, controls={"digits": {}})
    assert verdicts(given) == ["better"] * 3
    assert "It has no control, since its learning rates are its own." in sentence(given)
    # So has a row that is made of it.
    derived = {"sam": space, "soup": row("soup", "derived", of="sam")}
    values = {"sam": better(0.03), "soup": better(0.03, 2)}
    given = evidence(values=values, rows=derived, controls={"digits": {}})
    assert verdicts(given, "soup") == ["better"] * 3


@pytest.mark.parametrize("edge", ["sam", "ensemble"])
def test_at_the_edge_of_the_learning_rates_the_tuning_is_unfinished(edge):
    given = evidence(edges=[("digits", edge)])
    assert verdicts(given) == ["unfinished"] * 3
    text = summary(given)
    assert "**No row is shown to be better than the ensemble.**" in text
    assert "but a tuning is unfinished" in sentence(given)
    whose = "Its tuning" if edge == "sam" else "The tuning of the ensemble"
    assert f"{whose} is unfinished" in text
    assert "the smallest or the largest tried (digits)" in text
    # That does not save a row that is worse.
    worse = evidence(values={"sam": better(-0.03)}, edges=[("digits", edge)])
    assert verdicts(worse) == ["worse"] * 3


@pytest.mark.parametrize(
    "part, name", [("finals", "sam"), ("finals", "ensemble"), ("controls", "sam")]
)
def test_who_looks_before_the_end_finds_no_winner(part, name):
    given = copy.deepcopy(evidence())
    del given[part]["digits"][name]["100"]
    assert verdicts(given) == ["incomplete"] * 3
    assert "but final runs are missing" in sentence(given)
    assert "**No row is shown to be better than the ensemble.**" in summary(given)
    # Nor does a row win that lacks a task.
    two = make_evidence({t: {"ensemble": REFERENCE, "sam": better(0.03)} for t in ("a", "b")})
    assert verdicts(two) == ["better"] * 3
    del two["finals"]["b"]["sam"]
    assert verdicts(two) == ["incomplete"] * 3


def test_more_mutual_information_is_never_a_win():
    values = {**REFERENCE, "mutual_information": np.full(SEEDS, 0.5)}
    reference = {**REFERENCE, "mutual_information": np.full(SEEDS, 0.1)}
    given = make_evidence({"digits": {"ensemble": reference, "sam": values}})
    assert verdicts(given) == ["equal"] * 3
    assert not re.search(r"\bMI\b|mutual", summary(given))
    assert all("mutual" not in measure.path[-1] for measure in PRIMARY)


# --- what none wins ------------------------------------------------------------------------------


def test_without_a_winner_the_cheapest_that_is_not_worse_is_recommended():
    values = {"single": better(-0.05), "map": better(0, 1), "sam": better(0, 2)}
    ratios = {"single": 1.0, "map": 1.6, "ensemble": 2.0, "sam": 4.0}
    text = summary(evidence(values=values, ratios=ratios))
    assert "Take the cheapest that is not shown to be worse: **map**. With these seeds" in text
    d = Analysis(evidence(values=values, ratios=ratios)).tests["map"][0].difference
    assert f"a loss of up to {d.detectable:.3f}".replace(" 0.", " .") in text


def test_with_the_same_training_the_cheaper_prediction_is_recommended():
    given = evidence(
        values={"soup": better(0, 1)}, rows={"soup": row("soup", "derived", of="ensemble")}
    )
    given["costs"]["digits"]["soup"]["forward_rows"] = 1
    text = summary(given)
    assert "worse: **soup**." in text
    assert "and a prediction runs 1 particle in place of 4" in text


def test_too_few_pairs_are_said():
    short = {n: v[:3] for n, v in better(0.03).items()}
    given = make_evidence(
        {"digits": {"ensemble": {n: v[:3] for n, v in REFERENCE.items()}, "sam": short}}
    )
    assert verdicts(given) == ["equal"] * 3
    assert (
        "With 3 pairs no difference can have p < .05 after Holm's correction over 1 rows; that "
        "takes 6 pairs." in summary(given)
    )
    assert "that takes" not in summary(evidence())


def test_one_seed_has_no_interval_and_no_verdict():
    one = {n: v[:1] for n, v in better(0.3).items()}
    given = make_evidence(
        {"digits": {"ensemble": {n: v[:1] for n, v in REFERENCE.items()}, "sam": one}}
    )
    assert verdicts(given) == ["equal"] * 3
    assert "[no interval]" in summary(given)


def test_a_task_with_one_pair_leaves_no_interval_and_so_no_verdict():
    one = {"sam": runs({n: v[:1] for n, v in better(0.03).items()})}
    given = make_evidence({"a": {"ensemble": REFERENCE, "sam": better(0.03)}})
    assert verdicts(given) == ["better"] * 3
    two = make_evidence(
        {
            "a": {"ensemble": REFERENCE, "sam": better(0.03)},
            "b": {"ensemble": REFERENCE, **one},
        }
    )
    assert Analysis(two).tests["sam"][0].p < 0.001
    assert verdicts(two) == ["equal"] * 3


# --- equal compute -------------------------------------------------------------------------------

DEARER = {
    "ensemble_8": row("ensemble, K = 8", "compute", of="ensemble"),
    "ensemble_long": row("ensemble, 4 × steps", "compute", of="ensemble", steps=4),
}


def equal_compute(gain_of_8, **options):
    values = {
        "sam": better(0.03),
        "ensemble_8": better(gain_of_8, 2),
        "ensemble_long": better(0, 3),
    }
    ratios = {"ensemble": 2.0, "sam": 3.6, "ensemble_8": 4.0, "ensemble_long": 2.0}
    return evidence(values=values, rows=DEARER, ratios=ratios, **options)


def test_a_dear_row_is_set_beside_the_row_of_nearest_compute():
    beside = Analysis(equal_compute(0.01)).beside
    assert list(beside) == ["sam"]
    other, tests = beside["sam"]
    assert other == "ensemble_8"
    assert tests[0].difference.mean == pytest.approx(-0.02)
    assert [test.verdict for test in tests] == ["better"] * 3
    assert "beside the ensemble, K = 8 (2.0 ×), still in NLL" in summary(equal_compute(0.01))


def test_the_nearest_compute_may_be_more_or_less():
    for ratio, nearest in [(1.0, None), (3.0, "ensemble_8"), (7.0, "ensemble_long")]:
        given = equal_compute(0.01)
        given["costs"]["digits"]["sam"]["ratio"] = ratio
        beside = Analysis(given).beside
        assert (beside["sam"][0] if beside else None) == nearest


def test_a_gain_that_equal_compute_gives_as_well_is_said():
    text = summary(equal_compute(0.03))
    assert "beside the ensemble, K = 8 (2.0 ×), in none." in text
    assert "Beside the ensemble, K = 8 (2.0 ×), it cannot be told apart in NLL" in text


def test_what_is_not_better_than_the_reference_is_not_better_at_equal_compute():
    given = equal_compute(-0.05, edges=[("digits", "sam")])
    assert [test.verdict for test in Analysis(given).beside["sam"][1]] == ["uncounted"] * 3
    assert "which does not count" in summary(given)


def test_steps_count_as_compute_and_cheap_rows_are_beside_nothing():
    analysis = Analysis(equal_compute(0.01))
    assert analysis.compute("ensemble_long") == pytest.approx(8)
    assert analysis.cost("ensemble_long") == pytest.approx(4)
    cheap = evidence(values={"sam": better(0), "ensemble_8": better(0)}, rows=DEARER)
    assert Analysis(cheap).beside == {}


# --- what is missing -----------------------------------------------------------------------------


def test_missing_seeds_and_undefined_measures_leave_their_pairs_out_and_are_said(tmp_path):
    given = evidence()
    del given["finals"]["digits"]["sam"]["100"]
    given["finals"]["digits"]["sam"]["101"]["auroc_ood"] = None
    given["finals"]["digits"]["sam"]["102"]["auroc_ood"] = float("nan")
    given["missing"] = ["digits, sam: 1 final runs."]
    tests = Analysis(given).tests["sam"]
    assert [test.difference.pairs for test in tests] == [19, 19, 17]
    write(given, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "digits, sam: 2 final runs have no OOD AUROC, so these pairs are left out." in text
    assert "- digits, sam: 1 final runs." in text
    assert "The comparison is not complete" in summary(given)
    assert "Nothing is missing." not in text


def test_a_measure_that_no_run_of_a_task_has_is_not_said_to_be_missing(tmp_path):
    given = evidence()
    for name in ("ensemble", "sam"):
        for result in given["finals"]["digits"][name].values():
            del result["auroc_ood"]
    assert verdicts(given) == ["better", "better", "none"]
    write(given, tmp_path)
    assert "Nothing is missing." in (tmp_path / "compare.md").read_text()
    assert "has no run to pair" in sentence(given)
    # Ranks are of the measures that are there.
    assert Analysis(given).ranks["sam"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("part", ["finals", "defaults", "controls", "trials", "chosen", "costs"])
def test_any_part_may_be_missing(part, tmp_path):
    given = make_evidence({t: {"ensemble": REFERENCE, "sam": better(0.03)} for t in ("a", "b")})
    for emptied in ({}, {t: {} for t in ("a", "b")}, {"a": given[part]["a"]}):
        write({**given, part: emptied}, tmp_path)
        text = summary({**given, part: emptied})
        assert text
    if part == "finals":
        assert "Nothing can be said yet" in summary({**given, part: {}})


def test_a_task_that_one_row_lacks_does_not_count_for_it():
    finals = {"a": {"ensemble": REFERENCE, "sam": better(0.03)}, "b": {"ensemble": REFERENCE}}
    analysis = Analysis(make_evidence(finals))
    d = analysis.tests["sam"][0].difference
    assert list(d.by_task) == ["a"]
    assert d.mean == pytest.approx(-0.03)
    assert set(analysis.ranks) == {"ensemble", "sam"}


def test_a_diverged_run_is_counted_and_printed(tmp_path):
    given = evidence()
    worst = {"diverged": True, **dict.fromkeys(KEYS, 2.3)}
    for seed in ("100", "105"):
        given["finals"]["digits"]["sam"][seed] = worst
    test = Analysis(given).tests["sam"][0]
    assert test.difference.pairs == SEEDS
    assert test.difference.mean > 0.1
    assert "2 of its 20 runs diverged." in sentence(given)
    write(given, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "class frequencies: sam, finals: 2 of 20; sam, defaults: 2 of 20." in text
    assert json.loads((tmp_path / "compare.json").read_text())["statistics"]["diverged"]["sam"] == 2


# --- ranks and tables ----------------------------------------------------------------------------


def test_ranks_are_over_tasks_and_measures_without_the_rows_of_more_compute():
    analysis = Analysis(equal_compute(0.5))
    assert set(analysis.ranks) == {"ensemble", "sam"}
    assert analysis.ranks["sam"] == (1.0, 1.0, 1.0)
    assert analysis.ranks["ensemble"] == (2.0, 2.0, 2.0)


def test_the_first_table_orders_the_rows_and_places_them_in_each_measure():
    mixed = {**better(0.03), "auroc_ood": better(-0.03)["auroc_ood"]}
    text = summary(evidence(values={"single": better(-0.05, 2), "sam": mixed}))
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][2:]
    cells = {r[0].strip(): [c.strip() for c in r[3:]] for r in rows}
    assert list(cells) == ["sam", "ensemble", "single"]
    assert [c[:2] for c in cells["sam"]] == ["1.", "1.", "2."]
    assert cells["ensemble"] == ["2. reference", "2. reference", "1. reference"]
    assert [c[:2] for c in cells["single"]] == ["3.", "3.", "3."]
    assert re.fullmatch(r"1\. −\.030 \[−\.03\d, −\.02\d\] <\.001", cells["sam"][0])


def test_the_tables_of_a_task(tmp_path):
    values = {"nll": np.array([0.2, 0.4]), "accuracy": np.array([0.9, 0.92])}
    given = make_evidence({"digits": {"ensemble": values, "sam": values}})
    for result in given["finals"]["digits"]["sam"].values():
        result |= {"fgsm": {"0.01": 0.5}, "shifted": {"noise": {"accuracy": 0.75, "nll": 1.25}}}
        result |= {"corrupted": {"accuracy": 0.5}, "vendi_weights": 3.5}
    write(given, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "| sam      | .910 ± .010 | .300 ± .100 |" in text
    assert re.search(
        r"Accuracy on each shifted set:\n\n.*noise ↑.*\n.*\n.*\n\| sam +\| \.750 ± \.000 \|", text
    )
    assert re.search(
        r"NLL on each shifted set:\n\n.*noise ↓.*\n.*\n.*\n\| sam +\| 1\.250 ± \.000 \|", text
    )
    assert re.search(r"Vendi, weights.*\n.*\n.*\n\| sam +\| +3\.500 ± \.000 \|", text)
    assert "*" not in text.split("## digits")[1].split("## Cost")[0]
    # Zero differences: 2.8 · 0 / √2.
    assert "NLL .000 (sam) to .000 (sam)" in text


def test_the_power_line_is_of_the_tasks_own_pairs(tmp_path):
    noise = np.array([0.0, 0.1] * 5)
    finals = {"ensemble": np.full(10, 0.5), "sam": 0.5 + noise, "map": 0.5 + 2 * noise}
    write(make_evidence({"digits": finals}), tmp_path)
    # 2.8 · 0.0527 / √10, and twice that.
    expected = "NLL .047 (sam) to .093 (map)"
    assert expected in (tmp_path / "compare.md").read_text()


def test_wins_ties_and_losses_over_tasks(tmp_path):
    gains = {"a": 0.03, "b": 0.03, "c": -0.03, "d": 0.0}
    write(
        make_evidence({t: {"ensemble": REFERENCE, "sam": better(g)} for t, g in gains.items()}),
        tmp_path,
    )
    text = (tmp_path / "compare.md").read_text()
    assert re.search(r"\| sam +\| +2/1/1 \| +2/1/1 \| +2/1/1 \|", text)


def test_configurations_cost_and_origin(tmp_path):
    default = {"digits": {"ensemble": REFERENCE, "sam": better(0.01)}}
    given = evidence(defaults=default, edges=[("digits", "sam")])
    given["trials"]["digits"]["sam"] = [
        {"settings": {}, "nll": [0.2, 0.4], "seconds": 1.0},
        {"settings": {}, "nll": [0.5, 0.5], "seconds": 1.0},
        {"settings": {}, "nll": [0.5, float("inf")], "seconds": 1.0},
    ]
    write(given, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    (line,) = [x for x in text.splitlines() if "at the edge" in x and x.startswith("| sam")]
    assert "lr 0.01" in line
    assert "−.020 [" in line
    assert ".300 / .400 / .500 (1 undefined)" in line
    assert (
        "- command: `multilora compare --out DIR`\n- plan: 0123456789abcdef\n- torch: 2.11" in text
    )
    assert re.search(r"\| sam +\| +1 \| +2\.0 \| +1\.00 \| +100 \| +1,000 \| +4 \| +6 \|", text)


# --- files ---------------------------------------------------------------------------------------


def test_the_same_evidence_gives_the_same_texts(tmp_path):
    given = equal_compute(0.01)
    before = copy.deepcopy(given)
    write(given, tmp_path)
    assert given == before
    first = [(tmp_path / f).read_bytes() for f in ("compare.md", "compare.json")]
    # What a dict's order is, is no evidence.
    for part in ("finals", "controls"):
        own = given[part]["digits"]
        given[part]["digits"] = {n: dict(reversed(own[n].items())) for n in reversed(own)}
    write(given, tmp_path)
    assert (tmp_path / "compare.md").read_bytes() == first[0]
    kept = json.loads(first[1])
    assert summary(kept) == summary(before)
    assert summary(kept) in first[0].decode()
    write(kept, tmp_path)
    assert [(tmp_path / f).read_bytes() for f in ("compare.md", "compare.json")] == first


def test_the_statistics_are_in_the_json(tmp_path):
    write(evidence(), tmp_path)
    kept = json.loads((tmp_path / "compare.json").read_text())
    test = kept["statistics"]["tests"]["sam"][0]
    assert test["measure"] == "nll"
    assert test["verdict"] == "better"
    assert test["difference"]["mean"] == pytest.approx(-0.03, rel=1e-5)
    assert kept["plan"]["hash"] == "0123456789abcdef"


def test_the_tables_are_aligned(tmp_path):
    write(equal_compute(0.01), tmp_path)
    for block in (tmp_path / "compare.md").read_text().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({len(line) for line in lines}) == 1


# --- the figure ----------------------------------------------------------------------------------


def boxes(given, monkeypatch, tmp_path):
    """The pixels of every name in the figure."""
    found = []
    original = figure._name

    def name(axes, points):
        original(axes, points)
        found.extend((t.get_text(), t.get_window_extent()) for t in axes.texts)

    monkeypatch.setattr(figure, "_name", name)
    figure.pareto_diagram(Analysis(given), tmp_path / "compare.png")
    return found


def overlapping(names):
    return [
        (one, other)
        for i, (one, box) in enumerate(names)
        for other, taken in names[i + 1 :]
        if box.overlaps(taken)
    ]


def test_no_names_of_26_rows_overlap_in_the_figure(monkeypatch, tmp_path):
    found = boxes(realistic(tasks=2, seeds=8), monkeypatch, tmp_path)
    assert len(found) == 26
    assert not overlapping(found)
    # One that is very far off is drawn at the border, with its value.
    assert any(re.fullmatch(r"SGLD \(\+\.\d{3}\)", text) for text, _ in found)


def test_names_of_equal_points_do_not_overlap_in_the_figure(monkeypatch, tmp_path):
    given = evidence(values={f"row {i}": better(0.03) for i in range(8)})
    assert not overlapping(boxes(given, monkeypatch, tmp_path))


def test_the_line_is_of_the_lowest_at_each_compute():
    points = [
        figure._Point(label, x, y, y, y, "other", False)
        for label, x, y in [("a", 1, 3), ("b", 2, 1), ("c", 3, 2), ("d", 4, 0), ("e", 5, 9)]
    ]
    expected = [(1, 3), (2, 3), (2, 1), (4, 1), (4, 0), (5, 0)]
    assert figure._stairs(points) == expected


def test_a_figure_is_written_with_and_without_costs(tmp_path):
    write(evidence(), tmp_path)
    drawn = (tmp_path / "compare.png").read_bytes()
    write({**evidence(), "costs": {}}, tmp_path)
    empty = (tmp_path / "compare.png").read_bytes()
    assert drawn[:4] == empty[:4] == b"\x89PNG"
    assert len(drawn) > 2 * len(empty)
