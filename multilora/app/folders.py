"""The folders that the command writes to, and what it must not replace in them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from multilora import atomic, particle_folders
from multilora.app.settings import SETTINGS, Settings, differences, read_settings
from multilora.app.tasks.task import ModelOptions

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"
#: What the library writes beside the particles.
SET = particle_folders.INDEX
HISTORY = "history.json"
RELIABILITY = "reliability.png"
ENTROPIES = "entropies.png"
HUMAN_CONFIDENCE = "human_confidence.png"
HISTORY_PICTURE = "history.png"
#: The pictures that a run may have, and what they show.
PICTURES = {
    RELIABILITY: "whether the confidences are right",
    ENTROPIES: "whether it is unsure where it is wrong",
    HUMAN_CONFIDENCE: "whether it is unsure where people are",
    HISTORY_PICTURE: "the course of the training",
}
#: All files of a run beside its particles.
_FILES = (SETTINGS, CHECKPOINT, METRICS, HISTORY, *PICTURES, SET)
#: Lists the files that `export` wrote into a folder, beside them.
_EXPORT = "multilora_export.json"


def make_run_folder(out: Path, settings: Settings, resume: bool, overwrite: bool = False) -> None:
    """Make `out`, which must hold neither another run nor files of the user's.

    A run that ended before its first checkpoint holds nothing that could be lost, so any other may
    take its place.

    Args:
        overwrite: `out` may hold another run, but no files beside it.

    Raises:
        ValueError: `out` holds a run and neither resume nor overwrite is True, or with resume a run
            of other settings; or it holds links, or other files.
        NotADirectoryError: `out` is a file.
    """
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if SETTINGS not in names:
        # A run that was killed while it wrote its settings leaves a temporary file.
        _refuse(out, "no run but other files", [n for n in names if not _is_temporary(n, SETTINGS)])
    else:
        # A run must not write outside its folder.
        links = [entry for entry in out.rglob("*") if entry.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link; a run writes into its own folder only")
        begun = all(name == SETTINGS or _is_temporary(name, *_FILES) for name in names)
        if resume:
            different = differences(read_settings(out), settings)
            if different:
                raise ValueError(f"{out} holds a run of other settings (there, here): {different}")
        elif overwrite:
            _refuse(out, "files that are not of its run", _strangers(out))
        elif not begun:
            raise ValueError(
                f"{out} holds a run already; continue it with --resume, replace it with "
                "--overwrite, or choose another --out"
            )
    atomic.make_folder(out)


def clear_run_folder(out: Path) -> None:
    """Remove the files of the run in `out` but for its settings, and no others."""
    inside = sorted(out.rglob("*"), reverse=True)  # a folder comes after what is in it
    for entry in inside:
        if entry.is_dir():
            if _is_own_folder(entry.relative_to(out)) and not any(entry.iterdir()):
                entry.rmdir()
        elif entry != out / SETTINGS and _is_own(entry.relative_to(out)):
            entry.unlink()


def _refuse(out: Path, what: str, strangers: list[str]) -> None:
    if strangers:
        raise ValueError(
            f"{out} holds {what}, which a run might replace: "
            f"{', '.join(sorted(strangers)[:5])}; choose another --out"
        )


def _strangers(out: Path) -> list[str]:
    """The files and folders below `out` that no run writes."""
    inside = ((entry, entry.relative_to(out)) for entry in out.rglob("*"))
    return [
        str(path)
        for entry, path in inside
        if not (_is_own_folder(path) if entry.is_dir() else _is_own(path))
    ]


def _is_own(file: Path) -> bool:
    """Whether a run writes this file, relative to its folder, or leaves it when it is killed."""
    *folders, name = file.parts
    if folders and folders[0].startswith(atomic.UNFINISHED):
        folders = folders[1:]
    if not folders:
        return name in _FILES or _is_temporary(name, *_FILES)
    return _is_own_folder(Path(*folders)) and name in particle_folders.FILES


def _is_own_folder(folder: Path) -> bool:
    *above, name = folder.parts
    if not above and name.startswith(atomic.UNFINISHED):
        return True
    within = not above or (len(above) == 1 and above[0].startswith(atomic.UNFINISHED))
    return within and re.fullmatch(r"particle_\d+", name) is not None


def _is_temporary(name: str, *files: str) -> bool:
    """Whether `write_file` leaves this file where it is killed while it writes one of `files`."""
    return any(Path(name).match(f".{file}.*.tmp") for file in files)


def free_folder(settings: Settings, method: str) -> Path:
    """runs/TASK-METHOD-SEED, with a number behind it if that folder exists."""
    task, options = settings.task, settings.options
    if isinstance(options, ModelOptions) and task == "images":
        task = options.model
    elif isinstance(options, ModelOptions) and task == "vtab":
        task += f"-{Path(options.data).name}"
    stem = f"{task}-{method}-{settings.seed}".replace("/", "_")
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def check_export(out: Path) -> None:
    """Raise ValueError where `out` holds anything but an unchanged earlier export."""
    try:
        written = dict(json.loads((out / _EXPORT).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        written = {}
    inside = out.iterdir() if out.is_dir() else ()
    strangers = sorted(
        f.name
        for f in inside
        if not f.is_file() or (f.name != _EXPORT and written.get(f.name) != atomic.digest(f))
    )
    if strangers or ((out / _EXPORT).exists() and not written):
        raise ValueError(
            f"{out} holds files that are not of an earlier export: "
            f"{', '.join(strangers[:5] or [_EXPORT])}; choose another folder"
        )


def record_export(out: Path, run: Path, kind: str) -> None:
    """List the files of an export, so that a later one may replace them."""
    digests = {f.name: atomic.digest(f) for f in out.iterdir() if f.name != _EXPORT}
    write_json(out / _EXPORT, {"run": str(run), "soup": kind, "files": digests})


def write_json(file: Path, value: Any) -> None:
    atomic.write_text(file, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """JSON text. JSON has no NaN, so an undefined measure is null."""
    return json.dumps(_defined(value), indent=2)


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
