"""The figure of a comparison: what each row gains against what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multilora.app.compare.analysis import Analysis
from multilora.app.compare.sentences import number

#: The measure that is drawn.
_DRAWN = 1
#: verdict -> caption, marker and colour, of Okabe and Ito, which colour-blind readers tell apart.
_STYLES = {
    "reference": ("reference", "D", "#000000"),
    "better": ("better", "o", "#0072B2"),
    "worse": ("worse", "s", "#D55E00"),
    "other": ("cannot be told apart, or does not count", "o", "#7F7F7F"),
}
_SMALL = {"fontsize": 8}
#: Points that lie so many times as high as three quarters of the others are drawn at the border.
_FAR = 3
_TICKS = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class _Point(NamedTuple):
    label: str
    x: float
    y: float
    low: float
    high: float
    verdict: str
    hollow: bool  # spends additional compute
    far: bool = False  # lies above the border, at which it is drawn


def pareto_diagram(analysis: Analysis, file: Path) -> None:
    """Draw the calibrated NLL of each row, as its difference to the reference, against its training
    compute, with 95 % intervals and the line of the lowest at each compute.

    Rows without costs or pairs are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = _points(analysis)
    figure, axes = plt.subplots(figsize=(9, 6), dpi=120, layout="constrained")
    if points:
        _draw(axes, points, analysis.label(analysis.reference))
        # The names need the final size of the axes.
        figure.canvas.draw()
        figure.set_layout_engine("none")
        _name(axes, points)
    else:
        axes.text(0.5, 0.5, "no row has costs and pairs yet", ha="center", va="center")
        axes.set_axis_off()
    figure.savefig(file)
    plt.close(figure)


def _points(analysis: Analysis) -> list[_Point]:
    found = []
    for row, entry in analysis.rows.items():
        x, label = analysis.compute(row), analysis.label(row)
        if x is None:
            continue
        if row == analysis.reference:
            found.append(_Point(label, x, 0.0, 0.0, 0.0, "reference", False))
            continue
        test = analysis.tests[row][_DRAWN]
        if test.difference is None:
            continue
        mean = test.difference.mean
        low, high = test.difference.interval or (mean, mean)
        verdict = test.verdict if test.verdict in _STYLES else "other"
        found.append(_Point(label, x, mean, low, high, verdict, entry["table"] == "compute"))
    top = _border([p.y for p in found])
    return [
        p._replace(label=f"{p.label} (+{number(p.y)})", y=top, low=top, high=top, far=True)
        if p.y > top
        else p
        for p in found
    ]


def _border(heights: Sequence[float]) -> float:
    """Where what lies far above the others is drawn."""
    usual = sorted(abs(y) for y in heights)[math.ceil(0.75 * len(heights)) - 1] if heights else 0
    inside = [y for y in heights if y <= _FAR * usual]
    return max(inside, default=0) + 0.3 * usual


def _draw(axes: Any, points: list[_Point], reference: str) -> None:
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--", zorder=1)
    axes.plot(*zip(*_stairs(points)), color="#009E73", zorder=1, label="lowest at its compute")
    for p in points:
        _, marker, colour = _STYLES[p.verdict]
        axes.errorbar(
            p.x,
            p.y,
            yerr=[[p.y - p.low], [p.high - p.y]],
            fmt="^" if p.far else marker,
            color=colour,
            markerfacecolor="white" if p.hollow else colour,
            markersize=7,
            elinewidth=1,
        )
    _frame(axes, min(p.x for p in points) / 1.3, max(p.x for p in points) * 1.5)
    axes.set_ylabel(f"calibrated NLL − that of the {reference}   (← better)")
    _legend(axes, points)


def _stairs(points: list[_Point]) -> list[tuple[float, float]]:
    """The corners of the line that no row lies below, up to its compute."""
    corners: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not corners:
            corners.append((p.x, p.y))
        elif p.y < corners[-1][1]:
            corners += [(p.x, corners[-1][1]), (p.x, p.y)]
    return [*corners, (max(p.x for p in points), corners[-1][1])]


def _frame(axes: Any, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [t for t in _TICKS if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(
        "training compute: step time × steps, in runs of the single adapter   (← cheaper)"
    )
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any, points: list[_Point]) -> None:
    for verdict, (caption, marker, colour) in _STYLES.items():
        if any(p.verdict == verdict for p in points):
            axes.plot([], [], marker, color=colour, label=caption)
    if any(p.hollow for p in points):
        axes.plot([], [], "o", color="black", markerfacecolor="white", label="more compute")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3, frameon=False, **_SMALL)


# --- names that do not overlap -------------------------------------------------------------------

_Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def _name(axes: Any, points: list[_Point]) -> None:
    """Write each label beside its point, where it covers no other label, point or interval."""
    corners = _stairs(points)
    left, right = axes.get_xlim()
    taken = [_box(axes, (p.x, p.y), (p.x, p.y), 6) for p in points]
    taken += [_box(axes, (p.x, p.low), (p.x, p.high), 2) for p in points]
    taken += [_box(axes, *ends, 2) for ends in itertools.pairwise(corners)]
    taken.append(_box(axes, (left, 0), (right, 0), 1))
    inside = (axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1)
    for p in points:
        x, y = axes.transData.transform((p.x, p.y))
        text = axes.text(0, 0, p.label, transform=None, va="center", ha="center", **_SMALL)
        extent = text.get_window_extent()
        places = _places(x, y, extent.width + 4, extent.height)
        box = min(places, key=lambda place: _overlap(place, taken, inside))
        taken.append(box)
        text.set_position(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        _lead(axes, (x, y), box)


def _box(axes: Any, one: tuple[float, float], other: tuple[float, float], pad: float) -> _Box:
    """The pixels around the line between two points."""
    (x0, y0), (x1, y1) = axes.transData.transform([one, other])
    return min(x0, x1) - pad, min(y0, y1) - pad, max(x0, x1) + pad, max(y0, y1) + pad


def _places(x: float, y: float, width: float, height: float) -> list[_Box]:
    """Boxes around a point, the nearest ones first."""
    found = []
    for distance in (9, 16, 26, 38, 52, 70, 90, 115):
        for angle in range(0, 360, 20):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            cx = x + distance * dx + width / 2 * max(-1, min(1, 2 * dx))
            cy = y + distance * dy + height / 2 * dy
            found.append((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
    return found


def _overlap(box: _Box, taken: list[_Box], inside: _Box) -> float:
    """The area that a box shares with those that are taken and with the outside."""

    def shared(other: _Box) -> float:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        return max(0.0, width) * max(0.0, height)

    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(map(shared, taken)) + area - shared(inside)


def _lead(axes: Any, point: tuple[float, float], box: _Box) -> None:
    """A thin line from a point to its label, if that is not at once beside it."""
    near = [min(max(c, box[i]), box[i + 2]) for i, c in enumerate(point)]
    if math.dist(near, point) > 14:
        axes.plot(*zip(point, near), transform=None, color="#999999", linewidth=0.6, zorder=1)
