"""The papers' protocols as data, apart from the numbers that the papers do not give and we chose.

A file has `sources` (what comes from where), `ours` (settings for every data set and method) and
`datasets`. A data set may have `settings` and `methods` of its own, which win over those in `ours`,
and then says in `settings_source` where they are from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(name: str) -> dict[str, Any]:
    """The recipe "vtab1k" or "commonsense" as it stands in its file."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def settings(recipe: dict[str, Any], dataset: str, method: str) -> dict[str, Any]:
    """The fields of `settings.Settings` for one data set and method, `method_args` as a dict.

    Later wins: settings for all, for the data set, for the method, for both; `method_args` are
    merged by name. Raises ValueError for a data set that the recipe does not have.
    """
    if dataset not in recipe["datasets"]:
        raise ValueError(
            f"the data set must be one of {', '.join(recipe['datasets'])}; got {dataset!r}"
        )
    merged: dict[str, Any] = {"method_args": {}}
    parts = [recipe["ours"], recipe["datasets"][dataset]]
    for layer in [part.get("settings", {}) for part in parts] + [
        part.get("methods", {}).get(method, {}) for part in parts
    ]:
        method_args = merged["method_args"] | layer.get("method_args", {})
        merged |= layer | {"method_args": method_args}
    return merged
