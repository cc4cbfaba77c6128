"""The geometry and SVGD's update as Triton compiles them, executed from their PTX; planted faults.

test_compiled_volume.py, test_compiled_linear.py and test_compiled_grouped.py have the others.
"""

import re
from pathlib import Path

import pytest
import test_compiled_grouped
import test_compiled_linear
import test_compiled_volume
import torch

from compiled.child import check, cover, cross
from multilora.ops.triton import configs
from multilora.ops.triton.common import Chip

pytestmark = pytest.mark.slow

# (d_in, d_out, r) of the layers; K; dtype.
CASES = {
    "mixed ranks": (((48, 36, 2), (33, 17, 8)), 3, "float32"),
    "several tiles": (((40, 24, 22),), 3, "float32"),
    "bfloat16": (((32, 48, 4),), 3, "bfloat16"),
    "float64, in parts": (((272, 24, 3),), 2, "float64"),
}
# The sums are in float64; in float64 they are of some hundred terms.
ROUNDINGS = {"bfloat16": 1.0, "float32": 2.0, "float64": 64.0}

EXECUTED = {
    "_pointer_table_kernel": {},
    "_lora_gram_partial_kernel": {"RANK": {0, 4}, "VECTOR": {1, 8}},
    "_lora_gram_trace_kernel": {"DISTANCE": {False, True}},
    "_lora_gram_weigh_kernel": {},
    "_lora_gram_apply_kernel": {"MIX": {0, 1, 2}, "RANK": {0, 4}, "VECTOR": {1, 8}},
}

FAULTS = [
    "the fence before products and stores is missing",
    "one more group of products may be pending",
    "the last products are not waited for",
    "half of the bytes are expected",
    "the barrier's parity stays the same",
    "barriers are set up for two arrivals",
    "a descriptor has another swizzle",
    "an operand is taken for transposed",
    "the tile's staging is reused at once",
    "the stores are not committed",
    "the tile is staged 16 bytes further",
    "threads do not wait for each other",
    "the copies are not waited for",
    "one more stage may be pending",
    "copies of other threads are not waited for",
    "copies do not end with the row",
    "a matrix is loaded from 16 bytes further",
    "stores have no mask",
    "every program does the first tile",
    "rows of the next group are stored over",
    "the copies of a group's rows are not waited for",
    "sums are of other lanes",
    "loads of logits have no mask",
    "products of float64 are not added up",
]


@pytest.mark.parametrize("case, chip, mode", cross(CASES, set()))
def test_geometry(case, chip, mode, compiling):
    errors = compiling.call("problems.geometry", *CASES[case], chip, mode)
    check(errors, ROUNDINGS[CASES[case][2]])


def test_there_are_sums_in_parts():
    (((d_in, d_out, rank),), particles, dtype) = CASES["float64, in parts"]
    sizes = particles, (rank,), (d_in, d_out), getattr(torch, dtype)
    assert all(configs.geometry(*sizes, Chip(chip, 2)).chunk < d_in for chip in (80, 90))


def test_every_kernel_was_executed(compiling):
    for case in CASES:
        compiling.call("problems.geometry", *CASES[case], 90, "late")
    cover(compiling, ["frobenius"], EXECUTED)


def test_no_kernel_is_in_none_of_these_files():
    sources = Path(__file__).parents[2] / "multilora" / "ops" / "triton"
    kernels = set()
    for source in sources.glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M))
    files = test_compiled_grouped, test_compiled_linear, test_compiled_volume
    assert kernels == set(EXECUTED).union(*(file.EXECUTED for file in files))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, compiling):
    found = compiling.call("faults.found", fault)
    assert found is not None
    mode, seed, how = found
    # In the same schedule the kernel is right as it was compiled.
    assert compiling.call("faults.right", fault, mode, seed), how


def test_every_fault_is_planted(compiling):
    assert compiling.call("faults.names") == FAULTS
