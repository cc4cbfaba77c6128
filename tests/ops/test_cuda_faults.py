"""Faults planted in the PTX of the CUDA kernels are found, one by one."""

import re

import pytest
import test_cuda_volume as volume
import test_lora_gemm as gemm
import test_svgd_update as svgd
import torch

import multilora as ml
import oracles
from oracles import relative_error
from ptx import native

pytestmark = [pytest.mark.usefixtures("executed_ptx"), pytest.mark.slow]

# --- problems: small ones, in which every planted fault matters -----------------------------------


def product():
    """More steps than stages, a low-rank step, the edges of tiles, two particles."""
    args = gemm.tensors(2, 20, 456, 72, 16, torch.bfloat16, False)
    gemm.check(args, False, gemm.run(*args, False, 128, 1))


def loss(K, N, C):
    run, oracle = volume.of_loss(torch.randint(C, (N,)), "logdet")
    volume.check(
        run, oracle, torch.randn(K, N, C), torch.randn(K + 1), volume.TOLERANCE[volume.F32]
    )


def few():
    loss(3, 9, 7)


def many():
    # Also a second step of the classes.
    loss(9, 2, 70)


def parts():
    loss(2, 1, 1100)


def distances():
    """Two tiles of rows, two steps of features."""
    A, B = torch.randn(2, 17, 40), torch.randn(2, 8, 17)
    got = ml.pairwise_frobenius(A, B, 0.5)
    assert relative_error(got, oracles.pairwise_frobenius(A, B, 0.5)) < 1e-6


def update():
    args = svgd.problem(2, [(5, 8, 17)], full=True)
    for got, expected in zip(svgd.flat(svgd.svgd_update(*args)), svgd.flat(svgd.oracle(*args))):
        assert relative_error(got, expected) < 1e-6


# --- faults ---------------------------------------------------------------------------------------


def replaced(pattern, new, which=slice(None), after=""):
    """A change of PTX: these occurrences of a pattern, behind the first one of `after`."""

    def change(text):
        start = re.search(after, text).end()
        for match in reversed(list(re.finditer(pattern, text[start:]))[which]):
            at = slice(start + match.start(), start + match.end())
            text = text[: at.start] + match.expand(new) + text[at.stop :]
        return text

    return change


def nth(number):
    return slice(number, number + 1)


PARITY = r"(mbarrier\.try_wait\.parity\S* \S+, \[\S+\], )(%r\d+);"
OTHER_PARITY = r"{ .reg .b32 other; xor.b32 other, \2, 1; \1other; }"
EXPECT = r"(mbarrier\.arrive\.expect_tx\S* _, \[\S+\], )(%r\d+);"
INIT = r"(mbarrier\.init\S* \[\S+\], )(%?\w+);"
HALF = r"{ .reg .b32 half; shr.u32 half, \2, 1; \1half; }"
STORE_WAIT = r"(cp\.async\.bulk\.wait_group\.read) 1;"
WARP_SYNC, BARRIER = r"bar\.warp\.sync\s[^;]*;", r"bar\.sync\s[^;]*;"
# The upper half of a descriptor: 128 bytes of swizzle, a stride of 64 units of 16 bytes.
DESCRIPTOR = str((1 << 62) + (64 << 32))
OTHER_SWIZZLE = str((2 << 62) + (64 << 32) - (1 << 64))
OTHER_STRIDE = str((1 << 62) + (32 << 32))

GEMM, SUMS, FINISH = r"lora_gemm_kernel", r"volume_sums_of_many_kernel", r"volume_finish_kernel"
PARTIAL, APPLY = r"lora_gram_partial_kernel", r"lora_gram_apply_kernel"

# The kernel, the problem, the mode and the change.
FAULTS = {
    # Fences.
    "no proxy fence before a store": (
        (GEMM, product, "late"),
        replaced(r"fence\.proxy\.async\S*;", "", slice(1, None)),
    ),
    "no wgmma fence": ((GEMM, product, "late"), replaced(r"wgmma\.fence\S*;", "")),
    # Waits.
    "staging reused without waiting": ((GEMM, product, "late"), replaced(STORE_WAIT, "")),
    "staging reused one store too early": (
        (GEMM, product, "late"),
        replaced(STORE_WAIT, r"\1 2;"),
    ),
    "last stores not waited for": (
        (GEMM, product, "late"),
        replaced(r"cp\.async\.bulk\.wait_group\.read 0;", ""),
    ),
    "a product group too many pending": (
        (GEMM, product, "late"),
        replaced(r"(wgmma\.wait_group\S*) 1;", r"\1 2;"),
    ),
    "last products not waited for": (
        (GEMM, product, "late"),
        replaced(r"(wgmma\.wait_group\S*) 0;", r"\1 1;"),
    ),
    "a store not committed": (
        (GEMM, product, "late"),
        replaced(r"cp\.async\.bulk\.commit_group;", "", nth(0)),
    ),
    # Phases and counts of mbarriers.
    "producer waits for the other phase": (
        (GEMM, product, "late"),
        replaced(PARITY, OTHER_PARITY, nth(0)),
    ),
    "consumer waits for the other phase": (
        (GEMM, product, "late"),
        replaced(PARITY, OTHER_PARITY, nth(1)),
    ),
    "a stage freed by half of the warps": (
        (GEMM, product, "random"),
        replaced(INIT, HALF, slice(1, None, 2)),
    ),
    "a stage never freed": (
        (GEMM, product, "late"),
        replaced(r"mbarrier\.arrive\.shared\S* _, \[\S+\];", "", nth(0)),
    ),
    "half of the bytes expected": ((GEMM, product, "late"), replaced(EXPECT, HALF)),
    "twice the bytes expected": (
        (GEMM, product, "late"),
        replaced(EXPECT, HALF.replace("shr.u32", "shl.b32")),
    ),
    "mbarriers used before they are set up": (
        (GEMM, product, "random"),
        replaced(BARRIER, "", nth(0)),
    ),
    # Swizzles, descriptors, coordinates.
    "staging not swizzled": (
        (GEMM, product, "late"),
        replaced(
            r"xor\.b32(\s+%r\d+, %r\d+), %r\d+;", r"mov.b32\1;", after="bulk.wait_group.read 1"
        ),
    ),
    "operands with another swizzle": (
        (GEMM, product, "late"),
        replaced(DESCRIPTOR, OTHER_SWIZZLE),
    ),
    "operands with half the stride": ((GEMM, product, "late"), replaced(DESCRIPTOR, OTHER_STRIDE)),
    "columns of the first particle for all": (
        (GEMM, product, "late"),
        replaced(r"(\{%r\d+, %r\d+, )%r\d+(\}\], \[)", r"\g<1>0\2", nth(1)),
    ),
    # Warps.
    "staging stored before the warp has written": (
        (GEMM, product, "threads"),
        replaced(WARP_SYNC, "", slice(1, None, 2)),
    ),
    "classes read before they are there": (
        (SUMS, many, "threads"),
        replaced(WARP_SYNC, "", nth(0)),
    ),
    "products of what is not there yet": (
        (SUMS, many, "threads"),
        replaced(WARP_SYNC, "", nth(1)),
    ),
    "classes overwritten in use": ((SUMS, many, "threads"), replaced(WARP_SYNC, "", nth(2))),
    "factors of parts not waited for": (
        (FINISH, parts, "threads"),
        replaced(WARP_SYNC, "", slice(0, 3)),
    ),
    "pivots not waited for": ((FINISH, few, "threads"), replaced(WARP_SYNC, "", slice(3, None))),
    "a sum that leaves out lanes": (
        (r"volume_sums_kernel", few, "late"),
        replaced(r"(shfl\.sync\.bfly\S*\s[^;]*?), [^,]+(, [^,]+, [^,]+;)", r"\1, 0\2"),
    ),
    "the first lanes named for all": (
        (r"volume_sums_kernel", few, "late"),
        replaced(r"(shfl\.sync\.bfly\S*\s[^;]*?), [^,]+;", r"\1, 15;"),
    ),
    "core not waited for": (
        (r"volume_gradient_kernel", few, "threads"),
        replaced(WARP_SYNC, ""),
    ),
    "a gradient not written": (
        (r"volume_gradient_kernel", few, "late"),
        replaced(r"st\.global\.f32\s[^;]*;", "", nth(0)),
    ),
    # Blocks.
    "core of a block not waited for": (
        (r"volume_gradient_of_many_kernel", many, "random"),
        replaced(BARRIER, ""),
    ),
    "totals not waited for": ((r"volume_means_kernel", few, "random"), replaced(BARRIER, "")),
    "panels overwritten in use": ((PARTIAL, distances, "random"), replaced(BARRIER, "", nth(0))),
    "panels not waited for": ((PARTIAL, distances, "random"), replaced(BARRIER, "", nth(1))),
    "warps add up at once": ((PARTIAL, distances, "random"), replaced(BARRIER, "", nth(2))),
    "the last warp's sum left out": ((PARTIAL, distances, "random"), replaced(BARRIER, "", nth(3))),
    "the other side of the diagonal left out": (
        (PARTIAL, distances, "late"),
        replaced(r"st\.global\.f64\s[^;]*;", "", nth(1)),
    ),
    "a product left out": (
        (PARTIAL, distances, "late"),
        replaced(r"mma\.sync[^;]*;", "", nth(1)),
    ),
    "norms not waited for": (
        (r"lora_gram_trace_kernel", distances, "random"),
        replaced(BARRIER, ""),
    ),
    "weights not waited for": ((APPLY, update, "random"), replaced(BARRIER, "", nth(1))),
    "result not waited for": ((APPLY, update, "random"), replaced(BARRIER, "", nth(3))),
}


@pytest.mark.parametrize(
    "problem, mode", sorted({fault[0][1:] for fault in FAULTS.values()}, key=str)
)
def test_unchanged(problem, mode):
    with native.launches.running(mode=mode):
        problem()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    (kernel, problem, mode), change = FAULTS[fault]
    changed = []

    def planted(name, text):
        if not re.search(kernel, name):
            return text
        changed.append(change(text) != text)
        return change(text)

    # The emulator raises, or numbers are wrong; in a random order not at every attempt.
    with (
        native.launches.running(mode=mode, change=planted),
        pytest.raises((RuntimeError, AssertionError), match=r"EmulationError|relative_error"),
    ):
        for seed in range(1 if mode == "late" else 12):
            with native.launches.running(seed=seed):
                problem()
    assert changed and all(changed)
