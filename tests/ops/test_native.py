"""The native modules, in new processes: which are built, are missing, run on this CPU."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LEVELS = ["scalar", "avx2", "avx512"]

OPERATORS = """
import sys, torch, multilora as ml
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
logits = torch.randn(4, 37, 29, requires_grad=True)
nll, divergence = ml.particle_loss(logits, torch.randint(29, (37,)))
(nll.sum() + divergence).backward()
A = [torch.randn(4, 3, d, requires_grad=True) for d in (50, 1700, 9)]
B = [torch.randn(4, d, 3, requires_grad=True) for d in (40, 30, 2500)]
D = ml.pairwise_frobenius(A, B, 0.5)
(D * torch.randn(3, 4, 4)).sum().backward()
results = [nll, divergence, logits.grad, D, *(t.grad for t in (*A, *B))]
"""


def python(program: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program where no test has imported or replaced anything."""
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the CPU's levels and threads ----------------------------------------------------------------


def results(tmp_path: Path, name: str, *args: str, **environment: str) -> list[torch.Tensor]:
    file = tmp_path / f"{name}.pt"
    succeed(python(OPERATORS + f"torch.save(results, {str(file)!r})", *args, **environment))
    return torch.load(file)


@pytest.mark.slow
def test_every_level_computes_the_same(tmp_path):
    from multilora import _C

    levels = _C.supported_levels()
    assert levels == LEVELS[: len(levels)]
    expected = results(tmp_path, "reference", MULTILORA_BACKEND="reference")
    for level in levels:
        got = results(tmp_path, level, MULTILORA_CPU_LEVEL=level)
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
        # Sums are taken in vectors of another length: what shows that the level was used.
        if level != levels[-1]:
            best = results(tmp_path, "best")
            assert any(not torch.equal(g, b) for g, b in zip(got, best))


@pytest.mark.slow
def test_one_thread_and_two_give_the_same_bits(tmp_path):
    for one, two in zip(results(tmp_path, "1", "1"), results(tmp_path, "2", "2")):
        assert torch.equal(one, two)


WRONG_LEVEL = """
import torch, multilora as ml
from multilora import _C
_C.supported_levels = lambda: ["scalar"]
A, B = torch.ones(2, 1, 3), torch.ones(2, 3, 1)
for run in (lambda: ml.lora_gram(A, B), lambda: ml.use_backend("cpu").__enter__()):
    try:
        run()
    except ml.BackendUnavailableError as error:
        print(error)
with ml.use_backend("reference"):
    print(ml.lora_gram(A, B)[0, 1].item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "avx1024"])
def test_a_level_that_this_cpu_does_not_have(level):
    # It was requested, so that nothing falls back to another one.
    one, other, value = succeed(python(WRONG_LEVEL, MULTILORA_CPU_LEVEL=level)).splitlines()
    for error in (one, other):
        assert f"MULTILORA_CPU_LEVEL asks for '{level}', and this CPU has scalar" in error
    assert value == "9.0"


# --- how tensors come in -------------------------------------------------------------------------


def test_swapped_arguments_are_found():
    from multilora import _C
    from multilora.ops.native import view

    logits, targets = torch.randn(4, 6, 5), torch.zeros(6, dtype=torch.int64)
    stats, core, value = torch.empty(3, 4, 6), torch.empty(6, 4, 4), torch.empty(6)
    views, saved = [view(logits), view(targets), view(value), None], (view(stats), view(core))
    options = {"eps": 1e-3, "det": False, "where": 1}
    assert _C.volume_forward(*views, saved, **options) == -1
    with pytest.raises(ValueError, match=r"stats \(6, 4, 4\) should be \(3, 4, 6\)"):
        _C.volume_forward(*views, saved[::-1], **options)
    with pytest.raises(ValueError, match=r"value \(4, 6, 5\) should be \(6\)"):
        _C.volume_forward(*views[:2], view(logits), None, saved, **options)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.volume_forward(*views, saved, *options.values())
    # A tensor has up to three dimensions.
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.volume_forward(view(logits[None]), *views[1:], saved, **options)


def test_native_functions_take_at_most_eight_arguments():
    from multilora import _C

    modules = [_C]
    if HAS_MODULE or shutil.which("nvcc"):
        from multilora import _C_cuda

        modules.append(_C_cuda)
    counts = {}
    for module in modules:
        for name, function in vars(module).items():
            if callable(function) and not isinstance(function, type):
                signature = function.__doc__.splitlines()[0]
                counts[name] = len(re.findall(r"\w+: ", signature))
    assert counts["volume_forward"] == counts["volume_backward"] == 8
    assert max(counts.values()) <= 8, counts


def test_only_the_bindings_know_pybind11():
    users = {f.name for f in (ROOT / "csrc").rglob("*.*") if "pybind11" in f.read_text()}
    assert users == {"bindings.h", "bindings.cpp", "bindings_cuda.cpp"}


# --- modules that are missing --------------------------------------------------------------------

MISSING = """
import sys
sys.modules["multilora._C"] = sys.modules["multilora._C_cuda"] = None
import torch, multilora as ml
from multilora.app.cli import main
A, B = torch.ones(2, 1, 3), torch.ones(2, 3, 1)
print(ml.lora_gram(A, B)[0, 1].item())
for name in ("cpu", "cuda"):
    try:
        ml.use_backend(name).__enter__()
    except ml.BackendUnavailableError as error:
        print(error)
sys.exit(main(["info"]))
"""


@pytest.mark.slow
def test_without_the_modules_the_reference_runs():
    value, cpu, cuda, *info = succeed(python(MISSING)).splitlines()
    assert value == "9.0"
    assert "'cpu' was requested" in cpu and "installed without a C++ compiler" in cpu
    assert "'cuda' was requested" in cuda and "installed without nvcc (12.5 or newer)" in cuda
    info = "\n".join(info)
    assert "reference: available" in info and "cpu: missing: the module multilora._C" in info
    assert "used by default: reference on a CPU, reference on a GPU" in info


def test_cpu_kernels_are_the_default_on_a_cpu():
    program = """
import torch
from multilora.ops import dispatch
print(dispatch.backend_of("lora_gram", (torch.ones(1),)))
print(dispatch.backend_of("lora_gram", (torch.ones(1, device="meta"),)))
print(dispatch.backend_of("lora_linear", (torch.ones(1),)))
"""
    assert succeed(python(program)).split() == ["cpu", "reference", "reference"]


# --- what setup.py builds ------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path):
    """setup.py in a copy of the sources, with compilers that write down how they are called."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "multilora").mkdir()
    shutil.copy(ROOT / "multilora" / "_version.py", tmp_path / "multilora" / "__init__.py")
    log = tmp_path / "log"
    script = f"""#!/bin/sh
echo "$0 $*" >> {log}
[ "$1" = --version ] && echo "release, V@NVCC@"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && : > "$2"
  shift
done
exit 0
"""

    def run(
        *tools: str, nvcc: str = "13.0.88", **environment: str
    ) -> tuple[subprocess.CompletedProcess, set[str], str]:
        folder = tmp_path / "tools"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        folder.mkdir()
        log.write_text("")
        for tool in tools:
            (folder / tool).write_text(script.replace("@NVCC@", nvcc))
            (folder / tool).chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "NVCC", "MULTILORA_BUILD")}
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
            cwd=tmp_path,
            env={**kept, "PATH": str(folder), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        modules = {file.name.split(".")[0] for file in (tmp_path / "out").rglob("*.so")}
        return done, modules, log.read_text()

    return run


@pytest.fixture
def driver(tmp_path):
    """A folder with a stand-in for the NVIDIA driver, which sees so many GPUs."""

    def make(gpus: int, error: int = 0) -> str:
        folder = tmp_path / f"driver-{gpus}-{error}"
        if not folder.exists():
            folder.mkdir()
            (folder / "driver.cpp").write_text(
                f'extern "C" int cuInit(unsigned) {{ return {error}; }}'
                f'extern "C" int cuDeviceGetCount(int* n) {{ *n = {gpus}; return {error}; }}'
            )
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            library = ["-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "driver.cpp"]
            subprocess.run([*compiler, *library], check=True)
        return str(folder)

    return make


def test_without_a_compiler_nothing_is_built(build):
    for tools in ((), ("nvcc",)):
        done, modules, _ = build(*tools)
        assert done.returncode == 0, done.stderr
        assert modules == set()
    done, _, _ = build(MULTILORA_BUILD="cpu")
    assert done.returncode != 0 and "MULTILORA_BUILD=cpu needs c++" in done.stderr


def test_without_nvcc_the_cpu_module_is_built(build):
    done, modules, log = build("c++")
    assert done.returncode == 0, done.stderr
    assert modules == {"_C"}
    levels = LEVELS if platform.machine() == "x86_64" else LEVELS[:1]
    assert all(log.count(f"-DMULTILORA_LEVEL={level} ") > 1 for level in levels)
    done, _, _ = build("c++", MULTILORA_BUILD="cuda")
    assert done.returncode != 0 and "MULTILORA_BUILD=cuda needs nvcc" in done.stderr


def test_an_old_nvcc_is_left_alone(build):
    assert build("c++", "nvcc", nvcc="12.4.131")[1] == {"_C"}
    done, _, _ = build("c++", "nvcc", nvcc="12.4.131", MULTILORA_BUILD="cuda")
    assert done.returncode != 0 and "needs nvcc 12.5 or newer; found 12.4.131" in done.stderr


def test_with_nvcc_and_a_gpu_both_modules_are_built_for_every_chip(build, driver):
    done, modules, log = build("c++", "nvcc", LD_LIBRARY_PATH=driver(gpus=1))
    assert done.returncode == 0, done.stderr
    assert modules == {"_C", "_C_cuda"}
    assert "multilora._C: built\nmultilora._C_cuda: built\n" in done.stdout
    for code in ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"):
        assert f"-gencode=arch={code}" in log


def test_without_a_gpu_the_cuda_module_is_built_on_request_only(build, driver):
    for gpus, error in ((0, 0), (0, 100)):
        done, modules, log = build("c++", "nvcc", LD_LIBRARY_PATH=driver(gpus, error))
        assert modules == {"_C"} and "_C_cuda: not built: there is no GPU" in done.stdout
        assert "-gencode" not in log
        folder = driver(gpus, error)
        done, modules, log = build("c++", "nvcc", LD_LIBRARY_PATH=folder, MULTILORA_BUILD="cuda")
        assert modules == {"_C", "_C_cuda"} and "multilora._C_cuda: built\n" in done.stdout


def test_what_is_asked_for_is_built(build):
    assert build("c++", "nvcc", MULTILORA_BUILD="none")[1] == set()
    assert build("c++", "nvcc", MULTILORA_BUILD="cpu")[1] == {"_C"}
    assert build("c++", "nvcc", MULTILORA_BUILD="cuda")[1] == {"_C", "_C_cuda"}
    done, _, _ = build("c++", MULTILORA_BUILD="gpu")
    assert done.returncode != 0 and "auto, cpu, cuda, none; got 'gpu'" in done.stderr


def test_a_compiler_that_fails_says_how_to_go_without(build, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    done, modules, _ = build(CXX=str(broken))
    assert done.returncode != 0 and modules == set()
    assert "multilora._C does not build; MULTILORA_BUILD=none goes without it" in done.stderr
    assert "no such header" in done.stdout + done.stderr


# --- the real CUDA module ------------------------------------------------------------------------

# Elsewhere in the tests another one stands in for it, whose kernels are executed from their PTX.
# Where it was requested, it has to be there.
HAS_MODULE = bool(list((ROOT / "multilora").glob("_C_cuda*.so")))
with_module = pytest.mark.skipif(
    not HAS_MODULE and os.environ.get("MULTILORA_BUILD") != "cuda",
    reason="multilora._C_cuda is not built: MULTILORA_BUILD=cuda builds it",
)


@pytest.mark.slow
@with_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which launches succeed")
def test_a_launch_without_a_gpu_is_an_error():
    program = """
import torch
from multilora import _C_cuda
from multilora.ops import cuda
assert "sm_90a" in _C_cuda.build_info()["targets"]
try:
    cuda.traces([torch.ones(2, 1, 3)], [torch.ones(2, 3, 1)], [1.0], True)
except RuntimeError as error:
    print(error)
"""
    assert "multilora: " in succeed(python(program)) and "CUDA" in succeed(python(program))


@pytest.mark.slow
@with_module
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_machine_code_of_the_cuda_kernels(target):
    program = """
import json, sys, dataclasses
from triton import knobs
from multilora.tools.kernels.machine_code import native_reports
reports = native_reports(sys.argv[1], knobs.nvidia.cuobjdump.path)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""
    reports = json.loads(succeed(python(program, target)))
    assert len(reports) > 5
    assert all(report["spills"] == 0 for report in reports)
    gemms = [report for report in reports if "gemm" in report["kernel"]]
    if target == "sm_90":
        assert gemms
        assert all(report["wgmma"] >= 4 and report["bulk_copies"] >= 3 for report in gemms)
