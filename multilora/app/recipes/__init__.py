"""The papers' protocols as data, kept apart from the numbers that we had to choose.

A file has `sources` (where its parts come from), `ours` (settings for every data set and method)
and `datasets`. A data set may have `settings` and `methods`, which win over those in `ours`, and
then names their source in `settings_source`. Defaults of the command line are not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(name: str) -> dict[str, Any]:
    """The recipe "vtab1k", "clip" or "commonsense", as its file holds it."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def settings(recipe: dict[str, Any], dataset: str, method: str) -> dict[str, Any]:
    """Settings and options of the task for one data set and method, with `method_args` as a dict.

    Settings for all, for the data set, for the method and for both are merged in this order, so
    that later ones win; `method_args` are merged by name.

    Raises:
        ValueError: The recipe does not have the data set.
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
