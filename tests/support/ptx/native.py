"""multilora._C_cuda for the tests: nvcc's host code, and its kernels executed from their PTX.

The module is built from the same files as the real one, once for each state of the sources, with
runtime.cpp in the place of CUDA's runtime. Its launches come back here, with the arguments as a GPU
would get them, and run on the memory of this process.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ptx import EmulationError, Kernel, Struct, TensorMap, entries, execute

CSRC = Path(__file__).parents[3] / "csrc"
RUNTIME = Path(__file__).parent / "runtime.cpp"
NVCC, CXX = os.environ.get("NVCC", "nvcc"), os.environ.get("CXX", "c++")
# The same as in setup.py.
OLDEST_NVCC = (12, 5)
ARCHS = ("compute_90a", "compute_80")
FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
FLAGS += "".join(f" -gencode=arch={arch},code={arch}" for arch in ARCHS)
# The shared memory that a block may have.
SHARED = {"compute_90a": 227 * 1024, "compute_80": 163 * 1024}

_ENTRY = re.compile(r"^(?=(?:\.(?:visible|weak) )?\.entry )", re.M)


def missing() -> str | None:
    """Why the module cannot be built here, or None."""
    for tool in (CXX, NVCC):
        if not shutil.which(tool.split()[0]):
            return f"{tool} is not on the PATH"
    release = re.search(r"V([\d.]+)", _nvcc_version())[1]
    if tuple(map(int, release.split("."))) < OLDEST_NVCC:
        return f"nvcc {release} is older than {'.'.join(map(str, OLDEST_NVCC))}"
    return None


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([*NVCC.split(), "--version"], capture_output=True, text=True).stdout


def build() -> Path:
    """The folder with the module and the PTX of its kernels, built if it is not there."""
    files = sorted(f for f in CSRC.rglob("*") if f.suffix in (".h", ".cpp", ".cu"))
    state = hashlib.sha256(f"{FLAGS} {NVCC} {CXX} {_nvcc_version()} {sys.version}".encode())
    for file in (*files, RUNTIME):
        state.update(file.name.encode() + file.read_bytes())
    name = f"multilora-ptx-{os.getuid()}-{state.hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    # pytest-xdist has a process for every core; the first one builds.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _module(folder).exists():
            _compile(folder)
    return folder


def _module(folder: Path) -> Path:
    return folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def _compile(folder: Path) -> None:
    import ninja
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    about = f'-DMULTILORA_NVCC=\\"emulated\\" -DMULTILORA_TARGETS=\\"{",".join(ARCHS)}\\"'
    with (folder / "build.ninja").open("w") as file:
        writer = Writer(file)
        # Every kernel's PTX stays where nvcc left it, as FILE.ARCH.ptx.
        kept = f"{NVCC} {FLAGS} --keep --keep-dir $out.kept -c $in -o $out"
        writer.rule("nvcc", f"mkdir -p $out.kept && {kept}")
        cxx = f"{CXX} -O1 -std=c++17 -fPIC -fvisibility=hidden {includes} {about}"
        writer.rule("cxx", f"{cxx} -c $in -o $out")
        # The runtime's names must not be looked up in what torch has loaded.
        writer.rule("link", f"{CXX} -shared -Wl,-Bsymbolic -o $out $in")
        objects = []
        for source in (RUNTIME, *sorted((CSRC / "cuda").glob("*.cu"))):
            objects += writer.build(f"{source.stem}.o", "nvcc", str(source))
        objects += writer.build("bindings.o", "cxx", str(CSRC / "bindings_cuda.cpp"))
        writer.build(str(_module(folder)), "link", objects)
    done = subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True
    )
    for kept in folder.glob("*.kept"):
        for ptx in kept.glob("*.ptx"):
            ptx.rename(folder / ptx.name)
        shutil.rmtree(kept)
    if done.returncode:
        _module(folder).unlink(missing_ok=True)
        raise RuntimeError(f"the CUDA kernels do not build:\n{done.stdout}{done.stderr}")


class Launches:
    """The fate of the module's launches.

    Attributes:
        arch: whose PTX they execute, one of ARCHS.
        mode, seed: of the emulator.
        change: what is executed in the place of a kernel, by its name and its PTX; or None.
        executed: the PTX of every kernel that has run, without the line that says for what chip.
    """

    def __init__(self, folder: Path):
        self.arch, self.mode, self.seed, self.change = ARCHS[0], "late", 0, None
        self.executed: set[str] = set()
        self._folder = folder
        self._parsed: dict[str, Kernel] = {}
        self._library = ctypes.CDLL(str(_module(folder)))
        # ctypes keeps no reference to what C holds.
        self._launcher = _LAUNCHER(self._launch)
        self._library.tests_run_on(self._launcher, ctypes.c_size_t(SHARED[self.arch]))

    @contextlib.contextmanager
    def running(self, **attributes):
        """Other values of the attributes within a block."""
        before = {name: getattr(self, name) for name in attributes}
        try:
            self._assign(attributes)
            yield self
        finally:
            self._assign(before)

    def _assign(self, attributes) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)
        self._library.tests_run_on(self._launcher, ctypes.c_size_t(SHARED[self.arch]))

    def kernels(self) -> set[str]:
        """The names of all kernels that the module has registered with the runtime."""
        names = set()
        see = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: names.add(name.decode()))
        self._library.tests_kernels(see)
        return names

    @functools.cached_property
    def texts(self) -> dict[tuple[str, str], str]:
        """(arch, kernel) -> its PTX, with what stands before the first kernel of its file."""
        texts = {}
        for file in self._folder.glob("*.ptx"):
            arch = file.suffixes[-2][1:]
            head, *rest = _ENTRY.split(file.read_text())
            for text in rest:
                texts[arch, entries(text)[0]] = head + text
        return texts

    def _kernel(self, name: str) -> Kernel:
        text = self.texts[self.arch, name]
        if self.change is not None:
            text = self.change(name, text)
        if text not in self._parsed:
            self._parsed[text] = Kernel(text, name)
        return self._parsed[text]

    def _launch(self, name, sizes, shared_bytes, arguments, message, room) -> int:
        try:
            self._execute(name.decode(), sizes[:3], sizes[3:6], shared_bytes, arguments)
        except Exception as error:
            # C++ raises it again.
            text = f"{type(error).__name__}: {error}".encode()[: room - 1]
            ctypes.memmove(message, text + b"\0", len(text) + 1)
            return 1
        return 0

    def _execute(self, name, grid, block, shared_bytes, arguments) -> None:
        kernel = self._kernel(name)
        size = sum(size for size, _ in kernel.static_shared.values()) + shared_bytes
        if size > SHARED[self.arch]:
            raise EmulationError(f"{size} bytes of shared memory are more than a block can have")
        if sum(p.bytes for p in kernel.parameters) > 4096:
            raise EmulationError("more than 4 KB of parameters")
        threads = block[0] * block[1] * block[2]
        if kernel.threads is not None and threads > kernel.threads:
            raise EmulationError(f"{threads} threads; the kernel is compiled for {kernel.threads}")
        parameters = [
            _parameter(ctypes.string_at(address, p.bytes))
            for p, address in zip(kernel.parameters, arguments)
        ]
        execute(kernel, grid, block, shared_bytes, parameters, self.mode, self.seed)
        if self.change is None:
            self.executed.add(_of_any_chip(self.texts[self.arch, name]))

    def check_executed(self, pattern: str, config: pytest.Config, archs=ARCHS) -> None:
        """Assert that this process has executed all kernels whose names the pattern finds.

        For a file's last test. What compute_80 and compute_90a have in common counts for both.
        """
        if config.getoption("keyword") or any("::" in arg for arg in config.args):
            pytest.skip("a part of the file's tests was chosen")
        names = {name for name in self.kernels() if re.search(pattern, name)}
        assert names
        left = [
            (arch, name)
            for arch in archs
            for name in sorted(names)
            if _of_any_chip(self.texts[arch, name]) not in self.executed
        ]
        assert not left, left


def _of_any_chip(text: str) -> str:
    return re.sub(r"^\.target.*$", "", text, flags=re.M)


_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_size_t,
)
# runtime.cpp's own layout of a tensor map.
_MAP = struct.Struct("<8sQ3Q2Q3III")


def _parameter(data: bytes) -> Struct:
    """A kernel's parameter, with the tensor maps in it."""
    maps = {}
    for at in range(0, len(data) - 127, 64):
        magic, base, *numbers, span, element = _MAP.unpack_from(data, at)
        if magic == b"tensormp":
            maps[at] = TensorMap(base, numbers[:3], numbers[3:5], numbers[5:], span, element)
    return Struct(data, maps)


class _Lazy(ModuleType):
    """multilora._C_cuda: built and loaded when a test first asks for one of its functions."""

    # multilora/ops/dispatch.py asks for it.
    emulated = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.load()
        return vars(self)[name]

    def load(self) -> None:
        if "launches" not in vars(self):
            folder = build()
            file = _module(folder)
            spec = importlib.util.spec_from_file_location(self.__name__, file)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            functions = {n: v for n, v in vars(loaded).items() if not n.startswith("__")}
            vars(self).update(functions, launches=Launches(folder))


_emulated = _Lazy("multilora._C_cuda")


def install() -> None:
    """Make it the module of this process: its kernels take CPU tensors."""
    sys.modules[_emulated.__name__] = _emulated


def __getattr__(name: str) -> Any:
    """launches: the Launches of the emulated module."""
    if name == "launches":
        _emulated.load()
        return vars(_emulated)["launches"]
    raise AttributeError(name)


def load_module(name: str, file: Path) -> None:
    """Make a file the native module `name` of this process."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
