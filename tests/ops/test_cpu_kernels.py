"""Properties of the CPU's kernels alone: threads, and any number of particles."""

import pytest
import torch
from test_volume import GRADIENT, VALUE, kinds, of, problem

import multilora as ml
import oracles
from multilora.ops import ragged, svgd_update
from multilora.ops.common import Part, Parts
from oracles import double_gradients, gradients, relative_error

pytestmark = pytest.mark.usefixtures("poison", "on_cpu")


@pytest.fixture
def on_cpu():
    with ml.use_backend("cpu"):
        yield


@pytest.fixture
def threads():
    """A function that calls another one with 1, 2 and 3 threads, and returns what it got."""
    before = torch.get_num_threads()

    def each(run):
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run())
        return results

    yield each
    torch.set_num_threads(before)


def assert_same_bits(first, *others):
    for other in others:
        for a, b in zip(first, other):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


# Many examples in a task of a thread, one, and a part of its classes; both sides of K = C.
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 999, 10), (4, 37, 3000), (2, 3, 40000), (9, 300, 7)], ids=str
)
def test_losses_of_any_number_of_threads(threads, shape, dtype, kind):
    logits, targets = problem(*shape, dtype)
    logits[1, 1, 2] = float("nan")

    def run(examples=slice(None)):
        part = logits[:, examples].clone().requires_grad_()
        value = ml.gram_volume(part, targets[examples], kind=kind)
        nll, divergence = ml.particle_loss(part, targets[examples], kind=kind)
        (gradient,) = torch.autograd.grad(value.sum() + nll.sum() + divergence, part)
        return value, gradient, nll, divergence

    alone, *together = threads(run)
    assert_same_bits(alone, *together)
    # The values of a part of the examples, at other places; their gradients have another mean.
    last = slice(2, None)
    assert torch.equal(run(last)[0], alone[0][last])


# One layer, whose features are shared out, and more than there are threads, a layer a thread.
@pytest.mark.parametrize("layers, d_in, d_out, rank", [(1, 2000, 1500, 8), (9, 200, 300, 7)])
def test_geometry_of_any_number_of_threads(threads, layers, d_in, d_out, rank):
    lora_A = [torch.randn(4, rank, d_in) for _ in range(layers)]
    lora_B = [torch.randn(4, d_out, rank) for _ in range(layers)]
    upstream, mix = torch.randn(layers, 4, 4), torch.randn(layers, 4, 4)

    def run():
        leaves = [t.clone().requires_grad_() for t in (*lora_A, *lora_B)]
        D = ml.pairwise_frobenius(leaves[:layers], leaves[layers:])
        of_A, of_B = svgd_update(lora_A, lora_B, mix, upstream, lora_A, lora_B)
        return [D, *torch.autograd.grad(D, leaves, upstream), *of_A, *of_B]

    assert_same_bits(*threads(run))


def test_unlike_rows_of_any_number_of_threads(threads):
    x, A, B = torch.randn(300, 40), torch.randn(2, 6, 40), torch.randn(2, 500, 6)
    parts = Parts([Part(0, 0, 290, 6, 1.5), Part(1, 290, 300, 6, 0.5)])
    update = torch.cat([1.5 * x[:290] @ (B[0] @ A[0]).T, 0.5 * x[290:] @ (B[1] @ A[1]).T])

    def run():
        with torch.no_grad():
            return [ragged.ragged_add(torch.ones(300, 500), x, A, B, parts)]

    alone, *together = threads(run)
    torch.testing.assert_close(alone[0], 1 + update, rtol=1e-4, atol=1e-4)
    assert_same_bits(alone, *together)


@pytest.mark.parametrize("shape", [(40, 2, 1000), (40, 3, 41), (40, 3, 40), (50, 3, 23)], ids=str)
def test_any_number_of_particles(shape):
    logits, targets = problem(*shape)
    value = ml.gram_volume(logits, targets)
    assert relative_error(value, oracles.gram_volume(logits, targets)) < VALUE
    upstream = torch.randn(shape[1])
    (got,) = gradients(of(ml.gram_volume, targets), [logits], upstream)
    (expected,) = double_gradients(of(oracles.gram_volume, targets), [logits], upstream)
    assert relative_error(got, expected) < GRADIENT
