"""Markers that follow from what a test asks for, and what -m "not slow" runs of many combinations.

Triton's interpreter and the emulator of compiled code take a hundred times as long as kernels of a
CPU. Of a test that runs there, and of every test with the marker "cover", -m "not slow" keeps as
many combinations of its parameters as it takes for every value of each parameter to come up. The
others are slow, and so is a test with the marker "heavy" in the interpreter and in the emulator.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

#: Fixtures of tests that run Triton's kernels, and of those that execute compiled code.
_INTERPRETED = {"triton", "far"}
_EMULATED = {"executed_ptx", "compiling"}


def mark(items: Iterable[pytest.Item]) -> None:
    """Add the markers interpreter, emulated and slow."""
    combinations: dict[tuple[str | None, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        tier = _tier(item)
        if tier is not None:
            item.add_marker(tier)
        if tier is not None and item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            continue
        if tier is not None or item.get_closest_marker("cover"):
            combinations[tier, item.nodeid.split("[")[0]].append(item)
    for tests in combinations.values():
        shown: set = set()
        for item in tests:
            values = {(name, repr(value)) for name, value in _parameters(item).items()}
            if values and values <= shown:
                item.add_marker(pytest.mark.slow)
            shown |= values


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """The values for parametrize; all but one in `every` are slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        for i, value in enumerate(values)
        for marks in [() if i % every == 0 else pytest.mark.slow]
    ]


def _tier(item: pytest.Item) -> str | None:
    fixtures = set(getattr(item, "fixturenames", ()))
    if _parameters(item).get("backend") == "triton" or _INTERPRETED & fixtures:
        return "interpreter"
    if item.get_closest_marker("emulated") or _EMULATED & fixtures:
        return "emulated"
    return None


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
