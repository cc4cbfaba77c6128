"""The goals of kernels and steps on a GPU, and what a record says of each.

A goal is judged by multilora's best backend in that case. Where a number is missing, because a case
has not run or our peers failed in it, the goal is open, not met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.case import is_ours

#: At most so many times the base GEMM on the same rows, at the widths of a ViT and of a decoder.
LINEAR = {"forward": (1.12, 1.06), "fwd + bwd": (1.30, 1.10)}
#: At most so many times the bytes that must be moved, at the rate of a copy.
GEOMETRY_BYTES, LOSS_BYTES = 2.0, 1.5
#: Loss and gradient: at most so many launches; at least so many times as fast as plain PyTorch.
LOSS_LAUNCHES, LOSS_SPEEDUP = 2, 5.0
#: A step is at least so many times as fast as a loop over PEFT models, and as compiled plain forms.
STEP_LOOP, STEP_COMPILED = 2.0, 1.25
#: The memory of 100 particles of CLIP's shape, over that of three.
CLIP_MEMORY = 1.16


@dataclass(frozen=True)
class Judged:
    """measured: None where nothing was. by: the peer, and the times that were compared."""

    goal: str
    limit: float
    at_most: bool
    measured: float | None = None
    by: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def __str__(self) -> str:
        word = {None: "open", True: "met", False: "MISSED"}[self.met]
        sign = "at most" if self.at_most else "at least"
        number = "not measured" if self.measured is None else f"{self.measured:.3g}, {self.by}"
        return f"{word:6}  {self.goal}: {number} ({sign} {self.limit:g})"


def judge(record: dict[str, Any]) -> list[Judged]:
    """All goals, from a record of bench.gpu; the cases that have run decide their number."""
    return [
        *_linears(record["cases"]),
        *_geometries(record),
        *_losses(record),
        *_steps(record["cases"]),
        _clip(record["others"]),
    ]


def as_records(found: list[Judged]) -> list[dict[str, Any]]:
    return [asdict(one) | {"met": one.met} for one in found]


def _kind(case: dict[str, Any]) -> str:
    """Which times decide: "kernel", those of replayed graphs, where there are any of ours."""
    return "kernel" if any(is_ours(name) for name in case.get("kernel", {})) else "launched"


def _one(
    goal: str,
    limit: float,
    at_most: bool,
    case: dict[str, Any],
    value: Callable[[str, str, float], float | None],
    kind: str = "",
) -> Judged:
    """value: (kind of times, our fastest peer, its seconds) -> the number, or None where it is not
    known."""
    kind = kind or _kind(case)
    ours = {name: q[1] for name, q in case.get(kind, {}).items() if is_ours(name)}
    if ours:
        name = min(ours, key=lambda peer: ours[peer])
        measured = value(kind, name, ours[name])
        if measured is not None:
            return Judged(goal, limit, at_most, measured, f"{name}, {kind}")
    return Judged(goal, limit, at_most)


def _of(cases: list[dict[str, Any]], group: str, *parts: str) -> Iterator[dict[str, Any]]:
    for case in cases:
        if case["group"] == group and all(part in case["name"] for part in parts):
            yield case


def _over(case: dict[str, Any], names: Callable[[str], bool]) -> Callable[..., float | None]:
    """How many times as long the fastest of these peers takes."""

    def value(kind: str, name: str, seconds: float) -> float | None:
        others = [q[1] for peer, q in case[kind].items() if names(peer)]
        return min(others) / seconds if others else None

    return value


def _linears(cases: list[dict[str, Any]]) -> Iterator[Judged]:
    for passes, (of_vit, of_decoder) in LINEAR.items():
        group = f"lora_linear {passes}"
        for case in _of(cases, group):
            widths, name = case["name"].split()[0], f"{group}, {case['name']}"
            if "shared" not in case["name"] and "," not in case["name"]:
                limit = of_decoder if "4096" in widths else of_vit
                over = _column(case, "x_yardstick")
                yield _one(f"{name}: over the base GEMM", limit, True, case, over)
            ahead = _column(case, "x_best_peer")
            yield _one(f"{name}: the best peer over it", 1.0, False, case, ahead)


def _column(case: dict[str, Any], column: str) -> Callable[..., float | None]:
    """What a column of the record says of our peer, the median where it has quartiles."""

    def value(kind: str, name: str, _: float) -> float | None:
        found = case[f"{kind}_columns"].get(column, {}).get(name)
        return found[1] if isinstance(found, (list, tuple)) else found

    return value


def _bytes(record: dict[str, Any], case: dict[str, Any]) -> Callable[..., float | None]:
    """How many times as long as its bytes take in a copy."""
    rate = (record["ceilings"] or {}).get("bytes")

    def value(kind: str, name: str, seconds: float) -> float | None:
        moved = case[f"{kind}_columns"].get("gbytes", {}).get(name)
        return rate / (moved * 1e9) if rate and moved else None

    return value


def _geometries(record: dict[str, Any]) -> Iterator[Judged]:
    group = "pairwise_frobenius fwd + bwd"
    for model in ("ViT-B", "7B decoder"):
        found = [c for c in _of(record["cases"], group) if c["name"].startswith(f"{model},")]
        for case in found or [{}]:
            goal = f"{group}, {model}: over its bytes"
            yield _one(goal, GEOMETRY_BYTES, True, case, _bytes(record, case))


def _losses(record: dict[str, Any]) -> Iterator[Judged]:
    group = "particle_loss fwd + bwd"
    for case in _of(record["cases"], group):
        if "," in case["name"]:
            continue
        name, classes = f"{group}, {case['name']}", case["name"].split(" C")[1]

        def counted(_kind: str, peer: str, _: float, case=case) -> float | None:
            return case.get("launches", {}).get(peer)

        if classes == "32000":
            yield _one(f"{name}: over its bytes", LOSS_BYTES, True, case, _bytes(record, case))
        if classes == "100":
            eager = _over(case, lambda peer: peer in ("softmax, logdet", "mask, Cholesky"))
            yield _one(f"{name}: plain PyTorch over it", LOSS_SPEEDUP, False, case, eager)
        yield _one(f"{name}: launches", LOSS_LAUNCHES, True, case, counted)


def _steps(cases: list[dict[str, Any]]) -> Iterator[Judged]:
    """Both with launches, as a training loop runs, and as replayed graphs."""
    for compiled, limit, what in (
        (False, STEP_LOOP, "a loop over PEFT models"),
        (True, STEP_COMPILED, "the best compiled plain form"),
    ):
        found = [
            case
            for case in _of(cases, "IBDR step", "ViT-B/16 K4 ")
            if ("torch.compile" in case["name"]) == compiled
        ]
        for kind in ("launched", "kernel"):
            goal = f"IBDR step, ViT-B/16 K4, {kind}: {what} over it"
            for case in found or [{}]:
                value = _over(case, _is_compiled if compiled else _is_loop)
                yield _one(goal, limit, False, case, value, kind)


def _is_loop(peer: str) -> bool:
    return peer.startswith("PEFT loop")


def _is_compiled(peer: str) -> bool:
    return not is_ours(peer) and peer.endswith("compiled")


def _clip(others: dict[str, Any]) -> Judged:
    goal = "an SVGD step of CLIP ViT-B/32: memory of K = 100 over K = 3"
    held = [others.get(f"CLIP ViT-B/32, K = {count}", {}).get("resident") for count in (100, 3)]
    if None in held:
        return Judged(goal, CLIP_MEMORY, True)
    by = f"{held[0] / 2**30:.2f} and {held[1] / 2**30:.2f} GiB"
    return Judged(goal, CLIP_MEMORY, True, held[0] / held[1], by)
