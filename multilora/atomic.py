"""Files that are written whole or not at all, one by one and as a set.

Contents reach the disk before the rename that shows them, and the rename before the function
returns. So neither a killed process nor a power cut leaves half a file under its final name.
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
#: With what the folders begin that a killed `replace_files` leaves.
UNFINISHED = (_STAGING, _COMMIT)
# How often a reading is tried until it fits between two saves.
_ATTEMPTS = 100
# The list of the files of 50,000 particles is smaller; JSON of ours or PEFT's is never larger.
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
    # A unique name: two processes that write one file must not write into the same temporary one.
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
    """Replace `file` by `text`, as `write_file` does."""
    write_file(file, lambda stream: stream.write(text.encode()))


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a set of files below `folder`, all of them or none; its other files are left alone.

    write(staging) makes the set below an empty folder. One rename inside `folder` then makes it the
    set that `newest` finds, and after that each file is moved into its place. If the process is
    killed before the rename, nobody reads the new set; after it, everybody does. The next call
    clears up either.

    Raises:
        OSError: another process wrote to `folder` at the same time. The sets of the two are never
            mixed, and at least one of them is there.
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
    """The path of the file `name` of the last complete set of `folder`."""
    committed = folder / _COMMIT / name
    return committed if committed.is_file() else folder / name


def read_set(folder: Path, marker: str, read: Callable[[], T]) -> T:
    """The result of read(), whose files below `folder`, found by `newest`, belong to one set.

    If a process commits a set while read() runs, or moves files that read() therefore does not
    find, the result or the error is dropped and read() runs again.

    Args:
        marker: a file of every set. As long as it is the same file, no other set was committed.

    Raises:
        ValueError: no reading fitted between two saves. Errors of read() come through.
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
    """The files that still have to be moved into their places."""
    commit = folder / _COMMIT
    if not commit.is_dir():
        return []
    return sorted(os.path.join(path, name) for path, _, names in os.walk(commit) for name in names)


@contextlib.contextmanager
def _held(folder: Path, name: str) -> Iterator[tuple[int, int] | None]:
    """The file that `newest` finds, as device and inode; None where there is none."""
    descriptor = None
    # In this order, a file that is moved in between is found in its final place.
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
    """Raise unless `file` is a file that can be read.

    Raises:
        FileNotFoundError: nothing is there; the message ends with `missing`.
        ValueError: it is a folder, a device, a pipe or a loop of links.
        PermissionError: it may not be looked at.
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
        raise ValueError(f"{file} is {kind}, not a file")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an error that the content of `file` causes into a ValueError that names it."""
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
        raise ValueError(f"{file} is damaged: it holds a {type(content).__name__}, not an object")
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
    """Remove `staging`, and return whether it was still there."""
    # The rename comes first, so that its writer, if it lives, fails to commit it instead of
    # committing a part of it.
    trash = _staging(staging.parent)
    try:
        os.rename(staging, trash)
    except FileNotFoundError:
        return False
    shutil.rmtree(trash, ignore_errors=True)
    return True


def _sync(path: Path) -> None:
    """Flush the contents of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, or have nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
