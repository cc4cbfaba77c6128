"""The record of a run: what its journal says, in the form that is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.jobs import Stage
from bench.journal import state
from bench.measure import is_ours


def build(events: list[dict[str, Any]], stages: list[Stage], kind: str, tiny: bool) -> dict:
    """cut: the jobs that were begun and have not ended, and the peer each was at; empty when the
    run is over and nothing was lost. left_out: jobs without a result."""
    s = state(events)
    jobs = {j.name: j for stage in stages for g in stage.every_group() for j in g.jobs}
    about = s.results.get("machine", {})
    record: dict[str, Any] = {
        "kind": kind,
        "tiny": tiny,
        "machine": about.get("machine", {"device": "unknown", "date": "", "commit": None}),
        "backends": about.get("backends", {}),
        "calls": s.calls,
        "build": s.results.get("build"),
        "ceilings": s.results.get("ceilings"),
        "tests": s.results.get("tests"),
        "plain": [],
        "smoke": {},
        "probes": {},
        "checks": {},
        "cases": [],
        "others": {},
    }
    if "backend" in (record["build"] or {}):
        # It was looked for before it was built.
        record["backends"] = record["backends"] | {"cuda": record["build"]["backend"]}
    if s.calls:
        record["machine"] = record["machine"] | {"commit": s.calls[-1]["commit"]}
    for name, result in s.results.items():
        first, _, rest = name.partition(": ")
        job = jobs.get(name)
        if first == "plain":
            record["plain"].append(_named(rest, result))
        elif first in ("smoke", "probe", "check"):
            record[{"probe": "probes", "check": "checks"}.get(first, first)][rest] = result
        elif job is not None and job.case is not None:
            record["cases"].append(_named(name, result))
        elif name not in ("machine", "build", "ceilings", "tests"):
            record["others"][name] = result
    return record | {
        "crashes": s.crashes,
        "groups": s.groups,
        "cut": s.open,
        "ended": s.ended or "not yet",
        "left_out": [name for name in jobs if name not in s.results],
    }


def _named(name: str, result: dict[str, Any]) -> dict[str, Any]:
    group, _, rest = name.partition(", ")
    return {"group": group, "name": rest, "failures": {}, **result}


def write(file: Path, record: dict[str, Any]) -> None:
    """At once or not at all."""
    # Six digits are more than any of these numbers has.
    short = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    fresh = file.with_suffix(".part")
    fresh.write_text(json.dumps(short, indent=1, ensure_ascii=False) + "\n")
    fresh.replace(file)


def wrong(record: dict[str, Any]) -> list[str]:
    """What of multilora failed: jobs that did, peers of ours, outputs that change."""
    found = []
    for part in ("smoke", "probes", "checks", "others"):
        found += [name for name, result in record[part].items() if result["failures"]]
    for case in [*record["plain"], *record["cases"]]:
        ours = [name for name in case["failures"] if not name or is_ours(name)]
        changing = [n for n, same in case.get("repeatable", {}).items() if not _all(same)]
        found += [f"{case['group']}, {case['name']}"] if ours or changing else []
    found += [part for part in ("build", "tests") if (record[part] or {}).get("failures")]
    return found


def _all(same: Any) -> bool:
    return all(same.values()) if isinstance(same, dict) else bool(same)
