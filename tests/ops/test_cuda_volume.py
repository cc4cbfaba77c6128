"""The CUDA kernels of the volume and the loss, executed from nvcc's PTX, against float64."""

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
import oracles
from oracles import double_gradients, gradients, relative_error
from ptx import native
from tiers import sampled

pytestmark = pytest.mark.usefixtures("executed_ptx")

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# With eps = 1e-2 the condition of a matrix is at most 1e2 K, and its numbers are rounded once to
# the dtype, or to float32 where that is a half: then to the half in the gradient alone.
EPS = 1e-2
TOLERANCE = {F32: 1e-4, F64: 1e-10, F16: 3e-3, BF16: 2e-2}

# K, N, C: a kernel has room for 2, 4, 8 or more particles, and one is for few classes.
SIZES = {
    "2 particles, aligned": (2, 5, 36),
    "3 particles": (3, 5, 7),
    "7 particles": (7, 3, 12),
    "12 particles": (12, 3, 70),
    "more particles than classes": (5, 4, 4),
}
# Between their sums the kernels use float64 for every dtype, so one dtype shows both kinds.
COVER = [
    (size, dtype, "logdet", "late") for size in SIZES.values() for dtype in (F32, F64, F16, BF16)
]
COVER += [(size, F64, "det", "late") for size in SIZES.values()]
COVER += [
    ((3, 4, 7), F32, "logdet", "random"),
    ((12, 2, 70), F32, "det", "random"),
    ((5, 3, 4), F64, "logdet", "random"),
    ((3, 3, 7), F32, "det", "threads"),
    ((9, 2, 11), F32, "logdet", "threads"),
    ((3, 3, 3), F64, "logdet", "threads"),
    # Classes in parts, which are merged; as many particles as there may be.
    ((2, 2, 1100), F32, "logdet", "late"),
    ((2, 1, 1100), F32, "logdet", "random"),
    ((9, 2, 1030), BF16, "logdet", "late"),
    ((32, 1, 40), F32, "logdet", "late"),
    ((10, 3, 5), F64, "logdet", "late"),
]


def of_loss(targets, kind):
    """The losses and the divergence as one vector."""

    def run(logits):
        nll, divergence = ml.particle_loss(logits, targets, EPS, kind)
        return torch.cat([nll, divergence[None]])

    def oracle(logits):
        values = oracles.gram_volume(logits, targets, EPS, kind)
        nll = torch.stack([F.cross_entropy(z, targets) for z in logits.double()])
        return torch.cat([nll, (values.sum() / (targets != -100).sum())[None]])

    return run, oracle


def check(run, oracle, logits, upstream, tolerance):
    value, expected = run(logits), oracle(logits)
    assert relative_error(value, expected) < tolerance
    (got,) = gradients(run, [logits], upstream)
    (gradient,) = double_gradients(oracle, [logits], upstream)
    assert got.dtype == logits.dtype
    assert relative_error(got, gradient) < tolerance


@pytest.mark.parametrize("size, dtype, kind, mode", sampled(COVER, 20), ids=str)
def test_cover(size, dtype, kind, mode):
    K, N, C = size
    logits, targets = torch.randn(K, N, C).to(dtype), torch.randint(C, (N,))
    if N > 2:
        targets[1] = -100
    with native.launches.running(mode=mode):
        check(*of_loss(targets, kind), logits, torch.randn(K + 1), TOLERANCE[dtype])


# Rows that are not contiguous: pieces of four classes start at multiples of four numbers, or not,
# and the last piece is not whole.
@pytest.mark.slow
@pytest.mark.parametrize("classes, kind", [(slice(1, None), "logdet"), (slice(9), "det")])
def test_volume_alone_of_views(classes, kind):
    logits = torch.randn(5, 2, 12).permute(1, 0, 2)[..., classes]
    targets = torch.tensor([0, 9, 7, 9, -100, 9, 3, 9, 1])[::2]
    run, oracle = (
        lambda z, op=op: op(z, targets, EPS, kind) for op in (ml.gram_volume, oracles.gram_volume)
    )
    check(run, oracle, logits, torch.randn(5), TOLERANCE[F32])


def test_a_target_outside_stops_the_kernel(monkeypatch):
    from multilora.ops import cuda

    monkeypatch.setattr(cuda, "check_targets", lambda logits, targets: None)
    with pytest.raises(RuntimeError, match="failed assertion"):
        cuda.volume(torch.randn(2, 3, 5), torch.tensor([1, 5, 2]), EPS, "logdet", False)


@pytest.mark.slow
def test_every_kernel_was_executed(pytestconfig):
    native.launches.check_executed(r"volume_\w+_kernel", pytestconfig)
