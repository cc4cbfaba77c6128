"""Draw the figures of the documentation, and write its tables, from the records in bench/results/.

    python docs/figures/draw.py

Figures go to docs/images/. A table replaces what stands in a page between `<!-- table: NAME -->`
and `<!-- end of table -->`. tests/docs looks whether the tables are those of the records.
"""

import json
import re
import statistics
from pathlib import Path

from multilora.app.compare import report, sentences, tables
from multilora.app.compare.analysis import PRIMARY, Analysis, Measure

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "bench" / "results" / "digits"
COMPARISONS = ROOT / "bench" / "results" / "compare"
IMAGES = ROOT / "docs" / "images"
METHODS = ("single", "ensemble", "svgd", "ibdr")
COLOURS = {"single": "#57606a", "ensemble": "#0969da", "svgd": "#1a7f37", "ibdr": "#bc4c00"}
PAGES = {
    "methods": "benchmarks.md",
    "ensemble": "methods/ensemble.md",
    "svgd": "methods/svgd.md",
    "ibdr": "methods/ibdr.md",
    "winners on images": "../README.md",
    "winners on texts": "../README.md",
    "comparison on images": "evidence.md",
    "comparison on texts": "evidence.md",
    "parts on images": "evidence.md",
    "parts on texts": "evidence.md",
    "parts on priors": "evidence.md",
}
#: Record -> (row, row it is compared to) of its table "parts".
PARTS = {
    "images": (
        ("ibdr", "ibdr_no_volume"),
        ("ibdr", "ibdr_no_ascent"),
        ("ibdr", "ibdr_no_noise"),
        ("ibdr", "map"),
        ("ibdr", "sam"),
        ("ibdr", "ensemble"),
        ("svgd", "ensemble"),
    ),
    "texts": (("ibdr", "sam"), ("ibdr", "ensemble"), ("svgd", "ensemble")),
    "priors": (
        ("ibdr_prior", "ensemble"),
        ("ibdr_prior", "ibdr"),
        ("ibdr_prior", "map"),
        ("svgd_prior", "ensemble"),
        ("svgd_prior", "svgd"),
        ("map_8", "map"),
        ("map_8", "ensemble_8"),
    ),
}
#: (heading, path in a run, decimals); better is ↑ or ↓.
ROWS = (
    ("accuracy ↑", ("measures", "accuracy"), 3),
    ("NLL ↓", ("measures", "nll"), 3),
    ("NLL with a fitted temperature ↓", ("calibrated_nll",), 3),
    ("ECE ↓", ("measures", "ece"), 3),
    ("Brier ↓", ("measures", "brier"), 3),
    ("mutual information", ("measures", "mutual_information"), 3),
    ("corrupted accuracy ↑", ("measures", "corrupted", "accuracy"), 3),
    ("corrupted NLL ↓", ("measures", "corrupted", "nll"), 3),
    ("corrupted ECE ↓", ("measures", "corrupted", "ece"), 3),
    ("OOD AUROC by entropy ↑", ("measures", "auroc_ood"), 3),
    ("OOD AUROC by mutual information ↑", ("measures", "auroc_ood_mi"), 3),
    ("CPU ms per step ↓", ("step_cpu_ms",), 0),
)


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


def values(method: str, path: tuple[str, ...]) -> list[float]:
    """A number of every run of the method, in the order of the seeds."""
    found = []
    for run in record("methods")["runs"]:
        if run["method"] == method:
            value = run
            for key in path:
                value = value[key]
            found.append(value)
    return found


def mean_and_error(numbers: list[float], decimals: int, sign: str = "") -> str:
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{statistics.fmean(numbers):{sign}.{decimals}f} ± {error:.{decimals}f}"


# --- tables --------------------------------------------------------------------------------------


def comparison(name: str) -> dict:
    """The record of `multilora compare` of this name."""
    return json.loads((COMPARISONS / name / report.JSON).read_text())


def parts(name: str) -> str:
    """Differences between rows of a comparison, with 95 % intervals."""
    analysis = Analysis(comparison(name))
    measures = (
        *PRIMARY,
        Measure("accuracy ↑", ("accuracy",)),
        Measure("MI", ("mutual_information",)),
    )
    rows = []
    for row, other in PARTS[name]:
        found = [analysis.against(row, "finals", other, measure) for measure in measures]
        cells = [f"{sentences.number(d.mean)} {sentences.interval(d.interval)}" for d in found]
        rows.append([f"{analysis.label(row)} − {analysis.label(other)}", *cells])
    return tables.table(["", *(measure.heading for measure in measures)], rows)


#: What is not of the embedded task, but of a record of `multilora compare`: "winners on images".
COMPARED = {
    "winners": lambda name: report.headline(comparison(name)),
    "comparison": lambda name: report.summary(comparison(name)),
    "parts": parts,
}


def table(name: str) -> str:
    """Of all methods; or of one, beside what it is compared with, with the paired difference."""
    kind, _, compared = name.partition(" on ")
    if compared:
        return COMPARED[kind](compared)
    if name == "methods":
        columns = METHODS
        rows = [
            [title, *(mean_and_error(values(m, path), d) for m in METHODS)]
            for title, path, d in ROWS
        ]
    else:
        other = "single" if name == "ensemble" else "ensemble"
        columns = (other, name, "difference, by seed")
        rows = []
        for title, path, d in ROWS:
            theirs, ours = values(other, path), values(name, path)
            pairs = [b - a for a, b in zip(theirs, ours)]
            cells = [mean_and_error(x, d) for x in (theirs, ours)]
            rows.append([title, *cells, mean_and_error(pairs, d, "+").replace("-", "−")])
    lines = [["", *columns], ["---", *["--:"] * len(columns)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(text: str, name: str) -> str:
    """A page with the table in its place."""
    start, end = f"<!-- table: {name} -->\n", "\n<!-- end of table -->"
    assert start in text, f"the page has no place for the table {name}"
    if end not in text:
        return text.replace(start, f"{start}\n{table(name)}\n{end}\n")
    return re.sub(
        re.escape(start) + r".*?" + re.escape(end),
        lambda _: f"{start}\n{table(name)}\n{end}",
        text,
        flags=re.DOTALL,
    )


def write_tables() -> None:
    for name, page in PAGES.items():
        file = ROOT / "docs" / page
        file.write_text(with_table(file.read_text(), name))


# --- figures -------------------------------------------------------------------------------------


def save(figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def draw_reliability(plt) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), sharey=True, layout="constrained")
    for axis, method in zip(axes, METHODS):
        bins: dict[int, list] = {}
        for curve in values(method, ("reliability",)):
            for confidence, accuracy, count in curve:
                bins.setdefault(min(int(confidence * 15), 14), []).append(
                    (confidence, accuracy, count)
                )
        points = []
        for _, found in sorted(bins.items()):
            total = sum(count for *_, count in found)
            if total >= 20:  # of fewer, an accuracy says little
                points.append([sum(p[i] * p[2] for p in found) / total for i in (0, 1)])
        axis.plot([0, 1], [0, 1], color="#8c959f", linestyle="--", linewidth=1)
        axis.plot(*zip(*points), color=COLOURS[method], marker="o", markersize=3)
        axis.set(title=method, xlabel="confidence", xlim=(0.3, 1), ylim=(0.3, 1))
    axes[0].set(ylabel="accuracy")
    save(figure, "reliability")


def draw_training(plt) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for method in METHODS[1:]:
        traces = values(method, ("trace",))
        steps = [point[0] for point in traces[0]]
        for axis, column in ((left, 1), (right, 2)):
            means = [statistics.fmean(t[i][column] for t in traces) for i in range(len(steps))]
            axis.plot(steps, means, color=COLOURS[method], label=method)
    left.set(xlabel="step", ylabel="mean ‖ΔW_i − ΔW_j‖", title="distance of the updates")
    right.set(xlabel="step", ylabel="−log det(I + G/ε)", title="divergence (lower: more diverse)")
    left.legend()
    save(figure, "training")


def draw_cost(plt) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for method in METHODS:
        nll, cost = values(method, ("calibrated_nll",)), values(method, ("step_cpu_ms",))
        error = statistics.stdev(nll) / len(nll) ** 0.5
        axis.errorbar(
            statistics.fmean(cost), statistics.fmean(nll), yerr=error,
            color=COLOURS[method], marker="o", capsize=3, label=method,
        )  # fmt: skip
    axis.set(xlabel="CPU ms per step", ylabel="NLL with a fitted temperature", xlim=(0, None))
    axis.legend()
    save(figure, "cost")


def draw_speed(plt) -> None:
    points = record("speed")["points"]
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    names = {"loop over PEFT models": "#57606a"} | {m: COLOURS[m] for m in METHODS[1:]}
    for name, colour in names.items():
        low, middle, high = zip(*(point["step_cpu_ms"][name] for point in points))
        particles = [point["particles"] for point in points]
        style = "--" if "loop" in name else "-"
        axis.plot(particles, middle, style, color=colour, marker="o", markersize=3, label=name)
        axis.fill_between(particles, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="particles", ylabel="CPU ms per step of 16 images", ylim=(0, None))
    axis.set_xticks([point["particles"] for point in points])
    axis.legend()
    save(figure, "speed")


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "multilora",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    draw_reliability(plt)
    draw_training(plt)
    draw_cost(plt)
    draw_speed(plt)


if __name__ == "__main__":
    write_tables()
    draw()
