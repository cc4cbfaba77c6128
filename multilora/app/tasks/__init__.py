"""The tasks of the command line."""

from __future__ import annotations

from types import ModuleType

from multilora.app.tasks import (
    clip,
    commonsense,
    digits,
    images,
    mnist,
    sentiment,
    text,
    vtab,
)

#: The module of each task; every module has `Options` and make(options, seed, report) -> Task.
TASKS: dict[str, ModuleType] = {
    "digits": digits,
    "mnist": mnist,
    "images": images,
    "vtab": vtab,
    "clip": clip,
    "text": text,
    "sentiment": sentiment,
    **dict.fromkeys(commonsense.names(), commonsense),
}
