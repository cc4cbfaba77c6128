"""lora_linear as Triton compiles it for Ampere and Hopper, executed from its PTX on this CPU."""

import pytest
from compiled.child import Child

# K, T, d_in, d_out, r; dtype; whether all particles share their rows.
CASES = {
    "shrink inside": ((2, 150, 128, 264, 16), "bfloat16", False),
    "rank 20, inside": ((2, 70, 72, 88, 20), "bfloat16", False),
    "rank 64, first": ((1, 70, 128, 96, 64), "bfloat16", False),
    "odd sizes, two rank steps": ((3, 66, 77, 59, 37), "bfloat16", False),
    "ones": ((1, 1, 1, 1, 1), "bfloat16", False),
    "shared": ((2, 140, 128, 136, 16), "bfloat16", True),
    "float16": ((2, 40, 64, 96, 16), "float16", False),
    "float32": ((2, 40, 48, 32, 16), "float32", False),
    "float32, shared": ((2, 33, 64, 32, 16), "float32", True),
    "float64": ((2, 40, 48, 32, 16), "float64", False),
    "float64, shared": ((2, 33, 64, 32, 16), "float64", True),
}
CHIPS = (80, 90)
MODES = ("late", "random")
# A few roundings of the result's dtype, and of sums of some hundred terms in float32 and float64.
ROUNDINGS = {"bfloat16": 2.0, "float16": 2.0, "float32": 16.0, "float64": 32.0}


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def check(errors: dict[str, float], most: float) -> None:
    assert all(error <= most for error in errors.values()), errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_linear(case, chip, mode, child):
    errors = child.call("problems.linear", *CASES[case], chip, mode)
    print(errors)
    check(errors, ROUNDINGS[CASES[case][1]])
