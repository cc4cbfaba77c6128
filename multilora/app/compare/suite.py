"""What is compared: the tasks, and the rows of the table, of recipes/compare.json.

A row is a method that is tuned, or something that is made of one: the same method with more steps
or without a part ("of"), or what its runs are measured to be after a temperature or as a soup
("part").
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multilora.app import recipes
from multilora.app.options import described
from multilora.app.tasks import TASKS, vtab
from multilora.methods import METHODS

#: What a derived row measures of the runs of another one.
PARTS = ("calibrated", "uniform", "greedy")


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        of: the row whose chosen configuration this one takes; None where it is tuned itself.
        part: what is measured of the runs of `of`, in place of runs of its own; see `PARTS`.
        table: "tuned"; "derived" at the same number of particles; "compute", where more particles
            or steps make up for the dearer steps of other methods.
        steps: times the task's number of steps.
        space: what is tuned beside the numbers that all rows share, or otherwise than these.
    """

    name: str
    label: str
    method: str
    of: str | None = None
    part: str | None = None
    table: str = "tuned"
    steps: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    method_args: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The row whose configuration this one has."""
        return self.of or self.name


@dataclass(frozen=True)
class TaskEntry:
    """A task of a comparison: settings of its runs, and how its tuning runs differ.

    Attributes:
        tuning: settings of the tuning runs that differ from those of the final ones.
        measure: what the tuning looks at: "validation", the task's own validation examples; or
            "test", which the settings in `tuning` make the development set.
        space: replaces parts of the space that all rows share.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    tuning: Mapping[str, Any] = field(default_factory=dict)
    measure: str = "validation"
    space: Mapping[str, Any] = field(default_factory=dict)


def recipe() -> dict[str, Any]:
    return recipes.read("compare")


def suites() -> tuple[str, ...]:
    return tuple(recipe()["suites"])


@functools.cache
def known_rows() -> dict[str, Row]:
    """All rows of the recipe, by name."""
    found: dict[str, Row] = {}
    for name, given in recipe()["rows"].items():
        of = given.get("of")
        base = found[of] if of else None
        method = given.get("method") or (base.method if base else name)
        searched = {
            key: {"choices" if isinstance(value, list) else "log": list(value)}
            for key, value in METHODS[method].search.items()
        }
        space = searched | recipe()["spaces"].get(method, {}) | given.get("space", {})
        found[name] = Row(
            name=name,
            label=given["label"],
            method=method,
            of=of,
            part=given.get("part"),
            table=given.get("table", "derived" if of else "tuned"),
            steps=given.get("steps", 1),
            settings=(base.settings if base else {}) | given.get("settings", {}),
            method_args=given.get("method_args", {}),
            space={} if of else space,
        )
    return found


def rows(names: Sequence[str], reference: str) -> dict[str, Row]:
    """The rows of these names, with those that they are made of, and the reference.

    Raises:
        ValueError: A name is unknown, or the reference has numbers of its own to tune.
    """
    known = known_rows()
    unknown = sorted({*names, reference} - known.keys())
    if unknown:
        raise ValueError(f"the rows are {', '.join(known)}; got {', '.join(unknown)}")
    if known[reference].of or known[reference].space:
        plain = [name for name, row in known.items() if not row.of and not row.space]
        raise ValueError(
            f"the reference must have no numbers of its own, as {' or '.join(plain)}; got "
            f"{reference!r}"
        )
    wanted = {*names, reference}
    wanted |= {of for name in wanted if (of := known[name].of) is not None}
    return {name: row for name, row in known.items() if name in wanted}


def tasks(names: Sequence[str], data: str | None, given: Mapping[str, Any]) -> dict[str, TaskEntry]:
    """The tasks of these names.

    Args:
        names: those of the recipe; vtab, all data sets of VTAB-1K in the folder `data`, or
            vtab/NAME, one of them; a commonsense task's name; or text.
        data: the folder or the file with the data, for tasks that come without them.
        given: settings for every task, such as the number of steps.

    Raises:
        ValueError: A name is unknown, or a task needs data and there are none.
    """
    found: dict[str, TaskEntry] = {}
    for name in names:
        for entry in _entries(name, data):
            found[entry.name] = replace(entry, settings={**entry.settings, **given})
    return found


def _entries(name: str, data: str | None) -> list[TaskEntry]:
    known = recipe()["tasks"]
    kind, _, part = name.partition("/")
    if name in known:
        given = dict(known[name])
        module = TASKS[given["settings"]["task"]]
        if "data" in described(module.Options):
            given["settings"] = given["settings"] | {"data": _required(name, data)}
        return [TaskEntry(name=name, **given)]
    if kind == "vtab":
        root = Path(_required(name, data))
        folders = [root / part] if part else sorted(f for f in root.iterdir() if f.is_dir())
        names = recipes.read("vtab1k")["datasets"]
        folders = [f for f in folders if vtab.dataset_name(f) in names]
        if not folders:
            raise ValueError(f"{root} has no folder that is named as a data set of VTAB-1K")
        return [_split("vtab", f"vtab/{f.name}", f.name, str(f)) for f in folders]
    if name in recipes.read("commonsense")["datasets"]:
        return [_split(name, name, name, _required(name, data))]
    if name == "text":
        settings = {"task": "text", "data": _required(name, data)}
        return [TaskEntry("text", "text", settings)]
    every = [*known, "vtab", "vtab/NAME", *recipes.read("commonsense")["datasets"], "text"]
    raise ValueError(f"the tasks of a comparison are {', '.join(every)}; got {name!r}")


def _split(task: str, name: str, label: str, data: str) -> TaskEntry:
    """A task whose data have a development set, which the option `split` chooses."""
    return TaskEntry(name, label, {"task": task, "data": data}, {"split": "tune"}, "test")


def _required(name: str, data: str | None) -> str:
    if data is None:
        raise ValueError(f"the task {name!r} needs --data, the folder or the file of its data")
    return data
