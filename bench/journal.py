"""The journal: one JSON line per event, in a file that outlives every process that writes it.

Events: "call" (a run of the command begins: what it was asked, on which machine), "begin" (of a job
in a worker), "at" (which peer of the job comes next), "done" (a job's result), "crash" (a worker
ended in a job: peer and why), "group" (a worker's group is over: seconds, the card's state),
"forget" (jobs that are to run again), "end" (the call is over, and why).
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Journal:
    """Appends events; one process at a time may have it open."""

    def __init__(self, path: Path):
        self.path = path
        self.events = read(path)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another run writes {path}") from None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            # A run that was killed may have left half a line.
            os.write(self._file, b"\n")

    def add(self, **event: Any) -> None:
        # Keep the event as a reader will see it: keys are text, tuples are lists.
        line = json.dumps(event)
        self.events.append(json.loads(line))
        os.write(self._file, line.encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a journal, without half lines; [] if there is no file."""
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


@dataclass
class State:
    """State after all events: results by job, crashes, how often each job was begun, and `open`,
    the jobs that were begun and have not ended, each with the peer that was running."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    crashes: list[dict[str, Any]] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    ended: str | None = None


def state(events: list[dict[str, Any]]) -> State:
    s = State()
    for e in events:
        kind, job = e["event"], e.get("job", "")
        if kind == "call":
            s.calls.append(e)
            s.open, s.ended = {}, None
        elif kind == "begin":
            s.begun[job] = s.begun.get(job, 0) + 1
            s.open[job] = ""
        elif kind == "at":
            s.open[job] = e["peer"]
        elif kind == "done":
            # The call has the commit.
            s.results[job] = {**e["result"], "call": max(0, len(s.calls) - 1)}
            s.open.pop(job, None)
        elif kind == "crash":
            s.crashes.append(e)
            s.open.pop(job, None)
        elif kind == "group":
            s.groups.append(e)
        elif kind == "end":
            s.ended = e["why"]
        elif kind == "forget":
            for job in e["jobs"]:
                s.results.pop(job, None)
                s.begun.pop(job, None)
            s.crashes = [c for c in s.crashes if c["job"] not in e["jobs"]]
    return s
