"""The volume and the loss as Triton compiles them, executed from their PTX on this CPU."""

import pytest

from compiled.child import check, cover, cross

pytestmark = pytest.mark.slow

# (K, N, C); dtype; kind; scale of the logits.
CASES = {
    "4 particles": ((4, 6, 100), "float32", "logdet", 2.0),
    "aligned": ((4, 6, 96), "bfloat16", "logdet", 2.0),
    "products": ((8, 5, 10), "bfloat16", "logdet", 2.0),
    "fewer classes than particles": ((6, 5, 4), "float32", "logdet", 2.0),
    "float64": ((3, 7, 30), "float64", "logdet", 2.0),
    # These run on Hopper only: on Ampere they would execute nothing new.
    "wide range": ((4, 6, 100), "bfloat16", "logdet", 30.0),
    "many classes, in parts": ((4, 3, 3000), "bfloat16", "logdet", 2.0),
    "8 particles, in parts": ((8, 3, 600), "float32", "logdet", 2.0),
    "16 particles": ((16, 3, 50), "float32", "logdet", 2.0),
    "det": ((4, 6, 100), "float32", "det", 2.0),
    "det is zero": ((5, 7, 3), "float32", "det", 2.0),
    "float16": ((2, 6, 7), "float16", "logdet", 2.0),
}
ON_HOPPER_ONLY = set(list(CASES)[5:])
# The sums are in float64, from exponentials in float32 or in float64. With ε = 1e-4 the inverse of
# the Gram matrix makes their roundings up to some hundred times as large.
ROUNDINGS = {"bfloat16": 2.0, "float16": 2.0, "float32": 128.0, "float64": 512.0}

EXECUTED = {
    "_volume_forward_kernel": {
        "KIND": {"zero", "logdet", "det"},
        "ALIGNED": {False, True},
        "SPLIT": {False, True},
        "DOT": {False, True},
        "CLASS_SIDE": {0, 16},
    },
    "_volume_merge_kernel": {},
    "_particle_loss_mean_kernel": {},
    "_volume_backward_kernel": {
        "LOSS": {False, True},
        "ALIGNED": {False, True},
        "DOT": {False, True},
        "CLASS_SIDE": {0, 16},
    },
}


@pytest.mark.parametrize("case, chip, mode", cross(CASES, ON_HOPPER_ONLY))
def test_loss(case, chip, mode, compiling):
    errors = compiling.call("problems.loss", *CASES[case], chip, mode)
    check(errors, ROUNDINGS[CASES[case][1]])


@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "nan row", "-inf row"])
@pytest.mark.parametrize(
    "case", ["4 particles", "det", "16 particles", "fewer classes than particles"]
)
def test_what_is_not_finite(case, what, compiling):
    sizes, _, kind, _ = CASES[case]
    found, expected = compiling.call("problems.nonfinite", sizes, kind, what, 90, "late")
    assert found == expected


def test_every_kernel_was_executed(compiling):
    for case in CASES:
        compiling.call("problems.loss", *CASES[case], 90, "late")
    cover(compiling, ["loss"], EXECUTED)
