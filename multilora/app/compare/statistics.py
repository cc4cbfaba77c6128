"""Statistics of paired differences: bootstrap intervals, sign-flip tests, Holm's correction, ranks.

Tasks are fixed: a difference is the mean of the tasks' mean differences, and what is random are the
seeds within each task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Bootstrap resamples, and the most sign flips that a test looks at.
RESAMPLES = 10_000
#: The normal quantiles of a two-sided test at 5 % with 80 % power: 1.96 + 0.84.
POWER = 2.8

Interval = tuple[float, float]
#: task -> seed -> the value of a measure; None where it is undefined.
Values = Mapping[str, Mapping[str, "float | None"]]


@dataclass(frozen=True)
class Difference:
    """A row's difference to another one: the mean over tasks of the mean over pairs.

    Attributes:
        interval: of the mean, 95 %, by the percentile bootstrap; None where a task has one pair
            only, which says nothing about its spread.
        p: of the two-sided sign-flip permutation test.
        pairs: in all tasks together.
        detectable: the difference that so many pairs with this spread show in four of five
            experiments at the 5 % level, before any correction; None where a task has one pair.
        by_task: the same for each task; empty in these.
    """

    mean: float
    interval: Interval | None
    p: float
    pairs: int
    detectable: float | None
    by_task: Mapping[str, Difference]

    @property
    def clear(self) -> bool:
        """Whether there is an interval and it leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired(own: Values, other: Values) -> dict[str, np.ndarray]:
    """own − other by task, over the seeds at which both are defined; tasks without any left out."""
    found = {}
    for task, values in own.items():
        base = other.get(task, {})
        pairs = [(v, base.get(seed)) for seed, v in values.items()]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if differences:
            found[task] = np.array(differences)
    return found


def difference(by_task: Mapping[str, np.ndarray]) -> Difference | None:
    """What paired differences say, (pairs,) for each task; None without any."""
    if not by_task:
        return None
    own = {} if len(by_task) == 1 else {task: _difference([d]) for task, d in by_task.items()}
    whole = _difference(list(by_task.values()))
    return Difference(**{**vars(whole), "by_task": own or dict.fromkeys(by_task, whole)})


def _difference(arrays: Sequence[np.ndarray]) -> Difference:
    spread = all(len(d) > 1 for d in arrays)
    return Difference(
        mean=float(np.mean([d.mean() for d in arrays])),
        interval=bootstrap_interval(arrays) if spread else None,
        p=sign_flip(arrays),
        pairs=sum(map(len, arrays)),
        detectable=detectable(arrays) if spread else None,
        by_task={},
    )


def bootstrap_interval(arrays: Sequence[np.ndarray]) -> Interval:
    """The 95 % percentile interval of the mean of the arrays' means; each is resampled by itself.

    The generator is fixed, so the same differences have the same interval.
    """
    means = np.mean([resamples(len(d), i) @ d for i, d in enumerate(arrays)], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@functools.lru_cache(maxsize=64)
def resamples(size: int, stream: int) -> np.ndarray:
    """(RESAMPLES, size): the share that each of `size` values has in each resample."""
    generator = np.random.default_rng([0, size, stream])
    return generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size


def sign_flip(arrays: Sequence[np.ndarray]) -> float:
    """p of the hypothesis that every pair might as well have the other sign, two-sided.

    All sign patterns count where there are at most RESAMPLES of them. Otherwise as many are drawn,
    and p = (1 + at least as extreme ones) / (1 + RESAMPLES).
    """
    parts = np.concatenate([d / (len(d) * len(arrays)) for d in arrays])
    # Sums in another order round differently.
    observed = abs(parts.sum()) - 1e-12 * np.abs(parts).sum()
    extreme = int((np.abs(_signs(len(parts)) @ parts) >= observed).sum())
    exact = 2 ** len(parts) <= RESAMPLES
    return extreme / 2 ** len(parts) if exact else (1 + extreme) / (1 + RESAMPLES)


@functools.lru_cache(maxsize=16)
def _signs(size: int) -> np.ndarray:
    """(patterns, size) of ±1: all patterns, or RESAMPLES random ones."""
    if 2**size <= RESAMPLES:
        numbers = np.arange(2**size)[:, None] >> np.arange(size)
    else:
        numbers = np.random.default_rng([1, size]).integers(0, 2, (RESAMPLES, size))
    return 1.0 - 2.0 * (numbers & 1)


def detectable(arrays: Sequence[np.ndarray]) -> float:
    """2.8 standard errors of the mean of the arrays' means: 2.8 · √(Σ_t s_t² / n_t) / T.

    With one array it is 2.8 · s / √n. Tasks are fixed, so their means' spread does not count.
    """
    variances = [d.var(ddof=1) / len(d) for d in arrays]
    return POWER * math.sqrt(sum(variances)) / len(arrays)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values: compared to α, they reject what Holm's step-down procedure rejects."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p, key=lambda n: p[n])):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = largest
    return adjusted


def pairs_needed(tests: int, level: float = 0.05) -> int:
    """The fewest pairs with which one of `tests` sign-flip tests can be significant after Holm."""
    return math.floor(math.log2(2 * tests / level)) + 1


def mean_ranks(losses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Borda's ranking: each row's rank in a task and measure (1 is best), averaged over all.

    Its order is that of Colombo et al., "What are the best systems?" (2022), who sum the ranks.
    Ranks have no scale, so measures of different scales count alike. Equal rows share their ranks.

    Args:
        losses: for each task (rows, measures, seeds), lower is better.

    Returns:
        The mean ranks (rows,), and their 95 % intervals (rows, 2), where the seeds of each task are
        resampled, the same for all rows and measures.
    """
    means = np.concatenate([_ranks(task.mean(-1)) for task in losses], axis=1)
    drawn = [
        # (rows, measures, seeds), (RESAMPLES, seeds) -> ranks (RESAMPLES, rows, measures)
        _ranks(np.moveaxis(task @ resamples(task.shape[-1], i).T, -1, 0))
        for i, task in enumerate(losses)
    ]
    each = np.concatenate(drawn, axis=-1).mean(-1)
    return means.mean(-1), np.percentile(each, [2.5, 97.5], axis=0).T


def _ranks(losses: np.ndarray) -> np.ndarray:
    """Ranks along the last axis but one; 1 is the lowest, and equal ones get their mean rank."""
    ranks = np.empty(losses.shape)
    for row in range(losses.shape[-2]):
        own = losses[..., row : row + 1, :]
        below, equal = (losses < own).sum(-2), (losses == own).sum(-2)
        ranks[..., row, :] = below + (equal + 1) / 2
    return ranks
