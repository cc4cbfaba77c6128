"""Jobs that run a command: the build, the tests, a training, the sanitizer.

Their whole output is kept: it goes into the record's folder, in NAME.commands.log.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.jobs import Context
from bench.processes import ROOT, kill, start
from multilora.ops.dispatch import missing_reason

TESTS = ("lora_linear", "lora_add", "grouped", "geometry", "volume", "svgd_update")
#: Bytes of a log that are kept; a longer one keeps its beginning and its end.
LOG = 6 * 2**20


def run(
    command: list[str],
    context: Context,
    what: str,
    seconds: float,
    environment: dict[str, str] | None = None,
    merge: bool = True,
) -> tuple[int | None, str]:
    """Run a command -> its exit code and what it printed.

    The code is None if the command was stopped, after `seconds` or when the run's time was over.
    merge: whether the text includes stderr, which goes into the log in any case.
    """
    seconds = max(1.0, min(seconds, context.until - time.time()))
    file = Path(context.folder) / f"{context.name}.commands.log"
    begun = time.time()
    with file.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        before = log.tell()
        process = start(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log if merge else subprocess.PIPE,
            stderr=log,
        )
        text = b""
        if not merge:
            os.set_blocking(process.stdout.fileno(), False)
        while True:
            if not merge:
                text += process.stdout.read() or b""
            if process.poll() is not None:
                break
            if time.time() - begun > seconds:
                # Its workers end with it or by themselves.
                process.send_signal(signal.SIGINT)
                time.sleep(2.0)
                kill(process)
                break
            time.sleep(0.3)
            context.beat(what)
        if not merge:
            text += process.stdout.read() or b""
        code = None if time.time() - begun > seconds else process.returncode
    if merge:
        text = file.read_bytes()[before:]
    else:
        with file.open("ab") as log:
            log.write(text)
    shorten(file)
    return code, text.decode(errors="replace")


def shorten(file: Path, most: int = LOG) -> None:
    """Cut the middle out of a longer file."""
    data = file.read_bytes()
    if len(data) > most:
        file.write_bytes(data[: most // 2] + b"\n... cut ...\n" + data[-most // 2 :])


def failed(code: int | None, text: str, seconds: float) -> dict[str, str]:
    """The failures of a command: {} or one that says how it ended."""
    if code == 0:
        return {}
    lines = [line for line in text.strip().splitlines() if line.strip()][-3:]
    how = f"stopped after {seconds:.0f} s" if code is None else f"it ended with {code}"
    return {"": f"{how}: {' | '.join(lines)}"[:500]}


# --- the build -----------------------------------------------------------------------------------


def build(context: Context) -> dict[str, Any]:
    """Build multilora._C_cuda if it is missing or older than its sources, and nvcc is there.

    A build that fails is a failure, not a reason to go on without the kernels.
    """
    module = _module()
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc").split()[0])
    if module is not None and module.stat().st_mtime >= _newest_source():
        return {"failures": {}, "module": "was there"} | _loads()
    if nvcc is None and module is None:
        return {
            "failures": {},
            "skipped": {"": "there is no nvcc, and multilora._C_cuda is not there"},
        }
    if nvcc is None:
        return {"failures": {}, "module": "was there, older than its sources; no nvcc"} | _loads()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, text = run(command, context, "build", 240, {"MULTILORA_BUILD": "cuda"})
    wrong = failed(code, text, 240)
    return {"failures": wrong} if wrong else {"failures": {}, "module": "built"} | _loads()


def _module() -> Path | None:
    importlib.invalidate_caches()
    found = importlib.util.find_spec("multilora._C_cuda")
    return None if found is None or found.origin is None else Path(found.origin)


def _newest_source() -> float:
    sources = (ROOT / "csrc").rglob("*") if (ROOT / "csrc").is_dir() else ()
    return max((file.stat().st_mtime for file in sources if file.is_file()), default=0.0)


def _loads() -> dict[str, Any]:
    """Load the module in a new process: a module that does not fit may end it."""
    code = "from multilora import _C_cuda as m; from multilora.ops.dispatch import missing_reason; "
    code += "print(m.build_info()); print(missing_reason('cuda') or 'available')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        return {"failures": {"": (done.stderr.strip().splitlines() or ["it does not load"])[-1]}}
    about, backend = done.stdout.strip().splitlines()
    return {"about": about, "backend": backend}


# --- the operators' tests ------------------------------------------------------------------------


def tests(context: Context, seconds: float = 150.0) -> dict[str, Any]:
    """The operators' tests on the device. pytest-timeout, if installed, ends a test that hangs; a
    process whose CUDA context is broken is replaced (bench.broken_device)."""
    device = context.device.type
    files = [f"tests/ops/test_{name}.py" for name in TESTS]
    present = [name for name in files if (ROOT / name).exists()]
    command = [sys.executable, "-m", "pytest", *present, "-v", "-rfE", "-p", "no:cacheprovider"]
    command += ["-p", "bench.broken_device", "--color=no", "--tb=short"]
    absent = [name for name in ("xdist", "pytest_timeout") if not importlib.util.find_spec(name)]
    if "xdist" not in absent:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart=12"]
    if "pytest_timeout" not in absent:
        command += ["--timeout=60"]
    if context.tiny:
        command += ["-k", "test_wrong_shapes"]
    environment = {"MULTILORA_TEST_DEVICE": device, "COLUMNS": "300"}
    # The plugin must be found in every worker.
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if device == "cuda":
        environment["TRITON_INTERPRET"] = "0"
    begun = time.time()
    code, text = run(command, context, "tests", seconds, environment)
    found = summary(text.splitlines())
    failures = {"": "; ".join(found["failed"])[:2000]} if found["failed"] else {}
    return {
        "files": present,
        "missing": [name for name in files if name not in present],
        "absent": absent,
        # None if it was stopped because its time was over.
        "exit_code": code,
        "seconds": time.time() - begun,
        **found,
        "failures": failures or failed(code, text, seconds),
    }


#: A finished test, as pytest -v and pytest-xdist write it.
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<state>[A-Z]+) (?P<test>\S.*)"
    r"|(?P<name>\S+::.*?) (?P<outcome>[A-Z]+)\b.*\[ *\d+%\])$"
)


def gpu_tests(context: Context, file: str, backend: str, seconds: float = 110.0) -> dict[str, Any]:
    """A file of tests/gpu on one backend, in a new process, and the errors that it measured."""
    missing = missing_reason(backend)
    if missing is not None:
        return {"failures": {}, "skipped": {backend: missing}}
    environment = {"MULTILORA_TEST_DEVICE": context.device.type}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/gpu/{file}", "-m", "gpu", "-k", backend]
        command += ["-p", "no:cacheprovider", "--color=no", "--tb=short", f"--junitxml={report}"]
        code, text = run(command, context, file, seconds, environment)
        # A process that was ended in a test has written no report.
        found = junit(report) if report.exists() else {}
    return found or {"failures": failed(code, text, seconds)}


def junit(report: Path) -> dict[str, Any]:
    """The failures in pytest's report, and the property "error" of every test that has one; {} if
    no test ran."""
    tests = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, Any] = {"failures": {}} if tests else {}
    for test in tests:
        name = test.get("name", "")
        for wrong in [*test.findall("failure"), *test.findall("error")]:
            found["failures"][name] = (wrong.get("message") or "it failed")[:300]
        for one in test.iter("property"):
            found[name] = float(one.get("value", "nan"))
    return found


def summary(lines: list[str]) -> dict[str, Any]:
    """How many tests had which outcome, even if the run was stopped, and what failed."""
    found = [match for match in map(_OUTCOME.match, lines) if match]
    states = [(m["state"] or m["outcome"], m["test"] or m["name"]) for m in found]
    # The lines at the end also say why.
    why = [one[:300] for one in lines if one.startswith(("FAILED ", "ERROR "))]
    return {
        "outcomes": dict(Counter(state for state, _ in states)),
        "failed": why or [test for state, test in states if state in ("FAILED", "ERROR")],
    }


# --- whole programs ------------------------------------------------------------------------------


def train(context: Context) -> dict[str, Any]:
    """`multilora train` of the embedded task on the device, with its default backend."""
    steps = "2" if context.tiny else "50"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", "--method", "ibdr", "--steps", steps, "--out", f"{folder}/run"]
        arguments += ["--device", context.device.type]
        code = f"from multilora.app.cli import main; raise SystemExit(main({arguments!r}))"
        ended, text = run([sys.executable, "-c", code], context, "train", 90)
    return {"failures": failed(ended, text, 90), "tail": text.strip().splitlines()[-5:]}


def particles(context: Context, count: int, chunk: int = 3, images: int = 48) -> dict[str, Any]:
    """A step of CLIP ViT-B/32 with `count` particles, three at a time: memory and time. 48
    images are so many that three particles should come near the 4.5 GB of the Bella paper's
    Table 2; this is extrapolated from a few images on a CPU."""
    command = [sys.executable, "-m", "bench.growth", "--particles", str(count)]
    command += ["--chunk", str(chunk), "--images", str(images), "--device", context.device.type]
    code, text = run(command, context, "particles", 120, merge=False)
    wrong = failed(code, text, 120)
    return {"failures": wrong} if wrong else {"failures": {}} | json.loads(text.splitlines()[-1])


def sanitizer(context: Context, tool: str, backend: str) -> dict[str, Any]:
    """compute-sanitizer over the smallest problems of one backend.

    It may take wgmma's reads of what cp.async wrote for a race, so a person must read its report,
    and no peer is left out because of it.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"failures": {}, "skipped": {"": "compute-sanitizer is not there"}}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, "-m", "bench.sanitized", backend]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, text = run(command, context, "sanitizer", 75, environment)
    said = [line for line in text.splitlines() if line.startswith("=========")][:20]
    return {"failures": failed(code, text, 75), "said": said}
