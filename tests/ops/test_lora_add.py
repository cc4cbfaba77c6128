"""multilora.ops.lora_add: values, gradients, whose memory it takes, dtypes, errors."""

import contextlib
from functools import partial

import pytest
import torch
from test_lora_linear import FP32, SHAPES
from torch.utils.flop_counter import FlopCounterMode

import multilora as ml
import oracles
from multilora.ops import lora_add
from oracles import (
    Inside,
    check_compiled,
    check_operator,
    check_second_derivatives,
    double_gradients,
    gradients,
    relative_error,
)

pytestmark = oracles.each_backend("lora_add_")


def problem(K=3, lead=(5,), d_in=7, d_out=11, rank=2, dtype=torch.float32, shared=False):
    """y, x, lora_A, lora_B."""
    y = torch.randn(K, *lead, d_out, dtype=dtype)
    x = torch.randn(1 if shared else K, *lead, d_in, dtype=dtype)
    lora_A, lora_B = torch.randn(K, rank, d_in), torch.randn(K, d_out, rank)
    return y, x, lora_A.to(dtype), lora_B.to(dtype)


def added(y, x, lora_A, lora_B, scaling=1.0):
    """lora_add on a copy of y, which may then be a leaf."""
    return lora_add(y.clone(), x, lora_A, lora_B, scaling)


def oracle(y, x, lora_A, lora_B, scaling=1.0):
    nothing = torch.zeros(y.shape[-1], x.shape[-1])
    delta = oracles.lora_linear(x, nothing, lora_A, lora_B, None, scaling)
    return y.double() + delta.reshape(y.shape)


def check_against_oracle(tensors, scaling=0.5, tolerance=FP32):
    value = added(*tensors, scaling)
    assert value.dtype == tensors[0].dtype and value.is_contiguous()
    assert relative_error(value, oracle(*tensors, scaling)) < tolerance
    upstream = torch.randn_like(value)
    got = gradients(lambda *t: added(*t, scaling), tensors, upstream)
    expected = double_gradients(lambda *t: oracle(*t, scaling), tensors, upstream)
    for gradient, right, leaf in zip(got, expected, tensors):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, right) < tolerance


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, shared):
    check_against_oracle(problem(*shape, shared=shared))


def test_rows_of_all_particles_on_one_axis():
    # The output of a base layer for (K·B, tokens, d_in).
    y, x, lora_A, lora_B = problem(3, (2, 5))
    check_against_oracle((y.flatten(0, 1), x, lora_A, lora_B))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_non_contiguous_views(shared):
    y, x, lora_A, lora_B = problem(4, (3, 5), shared=shared)
    views = (
        y.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        lora_A.mT.contiguous().mT,
        lora_B.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(v.is_contiguous() for v in views)
    before = views[0].clone()
    value = lora_add(*views, -1.5)
    assert relative_error(value, oracle(before, *views[1:], -1.5)) < FP32
    check_against_oracle(views, -1.5)


def test_expanded_input_is_one_input():
    y, x, lora_A, lora_B = problem(4, (6,), shared=True)
    x.requires_grad_()
    value = added(y, x.expand(4, 6, 7), lora_A, lora_B)
    assert torch.equal(value, added(y, x, lora_A, lora_B))
    value.sum().backward()
    right = x.detach().double().requires_grad_()
    oracle(y, right, lora_A, lora_B).sum().backward()
    assert relative_error(x.grad, right.grad) < FP32


@pytest.mark.parametrize("sizes", [{"lead": (0,)}, {"lead": (3, 0)}, {"d_in": 0}], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nothing_to_add(sizes, shared):
    leaves = [t.requires_grad_() for t in problem(**sizes, shared=shared)]
    value = added(*leaves)
    assert torch.equal(value, leaves[0])
    value.sum().backward()
    # A sum over nothing is zero, not whatever the memory held.
    assert torch.equal(leaves[0].grad, torch.ones_like(leaves[0]))
    for leaf in leaves[2:]:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.heavy
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_gradcheck(shared):
    leaves = problem(2, (2,), 2, 3, 1, torch.float64, shared)
    assert torch.autograd.gradcheck(added, [t.requires_grad_() for t in leaves])


@pytest.mark.heavy
def test_second_derivatives_are_right_or_refused():
    check_second_derivatives(added, problem(2, (3,), 3, 2, 2, torch.float64))


class TestMemory:
    """The result takes y's memory, view or not, and who needs y after that hears of it."""

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("view", [True, False])
    def test_in_place(self, grad, view):
        y, x, lora_A, lora_B = problem(3, (2, 5))
        lora_A.requires_grad_(grad)
        given = y.clone().flatten(0, 1) if view else y.clone()
        value = lora_add(given, x, lora_A, lora_B)
        assert value.data_ptr() == given.data_ptr() and value.requires_grad == grad
        assert relative_error(value, oracle(y, x, lora_A, lora_B).view_as(value)) < FP32

    def test_no_other_tensor_of_its_size(self):
        y, x, lora_A, lora_B = problem(3, (50,), 7, 11)
        with ml.use_backend("reference"), Inside() as inside:
            lora_add(y.flatten(0, 1), x, lora_A.requires_grad_(), lora_B)
        large = [name for name, _, outputs in inside.calls if outputs[0] in (y.shape, (150, 11))]
        assert set(large) <= {"view", "detach", "baddbmm_"} and large.count("baddbmm_") == 1

    def test_backward_of_a_view_copies_no_gradient(self):
        y, x, lora_A, lora_B = problem(3, (50,), 7, 11)
        weight = torch.randn(4, 11, requires_grad=True)
        given = (torch.randn(150, 4) @ weight).view(3, 50, 11)
        value = lora_add(given, x, lora_A.requires_grad_(), lora_B)
        with ml.use_backend("reference"), Inside() as inside:
            value.backward(torch.randn(3, 50, 11))
        made = [name for name, _, outputs in inside.calls if outputs and outputs[0] == y.shape]
        assert not {"clone", "copy_", "new_empty_strided"} & set(made)

    @pytest.mark.parametrize("view", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize(
        "mode", [contextlib.nullcontext, partial(FlopCounterMode, display=False)]
    )
    def test_a_saved_y_raises_in_its_backward(self, mode, grad, view):
        y, x, lora_A, lora_B = problem()
        with mode():
            # exp keeps its output for its gradient.
            saved = y.requires_grad_().exp()
            given = saved.view(15, 11) if view else saved
            with torch.set_grad_enabled(grad):
                value = lora_add(given, x, lora_A, lora_B)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (value if grad else saved).sum().backward()

    def test_inference_tensors_count_no_changes(self):
        with torch.inference_mode():
            y, x, lora_A, lora_B = problem()
            expected = oracle(y, x, lora_A, lora_B)
            value = lora_add(y, x, lora_A, lora_B)
        assert relative_error(value, expected) < FP32

    def test_the_result_is_an_ordinary_tensor(self):
        # A layer may add to it in place, and then it counts for its gradient.
        y, x, lora_A, lora_B = problem()
        lora_B.requires_grad_()
        value = lora_add(y.clone(), x, lora_A, lora_B)
        value += 1
        value.mul_(2)
        value.sum().backward()
        right = lora_B.detach().double().requires_grad_()
        (2 * oracle(y, x, lora_A, right)).sum().backward()
        assert relative_error(lora_B.grad, right.grad) < FP32

    def test_leaves_are_refused(self):
        y, x, lora_A, lora_B = problem()
        before = y.clone()
        with pytest.raises(RuntimeError, match=r"leaf.*\(3, 5, 11\)"):
            lora_add(y.requires_grad_(), x, lora_A, lora_B)
        assert torch.equal(y, before)


@pytest.mark.parametrize("wanted", ["y", "x", "A", "B"])
def test_only_wanted_gradients_are_computed(backend, wanted):
    tensors = dict(zip("yxAB", problem()))
    expected = dict(zip("yxAB", gradients(added, list(tensors.values()), torch.ones(3, 5, 11))))
    tensors[wanted].requires_grad_()
    value = added(*tensors.values())
    with Inside() as inside:
        value.backward(torch.ones_like(value))
    torch.testing.assert_close(tensors[wanted].grad, expected[wanted])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)
    if backend in ("reference", "cpu"):  # the GPU's kernels are not PyTorch operators
        products = sum(name in ("mm", "bmm", "baddbmm") for name, *_ in inside.calls)
        assert products == {"y": 0, "x": 2, "A": 2, "B": 1}[wanted]


@pytest.mark.heavy
@pytest.mark.parametrize("dtype, shared", [(torch.float32, False), (torch.bfloat16, True)])
def test_opcheck(dtype, shared):
    y, x, lora_A, lora_B = problem(shared=shared)
    y, x = y.to(dtype), x.to(dtype)
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    operators = torch.ops.multilora
    check_operator(operators.lora_add_.default, (y, x, lora_A, lora_B, 0.5), **tolerances)
    leaves = [t.requires_grad_() for t in (y, x, lora_A, lora_B)]
    check_operator(operators.lora_add.default, (*leaves, 0.5), **tolerances)


@pytest.mark.parametrize("needs, shared", [([True] * 3, True), ([True, False, False], False)])
def test_opcheck_backward(needs, shared):
    y, x, lora_A, lora_B = problem(shared=shared)
    shrunk = torch.ops.multilora.lora_add_(y, x, lora_A, lora_B, 0.5)
    args = (torch.randn(3, 5, 11), x, None, lora_A, lora_B, shrunk, 0.5, needs)
    check_operator(torch.ops.multilora.lora_linear_backward.default, args)


def surrounded(y, x, lora_A, lora_B):
    """The operator twice, the second time with a shared input, among other operators."""
    hidden = lora_add(2 * y, x.tanh(), lora_A, lora_B, 0.5).relu()
    return lora_add(2 * hidden, x[:1].expand_as(x), lora_A, lora_B) + y


def under_autocast(y, x, lora_A, lora_B):
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        return lora_add(y.bfloat16(), x, lora_A, lora_B, 0.5)


# inductor gets the function alone: see test_lora_linear.
@pytest.mark.slow
@pytest.mark.parametrize(
    "function, compiler, dynamic",
    [
        (surrounded, "aot_eager", False),
        (under_autocast, "aot_eager", False),
        (added, "inductor", True),
    ],
)
def test_compile(function, compiler, dynamic):
    sizes = (5, 6, 9) if dynamic else (5,)
    check_compiled(function, [list(problem(lead=(n,))) for n in sizes], compiler, dynamic)


def test_compiled_code_leaves_y_alone():
    y, x, lora_A, lora_B = problem()

    def of_saved(y, lora_B):
        # exp keeps its output for its gradient.
        saved = y.exp()
        return lora_add(saved, x, lora_A, lora_B) + saved

    compiled = torch.compile(of_saved, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(y)
    got = gradients(compiled, [y, lora_B], upstream)
    expected = double_gradients(
        lambda y, B: oracle(y.exp(), x, lora_A, B) + y.exp(), [y, lora_B], upstream
    )
    for gradient, right in zip(got, expected):
        assert relative_error(gradient, right) < FP32


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_masters(dtype, shared):
    y, x, lora_A, lora_B = problem(4, (6,), 16, 8, 4, shared=shared)
    # S, the adapters' cast and the result are rounded: a few half-precision roundings.
    tolerance = 4 * torch.finfo(dtype).eps
    check_against_oracle((y.to(dtype), x.to(dtype), lora_A, lora_B), tolerance=tolerance)


@pytest.mark.heavy
@pytest.mark.parametrize("autocast", [False, True])
def test_y_decides_the_dtype(autocast):
    # For a float32 input, a quantised layer may return half precision, and the other way round.
    y, x, lora_A, lora_B = problem(4, (6,), 16, 8, 4)
    half = torch.bfloat16
    with torch.autocast(oracles.DEVICE, half, enabled=autocast):
        check_against_oracle((y.to(half), x, lora_A, lora_B), tolerance=4 * torch.finfo(half).eps)
        check_against_oracle((y, x.to(half), lora_A, lora_B), tolerance=torch.finfo(half).eps)
        check_against_oracle((y.double(), x, lora_A, lora_B))


def changed(index, change):
    args = list(problem())
    args[index] = change(args[index])
    return args


@pytest.mark.parametrize(
    "index, change",
    [
        (0, lambda y: y[:2]),
        (0, lambda y: y[..., :6]),
        (0, lambda y: y[0, 0]),
        (1, lambda x: x[:2]),
        (1, lambda x: x[:, :3]),
        (1, lambda x: x[..., :6]),
        (2, lambda lora_A: lora_A[:2]),
        (2, lambda lora_A: lora_A[:, :1]),
        (3, lambda lora_B: lora_B.mT),
        (3, lambda lora_B: lora_B[..., :0]),
    ],
)
def test_wrong_shapes(index, change):
    args = changed(index, change)
    with pytest.raises(ValueError, match="lora_add needs y") as error:
        lora_add(*args)
    for tensor in args:
        assert str(tuple(tensor.shape)) in str(error.value)


@pytest.mark.parametrize("index", range(4))
def test_another_device(index):
    with pytest.raises(ValueError, match="one device") as error:
        lora_add(*changed(index, lambda t: t.to("meta")))
    assert "meta" in str(error.value) and "(3, 5, 7)" in str(error.value)


@pytest.mark.parametrize("index", range(4))
def test_wrong_dtypes(index):
    dtype = torch.int64 if index < 3 else torch.bfloat16
    with pytest.raises(TypeError, match="floating") as error:
        lora_add(*changed(index, lambda t: t.to(dtype)))
    assert str(dtype) in str(error.value) and "(3, 5, 7)" in str(error.value)
