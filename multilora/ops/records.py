"""The records that make a backend's kernels the default of a GPU, and for which arguments.

Two kinds of evidence, each with the name of its record: an entry of table.json is for the sizes
that it was measured at, an entry of promotions.json for a range of sizes. `promotions_of` makes the
second kind of what a run measured. Both files are read once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from multilora.ops.triton import configs
from multilora.ops.triton.common import Chip, chip, precision
from multilora.ops.triton.loss import is_aligned

PROMOTIONS = Path(configs.__file__).with_name("promotions.json")

#: A range needs at least so many shapes.
LEAST_SHAPES = 3
#: Larger values of these add blocks of the same kind, so ranges have no upper end there.
_ENDLESS = ("rows", "examples")


@dataclass(frozen=True)
class Measured:
    """One shape of an operator: whether the backend was right there, and ahead of the reference.

    sizes are numbers by name; switches, such as `shared`, make it another computation.
    """

    sizes: dict[str, int]
    switches: dict[str, Any]
    right: bool
    ahead: bool


@dataclass(frozen=True)
class Promotion:
    """`backend` is the default of operator `op` on this chip, in this dtype, with these switches,
    from `sizes[name][0]` to `sizes[name][1]`, or without an upper end for None.

    shapes: in how many shapes of the range `record` found it right and ahead: in all that it has.
    """

    op: str
    backend: str
    capability: int
    processors: int
    dtype: str
    switches: dict[str, Any]
    sizes: dict[str, list[int | None]]
    shapes: int
    record: str

    def __post_init__(self):
        if not self.record or self.shapes < LEAST_SHAPES or self.backend not in ("triton", "cuda"):
            raise ValueError(
                f"not a promotion: it needs a record and {LEAST_SHAPES} shapes: {self}"
            )

    def covers(self, op: str, question: Question) -> bool:
        """Whether the promotion holds for this operator and question."""
        of = (self.op, self.capability, self.processors, self.dtype, self.switches)
        chip = question.chip
        return (
            of == (op, chip.capability, chip.processors, question.dtype, question.switches)
            and self.sizes.keys() == question.sizes.keys()
            and all(
                (low or 0) <= question.sizes[name]
                and (high is None or question.sizes[name] <= high)
                for name, (low, high) in self.sizes.items()
            )
        )


def promotions_of(
    op: str, backend: str, chip: Chip, dtype: str, measured: Sequence[Measured], record: str
) -> list[Promotion]:
    """The ranges that `record` supports for one backend: at most one per setting of the switches.

    A backend that was wrong at any shape is promoted nowhere. A range goes from one measured shape
    on, upwards in every size, as far as shapes were measured, without an end where more is more of
    the same. It holds LEAST_SHAPES at least and no shape that was not ahead; of several, the one
    that holds the most.
    """
    if not all(shape.right for shape in measured):
        return []
    by_switches: dict[str, list[Measured]] = {}
    for shape in measured:
        by_switches.setdefault(json.dumps(shape.switches, sort_keys=True), []).append(shape)
    found = []
    for shapes in by_switches.values():
        ranges = []
        for corner in shapes:
            inside = [
                s for s in shapes if all(s.sizes[n] >= least for n, least in corner.sizes.items())
            ]
            if len(inside) >= LEAST_SHAPES and all(s.ahead for s in inside):
                ranges.append((corner.sizes, inside))
        if not ranges:
            continue
        least, inside = max(ranges, key=lambda found: len(found[1]))
        most = {n: None if n in _ENDLESS else max(s.sizes[n] for s in inside) for n in least}
        sizes = {n: [least[n], most[n]] for n in least}
        about = (op, backend, chip.capability, chip.processors, dtype, shapes[0].switches)
        found.append(Promotion(*about, sizes, len(inside), record))
    return found


def to_json(promotions: Sequence[Promotion]) -> str:
    """The text of promotions.json, one line per promotion."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(p)) for p in promotions)
    return f"[\n{lines}\n]\n" if lines else "[]\n"


@functools.cache
def promotions() -> tuple[Promotion, ...]:
    """The promotions of promotions.json. Raises ValueError for one without a record."""
    return tuple(Promotion(**entry) for entry in json.loads(PROMOTIONS.read_text()))


def proven_backends(op: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends that records call right for `op`, and ahead of the reference, with arguments
    like these on this kind of chip; the first one is to be taken, if it is there."""
    # There are no records of the grouped linear, nor of the low-rank part alone.
    if op in ("grouped_linear", "grouped_linear_backward", "lora_add_") or (
        op == "lora_linear_backward" and args[2] is None
    ):
        return ()
    rule, arguments = rule_of(op, args)
    # Records of float32 are measured with full products, not TF32.
    if rule is configs.lora_gemm and precision(args[0].dtype) == "tf32":
        return ()
    return _proven(op, rule, arguments, args[3] if op in _KINDS else None)


_KINDS = ("gram_volume", "particle_loss")


@functools.lru_cache(maxsize=4096)
def _proven(op: str, rule: Any, arguments: tuple[Any, ...], kind: str | None) -> tuple[str, ...]:
    here = configs.proven_backend(rule, arguments)
    question = question_of(rule, arguments, kind)
    names = [] if here is None else [here]
    names += [promotion.backend for promotion in promotions() if promotion.covers(op, question)]
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Question:
    """The arguments of a rule of `configs`, under the names that records use."""

    sizes: dict[str, int]
    switches: dict[str, Any]
    chip: Chip
    dtype: str


def question_of(rule: Any, arguments: tuple[Any, ...], kind: str | None = None) -> Question:
    """The arguments of a rule as sizes and switches. Of layers: their number, their largest rank
    and the sum of their widths."""
    bound = inspect.signature(rule).bind(*arguments)
    bound.apply_defaults()
    named = dict(bound.arguments)
    chip, dtype = named.pop("chip"), str(named.pop("dtype")).removeprefix("torch.")
    if "ranks" in named:
        ranks, widths = named.pop("ranks"), named.pop("widths")
        named |= {"layers": len(ranks), "rank": max(ranks), "width": sum(widths)}
    if kind is not None:
        named["kind"] = kind
    sizes = {n: v for n, v in named.items() if isinstance(v, int) and not isinstance(v, bool)}
    return Question(sizes, {n: v for n, v in named.items() if n not in sizes}, chip, dtype)


def rule_of(op: str, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The rule of `configs` that decides about the operator's main kernel, and its arguments."""
    if op.startswith("lora_linear"):
        backward = op.endswith("backward")
        x, weight, lora_A = args[1:4] if backward else args[:3]
        particles, rank, _ = lora_A.shape
        d_out, d_in = weight.shape
        shared = "" if x.shape[0] == particles else "in" if backward else "out"
        depth, cols = (d_out, d_in) if backward else (d_in, d_out)
        sizes = (particles, x.shape[1], depth, cols, rank)
        return configs.lora_gemm, (*sizes, x.dtype, chip(x.device), shared, backward)
    if op.startswith(("gram_volume", "particle_loss")):
        backward = op.endswith("backward")
        logits = args[0 if not backward else 1 if op.startswith("gram") else 2]
        return configs.volume, (
            *logits.shape, logits.dtype, is_aligned(logits), chip(logits.device), backward
        )  # fmt: skip
    factors = [arg for arg in args if isinstance(arg, list) and isinstance(arg[0], Tensor)]
    lora_A, lora_B = factors[-2:]
    ranks = tuple(A.shape[1] for A in lora_A)
    widths = tuple(t.shape[2] for t in lora_A) + tuple(t.shape[1] for t in lora_B)
    first = lora_A[0]
    return configs.geometry, (first.shape[0], ranks, widths, first.dtype, chip(first.device))
