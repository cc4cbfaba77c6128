"""The LoRA linear on a CPU for parts of other sizes: its numbers, its gradients, its limits."""

import contextlib
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import multilora as ml
from multilora.ops import dispatch, ragged
from multilora.ops.common import Part, Parts
from multilora.ops.native import view

LEVELS = ["cpu-scalar", "cpu-avx2", "cpu-avx512"]
if "cpu" in dispatch.available_backends():
    from multilora import _C

    LEVELS = LEVELS[: len(_C.supported_levels())]

K, R, D_IN, D_OUT = 4, 5, 6, 7
# Particle 2 has no rows, rows 9 and 10 have no adapter, and the ranks are smaller than R.
PARTS = Parts([Part(0, 0, 4, 2, 1.5), Part(1, 4, 5, 5, 0.25), Part(3, 5, 9, 1, 2.0)])
ROWS = 11
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@contextlib.contextmanager
def on(where):
    """The loop of the reference, or the kernel at a level of this CPU."""
    name, _, level = where.partition("-")
    with ml.use_backend(name):
        if not level:
            yield name
            return
        before = _C.level()
        _C.set_level(level)
        try:
            yield name
        finally:
            _C.set_level(before)


@pytest.fixture(params=["reference", *LEVELS])
def backend(request):
    with on(request.param) as name:
        yield name


@pytest.fixture(params=LEVELS)
def kernel(request):
    with on(request.param):
        yield


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


def test_it_is_each_parts_own_product(backend, poison):
    args = tensors()
    x, weight, bias, *factors = args
    wide = torch.stack([x, x], 1)[:, 0]  # rows that are not next to each other
    turned = x.T.contiguous().T
    assert ragged.has_kernel() == (backend == "cpu")
    for rows, b in itertools.product((x, wide, turned), (bias, None)):
        right = expected(x, weight, torch.zeros_like(bias) if b is None else b, *factors)
        with torch.no_grad():
            got = ragged.ragged_linear(rows, weight, b, *factors, PARTS)
            added = ragged.ragged_add(F.linear(rows, weight, b), rows, *factors, PARTS)
        torch.testing.assert_close(got, right, **CLOSE)
        torch.testing.assert_close(added, right, **CLOSE)
    nothing = ragged.ragged_linear(x, weight, bias, *factors, Parts())
    torch.testing.assert_close(nothing, F.linear(x, weight, bias), **CLOSE)
    assert ragged.ragged_linear(x[:0], weight, bias, *factors, Parts()).shape == (0, D_OUT)


# Ends of tiles, vectors and panels; a part of many rows; thin and long layers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (33, 300), (70, 17), (256, 512), (5, 1025)])
def test_any_sizes(backend, dtype, d_in, d_out, poison):
    parts, start = [], 3
    for rows, rank in [(1, 1), (150, 13), (2, 4), (0, 3), (7, 8), (33, 5)]:
        parts.append(Part(len(parts), start, start + rows, rank, 0.5 + len(parts)))
        start += rows
    g = torch.Generator().manual_seed(1)
    shapes = [(start + 2, d_in), (d_out, d_in), (d_out,), (6, 13, d_in), (6, d_out, 13)]
    args = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    parts = Parts(parts)
    right = F.linear(*args[:3])
    for k, first, last, rank, scaling in parts:
        update = scaling * args[4][k, :, :rank] @ args[3][k, :rank]
        right[first:last] += args[0][first:last] @ update.T
    own = [t.to(dtype) for t in args]
    for k, *_, rank, _ in parts:
        own[3][k, rank:], own[4][k, :, rank:] = torch.nan, torch.nan  # never read
    with torch.no_grad():
        added = ragged.ragged_add(F.linear(*own[:3]), own[0], *own[3:], parts)
        linear = ragged.ragged_linear(*own, parts)
    for got in (added, linear):
        error = (got.double() - right).norm() / right.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-14)


def test_numbers_that_are_not_finite_stay_with_their_rows(backend):
    x, weight, bias, *factors = tensors()
    clean = ragged.ragged_linear(x, weight, bias, *factors, PARTS)
    x[2], x[6, 0] = torch.inf, torch.nan
    got = ragged.ragged_linear(x, weight, bias, *factors, PARTS)
    hit = torch.zeros(ROWS, dtype=torch.bool)
    hit[[2, 6]] = True
    assert not got[hit].isfinite().any()
    torch.testing.assert_close(got[~hit], clean[~hit], rtol=0, atol=0)


def test_the_kernel_refuses_what_lies_outside(kernel):
    x, _, bias, A, B = tensors()
    y = torch.zeros(ROWS, D_OUT, dtype=x.dtype)

    def run(parts, bias=bias, y=y, x=x):
        views = map(view, (y, bias, x, A, B))
        _C.low_rank(*views, None, _C.Parts(parts), where=1)

    run(PARTS)
    for part in [(4, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, ROWS + 1)]:
        with pytest.raises(ValueError, match="outside"):
            run([Part(*part, 1, 1.0)])
    for parts in ([Part(0, 0, 1, R + 1, 1.0)], [PARTS[1], PARTS[0]]):
        with pytest.raises(ValueError, match="outside"):
            run(parts)
    with pytest.raises(ValueError, match=r"start \(6\) should be \(7\)"):
        run(PARTS, bias=bias[1:])
    with pytest.raises(ValueError, match="dtype"):
        run(PARTS, bias=bias.float())
    with pytest.raises(ValueError, match="dtype"):
        halves = (view(t.half()) for t in (y, bias, x, A, B))
        _C.low_rank(*halves, None, _C.Parts(PARTS), where=1)


@pytest.mark.parametrize("wanted", [(0, 3, 4), (3,), (4,), (0,)])
def test_gradients(wanted, backend, poison):
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


def test_it_adds_in_place_with_gradients(backend, poison):
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


def test_what_is_added_without_a_graph_is_seen_by_an_earlier_one(backend):
    x, weight, _, *factors = tensors()
    y = F.linear(x, weight.requires_grad_())
    loss = y.square().sum()  # it has saved y
    with torch.no_grad():
        ragged.ragged_add(y, x, *factors, PARTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_keeps_only_what_its_gradients_read():
    x, weight, bias, lora_A, lora_B = tensors()
    unread = weakref.ref(x)
    y = ragged.ragged_linear(x, weight, bias, lora_A, lora_B.requires_grad_(), PARTS)
    del x
    assert unread() is None  # only the gradient of A would read it
    y.sum().backward()
    assert lora_B.grad.any()


def test_second_derivatives_are_refused():
    args = tensors()
    args[3].requires_grad_()
    y = ragged.ragged_linear(*args, PARTS)
    (first,) = torch.autograd.grad(y.square().sum(), args[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_runs_here():
    x, *args = tensors()
    assert ragged.takes(*args) and ragged.takes(args[0], None, *args[2:])
    assert ragged.is_plain() and ragged.runs_on(x)
    for i, wrong in itertools.product(range(4), (torch.Tensor.float, _trained)):
        changed = [wrong(t) if i == j else t for j, t in enumerate(args)]
        assert ragged.takes(*changed) == (wrong is _trained and i in (2, 3))
    assert not ragged.takes(*(t.bfloat16() for t in args))
    for i in range(4):
        assert not ragged.takes(*(t.to("meta") if i == j else t for j, t in enumerate(args)))
    assert not ragged.takes(args[0].to_sparse_csr(), *args[1:])
    assert ragged.is_plain_tensor(x, x.dtype) and not ragged.is_plain_tensor(x, torch.float32)
    assert not ragged.is_plain_tensor(torch._neg_view(x), x.dtype)
    assert not ragged.is_plain_tensor(x.as_subclass(_Marked), x.dtype)
    assert not ragged.runs_on(x.to("meta"))
    with ml.use_backend("reference"):
        assert ragged.runs_on(x) and not ragged.has_kernel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ragged.is_plain()
    torch.func.vmap(lambda _: torch.tensor(_false(ragged.is_plain())))(x)
    with forward_ad.dual_level():
        assert not ragged.is_plain()


class _Marked(torch.Tensor):
    pass


def _trained(t):
    return t.clone().requires_grad_()


def _false(flag):
    assert not flag
    return flag
