"""The CUDA kernels as C++ for the CPU: every thread a fiber, Hopper's instructions included.

They are built from the same files as multilora._C_cuda, with -DMULTILORA_EMULATE, once for each
state of the sources; csrc/cuda/emulate.h says what that emulates.
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
# Fortified longjmp takes a change of stacks for an error.
FLAGS += " -U_FORTIFY_SOURCE -DMULTILORA_EMULATE"
# A GPU faults on a vector that is not aligned; here it is an illegal instruction.
FLAGS += " -fsanitize=alignment -fsanitize-undefined-trap-on-error"


def load(name: str, file: Path) -> None:
    """Make a file the native module `name` of this process."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def build() -> Path:
    """The emulation's file, built if it is not there."""
    files = sorted(f for f in CSRC.rglob("*") if f.suffix in (".h", ".cpp", ".cu"))
    state = hashlib.sha256(FLAGS.encode())
    for file in files:
        state.update(str(file.relative_to(CSRC)).encode() + file.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    name = f"multilora-emulated-{os.getuid()}-{state.hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    out = folder / f"_C_cuda{suffix}"
    # pytest-xdist has a process for every core; the first one builds.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            _compile([CSRC / "bindings_cuda.cpp", *(CSRC / "cuda").glob("*.c*")], folder, out)
    return out


def _compile(sources: list[Path], folder: Path, out: Path) -> None:
    import ninja
    import pybind11
    from ninja.ninja_syntax import Writer

    cxx = os.environ.get("CXX", "c++")
    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    with (folder / "build.ninja").open("w") as file:
        writer = Writer(file)
        writer.rule("compile", f"{cxx} {FLAGS} {includes} -x c++ -c $in -o $out")
        writer.rule("link", f"{cxx} -shared -o $out $in")
        objects = [
            writer.build(f"{source.name}.o", "compile", str(source))[0] for source in sources
        ]
        writer.build(str(out), "link", objects)
    done = subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the emulated CUDA kernels do not build:\n{done.stdout}{done.stderr}")
