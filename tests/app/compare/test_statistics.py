"""Intervals, p values, Holm's correction and ranks, by hand, by scipy and by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from multilora.app.compare.statistics import (
    POWER,
    bootstrap_interval,
    detectable,
    difference,
    holm,
    mean_ranks,
    paired,
    pairs_needed,
    sign_flip,
)


def normal(size, seed, mean=0.0, sd=1.0):
    return np.random.default_rng(seed).normal(mean, sd, size)


# --- pairs ---------------------------------------------------------------------------------------


def test_only_tasks_and_seeds_that_both_have_are_paired():
    own = {"a": {"1": 3.0, "2": 5.0, "3": None}, "b": {"1": 1.0}, "c": {"9": 1.0}}
    other = {"a": {"2": 4.0, "3": 1.0, "1": 1.0}, "c": {"8": 1.0}}
    found = paired(own, other)
    assert {task: d.tolist() for task, d in found.items()} == {"a": [2.0, 1.0]}
    assert difference(paired({"c": {"9": 1.0}}, other)) is None


def test_tasks_count_alike_however_many_pairs_they_have():
    d = difference({"a": np.array([1.0, 1.0, 1.0, 1.0]), "b": np.array([3.0, 5.0])})
    assert d.mean == pytest.approx(2.5)
    assert d.pairs == 6
    assert d.by_task["b"].mean == pytest.approx(4)
    # The first task does not vary: only the second one's resamples 3, 4, 5 spread.
    assert d.interval == pytest.approx((2.0, 3.0))


def test_one_pair_says_nothing_about_the_spread():
    d = difference({"a": np.array([1.0, 2.0]), "b": np.array([3.0])})
    assert (d.interval, d.detectable, d.clear) == (None, None, False)
    assert d.by_task["a"].interval is not None
    assert d.by_task["b"].interval is None


def test_one_task_is_the_whole():
    d = difference({"a": normal(5, 0)})
    assert vars(d.by_task["a"]) == vars(d) | {"by_task": {}}


def test_no_difference_at_all_is_not_clear():
    d = difference({"a": np.zeros(20), "b": np.zeros(5)})
    assert (d.mean, d.interval, d.p, d.detectable) == (0.0, (0.0, 0.0), 1.0, 0.0)
    assert not d.clear


# --- intervals -----------------------------------------------------------------------------------


def test_the_interval_of_many_normal_pairs_is_that_of_theory():
    """Two tasks with other spreads: the mean's standard error is √(s₁²/n₁ + s₂²/n₂) / 2."""
    first, second = normal(200, 1, sd=1.0), normal(300, 2, sd=3.0)
    low, high = bootstrap_interval([first, second])
    error = math.sqrt(first.var() / 200 + second.var() / 300) / 2
    middle = (first.mean() + second.mean()) / 2
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.006)


def test_19_of_20_intervals_hold_the_truth():
    covered = [
        low <= 0.3 <= high
        for seed in range(400)
        for low, high in [bootstrap_interval([normal(20, seed, 0.3), normal(20, 999 + seed, 0.3)])]
    ]
    # The percentile bootstrap of 20 values covers a little less than 95 %.
    assert 0.91 <= np.mean(covered) <= 0.97


def test_tasks_are_resampled_independently():
    """Opposite differences would cancel if both tasks had the same resamples."""
    d = normal(30, 0)
    low, high = bootstrap_interval([d, -d])
    assert high - low > 0.5 * np.subtract(*bootstrap_interval([d])[::-1])


def test_power():
    a, b = normal(16, 3), normal(9, 4, sd=2)
    assert detectable([a]) == pytest.approx(2.8 * a.std(ddof=1) / 4)
    pooled = math.sqrt(a.var(ddof=1) / 16 + b.var(ddof=1) / 9) / 2
    assert detectable([a, b]) == pytest.approx(2.8 * pooled)
    assert stats.norm.ppf([0.975, 0.8]).sum() == pytest.approx(POWER, abs=0.01)


# --- sign flips ----------------------------------------------------------------------------------


def test_sign_flip_by_hand():
    # Of the 8 sums ±1 ±2 ±4, those of size >= 7 are +7 and −7.
    assert sign_flip([np.array([1.0, 2.0, 4.0])]) == 2 / 8
    # >= 5: ±7, ±5 (−1 + 2 + 4).
    assert sign_flip([np.array([-1.0, 2.0, 4.0])]) == 4 / 8
    assert sign_flip([np.array([1.0, 2.0, -4.0])]) == 8 / 8


def test_sign_flip_over_tasks_by_enumeration():
    """Tasks of other sizes weigh alike."""
    tasks = [np.array([0.5, -0.2, 0.9]), np.array([0.3, 0.4]), np.array([1.1, -0.6, 0.2])]
    means = []
    for signs in itertools.product([1, -1], repeat=8):
        s = np.array(signs)
        parts = [s[:3] * tasks[0], s[3:5] * tasks[1], s[5:] * tasks[2]]
        means.append(np.mean([p.mean() for p in parts]))
    observed = np.mean([t.mean() for t in tasks])
    expected = np.mean(np.abs(means) >= abs(observed) - 1e-12)
    assert sign_flip(tasks) == pytest.approx(expected)


@pytest.mark.parametrize("size, tolerance", [(9, 0), (13, 0), (14, 0.02), (30, 0.02)])
def test_sign_flip_is_scipys(size, tolerance):
    d = normal(size, 5, 0.4)
    result = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert sign_flip([d]) == pytest.approx(result.pvalue, abs=tolerance + 1e-12)
    assert sign_flip([-d]) == pytest.approx(sign_flip([d]), abs=tolerance + 1e-12)


def test_the_smallest_p_of_random_flips_is_not_zero():
    assert sign_flip([np.ones(40)]) == 1 / 10_001


# --- Holm ----------------------------------------------------------------------------------------


def test_holm_by_hand():
    # 3 · .01; 2 · .03; max(.06, 1 · .04).
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"b": 0.03, "c": 0.06, "a": 0.06}
    )
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_is_its_step_down_procedure():
    p = dict(enumerate(np.random.default_rng(0).beta(0.3, 1, 12)))
    rejected = set()
    for i, name in enumerate(sorted(p, key=p.get)):
        if p[name] > 0.05 / (12 - i):
            break
        rejected.add(name)
    assert 0 < len(rejected) < 12
    assert {name for name, q in holm(p).items() if q <= 0.05} == rejected


def test_pairs_needed():
    for tests in (1, 2, 5, 6, 25):
        n = pairs_needed(tests)
        assert tests * sign_flip([np.ones(n)]) < 0.05 <= tests * sign_flip([np.ones(n - 1)])


# --- ranks ---------------------------------------------------------------------------------------


def test_borda_by_hand():
    """3 rows × 3 measures × 2 seeds, with two rows equal in the last measure."""
    means = np.array([[1.0, 5.0, 0.3], [2.0, 4.0, 0.2], [3.0, 6.0, 0.3]])
    losses = np.stack([means - 0.01, means + 0.01], axis=-1)
    ranks, intervals = mean_ranks([losses])
    # Ranks: (1, 2, 2.5), (2, 1, 1), (3, 3, 2.5).
    assert ranks == pytest.approx([5.5 / 3, 4 / 3, 8.5 / 3])
    # Both seeds rank alike, so resamples do, too.
    assert intervals == pytest.approx(np.stack([ranks, ranks], -1))


def test_borda_over_tasks_adds_ranks_and_knows_no_scale():
    first = np.array([[[1.0, 1.0]], [[2.0, 2.0]], [[3.0, 3.0]]])
    second = 1000 * np.array([[[2.0, 2.0]], [[1.0, 1.0]], [[3.0, 3.0]]])
    assert mean_ranks([first, second])[0] == pytest.approx([1.5, 1.5, 3])


def test_the_intervals_of_ranks_show_what_seeds_cannot_order():
    base = normal(20, 7)
    losses = np.stack([base, base + normal(20, 8), base + 9])[:, None]
    _, intervals = mean_ranks([losses])
    assert intervals[:2].tolist() == [[1, 2], [1, 2]]
    assert intervals[2].tolist() == [3, 3]
    # Seeds are resampled together: a row that is a little worse on each of them never wins.
    paired_rows = np.stack([base, base + 0.01])[:, None]
    assert mean_ranks([paired_rows])[1].tolist() == [[1, 1], [2, 2]]


# --- what is found and what is not ---------------------------------------------------------------


def found(d):
    return d.clear and d.p < 0.05


def test_a_difference_of_the_power_line_is_found_in_four_of_five_experiments():
    delta = POWER / math.sqrt(2 * 20)
    tasks = [
        {"a": normal(20, [seed, 0], delta), "b": normal(20, [seed, 1], delta)}
        for seed in range(200)
    ]
    assert 0.72 <= np.mean([found(difference(task)) for task in tasks]) <= 0.88


def test_equal_methods_differ_in_2_of_40():
    counts = [
        found(difference({"a": normal(20, [seed, 2]), "b": normal(20, [seed, 3])}))
        for seed in range(40)
    ]
    assert sum(counts) <= 4
    more = [found(difference({"a": normal(20, [seed, 4])})) for seed in range(400)]
    assert 0.02 <= np.mean(more) <= 0.08
