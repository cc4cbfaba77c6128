"""grouped_linear as Triton compiles it for Ampere and Hopper, executed from its PTX on this CPU."""

import pytest

from compiled.child import check, cover, cross

pytestmark = pytest.mark.slow

# The rows of each group, d_in, d_out; the dtypes of the rows and of the matrices.
CASES = {
    "unequal groups": (((70, 0, 3, 137), 72, 88), "bfloat16", "float32"),
    "odd sizes": (((0, 33, 1, 0, 20, 0), 77, 5), "bfloat16", "bfloat16"),
    "float32": (((40, 0, 9), 33, 20), "float32", "float32"),
    # These run on Hopper only: on Ampere they would execute nothing new.
    "float64": (((20, 7), 24, 10), "float64", "float64"),
    "float16": (((70, 90, 0), 136, 3), "float16", "float32"),
    "ones": (((1,), 1, 1), "bfloat16", "float32"),
}
ON_HOPPER_ONLY = {"float64", "float16", "ones"}
# A rounding of the result's dtype, and of sums of some hundred terms in float32 and float64.
ROUNDINGS = {"bfloat16": 1.0, "float16": 1.0, "float32": 16.0, "float64": 32.0}

EXECUTED = {
    "_grouped_linear_kernel": {"GROUPS": {1, 2, 4, 8}, "BLOCK_M": {16, 64}},
    "_grouped_outer_kernel": {"BLOCK_K": {16, 64}, "BLOCK_N": {16, 32}},
}


@pytest.mark.parametrize("case, chip, mode", cross(CASES, ON_HOPPER_ONLY))
def test_grouped(case, chip, mode, compiling):
    errors = compiling.call("problems.grouped", *CASES[case], chip, mode)
    of_result, of_master = (ROUNDINGS[name] for name in CASES[case][1:])
    check({name: errors[name] for name in ("y", "dx")}, of_result)
    check({"dW": errors["dW"]}, of_master)


def test_every_kernel_was_executed(compiling):
    for case, chip, mode in cross(CASES, ON_HOPPER_ONLY):
        if chip == 90 and mode == "late":
            compiling.call("problems.grouped", *CASES[case], chip, mode)
    cover(compiling, ["grouped"], EXECUTED)
