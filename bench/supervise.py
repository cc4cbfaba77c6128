"""Runs the groups of a plan, each in its own process, and survives whatever they do.

What a worker reports goes into the journal at once. One that crashes, says nothing for too long or
takes too much time is ended; its group goes on in a new process without the peer that was running.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.bans import not_timed
from bench.case import is_ours
from bench.device import Card, spread
from bench.jobs import SILENCE, Group, Job, Stage
from bench.journal import Journal, State, state
from bench.outside import shorten
from bench.processes import Child, kill

#: How often a job is begun at most, not counting one time for each peer that ended its process.
TRIES = 2
#: The most processes that a group may start.
STARTS = 10
#: Seconds that a worker has to end by itself when the time is over.
GRACE = 8.0
#: Seconds until a worker's first word, which comes when PyTorch is imported.
START = 150.0
#: Seconds between two readings of the card.
EVERY = 3.0


class Running:
    """A group's worker, and the last news from it."""

    def __init__(self, group: Group, child: Child, spent: float):
        self.group, self.child = group, child
        # Seconds of the group's earlier processes, and when this one first reported.
        self.spent, self.begun = spent, math.inf
        self.job: Job | None = None
        self.peer = ""
        self.samples: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds of the group so far, without the starts of its processes."""
        return self.spent + max(0.0, time.time() - self.begun)


@dataclass(frozen=True)
class Task:
    """All that the workers need to make the same plan again, and where files are written.

    plan: a module with a function `stages(device, tiny, **options)`. name: the files' first part.
    """

    plan: str
    device: str
    tiny: bool
    folder: Path
    name: str
    options: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """Runs the groups of the stages until the time `until`, and keeps the journal.

    changed: is called when the journal has something new.
    """

    def __init__(
        self,
        stages: list[Stage],
        journal: Journal,
        until: float,
        task: Task,
        changed: Callable[[], None] = lambda: None,
    ):
        self.stages, self.journal, self.until = stages, journal, until
        self.task = {**vars(task), "folder": str(task.folder.resolve())}
        self.log = task.folder / f"{task.name}.log"
        self.changed = changed
        self.jobs = {j.name: j for s in stages for g in s.every_group() for j in g.jobs}
        self.card = Card(task.device.split(":")[0])
        self.read_card = 0.0
        self.starts: Counter[str] = Counter()
        self.crashes: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()
        self.running: list[Running] = []

    def run(
        self,
        again: list[str],
        wanted: Callable[[Stage, Group, Job], bool] = lambda *_: True,
    ) -> str | None:
        """Run the wanted jobs of all stages that have no result, as far as the time goes.

        Jobs of `again` run even if they have one. The first stage's job is "machine".

        Returns:
            None, or why nothing was run: times of two cards must not stand side by side.
        """
        earlier = self.state()
        always = [name for name, job in self.jobs.items() if job.always]
        self.journal.add(event="forget", jobs=sorted(always))
        first, *rest = self.stages
        self.run_stage(first, lambda *_: True)
        before, now = (_device(s) for s in (earlier, self.state()))
        if None not in (before, now) and before != now:
            self.journal.add(event="done", job="machine", result=earlier.results["machine"])
            self.journal.add(event="end", why="another card")
            return f"the journal is of {before}, this is {now}: give another name"
        self.journal.add(event="forget", jobs=sorted(set(again) - set(always)))
        for stage in rest:
            self.run_stage(stage, wanted)
        over = time.time() > self.until - 5
        self.journal.add(event="end", why="its time was over" if over else "done")
        return None

    def run_stage(self, stage: Stage, wanted: Callable[[Stage, Group, Job], bool]) -> None:
        def chosen(groups: list[Group]) -> list[tuple[Group, list[Job]]]:
            found = [(g, [j for j in g.jobs if wanted(stage, g, j)]) for g in groups]
            return [(g, jobs) for g, jobs in found if self.left(jobs)]

        waiting = chosen(stage.groups)
        background = chosen(stage.background)
        beside = {group.name for group, _ in background}
        try:
            while True:
                ready = background + waiting
                for group, jobs in ready:
                    active = [r for r in self.running if r.group.name not in beside]
                    full = len(self.running) >= max(2, os.cpu_count() or 1)
                    if full or (group.name not in beside and len(active) >= stage.at_once):
                        continue
                    (background if group.name in beside else waiting).remove((group, jobs))
                    if time.time() < self.until:
                        self.start(group, jobs)
                if not self.running and not waiting and not background:
                    return
                before = time.time()
                time.sleep(0.05)
                # If this process got no processor time, the workers got none either.
                late = max(0.0, time.time() - before - 0.2)
                for running in list(self.running):
                    running.child.heard += late
                    if self.attend(running):
                        continue
                    self.running.remove(running)
                    jobs = [j for j in running.group.jobs if wanted(stage, running.group, j)]
                    if self.goes_on(running, jobs):
                        queue = background if running.group.name in beside else waiting
                        queue.insert(0, (running.group, jobs))
        finally:
            for running in self.running:
                kill(running.child.process)
            self.running.clear()

    # --- one worker ------------------------------------------------------------------------------

    def start(self, group: Group, jobs: list[Job]) -> None:
        s = self.state()
        left = self.left(jobs)
        task = {
            **self.task,
            "group": group.name,
            "jobs": [job.name for job in left],
            "until": self.until,
            "without": {job.name: self.without(job, s) for job in left},
        }
        self.starts[group.name] += 1
        child = Child([sys.executable, "-m", "bench.worker"], task)
        self.running.append(Running(group, child, self.spent[group.name]))

    def attend(self, running: Running) -> bool:
        """Take the worker's reports -> whether it still runs."""
        child, group = running.child, running.group
        # Ask before reading, so that the last reports are read too.
        ended = child.process.poll() is not None
        self.take(running)
        if ended:
            self.finish(running, self.ending(child))
            return False
        now = time.time()
        if now - self.read_card > EVERY:
            self.read_card = now
            sample = self.card.sample()
            for one in self.running if sample is not None else ():
                one.samples.append(sample)
        silence = running.job.silence if running.job is not None else SILENCE
        if running.begun == math.inf:
            silence = START
        why = ""
        if now > self.until + GRACE:
            why = "time"
        elif now - child.heard > silence:
            why = f"nothing was heard for {silence:.0f} s"
        elif running.seconds > group.limit:
            why = f"the group's {group.limit:.0f} s were over"
        if not why:
            return True
        if not kill(child.process):
            why += "; it could not be ended"
        self.take(running)
        self.finish(running, why)
        return False

    def take(self, running: Running) -> None:
        for event in running.child.events():
            running.begun = min(running.begun, time.time())
            kind = event["event"]
            if kind in ("begin", "at", "beat"):
                running.peer = event.get("peer", "")
            if kind == "begin":
                running.job = self.jobs[event["job"]]
            elif kind == "done":
                running.job = None
            if kind != "beat":
                self.journal.add(**event)
            if kind in ("begin", "done"):
                self.changed()

    def ending(self, child: Child) -> str:
        """Why the worker ended; "" if it was done."""
        code = child.process.returncode
        if code == 0:
            return ""
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        lines = [line for line in child.log().splitlines() if line.strip()]
        return ": ".join([f"the process ended with {how}", *lines[-1:]])[:300]

    def finish(self, running: Running, why: str) -> None:
        """Write down how the worker ended; the end of the time is nobody's fault."""
        self.spent[running.group.name] = running.seconds
        group, job = running.group, running.job
        if why and not why.startswith("time"):
            name = "" if job is None else job.name
            crash = {"group": group.name, "job": name, "peer": running.peer, "why": why}
            self.crashes[group.name] += 1
            self.journal.add(event="crash", **crash)
            print(f"CRASH in {name or group.name}, {running.peer}: {why}", flush=True)
        self.journal.add(
            event="group",
            name=group.name,
            seconds=round(time.time() - running.child.started, 2),
            card=spread(running.samples),
            ended=why or "well",
        )
        said = running.child.log()
        if said.strip():
            with self.log.open("a") as log:
                log.write(f"--- {group.name}\n{said}")
            shorten(self.log)
        running.child.errors.close()
        running.child.process.stdout.close()
        self.changed()

    def goes_on(self, running: Running, jobs: list[Job]) -> bool:
        """Whether the group gets another process."""
        name, process = running.group.name, running.child.process
        if process.returncode == 0 or not self.left(jobs) or time.time() > self.until:
            return False
        if self.spent[name] > running.group.limit:
            return False
        # A process that ended before its first job would do so again.
        stillborn = running.job is None and self.crashes[name] >= TRIES
        return not stillborn and self.starts[name] < STARTS

    # --- what is left ----------------------------------------------------------------------------

    def state(self) -> State:
        return state(self.journal.events)

    def left(self, jobs: list[Job]) -> list[Job]:
        """The jobs without a result. A job that was begun too often gets a failure as result."""
        s = self.state()
        found = []
        for job in jobs:
            if job.name in s.results:
                continue
            crashes = [c for c in s.crashes if c["job"] == job.name]
            # These peers are left out the next time.
            peers = {c["peer"] for c in crashes if self.can_go_without(job, c["peer"])}
            if s.begun.get(job.name, 0) < TRIES + len(peers):
                found.append(job)
                continue
            why = crashes[-1]["why"] if crashes else "it was begun twice, and the run ended in it"
            self.journal.add(event="done", job=job.name, result={"failures": {"": why}})
        return found

    def can_go_without(self, job: Job, peer: str) -> bool:
        return is_ours(peer) or (job.case is not None and peer in job.case.peers)

    def without(self, job: Job, s: State) -> dict[str, str]:
        """The peers that this job must leave out, and why."""
        found: dict[str, str] = {}
        times = Counter(
            (c["peer"], self.jobs[c["job"]].operator) for c in s.crashes if c["job"] in self.jobs
        )
        for crash in s.crashes:
            other, peer = self.jobs.get(crash["job"]), crash["peer"]
            if other is None or not peer:
                continue
            same_group = job.group and job.group == other.group
            often = (
                job.operator and times[peer, job.operator] >= 2 and job.operator == other.operator
            )
            if other is job or same_group or often:
                found[peer] = f"{crash['why']} (in {other.name})"
        if job.case is not None:
            dtype = "bfloat16" if job.case.half_precision else "float32"
            wrong = not_timed(job.case.group, dtype, list(job.case.peers), s.results)
            # The stage before the correctness runs the reference only.
            found |= {} if job.name.startswith("plain: ") else wrong
        return found


def _device(s: State) -> str | None:
    return s.results.get("machine", {}).get("machine", {}).get("device")
