"""Checks of arguments, with the same form of error for every number, integer, choice and flag.

Each check returns the value, as a Python number, or raises ValueError with the name, the allowed
values and the given one. A bool does not count as a number, nor does a string or None.
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
    """Return a finite real number in [low, high], or in an interval with open ends."""
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
    """Return an integer in [low, high]."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _refused(name, "an integer", _range(low, high), value)
    result = int(value)
    if not low <= result <= high:
        raise _refused(name, "an integer", _range(low, high), value)
    return result


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return one of the words in `choices`."""
    *others, last = choices
    if not isinstance(value, str) or value not in (*others, last):
        words = ", ".join(f'"{word}"' for word in others)
        raise _refused(name, f'{words} or "{last}"', "", value)
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False; other values that count as true or false are refused."""
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
