"""Records: what a number depends on, and the JSON files that hold the numbers."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import goals
from bench.case import is_ours
from bench.jobs import Stage
from bench.journal import state
from multilora.ops import dispatch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """The environment that a number depends on; it names neither the host nor its folders."""
    names = ("multilora", "torch", "triton", "peft", "timm", "transformers", "numpy")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backend": dispatch.current_backend(device.type),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, followed by "+" if files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Records are written while others are measured; they do not change what is measured.
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(file: Path, record: dict[str, Any]) -> None:
    """Write the file at once or not at all, with six digits, more than these numbers have."""
    short = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    text = json.dumps(short, indent=1, ensure_ascii=False)
    # Quartiles, and other lists of numbers, on one line.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda found: " ".join(found[0].split()), text)
    fresh = file.with_suffix(".part")
    fresh.write_text(text + "\n")
    fresh.replace(file)


def committed(folder: Path = RESULTS) -> list[str]:
    """One line per record in the folder, the newest first."""
    found = []
    for file in folder.rglob("*.json"):
        record = json.loads(file.read_text())
        about = record.get("machine", {})
        cases = next((part for part in record.values() if isinstance(part, list)), [])
        wrong = sum(1 for case in cases if isinstance(case, dict) and case.get("failures"))
        name = file.relative_to(folder).with_suffix("")
        date, device = about.get("date", ""), about.get("device", "no device")
        text = f"{name}: {device}, {len(cases)} cases, {wrong} with a failure"
        found.append((date, f"{date[:10]}  {text}"))
    return [line for _, line in sorted(found, reverse=True)]


def build(events: list[dict[str, Any]], stages: list[Stage], kind: str, tiny: bool) -> dict:
    """The record of a run of bench.gpu, from its journal.

    cut: the jobs that were begun and have not ended, and the peer that was running; empty when the
    run is over and nothing was lost. left_out: jobs without a result.
    """
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
        # The job "machine" looked for it before it was built.
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
    if kind == "gpu":
        record["goals"] = goals.as_records(goals.judge(record))
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


def wrong(record: dict[str, Any]) -> list[str]:
    """The failures: jobs, multilora's peers in cases, outputs that change between repeats."""
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
