"""Markers that follow from what a test asks for, and what -m "not slow" runs of the slow backends.

Triton's interpreter and the emulator of compiled code take a hundred times as long as kernels of a
CPU. Of a test that runs there, -m "not slow" keeps a cover: as many combinations of its parameters
as it takes for every value of each parameter to come up. The others are slow.
"""

from collections import defaultdict
from collections.abc import Iterable

import pytest

#: Fixtures of tests that execute compiled code.
_EMULATED = {"executed_ptx", "compiling"}


def mark(items: Iterable[pytest.Item]) -> None:
    """Add the markers interpreter, emulated and slow."""
    combinations: dict[tuple[str, str], list[tuple[pytest.Item, set]]] = defaultdict(list)
    for item in items:
        tier = _tier(item)
        if tier is not None:
            item.add_marker(tier)
            values = {(name, repr(value)) for name, value in _parameters(item).items()}
            combinations[tier, item.nodeid.split("[")[0]].append((item, values))
    for tests in combinations.values():
        shown: set = set()
        for item, values in tests:
            if values and values <= shown:
                item.add_marker(pytest.mark.slow)
            shown |= values


def _tier(item: pytest.Item) -> str | None:
    if _parameters(item).get("backend") == "triton":
        return "interpreter"
    if item.get_closest_marker("emulated") or _EMULATED & set(getattr(item, "fixturenames", ())):
        return "emulated"
    return None


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
