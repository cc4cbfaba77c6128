"""multilora.ops.grouped_linear: values, gradients, groups of any sizes, dtypes, errors."""

import pytest
import torch

import multilora as ml
import oracles
from multilora.ops import grouped_linear
from oracles import (
    Inside,
    check_compiled,
    check_operator,
    check_second_derivatives,
    double_gradients,
    gradients,
    relative_error,
)

pytestmark = oracles.each_backend("grouped_linear")

# float32 has 6e-8 a rounding, and sums of fewer than 100 terms are taken here.
FP32 = 1e-5

# The groups' rows, d_in, d_out: equal groups (one batched product), unequal ones in widths that
# PyTorch's grouped product takes and in widths that it does not, and empty groups at every place.
PROBLEMS = [
    ((1,), 1, 1),
    ((5,), 7, 11),
    ((4, 4, 4), 16, 8),
    ((3, 3), 5, 2),
    ((1, 6, 2), 16, 24),
    ((0, 3, 0, 0, 7, 0), 8, 12),
    ((0, 3, 0, 0, 7, 0), 3, 5),
    ((17, 1, 40), 13, 1),
    ((2, 9), 1, 19),
    ((70, 0, 3), 20, 3),
    ((30, 2, 41), 2, 36),
    (tuple(range(12)), 37, 33),
]


def problem(counts=(2, 0, 3), d_in=7, d_out=4, dtype=torch.float32):
    """x, weight, ends."""
    x = torch.randn(sum(counts), d_in, dtype=dtype)
    weight = torch.randn(len(counts), d_out, d_in, dtype=dtype)
    return x, weight, torch.tensor(counts).cumsum(0).int()


def oracle(x, weight, ends):
    """One row at a time."""
    groups = torch.searchsorted(ends.contiguous(), torch.arange(len(x)).int(), right=True)
    return torch.einsum("ti,toi->to", x.double(), weight.double()[groups])


def check_against_oracle(x, weight, ends, tolerance=FP32):
    y = grouped_linear(x, weight, ends)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert relative_error(y, oracle(x, weight, ends)) < tolerance
    upstream = torch.randn_like(y)
    got = gradients(lambda x, w: grouped_linear(x, w, ends), [x, weight], upstream)
    expected = double_gradients(lambda x, w: oracle(x, w, ends), [x, weight], upstream)
    for value, right, leaf in zip(got, expected, (x, weight)):
        assert value.dtype == leaf.dtype
        assert relative_error(value, right) < tolerance
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    # A sum over nothing is zero, not whatever the memory held.
    assert torch.equal(got[1][empty], torch.zeros_like(weight[empty]))


@pytest.mark.parametrize("counts, d_in, d_out", PROBLEMS, ids=str)
def test_values_and_gradients(counts, d_in, d_out):
    check_against_oracle(*problem(counts, d_in, d_out))


@pytest.mark.parametrize("counts", [(4, 4), (1, 0, 7)], ids=str)
def test_float64(counts):
    check_against_oracle(*problem(counts, 16, 8, torch.float64), tolerance=1e-14)


@pytest.mark.parametrize("counts", [(4, 4), (1, 0, 7)], ids=str)
@pytest.mark.parametrize("d_in, d_out", [(16, 8), (7, 3)])
def test_non_contiguous_views(counts, d_in, d_out):
    x, weight, ends = problem(counts, d_in, d_out)
    views = (
        x.T.contiguous().T,
        weight.transpose(0, 2).contiguous().transpose(0, 2),
        ends.repeat_interleave(2)[::2],
    )
    assert not any(v.is_contiguous() for v in views)
    check_against_oracle(*views)


def test_rows_that_start_between_16_bytes():
    x, weight, ends = problem((1, 5), 16, 8)
    moved = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    check_against_oracle(moved, weight, ends)


def test_expanded_upstream_gradient():
    x, weight, ends = problem()
    got = gradients(lambda w: grouped_linear(x, w, ends), [weight], torch.ones(()).expand(5, 4))
    expected = double_gradients(lambda w: oracle(x, w, ends), [weight], torch.ones(5, 4))
    assert relative_error(got[0], expected[0]) < FP32


@pytest.mark.parametrize("counts, d_in, d_out", [((0, 0), 7, 4), ((2, 3), 0, 4), ((2, 3), 7, 0)])
def test_sums_over_nothing(counts, d_in, d_out):
    x, weight, ends = problem(counts, d_in, d_out)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = grouped_linear(*leaves, ends)
    assert torch.equal(y, torch.zeros(sum(counts), d_out))
    y.sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.heavy
@pytest.mark.parametrize("counts", [(2, 2), (0, 1, 3)], ids=str)
def test_gradcheck(counts):
    x, weight, ends = problem(counts, 3, 2, torch.float64)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), leaves)


@pytest.mark.heavy
def test_second_derivatives_are_right_or_refused():
    x, weight, ends = problem(dtype=torch.float64)
    check_second_derivatives(lambda x, w: grouped_linear(x, w, ends), [x, weight])


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_wanted_gradients_are_computed(backend, wanted):
    x, weight, ends = problem((2, 6), 16, 8)
    both = gradients(lambda x, w: grouped_linear(x, w, ends), [x, weight], torch.ones(8, 8))
    leaf = {"x": x, "weight": weight}[wanted].requires_grad_()
    y = grouped_linear(x, weight, ends)
    with Inside() as inside:
        y.backward(torch.ones(8, 8))
    torch.testing.assert_close(leaf.grad, both[wanted == "weight"])
    assert (x.grad is None) != (weight.grad is None)
    # Triton's kernels are not PyTorch operators, and a GPU multiplies float32 group by group.
    if backend == "reference" and oracles.DEVICE == "cpu":
        products = [name for name, *_ in inside.calls if name.endswith("mm")]
        assert products == ["_grouped_mm"]
    grads = torch.ops.multilora.grouped_linear_backward(
        torch.ones(8, 8), x.detach(), weight.detach(), ends, [wanted == "x", wanted == "weight"]
    )
    assert [g.numel() > 0 for g in grads] == [wanted == "x", wanted == "weight"]


def test_equal_groups_are_one_batched_product():
    x, weight, ends = problem((3, 3, 3))
    with ml.use_backend("reference"), Inside() as inside:
        grouped_linear(x, weight, ends)
    assert [name for name, *_ in inside.calls if name.endswith("mm")] == ["bmm"]


@pytest.mark.heavy
@pytest.mark.parametrize("counts", [(2, 2), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, counts):
    x, weight, ends = problem(counts, 8, 16)
    leaves = [x.to(dtype).requires_grad_(), weight.requires_grad_()]
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    check_operator(torch.ops.multilora.grouped_linear.default, (*leaves, ends), **tolerances)


@pytest.mark.parametrize("needs", [[True, True], [False, True]], ids=str)
def test_opcheck_backward(needs):
    x, weight, ends = problem()
    args = (torch.randn(5, 4), x, weight, ends, needs)
    check_operator(torch.ops.multilora.grouped_linear_backward.default, args)


def low_rank(x, lora_A, lora_B, ends):
    """The low-rank part of unequal numbers of rows per particle, among other operators."""
    return grouped_linear(grouped_linear(x.tanh(), lora_A, ends), lora_B, ends).relu()


def under_autocast(x, lora_A, lora_B, ends):
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        return low_rank(x, lora_A, lora_B, ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, compiler, dynamic",
    [
        (low_rank, "aot_eager", False),
        (low_rank, "aot_eager", True),
        (under_autocast, "aot_eager", False),
        (low_rank, "inductor", True),
    ],
)
def test_compile(function, compiler, dynamic):
    problems = []
    for rows in (5, 6, 9) if dynamic else (5,):
        x, lora_A, ends = problem((2, 0, rows - 2), 7, 3)
        problems.append([x, lora_A, torch.randn(3, 11, 3), ends])
    check_compiled(function, problems, compiler, dynamic)


@pytest.mark.parametrize("counts", [(6, 6), (2, 0, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_masters(dtype, counts):
    x, weight, ends = problem(counts, 16, 8)
    # The rows, the matrices' cast and the result are rounded: a few half-precision roundings.
    check_against_oracle(x.to(dtype), weight, ends, tolerance=4 * torch.finfo(dtype).eps)
    check_against_oracle(x.to(dtype), weight.to(dtype), ends, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast(master_dtype):
    x, weight, ends = problem((2, 0, 9), 16, 8)
    weight = weight.to(master_dtype)

    def run(x, weight):
        with torch.autocast(oracles.DEVICE, torch.bfloat16):
            return grouped_linear(x, weight, ends)

    def by_hand(x, weight):
        # A float32 master stays one, and its gradient comes back in float32.
        masters = weight.dtype == torch.float32
        return grouped_linear(x.bfloat16(), weight if masters else weight.bfloat16(), ends)

    y = run(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_hand(x, weight))
    upstream = torch.randn_like(y)
    leaves = [x, weight]
    for got, expected, leaf in zip(
        gradients(run, leaves, upstream), gradients(by_hand, leaves, upstream), leaves
    ):
        assert got.dtype == leaf.dtype
        assert torch.equal(got, expected)


def test_autocast_leaves_float64_alone():
    args = problem(dtype=torch.float64)
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        y = grouped_linear(*args)
    assert relative_error(y, oracle(*args)) < 1e-14


def changed(index, change):
    args = list(problem())
    args[index] = change(args[index])
    return args


@pytest.mark.parametrize(
    "index, change",
    [
        (0, lambda x: x[:, :6]),
        (0, lambda x: x[None]),
        (1, lambda weight: weight.mT),
        (1, lambda weight: weight[:2]),
        (1, lambda weight: weight[0]),
        (2, lambda ends: ends[:2]),
        (2, lambda ends: ends[None]),
    ],
)
def test_wrong_shapes(index, change):
    args = changed(index, change)
    with pytest.raises(ValueError, match="grouped_linear needs x") as error:
        grouped_linear(*args)
    for tensor in args:
        assert str(tuple(tensor.shape)) in str(error.value)


def test_no_group():
    with pytest.raises(ValueError, match="G >= 1"):
        grouped_linear(torch.zeros(0, 7), torch.zeros(0, 4, 7), torch.zeros(0).int())


@pytest.mark.parametrize("index", range(3))
def test_another_device(index):
    with pytest.raises(ValueError, match="one device") as error:
        grouped_linear(*changed(index, lambda t: t.to("meta")))
    assert "meta" in str(error.value) and "(5, 7)" in str(error.value)


@pytest.mark.parametrize(
    "index, dtype",
    [(0, torch.float64), (0, torch.int64), (1, torch.bfloat16), (2, torch.int64)],
)
def test_wrong_dtypes(index, dtype):
    with pytest.raises(TypeError, match="dtype") as error:
        grouped_linear(*changed(index, lambda t: t.to(dtype)))
    assert str(dtype) in str(error.value) and "(5, 7)" in str(error.value)


@pytest.mark.skipif(oracles.DEVICE != "cpu", reason="nothing waits for a GPU's ends")
@pytest.mark.parametrize("ends", [[2, 2, 4], [2, 2, 6], [3, 2, 5], [-1, 2, 5]], ids=str)
def test_wrong_ends(ends):
    x, weight, _ = problem()
    with pytest.raises(ValueError, match="ascend") as error:
        grouped_linear(x, weight, torch.tensor(ends).int())
    assert str(ends) in str(error.value) and "which is 5" in str(error.value)


def test_meta_tensors_give_shapes():
    y = grouped_linear(*(t.to("meta") for t in problem()))
    assert y.device.type == "meta" and y.shape == (5, 4) and y.is_contiguous()
