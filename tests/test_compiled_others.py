"""The geometry, the volume and the loss as Triton compiles them, executed from their PTX."""

import pytest
from compiled.child import Child

CHIPS = (80, 90)
MODES = ("late", "random")
# Roundings of the result's dtype: the sums are in float64. In float64, of sums of some hundred
# terms, and of factorisations.
ROUNDINGS = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "float64": 256.0}

# (d_in, d_out, r) of the layers; K; dtype.
GEOMETRY = {
    "two layers": (((48, 80, 4), (33, 17, 4)), 3, "float32"),
    "in parts": (((600, 96, 3),), 5, "float32"),
    "aligned": (((64, 32, 16),), 2, "float32"),
    "mixed ranks": (((48, 32, 2), (32, 64, 8)), 4, "float32"),
    "several tiles": (((32, 64, 4),), 20, "float32"),
    "bfloat16": (((32, 48, 4),), 3, "bfloat16"),
    "float64": (((40, 24, 3),), 2, "float64"),
}

# (K, N, C); dtype; kind; scale of the logits.
LOSSES = {
    "4 particles": ((4, 20, 100), "float32", "logdet", 2.0),
    "bfloat16": ((4, 20, 100), "bfloat16", "logdet", 2.0),
    "aligned": ((4, 6, 96), "bfloat16", "logdet", 2.0),
    "wide range": ((4, 8, 101), "bfloat16", "logdet", 30.0),
    "many classes, in parts": ((4, 3, 3000), "bfloat16", "logdet", 2.0),
    "8 particles": ((8, 3, 600), "float32", "logdet", 2.0),
    "products": ((8, 5, 10), "bfloat16", "logdet", 2.0),
    "16 particles": ((16, 3, 50), "float32", "logdet", 2.0),
    "det": ((4, 9, 40), "float32", "det", 2.0),
    "det is zero": ((5, 7, 3), "float32", "det", 2.0),
    "fewer classes than particles": ((6, 5, 4), "float32", "logdet", 2.0),
    "float16": ((2, 6, 7), "float16", "logdet", 2.0),
    "float64": ((3, 7, 30), "float64", "logdet", 2.0),
}

# The same at all chips: what is not finite comes from arithmetic.
NONFINITE = [
    ((4, 6, 20), "logdet"),
    ((4, 6, 20), "det"),
    ((16, 4, 20), "logdet"),
    ((3, 5, 300), "logdet"),
    ((6, 5, 4), "logdet"),
]


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def check(errors: dict[str, float], most: float) -> None:
    assert all(error <= most for error in errors.values()), errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", GEOMETRY)
def test_geometry(case, chip, mode, child):
    errors = child.call("problems.geometry", *GEOMETRY[case], chip, mode)
    print(errors)
    check(errors, ROUNDINGS[GEOMETRY[case][2]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", LOSSES)
def test_loss(case, chip, mode, child):
    errors = child.call("problems.loss", *LOSSES[case], chip, mode)
    print(errors)
    check(errors, ROUNDINGS[LOSSES[case][1]])


@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "nan row", "-inf row"])
@pytest.mark.parametrize("sizes, kind", NONFINITE, ids=str)
def test_what_is_not_finite(sizes, kind, what, child):
    found, expected = child.call("problems.nonfinite", sizes, kind, what, 90, "late")
    assert found == expected
