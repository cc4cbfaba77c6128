"""lora_linear as Triton compiles it for Ampere and Hopper, executed from its PTX on this CPU."""

import pytest

from compiled.child import check, cover, cross

pytestmark = pytest.mark.slow

# K, T, d_in, d_out, r; dtype; whether all particles share their rows.
CASES = {
    "shrink inside": ((2, 140, 128, 264, 16), "bfloat16", False),
    "odd sizes, two rank steps": ((2, 66, 77, 59, 37), "bfloat16", False),
    "shared": ((2, 140, 72, 136, 16), "bfloat16", True),
    "float32": ((2, 40, 48, 32, 16), "float32", False),
    "float32, shared": ((2, 33, 64, 32, 16), "float32", True),
    "float64, shared": ((2, 33, 48, 32, 16), "float64", True),
    "float64": ((2, 40, 48, 32, 16), "float64", False),
    # These run on Hopper only: on Ampere they would execute nothing new.
    "rank 20, inside": ((2, 70, 72, 88, 20), "bfloat16", False),
    "rank 64, first": ((1, 70, 128, 96, 64), "bfloat16", False),
    "ones": ((1, 1, 1, 1, 1), "bfloat16", False),
    "float16": ((2, 40, 64, 96, 16), "float16", False),
}
ON_HOPPER_ONLY = {"rank 20, inside", "rank 64, first", "ones", "float16"}
# A few roundings of the result's dtype, and of sums of some hundred terms in float32 and float64.
ROUNDINGS = {"bfloat16": 2.0, "float16": 2.0, "float32": 16.0, "float64": 32.0}

EXECUTED = {
    "_lora_linear_gemm_kernel": {
        "SHRINK": {False, True},
        "SHARED": {"", "out", "in"},
        "W_DEPTH_FIRST": {False, True},
        "DESCRIBED": {False, True},
        "RANK_STEPS": {1, 2},
    },
    "_lora_linear_pass_kernel": {
        "SHARED": {False, True},
        "SHRINK": {False, True},
        "OUTER": {False, True},
        "DESCRIBED": {False, True},
    },
    "_lora_linear_reduce_kernel": {"BOTH": {True}},
    "_lora_linear_expand_kernel": {"HAS_BIAS": {False, True}},
}


@pytest.mark.parametrize("case, chip, mode", cross(CASES, ON_HOPPER_ONLY))
def test_linear(case, chip, mode, compiling):
    errors = compiling.call("problems.linear", *CASES[case], chip, mode)
    check(errors, ROUNDINGS[CASES[case][1]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_onto_a_base_layer(dtype, compiling):
    errors = compiling.call("problems.linear_add", (2, 70, 64, 48, 8), dtype, 90, "late")
    check(errors, ROUNDINGS[dtype])


def test_every_kernel_was_executed(compiling):
    for case, chip, mode in cross(CASES, ON_HOPPER_ONLY):
        if chip == 90 and mode == "late":
            compiling.call("problems.linear", *CASES[case], chip, mode)
    cover(compiling, ["gemm", "thin"], EXECUTED)
