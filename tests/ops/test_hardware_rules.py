"""Rules of the hardware that small tests on a CPU do not meet: offsets past 32 bits, bases off
their alignment, drivers, and what machine code must have.

Memory that nobody has touched costs nothing, so views may lie as far apart as on a large GPU.
"""

import ast
import dataclasses
import mmap
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import multilora as ml
from multilora.ops import dispatch
from multilora.ops import triton as backend
from multilora.ops.triton import blocks, common, configs, frobenius
from multilora.ops.triton.common import A100, H200, Chip
from multilora.tools.kernels import machine_code
from multilora.tools.kernels.compile import resident

pytestmark = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="on a GPU, bench.gpu's checks are as large"
)


@pytest.fixture
def far(monkeypatch):
    """far(values, strides) -> the values in a view with these strides; what lies around is zero, to
    2³¹ elements before it, so that an offset that wraps around reads zeros and does not crash."""
    # Tensors of the CPU are the interpreter's own: it would write all of their memory back.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    def place(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        extent = sum((n - 1) * step for n, step in zip(values.shape, strides)) + 1
        size = (2**31 + extent) * values.element_size()
        # MAP_NORESERVE, which Python names from 3.13 on.
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        room.madvise(mmap.MADV_NOHUGEPAGE)
        memory = torch.frombuffer(room, dtype=values.dtype)
        view = memory.as_strided(values.shape, strides, 2**31)
        return view.copy_(values)

    return place


# --- 64-bit offsets ------------------------------------------------------------------------------


# Every axis of both factors in turn: K, then r and d_in (r and d_out), 2³¹ and more apart.
FAR = {
    "particles": ((2**31 + 8, 24, 1), (2**31 + 8, 5, 1)),
    "ranks": ((200, 2**29 + 8, 1), (40, 1, 2**29 + 8)),
    "widths": ((5, 1, 2**27 + 8), (5, 2**27 + 8, 1)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("path", ["shrink inside", "shrink first", "accumulate"])
@pytest.mark.parametrize("axis", FAR)
def test_factors_that_are_far_apart(axis, path, far, monkeypatch):
    rule = configs.lora_gemm

    def forced(*args):
        inside = path == "shrink inside" and args[-1] is True
        return dataclasses.replace(rule(*args), path="shrink first" if inside else path)

    monkeypatch.setattr(configs, "lora_gemm", forced)
    x, weight = torch.randn(2, 9, 24), torch.randn(40, 24)
    near = torch.randn(2, 5, 24), torch.randn(2, 40, 5)
    apart = [far(values, strides) for values, strides in zip(near, FAR[axis])]
    for A, B in (apart, near):
        y, shrunk = backend.lora_linear(x, weight, A, B, None, 0.5)
        needs = [True, True, True]
        grads = backend.lora_linear_backward(y, x, weight, A, B, shrunk, 0.5, needs)
        if A is apart[0]:
            found = [y, shrunk, grads[0], grads[1], grads[2]]
    assert all(torch.equal(a, b) for a, b in zip(found, [y, shrunk, *grads]))


def test_logits_that_are_far_apart(far):
    near = torch.randn(3, 20, 8)
    targets = torch.randint(8, (20,))
    apart = far(near, (2**33, 2**28, 1))
    upstream, nll = torch.randn(20), torch.randn(3)
    far_upstream, far_nll = far(upstream, (2**28,)), far(nll, (2**30 + 2**29,))
    results = []
    for logits, grad, grad_nll in ((apart, far_upstream, far_nll), (near, upstream, nll)):
        value, *saved = backend.volume(logits, targets, 1e-4, "logdet", False)
        mean_nll, divergence, *stats, count = backend.volume(logits, targets, 1e-4, "logdet", True)
        results.append(
            [
                value,
                *saved,
                mean_nll,
                divergence,
                backend.volume_backward(grad, logits, targets, *saved),
                backend.volume_backward(divergence, logits, targets, *stats, grad_nll, count),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


@triton.jit
def _move_block_kernel(from_ptr, to_ptr, k, row, col, rows, cols):
    block = blocks.load_block(None, from_ptr, k, row, col, rows, cols, False, 16, 16)
    blocks.store_block(None, to_ptr, block, k, row, col, rows, cols, False, 16, 16)


def test_blocks_of_tensors_with_more_than_2_to_the_31_elements(far):
    rows, cols = 2**20 + 8, 1024
    values = torch.randn(8, cols)
    # The last rows of the last of three particles: only these are there to be read.
    place = 2 * rows * cols + 2**20 * cols
    ends = [far(torch.zeros(2, 1), (place + 8 * cols - 1, 1)) for _ in range(2)]
    here, there = (end.as_strided((8, cols), (cols, 1), 2**31 + place) for end in ends)
    here.copy_(values)
    for col in range(0, cols, 16):
        _move_block_kernel[(1,)](ends[0], ends[1], 2, 2**20, col, rows, cols)
    assert torch.equal(there, values)


_load_rows = frobenius._load_rows


@triton.jit
def _load_rows_kernel(x, out, row, col, d, rank, LORA_B: tl.constexpr):
    c, at = row + tl.arange(0, 16), col + tl.arange(0, 16)
    width = d.to(tl.int64)
    values = _load_rows(x, c[:, None], at[None, :], 300, width, rank, LORA_B, 0)
    tl.store(out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], values)


@pytest.mark.parametrize("is_B", [False, True], ids=["lora_A", "lora_B"])
def test_factors_with_more_than_2_to_the_31_elements(is_B, far):
    d, rank, row, col = 2**20, 16, 256 * 16, 2**20 - 16
    values = torch.randn(16, 16).double()
    # Particle 256: rows of A_cat, or columns of B_cat.
    place = 256 * rank * d + (col * rank if is_B else col)
    steps = (1, rank) if is_B else (d, 1)
    end = far(torch.zeros(2, 1), (place + 16 * d, 1))
    end.as_strided((16, 16), steps, 2**31 + place).copy_(values)
    out = torch.zeros(16, 16, dtype=torch.float64)
    _load_rows_kernel[(1,)](end, out, row, col, d, rank, is_B)
    assert torch.equal(out, values.float().double())


def test_gram_matrices_with_more_elements_than_32_bits_count():
    A, B = torch.zeros(1, 1, 1).expand(800, 60, 3), torch.zeros(1, 1, 1).expand(800, 4, 60)
    refusal = pytest.raises(ml.BackendUnavailableError, match=r"\(800, 60, 3\).*46340.*not 48000")
    with ml.use_backend("triton"), refusal:
        ml.lora_gram(A, B)


# --- alignment -----------------------------------------------------------------------------------


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element off the 16 bytes that bulk copies start at."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B", "bias", "grad", "shrunk"])
def test_bases_off_their_alignment(which):
    t = {
        "x": torch.randn(2, 20, 24).half(),
        "weight": torch.randn(40, 24).half(),
        "lora_A": torch.randn(2, 8, 24).half(),
        "lora_B": torch.randn(2, 40, 8).half(),
        "bias": torch.randn(40).half(),
        "grad": torch.randn(2, 20, 40).half(),
        "shrunk": torch.randn(2, 20, 8).half(),
    }

    def both(x, weight, lora_A, lora_B, bias, grad, shrunk):
        forward = backend.lora_linear(x, weight, lora_A, lora_B, bias, 0.5)
        needs = [True, True, True]
        return *forward, *backend.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, shrunk, 0.5, needs
        )

    aligned = both(**t)
    odd = shifted(t[which])
    assert odd.is_contiguous() and odd.data_ptr() % 16 and t[which].data_ptr() % 16 == 0
    for a, b in zip(aligned, both(**{**t, which: odd})):
        # Copies and pointers may divide the sums otherwise.
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_rows_that_bulk_copies_cannot_take():
    assert blocks.describable(common.H200, torch.float16, 8)
    assert not blocks.describable(common.H200, torch.float16, 4)
    assert not blocks.describable(common.H200, torch.float16, 8, 12)
    assert not blocks.describable(common.A100, torch.float16, 8)


# --- drivers -------------------------------------------------------------------------------------


def test_drivers_that_are_too_old_are_named():
    assert dispatch._old_driver("nvcc 12.9.1", 12020) is None
    assert dispatch._old_driver("nvcc 12.9.1", 13000) is None
    reason = dispatch._old_driver("nvcc 13.0.88", 12080)
    assert "nvcc 13.0.88" in reason and "CUDA 12.8" in reason and "driver" in reason


_ASKED_ON_A_GPU = """
import sys, types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
module = types.ModuleType("multilora._C_cuda")
module.build_info = lambda: {"compiler": "nvcc 13.0.88"}
sys.modules["multilora._C_cuda"] = module
from multilora.ops import dispatch
print(dispatch.missing_reason("cuda"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "driver, reason", [(13000, "None"), (12080, "driver is one for CUDA 12.8")]
)
def test_the_driver_is_asked_for_its_version(tmp_path, driver, reason):
    source = f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {driver}; return 0; }}'
    (tmp_path / "driver.cpp").write_text(source)
    library = tmp_path / "libcuda.so.1"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run([*compiler, "-shared", "-o", library, tmp_path / "driver.cpp"], check=True)
    folders = filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")])
    done = subprocess.run(
        [sys.executable, "-c", _ASKED_ON_A_GPU],
        env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout


def test_pytorch_has_every_name_that_is_read_of_it():
    # Also where only a GPU's code reads it.
    root = Path(__file__).parents[2]
    names = {
        ast.unparse(node)
        for folder in ("multilora", "bench")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    names = {name for name in names if re.fullmatch(r"torch(\.\w+)+", name)}
    assert "torch.cuda.get_device_capability" in names
    assert [name for name in sorted(names) if not _is_there(name)] == []


def _is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


# --- machine code --------------------------------------------------------------------------------


def test_how_many_blocks_a_processor_holds():
    # Registers are allotted by eight per thread and 256 per warp; a block reserves 1 KB.
    assert resident(H200, registers=128, shared=100 * 1024, warps=8) == 2
    assert resident(H200, registers=129, shared=100 * 1024, warps=8) == 1
    assert resident(H200, registers=32, shared=113 * 1024, warps=4) == 2
    assert resident(H200, registers=32, shared=114 * 1024, warps=4) == 1
    assert resident(A100, registers=255, shared=0, warps=8) == 1
    assert resident(Chip(90, 132), registers=16, shared=0, warps=4) == 16


def test_code_that_does_not_do_what_its_source_says():
    def report(**changes):
        about = {"kernel": "k", "problem": "p", "configuration": "", "registers": 168}
        about |= {"spills": 0, "shared": 0, "wgmma": 9, "mma": 0, "bulk_copies": 3}
        about |= {"serialized": False}
        return machine_code.Report(**(about | changes))

    assert report().failure(10**6) is report().note() is None
    # Registers that a group gives up must be enough for what the others take.
    pool = (384, 128 * 40 + 256 * 232)
    assert report(pool=pool).failure(10**6) is None
    assert "64512 registers, 61440" in report(pool=pool, registers=160).failure(10**6)
    assert report(programs=2, resident=2).note() is None
    assert "1 of 2" in report(programs=2, resident=1).note()


SASS = """
  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


def test_waits_behind_every_product_are_seen():
    assert machine_code.is_serialized(3 * SASS)
    assert not machine_code.is_serialized(
        3 * SASS.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "") + SASS
    )
    assert not machine_code.is_serialized("DMMA.16x8x8 R4 ;")


def test_registers_that_warp_groups_hand_over():
    code = "USETMAXREG.DEALLOC.CTAPOOL 0x28 ;\nUSETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;"
    assert machine_code.register_pool(code, 384) == (384, 128 * 40 + 256 * 232)
    assert machine_code.register_pool("HGMMA ;", 384) is None
