"""The GEMM for Hopper: its kernel alone, and as the LoRA linear of backend "cuda".

On the CPU it is executed from its PTX, with the copies, swizzles, barriers and products of the
hardware: tests/ptx.
"""

import contextlib

import pytest
import torch

import multilora as ml
import oracles
import ptx
from multilora.ops import dispatch
from multilora.ops.native import stream, view
from oracles import double_gradients, gradients, relative_error
from ptx import native

if dispatch.missing_reason("cuda"):
    reason = native.missing() or dispatch.missing_reason("cuda")
    pytest.skip(f"backend cuda: {reason}", allow_module_level=True)

from multilora import _C_cuda
from multilora.ops import hopper
from multilora.ops.hopper import _tile_cols

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.emulated]

BF16, F16 = HALVES = [torch.bfloat16, torch.float16]

executed = pytest.mark.skipif(
    oracles.DEVICE != "cpu", reason="on a GPU there is nothing to look into"
)

# K, T, depth, cols, rank, processors. Tiles are 128 rows by 128 or 256 columns by 64 of the depth,
# with a ring of 6 or 4 stages.
PROBLEMS = {
    "one tile, fewer steps than stages": (1, 128, 64, 256, 16, 1),
    "a corner of a tile": (1, 8, 8, 8, 8, 1),
    "every edge, several tiles a block": (2, 136, 72, 392, 8, 2),
    "more steps than stages": (1, 130, 456, 136, 16, 1),
    "more strips than a band": (17, 8, 64, 136, 8, 2),
    "two low-rank products": (2, 72, 136, 256, 24, 3),
    "four low-rank products": (2, 136, 72, 136, 40, 1),
    "several low-rank steps": (2, 16, 64, 128, 136, 1),
}
# All instances of the kernel: dtype, whether W has the depth first, the tiles' width.
COVER = [
    ("one tile, fewer steps than stages", BF16, False, 256, "late"),
    ("one tile, fewer steps than stages", F16, True, 256, "late"),
    ("a corner of a tile", F16, False, 128, "random"),
    ("a corner of a tile", BF16, True, 256, "threads"),
    ("every edge, several tiles a block", BF16, False, 128, "late"),
    ("every edge, several tiles a block", F16, True, 128, "late"),
    ("more steps than stages", BF16, False, 128, "late"),
    ("more steps than stages", BF16, True, 256, "late"),
    ("more steps than stages", F16, False, 256, "random"),
    ("more strips than a band", BF16, True, 128, "late"),
    ("two low-rank products", F16, False, 128, "late"),
    ("two low-rank products", BF16, True, 128, "random"),
    ("four low-rank products", BF16, False, 256, "late"),
    ("four low-rank products", F16, True, 256, "late"),
    ("several low-rank steps", BF16, True, 128, "late"),
]


def running(**how):
    """The order in which the kernel's PTX is executed; a GPU chooses its own."""
    return native.launches.running(**how) if oracles.DEVICE == "cpu" else contextlib.nullcontext()


def guarded(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy with NaN before and behind it, and all of that memory."""
    memory = t.new_full((t.numel() + 256,), torch.nan)
    inner = memory[128 : 128 + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner, memory


def tensors(K, T, depth, cols, rank, dtype, w_depth_first, with_bias=True):
    x, s = torch.randn(K, T, depth), torch.randn(K, T, rank)
    w, q = torch.randn(depth, cols), torch.randn(K, rank, cols)
    if not w_depth_first:
        w, q = w.mT.contiguous(), q.mT.contiguous()
    bias = torch.randn(cols) if with_bias else None
    return [t if t is None else guarded(t.to(dtype))[0] for t in (x, w, s, q, bias)]


def run(x, w, s, q, bias, w_depth_first, tile_cols, processors) -> torch.Tensor:
    """y in NaN; nothing but y may be written."""
    K, T, _ = x.shape
    y, memory = guarded(x.new_full((K, T, w.shape[int(w_depth_first)]), torch.nan))
    _C_cuda.lora_gemm(
        view(y),
        view(x),
        view(w),
        (view(s), view(q)),
        view(bias),
        w_depth_first=w_depth_first,
        tiling=(tile_cols, processors),
        where=stream(x),
    )
    assert memory[:128].isnan().all() and memory[-128:].isnan().all()
    return y


def expected(x, w, s, q, bias, w_depth_first) -> torch.Tensor:
    if not w_depth_first:
        w, q = w.mT, q.mT
    y = torch.baddbmm(torch.matmul(x, w), s, q)
    return y if bias is None else y + bias


def check(args, w_depth_first, y) -> None:
    """Twice the error that PyTorch has in this dtype, and one rounding."""
    oracle = expected(*(None if t is None else t.double() for t in args), w_depth_first)
    plain = relative_error(expected(*args, w_depth_first), oracle)
    assert relative_error(y, oracle) < 2 * plain + torch.finfo(y.dtype).eps / 2


@pytest.mark.parametrize("problem, dtype, w_depth_first, tile_cols, mode", COVER)
def test_kernel(problem, dtype, w_depth_first, tile_cols, mode):
    *sizes, processors = PROBLEMS[problem]
    # The bias is the forward's alone.
    args = tensors(*sizes, dtype, w_depth_first, with_bias=not w_depth_first)
    with running(mode=mode):
        check(args, w_depth_first, run(*args, w_depth_first, tile_cols, processors))


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("w_depth_first", [False, True], ids=["rows", "columns"])
def test_bias_in_both_orders(w_depth_first, with_bias):
    args = tensors(1, 8, 8, 72, 8, BF16, w_depth_first, with_bias)
    check(args, w_depth_first, run(*args, w_depth_first, 256, 1))


@pytest.mark.slow
@pytest.mark.parametrize("w_depth_first", [False, True], ids=["rows", "columns"])
def test_which_block_computes_a_tile_does_not_matter(w_depth_first):
    args = tensors(3, 136, 8, 136, 8, BF16, w_depth_first)
    one, *others = (run(*args, w_depth_first, 128, processors) for processors in (1, 5, 100))
    assert all(torch.equal(one, other) for other in others)


def test_rows_of_other_particles_are_not_read():
    args = tensors(3, 72, 64, 64, 8, torch.float16, False)
    clean = run(*args, False, 128, 1)
    x, _, s, q, _ = args
    for t in (x, s, q):
        t[1] = torch.nan
    spoilt = run(*args, False, 128, 1)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[0], clean[0]) and torch.equal(spoilt[2], clean[2])


def test_infinities_and_rounding_to_the_nearest():
    # y = x: one element of x in the depth for every column, W the identity.
    x = torch.tensor([torch.inf, -torch.inf, 65504.0, 6e-8, -0.0, 1.0009765625, 1.0, 0.0])
    for dtype in HALVES:
        args = [
            x.to(dtype).view(1, 1, 8),
            torch.eye(8, dtype=dtype),
            *(torch.zeros(1, 1, 8, dtype=dtype), torch.zeros(1, 8, 8, dtype=dtype)),
        ]
        finite = args[0].clone()
        finite[..., :2] = 0
        args = [guarded(t)[0] for t in args]
        y = run(*args, None, False, 128, 1)
        assert y.isnan().any()  # ∞·0
        args[0].copy_(finite)
        assert torch.equal(run(*args, None, False, 128, 1), finite)
        # 1 + 3/4 of a unit in the last place rounds up, 1 + 1/4 down.
        eps = torch.finfo(dtype).eps
        args[0].copy_(torch.tensor([1.0, eps, 0, 0, 0, 0, 0, 0], dtype=dtype))
        args[1].zero_()
        args[1][:, 0] = 1
        args[1][:4, 1], args[1][4:, 1] = 0.75, 0.25
        y = run(*args, None, False, 128, 1).view(8)
        assert torch.equal(y, torch.tensor([1 + eps] * 4 + [1.0] * 4, dtype=dtype))


def test_tensors_off_their_alignment_are_an_error():
    args = tensors(1, 8, 16, 16, 8, torch.bfloat16, False)
    x = args[0].new_zeros(1, 9, 16).flatten()[1:129].view(1, 8, 16)
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled|16 bytes"):
        run(x, *args[1:], False, 128, 1)


@executed
def test_other_chips_have_kernels_that_stop():
    # On Ampere the operator never launches them: a block has too little shared memory.
    texts = native.launches.texts
    found = [at for at in texts if at[0] == "compute_80" and "lora_gemm_kernel" in at[1]]
    assert len(found) == 8
    for at in found:
        kernel = ptx.Kernel(texts[at], at[1])
        arguments = [ptx.Struct(bytes(p.bytes)) for p in kernel.parameters]
        with pytest.raises(ptx.EmulationError, match="failed assertion"):
            ptx.execute(kernel, (1,), 384, 0, arguments)


# --- the operator --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The operand orders of the kernel's calls, in backend "cuda"."""
    orders = []
    kernel = _C_cuda.lora_gemm

    def count(*views, w_depth_first, **rest):
        orders.append("columns" if w_depth_first else "rows")
        kernel(*views, w_depth_first=w_depth_first, **rest)

    monkeypatch.setattr(_C_cuda, "lora_gemm", count)
    with ml.use_backend("cuda"):
        yield orders


def operands(K, lead, d_in, d_out, rank, dtype, master):
    x, weight = torch.randn(K, *lead, d_in), torch.randn(d_out, d_in) / d_in**0.5
    lora_A, lora_B = torch.randn(K, rank, d_in) / d_in**0.5, torch.randn(K, d_out, rank)
    return x.to(dtype), weight.to(dtype), lora_A.to(master), lora_B.to(master), torch.randn(d_out)


@pytest.fixture(params=["Triton", "PyTorch"])
def thin_products(request, monkeypatch):
    """Who computes the thin products: without Triton on the device, PyTorch does."""
    if request.param == "PyTorch":
        monkeypatch.setattr(hopper, "passes_of", lambda _: None)
    return request.param


@pytest.fixture
def passes(monkeypatch):
    """How often a pass of the Triton backend ran."""
    from multilora.ops.triton.common import Launch

    found, run = [], Launch.__call__

    def count(launch, *tensors):
        if launch.kernel.__name__ == "_lora_linear_pass_kernel":
            found.append(launch)
        run(launch, *tensors)

    monkeypatch.setattr(Launch, "__call__", count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, dtype, master",
    [(1, BF16, torch.float32), (5, F16, None), (8, BF16, None), (40, F16, torch.float32)],
    ids=str,
)
def test_operator_and_gradients(rank, dtype, master, calls, thin_products, passes):
    x, weight, A, B, bias = operands(2, (3, 5), 72, 136, rank, dtype, master or dtype)
    bias = bias.to(dtype)
    upstream = torch.randn(2, 3, 5, 136, dtype=dtype)

    def everything(x, A, B):
        y = ml.lora_linear(x, weight, A, B, bias, 0.5)
        return [y.detach(), *gradients(lambda *t: ml.lora_linear(*_of(t)), [x, A, B], upstream)]

    def _of(t):
        return t[0], weight, t[1], t[2], bias, 0.5

    got = everything(x, A, B)
    assert calls == ["rows", "rows", "columns"]
    # S twice, then dS and dB, in one pass over dY where the rank is small, and dA.
    expected = 2 + (2 if rank <= 16 else 3)
    assert len(passes) == (expected if thin_products == "Triton" else 0)
    with ml.use_backend("reference"):
        plain = everything(x, A, B)
    oracle = [oracles.lora_linear(*_of((x, A, B)))]
    oracle += double_gradients(lambda *t: oracles.lora_linear(*_of(t)), [x, A, B], upstream)
    for g, p, o, like in zip(got, plain, oracle, (x, x, A, B)):
        assert g.dtype == like.dtype and g.is_contiguous()
        assert relative_error(g, o) < 2 * relative_error(p, o) + torch.finfo(dtype).eps / 2


def test_views_and_odd_storage_offsets(calls):
    x, weight, A, B, bias = operands(2, (6,), 16, 24, 4, torch.bfloat16, torch.bfloat16)
    bias = bias.bfloat16()

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    plain = ml.lora_linear(x, weight, A, B, bias, 0.5)
    for change in (shifted, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t):
        views = [change(t) for t in (x, weight, A, B, bias)]
        assert torch.equal(ml.lora_linear(*views, 0.5), plain)
    assert len(calls) == 3


REFUSED = {
    "float32": ((2, (6,), 16, 24, 4, torch.float32, torch.float32), "float16 and bfloat16"),
    "float64": ((2, (6,), 16, 24, 4, torch.float64, torch.float64), "float16 and bfloat16"),
    "input width": ((2, (6,), 12, 16, 4, BF16, BF16), "d_in and d_out"),
    "output width": ((2, (6,), 16, 20, 4, BF16, BF16), "d_in and d_out"),
    "shared input": ((2, (6,), 16, 24, 4, BF16, BF16), "all share"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_take_is_refused(name, calls):
    problem, why = REFUSED[name]
    x, weight, A, B, _ = operands(*problem)
    x = x[:1] if name == "shared input" else x
    with pytest.raises(ml.BackendUnavailableError, match=f"(?s){why}.*otherwise='reference'") as e:
        ml.lora_linear(x, weight, A, B)
    assert str(tuple(x.shape)) in str(e.value) and str(tuple(B.shape)) in str(e.value)
    # With the user's permission it is the reference's, and so is its backward.
    leaves = [t.requires_grad_() for t in (x, A, B)]
    with ml.use_backend("cuda", otherwise="reference"):
        y = ml.lora_linear(x, weight, A, B)
    y.sum().backward()
    with ml.use_backend("reference"):
        expected = ml.lora_linear(x, weight, A, B)
        grads = torch.autograd.grad(expected.sum(), leaves)
    assert torch.equal(y, expected) and calls == []
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, grads))


def test_nothing_to_multiply(calls):
    x, weight, A, B, bias = operands(2, (6,), 16, 24, 4, BF16, torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    for rows, features in ((0, 16), (6, 0)):
        some = x[:, :rows, :features], weight[:, :features], A[..., :features], B
        y = ml.lora_linear(*some, bias.bfloat16())
        assert torch.equal(y, bias.bfloat16().expand(2, rows, 24))
        for grad, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves):
            assert torch.equal(grad, torch.zeros_like(leaf))
    assert calls == []


def test_no_large_product_where_x_needs_no_gradient(calls, thin_products):
    x, weight, A, B, _ = operands(2, (6,), 16, 24, 4, BF16, torch.float32)
    leaves = [A.requires_grad_(), B.requires_grad_()]
    y = ml.lora_linear(x, weight, A, B)
    upstream = torch.randn_like(y)
    got = [torch.autograd.grad(y, leaf, upstream, retain_graph=True)[0] for leaf in leaves]
    expected = double_gradients(lambda A, B: oracles.lora_linear(x, weight, A, B), leaves, upstream)
    for gradient, right in zip(got, expected):
        # dS or S is rounded to bfloat16 in between.
        assert relative_error(gradient, right) < 1e-2
    assert calls == ["rows"]


def test_tile_widths():
    # Many tiles: wide ones. Too few to go round, or too few columns to fill one: narrow ones.
    assert _tile_cols(8, 4096, 4096, 132) == 256
    assert _tile_cols(4, 256, 768, 132) == 128
    assert _tile_cols(8, 4096, 128, 132) == 128


@executed
@pytest.mark.slow
def test_every_kernel_was_executed(pytestconfig):
    native.launches.check_executed("lora_gemm_kernel", pytestconfig, archs=["compute_90a"])
