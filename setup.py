"""Builds the native modules with ninja, from the tools that are installed. Nothing is downloaded.
The rest of the package is in pyproject.toml.

MULTILORA_BUILD=auto  the default: multilora._C where there is a C++ compiler (c++, or CXX), and
                      multilora._C_cuda where there are nvcc (or NVCC) and a GPU
MULTILORA_BUILD=cpu   multilora._C only
MULTILORA_BUILD=cuda  both, with or without a GPU
MULTILORA_BUILD=none  neither: plain Python
CXXFLAGS              is added to the flags of the C++ compiler and linker
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
CXX, NVCC = os.environ.get("CXX", "c++"), os.environ.get("NVCC", "nvcc")
CXXFLAGS = os.environ.get("CXXFLAGS", "")
# Contraction to FMA is what makes kernels fast; no NaN or infinity is assumed away.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -fno-math-errno -fno-trapping-math"
# A kernel file of the CPU is compiled once for each level; cpu/levels.h says how they stay apart.
LEVELS = {"scalar": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = "-mavx2 -mfma"
    LEVELS["avx512"] = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma"
    LEVELS["avx512"] += " -mprefer-vector-width=512"
# Machine code for Ampere and Hopper; what comes later compiles the PTX when it loads it.
OLDEST_NVCC = (12, 5)
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "compute_90": "compute_90"}


def nvcc_release() -> tuple[int, ...]:
    said = subprocess.run([*NVCC.split(), "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"V([\d.]+)", said)[1].split(".")))


def sees_gpu() -> bool:
    """Whether the NVIDIA driver is there and shows a GPU to this process."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def wanted() -> list[Extension]:
    """The modules that MULTILORA_BUILD asks for; says which, and why a module is left out."""
    choice = os.environ.get("MULTILORA_BUILD", "auto")
    choices = {"auto": [], "cpu": [CXX], "cuda": [CXX, NVCC], "none": []}
    if choice not in choices:
        raise SystemExit(f"MULTILORA_BUILD must be one of {', '.join(choices)}; got {choice!r}")
    has = {tool: shutil.which(tool.split()[0]) is not None for tool in (CXX, NVCC)}
    for tool in choices[choice]:
        if not has[tool]:
            raise SystemExit(f"MULTILORA_BUILD={choice} needs {tool}, which is not on the PATH")
    missing = {"_C": _without_cpu(choice, has[CXX])}
    missing["_C_cuda"] = missing["_C"] or _without_cuda(choice, has[NVCC])
    for name, reason in missing.items():
        print(f"multilora.{name}: {'not built: ' + reason if reason else 'built'}")
    # As dependencies, the sources go into the source distribution.
    files = [str(f.relative_to(CSRC.parent)) for f in CSRC.rglob("*.*")]
    names = [name for name, reason in missing.items() if not reason]
    return [Extension(f"multilora.{name}", [], depends=files) for name in names]


def _without_cpu(choice: str, has_compiler: bool) -> str:
    """Why multilora._C is not built, or an empty string."""
    if choice == "none":
        return "MULTILORA_BUILD=none"
    return "" if has_compiler else f"there is no C++ compiler ({CXX})"


def _without_cuda(choice: str, has_nvcc: bool) -> str:
    """Why multilora._C_cuda is not built, or an empty string."""
    if choice == "cpu":
        return "MULTILORA_BUILD=cpu"
    if not has_nvcc:
        return f"there is no {NVCC}"
    if nvcc_release() < OLDEST_NVCC:
        found, oldest = (".".join(map(str, version)) for version in (nvcc_release(), OLDEST_NVCC))
        if choice == "cuda":
            raise SystemExit(f"MULTILORA_BUILD=cuda needs nvcc {oldest} or newer; found {found}")
        return f"nvcc {found} is older than {oldest}"
    if choice == "auto" and not sees_gpu():
        return "there is no GPU; MULTILORA_BUILD=cuda builds it all the same"
    return ""


class Ninja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja
        from ninja.ninja_syntax import Writer

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            (write_cuda if ext.name.endswith("_cuda") else write_cpu)(Writer(file), str(out))
        if subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder]).returncode:
            less = "cpu" if ext.name.endswith("_cuda") else "none"
            raise SystemExit(f"{ext.name} does not build; MULTILORA_BUILD={less} goes without it")


def write_cpu(ninja, out: str) -> None:
    write_compiler(ninja)
    ninja.rule("link", f"{CXX} -shared -fopenmp {CXXFLAGS} -o $out $in")
    objects = [compile_cpp(ninja, CSRC / "bindings.cpp")]
    for file in sorted((CSRC / "cpu").glob("*.cpp")):
        if not file.stem.endswith("_kernels"):
            objects.append(compile_cpp(ninja, file))
            continue
        for level, flags in LEVELS.items():
            flags += f" -ffp-contract=fast -DMULTILORA_LEVEL={level}"
            objects.append(compile_cpp(ninja, file, f"{file.stem}_{level}.o", flags))
    ninja.build(out, "link", objects)


def write_cuda(ninja, out: str) -> None:
    write_compiler(ninja)
    codes = " ".join(f"-gencode=arch={arch},code={code}" for code, arch in TARGETS.items())
    # nvcc knows its toolkit, also where the one on the PATH is a wrapper, and links its runtime.
    flags = "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
    ninja.rule("nvcc", f"{NVCC} {codes} {flags} -MD -MF $out.d -c $in -o $out", depfile="$out.d")
    ninja.rule("link", f"{NVCC} {codes} -shared -Xcompiler -fPIC -o $out $in")
    release = ".".join(map(str, nvcc_release()))
    about = f'-DMULTILORA_NVCC=\\"{release}\\" -DMULTILORA_TARGETS=\\"{",".join(TARGETS)}\\"'
    objects = [compile_cpp(ninja, CSRC / "bindings_cuda.cpp", "bindings.o", about)]
    for file in sorted((CSRC / "cuda").glob("*.cu")):
        objects += ninja.build(f"{file.stem}.cu.o", "nvcc", str(file))
    ninja.build(out, "link", objects)


def write_compiler(ninja) -> None:
    import pybind11

    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    command = f"{CXX} {FLAGS} {includes} -fopenmp $flags {CXXFLAGS} -MMD -MF $out.d -c $in -o $out"
    ninja.rule("cxx", command, depfile="$out.d", deps="gcc")


def compile_cpp(ninja, file: Path, out: str = "", flags: str = "") -> str:
    return ninja.build(out or f"{file.stem}.o", "cxx", str(file), variables={"flags": flags})[0]


setup(ext_modules=wanted(), cmdclass={"build_ext": Ninja})
