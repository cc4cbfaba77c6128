"""Numbers in README.md and docs/ are those of the records that stand beside them."""

import importlib.util
import json
import statistics

import pytest

from documents import ROOT
from multilora.app.compare.analysis import Analysis
from multilora.app.compare.sentences import number

RESULTS = ROOT / "bench" / "results"


def draw():
    file = ROOT / "docs" / "figures" / "draw.py"
    spec = importlib.util.spec_from_file_location("draw", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_of_the_records():
    """`python docs/figures/draw.py` would change nothing in them."""
    module = draw()
    for name, page in module.PAGES.items():
        text = (ROOT / "docs" / page).read_text()
        assert module.with_table(text, name) == text, page


def spread(trials: list[dict]) -> list[str]:
    """The lowest and the highest validation NLL of the trials."""
    found = [statistics.fmean(trial["nll"]) for trial in trials]
    return [number(min(found), 2), number(max(found), 2)]


def test_the_numbers_of_the_evidence_are_of_the_record():
    text = (ROOT / "docs" / "evidence.md").read_text()
    evidence = json.loads((RESULTS / "compare" / "images" / "compare.json").read_text())
    texts = json.loads((RESULTS / "compare" / "texts" / "compare.json").read_text())
    low, high = spread(evidence["trials"]["digits5"]["ensemble"])
    assert f"ranges from {low} to {high} over the trials on the digits" in text
    low, high = spread(texts["trials"]["sentiment"]["ensemble"])
    assert f"from {low} to {high} on the tweets" in text
    accuracies = [
        statistics.fmean(run["accuracy"] for run in runs.values())
        for runs in texts["finals"]["sentiment"].values()
    ]
    assert f"accuracy of {number(min(accuracies), 2)} to {number(max(accuracies), 2)} says" in text
    [one] = [t.difference for t in Analysis(texts).tests["single"] if t.measure.name == "NLL"]
    assert f"a difference of about {number(one.detectable, 2)} between one and four" in text
    assert all(rows["map"]["settings"]["prior_std"] > 4 for rows in texts["chosen"].values())
    chosen = {
        (task, row): found["settings"]
        for task, rows in evidence["chosen"].items()
        for row, found in rows.items()
    }
    assert all(4 < chosen[task, "map"]["prior_std"] < 7 for task in evidence["chosen"])
    p = Analysis(evidence).tests["ibdr"][0].difference.p
    assert f"Its p without a correction\n  is {number(p)} in NLL" in text
    alphas = [number(chosen[task, "ibdr"]["alpha"]) for task in ("digits5", "mnist5")]
    assert f"chose α = {alphas[0]} and {alphas[1]}, around" in text
    assert f"σ = {number(chosen['mnist5', 'ibdr']['sigma'])}" in text
    assert f"γ = {number(chosen['digits5', 'svgd']['gamma'], 4)}" in text
    assert not chosen["mnist5", "svgd"].keys() & {"gamma", "scope"}  # the defaults


def test_the_numbers_of_the_prior_are_of_the_record():
    text = (ROOT / "docs" / "evidence.md").read_text()
    evidence = json.loads((RESULTS / "compare" / "priors" / "compare.json").read_text())
    tests = Analysis(evidence).tests
    assert len(tests) == 7
    assert f"over these seven rows is {number(tests['ibdr_prior'][0].p)} in NLL" in text
    chosen = [rows["ibdr_prior"]["settings"] for rows in evidence["chosen"].values()]
    digits, mnist = ((1 / (20 * 2 * own["beta"])) ** 0.5 for own in chosen)  # 1/(Nτ²) = 2β
    assert f"τ of {digits:.0f} on the digits and {mnist:.0f} on MNIST" in text
    assert "α of {} and {}, far".format(*(number(own["alpha"]) for own in chosen)) in text
    gains = {row: own[0].difference.mean for row, own in tests.items()}
    assert min(gains, key=gains.__getitem__) == "map_8"
    images = json.loads((RESULTS / "compare" / "images" / "compare.json").read_text())
    others = [own[0].difference.mean for own in Analysis(images).tests.values()]
    assert gains["map_8"] < min(others)


def case(group: str, name: str) -> dict:
    cases = json.loads((RESULTS / "cpu-epyc-2-threads.json").read_text())["cases"]
    [found] = [c for c in cases if (c["group"], c["name"]) == (group, name)]
    return found


def speedup(group: str, name: str, peer: str) -> float:
    return case(group, name)["speedup"][peer][1]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_speedups_are_of_the_record(page):
    text = (ROOT / page).read_text()
    step = speedup("IBDR step", "digits ViT K4 B16", "PEFT loop")
    assert f"{step:.1f} × faster" in text
    loss = speedup("particle_loss fwd + bwd", "K4 N64 C32000", "softmax, logdet")
    assert f"{loss:.1f} × faster" in text
    pairs = speedup("pairwise_frobenius forward", "12 layers 768→3072 K8 r8", "ΔW differences")
    assert f"{pairs:.0f}"[0] + "00 ×" in text
    widths = ("768→768", "768→2304", "768→3072", "3072→768")
    linear = [speedup("lora_linear fwd + bwd", f"{w} K4 T197 r8", "baddbmm") for w in widths]
    assert f"{min(linear):.2f}–{max(linear):.2f} ×" in text


def test_what_is_slower_is_of_the_record():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    ibdr = speedup("IBDR step", "digits ViT K4 B16", "folded")
    ensemble = speedup("Ensemble step", "digits ViT K4 B16", "folded")
    few = speedup("IBDR step", "digits ViT K4 B8", "folded")
    assert f"**{ibdr:.2f} ×** the batch folded by hand" in text
    assert f"**{ensemble:.2f} ×** and" in text
    less = (f"{1 / ratio - 1:.0%}".replace("%", " %") for ratio in (ensemble, ibdr, few))
    assert "by {} (Ensemble), {} (IBDR, 16 images) or {} (8 images)".format(*less) in text


def test_memory_is_of_the_record():
    record = json.loads((RESULTS / "many_particles" / "growth-cpu.json").read_text())
    assert f"{record['memory_ratio']:.2f} ×" in (ROOT / "README.md").read_text()
    guide = (ROOT / "docs" / "guides" / "many_particles.md").read_text()
    for run in record["growth"]:
        assert str(round(run["resident"] / 2**20)) in guide
        assert f"| {run['cpu_seconds']:.0f} |" in guide


@pytest.mark.parametrize(("name", "targets"), [("trunk-cpu", "MLPs"), ("trunk-cpu-qkv", "`qkv`")])
def test_the_trunk_is_of_the_record(name, targets):
    record = json.loads((RESULTS / "many_particles" / f"{name}.json").read_text())
    speedups = [f"{case['speedup'][1]:.2f} ×" for case in record["cases"]]
    guide = (ROOT / "docs" / "guides" / "many_particles.md").read_text()
    assert f"| {targets} | {' | '.join(speedups)} |" in guide


def test_unrelated_runs_are_of_the_record():
    """Every ratio of a case of eight runs, and of its mixed batches, stands on the page."""
    cases = json.loads((RESULTS / "many_runs" / "cpu-2-threads.json").read_text())["cases"]
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for one in cases:
        assert not one["failures"]
        for found in (one.get("speedup", {}), one.get("in_parts", {})):
            if "PEFT one by one" in found and found is not one["speedup"]:
                found = {"PEFT in turn": found["PEFT in turn"]}
            for low, middle, high in found.values():
                assert f"{middle:.2f} × ({low:.2f}–{high:.2f})" in text
        if one["name"].endswith("allocated"):
            assert f"{one['ratio']:.2f} × (" in text


def test_figures_are_small():
    images = list((ROOT / "docs" / "images").iterdir())
    assert len(images) >= 5
    assert sum(file.stat().st_size for file in images) < 600_000
