"""The folders that the command writes to, and what it must not replace in them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from multilora import atomic
from multilora.app.settings import SETTINGS, Settings, differences, read_settings
from multilora.app.tasks.task import ModelOptions

METRICS = "metrics.json"
CHECKPOINT = "checkpoint.pt"
#: What the library writes beside the particles.
SET = "multilora.json"
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
#: Lists the files that `export` wrote into a folder, beside them.
_EXPORT = "multilora_export.json"


def make_run_folder(out: Path, settings: Settings, resume: bool, overwrite: bool = False) -> None:
    """Make `out`, which must hold neither another run nor files of the user's.

    A run that failed before its first checkpoint has left nothing: another one may take its folder.

    Args:
        overwrite: Remove what a run that is there has written, and nothing else.

    Raises:
        ValueError: `out` holds a run and neither resume nor overwrite is True, a run of other
            settings that is to be resumed, other files, or a link.
        NotADirectoryError: `out` is a file.
    """
    if (out / SETTINGS).is_file():
        # A run must not write outside its folder.
        links = [entry for entry in out.rglob("*") if entry.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link; a run writes into its own folder only")
        if not resume:
            _clear(out, overwrite)
        elif different := differences(read_settings(out), settings):
            raise ValueError(f"{out} holds a run of other settings (there, here): {different}")
    elif out.is_dir():
        # A run that was killed while it wrote its settings leaves a temporary file.
        strangers = [f.name for f in out.iterdir() if not f.match(f".{SETTINGS}.*.tmp")]
        if strangers:
            raise ValueError(
                f"{out} holds no run but other files, which a run might replace: "
                f"{', '.join(sorted(strangers)[:5])}; choose another --out"
            )
    atomic.make_folder(out)


def _clear(out: Path, overwrite: bool) -> None:
    """Remove a run from its folder.

    Raises:
        ValueError: It has something to lose and overwrite is False, or there are other files.
    """
    of_a_run = (SETTINGS, CHECKPOINT, METRICS, HISTORY, *PICTURES, SET, "particle_*")
    patterns = [p for name in of_a_run for p in (name, f".{name}.*.tmp")]
    inside = [*out.iterdir()]
    strangers = [f.name for f in inside if not any(f.match(p) for p in patterns)]
    if strangers:
        raise ValueError(
            f"{out} holds a run and other files: {', '.join(sorted(strangers)[:5])}; choose "
            "another --out"
        )
    if not overwrite and any((out / name).exists() for name in (CHECKPOINT, METRICS)):
        raise ValueError(
            f"{out} holds a run already; continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )
    # The settings go last: without them, what is left would be files of nobody.
    for file in sorted(inside, key=lambda f: f.name == SETTINGS):
        shutil.rmtree(file) if file.is_dir() else file.unlink()


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
