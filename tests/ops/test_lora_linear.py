"""ml.lora_linear: values, gradients, dtypes, the shared input, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
import oracles
from oracles import (
    Inside,
    check_compiled,
    check_operator,
    check_second_derivatives,
    double_gradients,
    gradients,
    relative_error,
)

# The GEMM for Hopper refuses most of these sizes and dtypes: test_lora_gemm.py.
pytestmark = oracles.each_backend("lora_linear", but=("cuda",))

# float32 has 6e-8 a rounding, and sums of fewer than 100 terms are taken here: 1e-5 leaves room
# for any order of summation and none for a wrong term.
FP32 = 1e-5

# K, the axes between the particles and d_in, d_in, d_out, r
SHAPES = [
    (1, (1,), 1, 1, 1),
    (1, (5,), 7, 11, 3),
    (2, (3, 5), 13, 17, 2),
    (3, (), 5, 3, 1),
    (5, (2, 3, 2), 16, 8, 4),
    (7, (19,), 23, 5, 7),
    (8, (31,), 37, 29, 16),
]


def problem(K=3, lead=(5,), d_in=7, d_out=11, rank=2, dtype=torch.float32, shared=False):
    """x, weight, lora_A, lora_B, bias."""
    x = torch.randn(1 if shared else K, *lead, d_in, dtype=dtype)
    weight = torch.randn(d_out, d_in, dtype=dtype)
    lora_A = torch.randn(K, rank, d_in, dtype=dtype)
    lora_B = torch.randn(K, d_out, rank, dtype=dtype)
    return x, weight, lora_A, lora_B, torch.randn(d_out, dtype=dtype)


def check_against_oracle(x, weight, lora_A, lora_B, bias, scaling, tolerance=FP32):
    y = ml.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    expected = oracles.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    assert y.dtype == x.dtype
    assert relative_error(y, expected) < tolerance

    def of(function):
        return lambda x, A, B: function(x, weight, A, B, bias, scaling)

    upstream = torch.randn_like(y)
    got = gradients(of(ml.lora_linear), [x, lora_A, lora_B], upstream)
    expected = double_gradients(of(oracles.lora_linear), [x, lora_A, lora_B], upstream)
    for value, oracle, leaf in zip(got, expected, (x, lora_A, lora_B)):
        assert value.dtype == leaf.dtype
        assert relative_error(value, oracle) < tolerance


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, with_bias, shared):
    x, weight, lora_A, lora_B, bias = problem(*shape, shared=shared)
    check_against_oracle(x, weight, lora_A, lora_B, bias if with_bias else None, 0.5)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_non_contiguous_views(shared):
    x, weight, lora_A, lora_B, bias = problem(4, (3, 5), 7, 11, 2, shared=shared)
    views = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        weight.T.contiguous().T,
        lora_A.mT.contiguous().mT,
        lora_B.transpose(0, 1).contiguous().transpose(0, 1),
        bias.repeat_interleave(3)[::3],
    )
    assert not any(v.is_contiguous() for v in views)
    check_against_oracle(*views, -1.5)


def test_the_result_may_be_changed_in_place():
    # Models do this with a layer's output.
    x, weight, lora_A, lora_B, bias = problem()
    upstream = torch.randn(3, 5, 11)

    def doubled(x, A, B):
        y = ml.lora_linear(x, weight, A, B, bias)
        y += 1
        return y.mul_(2)

    got = gradients(doubled, [x, lora_A, lora_B], upstream)
    plain = gradients(
        lambda x, A, B: ml.lora_linear(x, weight, A, B, bias), [x, lora_A, lora_B], 2 * upstream
    )
    torch.testing.assert_close(got, plain)


def test_expanded_upstream_gradient():
    # y.sum() hands the backward a gradient whose strides are all zero.
    x, weight, lora_A, lora_B, _ = problem()
    lora_A.requires_grad_()
    ml.lora_linear(x, weight, lora_A, lora_B).sum().backward()
    A = lora_A.detach().double().requires_grad_()
    oracles.lora_linear(x, weight, A, lora_B).sum().backward()
    assert relative_error(lora_A.grad, A.grad) < FP32


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_rows(lead, shared):
    x, weight, lora_A, lora_B, bias = problem(lead=lead, shared=shared)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = ml.lora_linear(x, weight, lora_A, lora_B, bias)
    assert y.shape == (3, *lead, 11)
    y.sum().backward()
    # A sum over nothing is zero, not whatever the memory held.
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_no_input_features():
    x, weight, lora_A, lora_B, bias = problem(d_in=0)
    lora_B.requires_grad_()
    y = ml.lora_linear(x, weight, lora_A, lora_B, bias)
    assert torch.equal(y, bias.expand(3, 5, 11))
    y.sum().backward()
    assert torch.equal(lora_B.grad, torch.zeros_like(lora_B))


@pytest.mark.heavy
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_gradcheck(shared):
    x, weight, lora_A, lora_B, bias = problem(2, (3,), 3, 2, 2, torch.float64, shared)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    assert torch.autograd.gradcheck(
        lambda x, A, B: ml.lora_linear(x, weight, A, B, bias, 0.5), leaves
    )


@pytest.mark.heavy
def test_second_derivatives_are_right_or_refused():
    x, weight, lora_A, lora_B, _ = problem(2, (3,), 3, 2, 2, torch.float64)
    check_second_derivatives(lambda x, A, B: ml.lora_linear(x, weight, A, B), [x, lora_A, lora_B])


def frozen(function):
    """The function of a weight and a bias that may require gradients."""
    return lambda x, weight, lora_A, lora_B, bias: function(
        x, weight.detach(), lora_A, lora_B, bias.detach()
    )


def test_weight_and_bias_are_frozen():
    x, weight, lora_A, lora_B, bias = problem()
    for t in (weight, lora_A, bias):
        t.requires_grad_()
    # One that is to be trained is refused: tests/ops/test_operators.py.
    frozen(ml.lora_linear)(x, weight, lora_A, lora_B, bias).sum().backward()
    assert lora_A.grad is not None
    assert weight.grad is None and bias.grad is None


@pytest.mark.cover
@pytest.mark.heavy
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, shared):
    x, weight, lora_A, lora_B, bias = problem(shared=shared)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for b in (bias, None):
        args = (leaves[0], weight, leaves[1], leaves[2], b, 0.5)
        check_operator(torch.ops.multilora.lora_linear.default, args, **tolerances)


@pytest.mark.cover
@pytest.mark.heavy
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("needs", [[True] * 3, [False, True, False]], ids=["all", "A"])
def test_opcheck_backward(needs, shared):
    x, weight, lora_A, lora_B, _ = problem(shared=shared)
    _, shrunk = torch.ops.multilora.lora_linear(x, weight, lora_A, lora_B, None, 0.5)
    args = (torch.randn(3, 5, 11), x, weight, lora_A, lora_B, shrunk, 0.5, needs)
    check_operator(torch.ops.multilora.lora_linear_backward.default, args)


def surrounded(x, weight, lora_A, lora_B, bias):
    """The operator twice, the second time with a shared input, among other operators."""
    hidden = ml.lora_linear(x.tanh(), weight, lora_A, lora_B, bias, 0.5).relu()
    return hidden + ml.lora_linear(x[:1].expand_as(x), weight, lora_A, lora_B)


def under_autocast(x, weight, lora_A, lora_B, bias):
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        return ml.lora_linear(x, weight, lora_A, lora_B, bias, 0.5)


# inductor checks the strides that the fake operators promise. It gets the function alone: code
# for the operators around it would have to be compiled, which takes long and tests nothing of ours.
@pytest.mark.slow
@pytest.mark.parametrize(
    "function, compiler",
    [(surrounded, "aot_eager"), (under_autocast, "aot_eager"), (ml.lora_linear, "inductor")],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(function, compiler, dynamic):
    sizes = (5, 6, 9) if dynamic else (5,)
    check_compiled(frozen(function), [problem(lead=(n,)) for n in sizes], compiler, dynamic)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["one", "expanded leaf"])
def test_compile_a_shared_input(form):
    x, *others = problem(4, (6,), shared=True)
    x = x if form == "one" else x.expand(4, 6, 7)
    # An expanded leaf keeps one gradient a particle, compiled too.
    check_compiled(frozen(ml.lora_linear), [[x, *others]], "aot_eager", dynamic=False)


@pytest.mark.heavy
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_masters(dtype, shared):
    x, weight, lora_A, lora_B, bias = problem(4, (6,), 16, 8, 4, shared=shared)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    # Inputs, S, the adapters' cast and the result are rounded: a few half-precision roundings.
    check_against_oracle(x, weight, lora_A, lora_B, bias, 0.5, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.heavy
@pytest.mark.parametrize("master_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(master_dtype):
    x, weight, lora_A, lora_B, bias = problem(4, (6,), 16, 8, 4)
    lora_A, lora_B = lora_A.to(master_dtype), lora_B.to(master_dtype)

    def run(x, A, B):
        with torch.autocast(oracles.DEVICE, torch.bfloat16):
            return ml.lora_linear(x, weight, A, B, bias, 0.5)

    def by_hand(x, A, B):
        half = torch.bfloat16
        return ml.lora_linear(x.to(half), weight.to(half), A, B, bias.to(half), 0.5)

    y = run(x, lora_A, lora_B)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_hand(x, lora_A, lora_B))
    upstream = torch.randn_like(y)
    leaves = [x, lora_A, lora_B]
    for got, expected, leaf in zip(
        gradients(run, leaves, upstream), gradients(by_hand, leaves, upstream), leaves
    ):
        assert got.dtype == leaf.dtype
        assert torch.equal(got, expected)


def test_autocast_leaves_float64_alone():
    args = problem(dtype=torch.float64)
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        y = ml.lora_linear(*args)
    assert relative_error(y, oracles.lora_linear(*args)) < 1e-14


class TestSharedInput:
    """x.expand(K, ...) and x (1, ...): the particles read the same rows."""

    @pytest.mark.parametrize("lead", [(6,), (2, 3), ()], ids=str)
    def test_gradient_reaches_the_expanded_tensor(self, lead):
        x, weight, lora_A, lora_B, bias = problem(4, lead, shared=True)

        def shared(x, A, B):
            return ml.lora_linear(x.expand(4, *x.shape[1:]), weight, A, B, bias, 0.5)

        def oracle(x, A, B):
            return oracles.lora_linear(x, weight, A, B, bias, 0.5)

        leaves = [x, lora_A, lora_B]
        upstream = torch.randn(4, *lead, 11)
        assert relative_error(shared(*leaves), oracle(*leaves)) < FP32
        for got, expected in zip(
            gradients(shared, leaves, upstream), double_gradients(oracle, leaves, upstream)
        ):
            assert relative_error(got, expected) < FP32

    def test_an_expanded_leaf_keeps_one_gradient_a_particle(self):
        x, weight, lora_A, lora_B, _ = problem(4, (6,), shared=True)
        upstream = torch.randn(4, 6, 11)
        leaf = x.expand(4, 6, 7)
        (got,) = gradients(lambda x: ml.lora_linear(x, weight, lora_A, lora_B), [leaf], upstream)
        (expected,) = double_gradients(
            lambda x: oracles.lora_linear(x, weight, lora_A, lora_B), [leaf.clone()], upstream
        )
        assert relative_error(got, expected) < FP32
        assert not torch.equal(got[0], got[1])

    @pytest.mark.parametrize("form", ["expand", "one", "repeat"])
    def test_base_product_is_computed_once(self, form):
        K, T, d_in, d_out = 4, 6, 7, 11
        x, weight, lora_A, lora_B, _ = problem(K, (T,), d_in, d_out, shared=True)
        x.requires_grad_()
        given = {"expand": x.expand(K, T, d_in), "one": x, "repeat": x.repeat(K, 1, 1)}[form]
        with ml.use_backend("reference"), Inside() as inside:
            ml.lora_linear(given, weight, lora_A, lora_B).sum().backward()
        # Forward x Wᵀ and backward dY W; a copy per particle, as "repeat" makes it, costs K times.
        once = 2 * T
        assert rows_through(weight, inside) == (K * once if form == "repeat" else once)


def rows_through(weight, inside: Inside) -> int:
    """How many rows were multiplied with the weight or its transpose."""
    products = ("linear", "matmul", "mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
    weights = {tuple(weight.shape), tuple(weight.T.shape)}
    rows = 0
    for name, inputs, outputs in inside.calls:
        if name in products and any(shape[-2:] in weights for shape in inputs):
            rows += math.prod(outputs[0][:-1])
    return rows


@pytest.mark.parametrize("wanted", ["x", "A", "B", "AB"])
def test_only_wanted_gradients_are_computed(wanted):
    x, weight, lora_A, lora_B, _ = problem()
    leaves = {"x": x, "A": lora_A, "B": lora_B}
    all_grads = gradients(
        lambda x, A, B: ml.lora_linear(x, weight, A, B), [x, lora_A, lora_B], torch.ones(3, 5, 11)
    )
    for name in wanted:
        leaves[name].requires_grad_()
    y = ml.lora_linear(x, weight, lora_A, lora_B)
    with ml.use_backend("reference"), Inside() as inside:
        y.backward(torch.ones_like(y))
    for (name, leaf), expected in zip(leaves.items(), all_grads):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None
    # dX is the only gradient that reads the weight.
    assert rows_through(weight, inside) == (15 if "x" in wanted else 0)


@pytest.mark.parametrize("index", range(3))
def test_unwanted_gradients_come_back_empty(index):
    x, weight, lora_A, lora_B, _ = problem()
    _, shrunk = torch.ops.multilora.lora_linear(x, weight, lora_A, lora_B, None, 1.0)
    inputs = (torch.randn(3, 5, 11), x, weight, lora_A, lora_B, shrunk, 1.0)
    full = torch.ops.multilora.lora_linear_backward(*inputs, [True] * 3)
    part = torch.ops.multilora.lora_linear_backward(*inputs, [i == index for i in range(3)])
    for i in range(3):
        if i == index:
            torch.testing.assert_close(part[i], full[i])
        else:
            assert part[i].shape == (0,)


def test_zero_B_is_the_base_layer():
    x, weight, lora_A, lora_B, bias = problem()
    y = ml.lora_linear(x, weight, lora_A, torch.zeros_like(lora_B), bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


def changed(index, change):
    args = list(problem())
    args[index] = change(args[index])
    return args


@pytest.mark.parametrize(
    "index, change",
    [
        (0, lambda x: x[:2]),
        (0, lambda x: x[..., :6]),
        (0, lambda x: x[0, 0]),
        (1, lambda weight: weight.T),
        (1, lambda weight: weight[None]),
        (2, lambda lora_A: lora_A[:2]),
        (2, lambda lora_A: lora_A[:, :1]),
        (2, lambda lora_A: lora_A[0]),
        (3, lambda lora_B: lora_B.mT),
        (3, lambda lora_B: lora_B[..., :0]),
        (4, lambda bias: bias[:10]),
    ],
)
def test_wrong_shapes(index, change):
    args = changed(index, change)
    with pytest.raises(ValueError, match="lora_linear needs x") as error:
        ml.lora_linear(*args)
    for tensor in args:
        assert str(tuple(tensor.shape)) in str(error.value)


@pytest.mark.parametrize("empty", ["particles", "rank"])
def test_without_particles_or_rank(empty):
    args = problem(K=0) if empty == "particles" else problem(rank=0)
    with pytest.raises(ValueError, match="K, r >= 1"):
        ml.lora_linear(*args)


@pytest.mark.parametrize("index", range(5))
def test_another_device(index):
    args = changed(index, lambda t: t.to("meta"))
    with pytest.raises(ValueError, match="one device") as error:
        ml.lora_linear(*args)
    assert "meta" in str(error.value) and "(3, 5, 7)" in str(error.value)


@pytest.mark.parametrize(
    "index, dtype",
    [
        (0, torch.float64),
        (0, torch.int64),
        (1, torch.bfloat16),
        (2, torch.bfloat16),
        (2, torch.float64),
        (3, torch.float16),
        (4, torch.float64),
    ],
)
def test_wrong_dtypes(index, dtype):
    args = changed(index, lambda t: t.to(dtype))
    with pytest.raises(TypeError, match="dtype") as error:
        ml.lora_linear(*args)
    assert str(dtype) in str(error.value) and "(3, 5, 7)" in str(error.value)


def test_integers_everywhere():
    # All alike, and still no dtype to compute in.
    args = [t.long() for t in problem()]
    with pytest.raises(TypeError, match=r"floating.*torch\.int64"):
        ml.lora_linear(*args)


def test_meta_tensors_give_shapes():
    args = [t.to("meta") for t in problem()]
    y = ml.lora_linear(*args)
    assert y.device.type == "meta" and y.shape == (3, 5, 11) and y.is_contiguous()
