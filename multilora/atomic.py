"""Files that are written whole or not at all, one by one and as a set.

Contents reach the disk before the rename that shows them, and the rename before the function
returns, so that neither a killed process nor a power cut leaves half a file under its own name.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_STAGING = ".multilora-staging-"
_COMMIT = ".multilora-commit"
# A reading that fits between two saves is repeated at most this often.
_ATTEMPTS = 100
# More than the list of the files of 50,000 particles; what is larger is no JSON of ours or PEFT's.
_LARGEST_JSON = 1 << 24

T = TypeVar("T")


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it. Raises NotADirectoryError where a file is in the way."""
    missing_or_file = [f for f in (folder, *folder.parents) if not f.is_dir()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(f for f in missing_or_file if f.exists())
        raise NotADirectoryError(f"{folder} cannot be a folder: {file} is a file") from error
    for made in missing_or_file:
        _sync(made.parent)


def write_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `file` by what write(stream) writes; a reader finds the old file or the new one."""
    for left_by_a_kill in file.parent.glob(f".{file.name}.*.tmp"):
        left_by_a_kill.unlink(missing_ok=True)
    # A name of its own: two processes that write one file must not write into each other's.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def write_text(file: Path, text: str) -> None:
    write_file(file, lambda stream: stream.write(text.encode()))


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a set of files below `folder`, all of them or none; its other files are left.

    write(staging) makes the set below an empty folder. One rename inside `folder` then makes it
    the set that `newest` finds, and after that each file is moved into its place. A process that
    is killed before the rename leaves what nobody reads, after it what everybody reads; the next
    call clears up either.

    Raises OSError where another process wrote to `folder` at the same time; the sets of the two are
    never mixed, and at least one of them is there.
    """
    make_folder(folder)
    _move_into_place(folder)
    for left_by_a_kill in folder.glob(f"{_STAGING}*"):
        _discard(left_by_a_kill)
    staging = _staging(folder)
    staging.mkdir()
    try:
        write(staging)
        for inner in staging.rglob("*"):
            _sync(inner)
        _sync(staging)
        # Refused by the system where another process has a set there.
        os.rename(staging, folder / _COMMIT)
    except BaseException as error:
        if not _discard(staging) or (folder / _COMMIT).is_dir():
            raise _disturbed(folder) from error
        raise
    _sync(folder)
    _move_into_place(folder)


def newest(folder: Path, name: str) -> Path:
    """Where the file `name` of the last complete set of `folder` is."""
    committed = folder / _COMMIT / name
    return committed if committed.is_file() else folder / name


def read_set(folder: Path, marker: str, read: Callable[[], T]) -> T:
    """read(), whose files below `folder`, found by `newest`, are all of one complete set.

    marker: a file that each set brings along. As long as it is the same file, no other set was
    committed. Where a process commits one while read() runs, or moves files that read() has not
    found for that reason, what it has read or raised is forgotten and it runs again.

    Raises what read() raises, and ValueError where no reading fits between two saves.
    """
    for _ in range(_ATTEMPTS):
        result: list[T] = []
        error: Exception | None = None
        # Held open, so that no other file can get its number.
        with _held(folder, marker) as before:
            not_moved = _committed(folder)
            try:
                result.append(read())
            except (OSError, ValueError) as raised:
                error = raised
            with _held(folder, marker) as after:
                is_same = before == after
        if is_same and error is None:
            return result[0]
        if is_same and error is not None and not_moved == _committed(folder):
            raise error
    raise ValueError(
        f"{folder} is saved to faster than it can be read; {_ATTEMPTS} readings failed"
    )


def _committed(folder: Path) -> list[str]:
    """The files that wait to be moved into their places."""
    commit = folder / _COMMIT
    if not commit.is_dir():
        return []
    return sorted(os.path.join(path, name) for path, _, names in os.walk(commit) for name in names)


@contextlib.contextmanager
def _held(folder: Path, name: str) -> Iterator[tuple[int, int] | None]:
    """Which file `newest` finds, as device and number; None where there is none."""
    descriptor = None
    # In this order: what is moved in between is found in its place.
    for path in (folder / _COMMIT / name, folder / name):
        # A pipe does not block.
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            break
    try:
        status = None if descriptor is None else os.fstat(descriptor)
        yield status and (status.st_dev, status.st_ino)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def require_file(file: Path, missing: str) -> None:
    """Raise where `file` is no file that could be read.

    FileNotFoundError with the words `missing` where nothing is there, ValueError for a folder, a
    device, a pipe or a loop of links, PermissionError.
    """
    try:
        mode = file.stat().st_mode
    except PermissionError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{file} is missing: {missing}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{file} is {kind}, no file")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever its content makes fail inside is a ValueError that names `file`."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises ValueError, naming the file, for anything else."""
    size = file.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"{file} is damaged: {size} bytes, of at most {_LARGEST_JSON}")
    with reading(file):
        content = json.loads(file.read_bytes().decode(), object_pairs_hook=_once)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(content).__name__}, no object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(
            f"{[name for name, n in counts.items() if n > 1][:3]} occur more than once"
        )
    return content


def digest(file: Path) -> str:
    """SHA-256, as sha256sum prints it."""
    sha = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _move_into_place(folder: Path) -> None:
    """Finish what `replace_files` was killed in, if anything."""
    commit = folder / _COMMIT
    if not commit.is_dir():
        return
    try:
        inside = sorted(commit.rglob("*"))
        folders = [commit, *(f for f in inside if f.is_dir())]
        places = [folder / f.relative_to(commit) for f in folders]
        for place in places:
            make_folder(place)
        for file in inside:
            if file not in folders:
                os.replace(file, folder / file.relative_to(commit))
        for place in places:
            _sync(place)
        for empty in reversed(folders):
            empty.rmdir()
    except OSError as error:
        # Files that somebody else has moved, or the next set where an empty folder was.
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY):
            raise _disturbed(folder) from error
        raise


def _staging(folder: Path) -> Path:
    return folder / f"{_STAGING}{uuid.uuid4().hex}"


def _disturbed(folder: Path) -> OSError:
    return OSError(f"another process saved to {folder} at the same time; let one process save")


def _discard(staging: Path) -> bool:
    """Whether `staging` was still there."""
    # Renamed first: its writer, if it lives, then fails to commit it instead of committing what
    # is left of it.
    trash = _staging(staging.parent)
    try:
        os.rename(staging, trash)
    except FileNotFoundError:
        return False
    shutil.rmtree(trash, ignore_errors=True)
    return True


def _sync(path: Path) -> None:
    """The contents of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, or have nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
