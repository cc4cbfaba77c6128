"""The LoRA linear on a CPU for parts of other sizes: its numbers, its gradients, its limits."""

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
from multilora.ops import ragged
from multilora.ops.ragged import Part

K, R, D_IN, D_OUT = 4, 5, 6, 7
# Particle 2 has no rows, rows 9 and 10 have no adapter, and the ranks are smaller than R.
PARTS = [Part(0, 0, 4, 2, 1.5), Part(1, 4, 5, 5, 0.25), Part(3, 5, 9, 1, 2.0)]
ROWS = 11
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tensors():
    g = torch.Generator().manual_seed(0)
    shapes = [(ROWS, D_IN), (D_OUT, D_IN), (D_OUT,), (K, R, D_IN), (K, D_OUT, R)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def expected(x, weight, bias, lora_A, lora_B):
    y = F.linear(x, weight, bias)
    low = torch.zeros_like(y)
    for k, start, end, rank, scaling in PARTS:
        update = scaling * lora_B[k, :, :rank] @ lora_A[k, :rank]
        low[start:end] = x[start:end] @ update.T
    return y + low


def test_it_is_each_parts_own_product():
    args = tensors()
    torch.testing.assert_close(ragged.ragged_linear(*args, PARTS), expected(*args), **CLOSE)
    x, weight, bias, *factors = args
    torch.testing.assert_close(
        ragged.ragged_linear(x, weight, None, *factors, PARTS),
        expected(x, weight, torch.zeros_like(bias), *factors),
        **CLOSE,
    )
    mask = ragged.mask_of(x, factors[0], PARTS)
    down, up = joined = ragged.joined(*factors, mask.columns)
    assert down.shape == (8, D_IN) and up.shape == (8, D_OUT)
    assert mask.scales.sum() == sum((p.end - p.start) * p.rank * p.scaling for p in PARTS)
    few = ragged.joined_linear(x, weight, bias, joined, mask.scales)
    torch.testing.assert_close(few, expected(*args), **CLOSE)


@pytest.mark.parametrize("wanted", [(0, 3, 4), (3,), (4,), (0,)])
def test_gradients(wanted):
    args = tensors()
    for i in wanted:
        args[i].requires_grad_()
    inputs = [args[i] for i in wanted]
    assert torch.autograd.gradcheck(lambda *_: ragged.ragged_linear(*args, PARTS), inputs)
    along = torch.randn(ROWS, D_OUT, dtype=torch.float64)
    got = torch.autograd.grad(ragged.ragged_linear(*args, PARTS), inputs, along)
    right = torch.autograd.grad(expected(*args), inputs, along)
    for one, other in zip(got, right):
        torch.testing.assert_close(one, other, **CLOSE)


def test_it_adds_in_place_with_gradients():
    x, weight, bias, lora_A, lora_B = tensors()
    leaves = [x.requires_grad_(), lora_A.requires_grad_(), lora_B.requires_grad_()]
    y = F.linear(x, weight, bias)
    memory = y.data_ptr()
    out = ragged.ragged_add(y, x, lora_A, lora_B, PARTS)
    assert out.data_ptr() == memory
    along = torch.randn(ROWS, D_OUT, dtype=torch.float64)
    got = torch.autograd.grad(out, leaves, along)
    right = torch.autograd.grad(expected(x, weight, bias, lora_A, lora_B), leaves, along)
    for one, other in zip(got, right):
        torch.testing.assert_close(one, other, **CLOSE)


def test_second_derivatives_are_refused():
    args = tensors()
    args[3].requires_grad_()
    y = ragged.ragged_linear(*args, PARTS)
    (first,) = torch.autograd.grad(y.square().sum(), args[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_runs_here():
    x, _, _, lora_A, _ = tensors()
    assert ragged.takes(x, lora_A) and ragged.is_plain()
    assert not ragged.takes(x, lora_A.float())
    assert not ragged.takes(x.bfloat16(), lora_A.bfloat16())
    assert not ragged.takes(x.to("meta"), lora_A.to("meta"))
    with ml.use_backend("reference"):
        assert ragged.takes(x, lora_A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ragged.is_plain()
    torch.func.vmap(lambda _: torch.tensor(_false(ragged.is_plain())))(x)


def _false(flag):
    assert not flag
    return flag
