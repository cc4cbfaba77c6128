"""Processes that end with the one that started them, and children that report line by line."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Called in a child: the kernel kills it when `parent` ends, however that happens."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """Start a process in a new session, in the repository's root, that dies with this one."""
    parent = os.getpid()
    return subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent),
        **options,
    )


def kill(process: subprocess.Popen) -> bool:
    """End a process and its session -> whether it is gone. A process that waits inside a driver
    cannot always be ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        return False
    return True


class Child:
    """A worker: it reads its task as one JSON document and reports events, one JSON line each."""

    def __init__(self, command: list[str], task: dict[str, Any]):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        self.process = start(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        # A process that ends at once does not read its task.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode())
            self.process.stdin.close()
        os.set_blocking(self.process.stdout.fileno(), False)
        self.started = self.heard = time.time()
        self._rest = b""

    def events(self) -> list[dict[str, Any]]:
        """The events since the last call. If the child was killed, its last line may be incomplete
        and is dropped."""
        text = self._rest
        while chunk := self.process.stdout.read(1 << 16):
            text += chunk
        *lines, self._rest = text.split(b"\n")
        if lines:
            self.heard = time.time()
        return [json.loads(line) for line in lines]

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")


class Reports:
    """The child's side: stdout carries the events, and what libraries print goes to stderr."""

    def __init__(self):
        self.file = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def __call__(self, **event: Any) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(self.file, data) :]
