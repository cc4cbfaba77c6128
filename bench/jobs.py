"""The parts of bench.gpu's plan: jobs, in groups with a process each, in stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.case import Case
from bench.roofline import Ceilings

#: A worker that reports nothing for so many seconds is taken to hang.
SILENCE = 45.0


@dataclass
class Context:
    """The tools that a worker hands to its jobs.

    without: peers that are left out, and why. note: called with the peer that comes next; beat:
    called with the peer that is still at work. folder: where logs may be written. until: when the
    time of the whole run is over.
    """

    device: torch.device
    tiny: bool
    folder: str
    name: str
    without: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    until: float = math.inf
    note: Callable[[str], None] = lambda peer: None
    beat: Callable[[str], None] = lambda peer: None


@dataclass(frozen=True, eq=False)
class Job:
    """A job, which `run` does in the worker; the result's "failures" say what was wrong.

    group, operator: a peer that broke a process is left out of the rest of the group, and, after
    its second time, of all jobs of the operator.
    seconds: expected on a GPU. memory: bytes of the device that must be free. always: also where a
    result is there from an earlier call. case: what it times, where it times a case.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    group: str = ""
    operator: str = ""
    seconds: float = 4.0
    silence: float = SILENCE
    memory: float = 0.0
    always: bool = False
    case: Case | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Jobs that share a process. ceilings: whether it measures the machine's ceilings first."""

    name: str
    jobs: list[Job]
    ceilings: bool = False

    @property
    def seconds(self) -> float:
        """Expected seconds, including the start of a process and the import of PyTorch."""
        return 6.0 + sum(job.seconds for job in self.jobs)

    @property
    def limit(self) -> float:
        """Seconds after which the process is ended."""
        return max(150.0, 2.5 * self.seconds)


@dataclass(frozen=True, eq=False)
class Stage:
    """learnt: what is known when it is over. at_once: how many groups run beside each other.

    background: groups that start with the stage and keep the processor, not the device, busy; the
    next stage waits for them.
    """

    name: str
    learnt: str
    groups: list[Group]
    at_once: int = 1
    background: list[Group] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Expected seconds."""
        total = sum(group.seconds for group in self.groups) / self.at_once
        longest = [group.seconds for group in [*self.groups, *self.background]]
        return max([total, *longest])

    def every_group(self) -> list[Group]:
        return [*self.background, *self.groups]


def shown(found: list[Stage]) -> str:
    """The plan as a Markdown table, with the minute in which each stage is expected to end."""
    lines = [
        "| ends in minute | stage | groups (jobs) | then we know |",
        "|--:|---|---|---|",
    ]
    spent = 0.0
    for stage in found:
        spent += stage.seconds
        groups = [f"{group.name} ({len(group.jobs)})" for group in stage.every_group()]
        if len(groups) > 6:
            of_stage = sum(len(group.jobs) for group in stage.groups)
            groups = [f"{len(stage.groups)} groups, {stage.at_once} at once ({of_stage} jobs)"]
        lines.append(f"| {spent / 60:.1f} | {stage.name} | {', '.join(groups)} | {stage.learnt} |")
    return "\n".join(lines)
