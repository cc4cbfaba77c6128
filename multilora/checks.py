"""Checks of arguments: one error in one form for every number, integer, choice and flag.

Each returns the value, a Python number, or raises ValueError with the name, what is allowed and
what was given. A bool is no number here, nor is a string or None.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A finite real number in [low, high]; without an end that is open."""
    result = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
    above = low < result if open_low else low <= result
    below = result < high if open_high else result <= high
    if not (math.isfinite(result) and above and below):
        raise _refused(name, "a finite number", _range(low, high, open_low, open_high), value)
    return result


def integer(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """An integer in [low, high]."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _refused(name, "an integer", _range(low, high), value)
    result = int(value)
    if not low <= result <= high:
        raise _refused(name, "an integer", _range(low, high), value)
    return result


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of some words."""
    *others, last = choices
    if not isinstance(value, str) or value not in (*others, last):
        words = ", ".join(f'"{word}"' for word in others)
        raise _refused(name, f'{words} or "{last}"', "", value)
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, and not what merely counts as one."""
    if not isinstance(value, bool):
        raise _refused(name, "True or False", "", value)
    return value


def _refused(name: str, kind: str, allowed: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {kind}{allowed}; got {value!r}")


def _range(low: float, high: float, open_low: bool = False, open_high: bool = False) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f" in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if math.isfinite(low):
        return f" {'>' if open_low else '>='} {low}"
    return f" {'<' if open_high else '<='} {high}" if math.isfinite(high) else ""
