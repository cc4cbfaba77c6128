"""multilora.ops.svgd_update: SVGD's direction of all layers, against float64 and one at a time."""

import pytest
import torch

import oracles
from multilora.ops import svgd_update
from oracles import check_operator, relative_error

pytestmark = oracles.each_backend("svgd_update")

# Computed in float64 from exact inputs and rounded once to the output's dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# d_in, d_out, r of every layer
ONE = [(7, 5, 2)]
RAGGED = [(17, 9, 3), (5, 40, 1), (17, 9, 3), (33, 8, 16), (70, 6, 5)]
ALIKE = [(32, 48, 8), (16, 40, 8), (48, 32, 8)]
WIDE = [(24, 20, 64), (8, 3, 1)]
# Long enough for products in several parts.
LONG = [(700, 300, 3)]


def problem(K, sizes, dtype=torch.float32, full=False):
    """The arguments of svgd_update for layers of these sizes."""
    lora_A = [torch.randn(K, r, d_in).to(dtype) for d_in, _, r in sizes]
    lora_B = [torch.randn(K, d_out, r).to(dtype) for _, d_out, r in sizes]
    grad_A = [torch.randn(A.shape).to(dtype) for A in lora_A]
    grad_B = [torch.randn(B.shape).to(dtype) for B in lora_B]
    layers = len(sizes)
    mix = torch.randn(layers, K, K) if full else torch.randn(layers, K)
    # The size is 1/K r d: both terms count, and half precision does not overflow.
    upstream = 0.01 * torch.randn(layers, K, K, dtype=torch.float64)
    scaling = [0.5 + layer for layer in range(layers)]
    return [grad_A, grad_B, mix, upstream, lora_A, lora_B, scaling]


def oracle(grad_A, grad_B, mix, upstream, lora_A, lora_B, scaling):
    """Layer by layer in float64, the repulsion by autograd through the formed ΔW."""
    of_A, of_B = [], []
    for layer, s in enumerate(scaling):
        A, B = (t[layer].double().requires_grad_() for t in (lora_A, lora_B))
        D = oracles.pairwise_frobenius(A, B, s)
        forces = torch.autograd.grad(D, (A, B), upstream[layer].double())
        weight = mix[layer].double()
        weight = weight if weight.ndim == 2 else weight.diag()
        for of, grads, force in zip((of_A, of_B), (grad_A, grad_B), forces):
            of.append(torch.einsum("ij,jab->iab", weight, grads[layer].double()) + force)
    return of_A, of_B


def flat(directions):
    return [*directions[0], *directions[1]]


@pytest.mark.heavy
@pytest.mark.parametrize("full", [False, True], ids=["own", "mix"])
@pytest.mark.parametrize(
    "K, sizes",
    [(1, ONE), (2, RAGGED), (3, ALIKE), (4, ALIKE), (5, RAGGED), (8, ALIKE), (3, WIDE), (4, LONG)],
    ids=["1-one", "2-ragged", "3-alike", "4-alike", "5-ragged", "8-alike", "3-wide", "4-long"],
)
def test_directions(K, sizes, full):
    args = problem(K, sizes, full=full)
    for got, expected in zip(flat(svgd_update(*args)), flat(oracle(*args))):
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


@pytest.mark.heavy
@pytest.mark.parametrize("full", [False, True], ids=["own", "mix"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, full):
    args = problem(4, RAGGED, dtype, full)
    for got, expected in zip(flat(svgd_update(*args)), flat(oracle(*args))):
        assert got.dtype == dtype
        assert relative_error(got, expected) < TOLERANCE[dtype]


def test_one_scaling_and_views():
    grad_A, grad_B, mix, upstream, lora_A, lora_B, _ = problem(4, ALIKE, full=True)
    args = [
        [t.mT.contiguous().mT for t in grad_A],
        [t.repeat_interleave(2, -1)[..., ::2] for t in grad_B],
        mix.mT,
        upstream.mT,
        [t.repeat_interleave(2, 0)[::2] for t in lora_A],
        [t.mT.contiguous().mT for t in lora_B],
    ]
    expected = oracle(*args, [2.0] * len(ALIKE))
    for got, e in zip(flat(svgd_update(*args, 2.0)), flat(expected)):
        assert got.is_contiguous()
        assert relative_error(got, e) < TOLERANCE[torch.float32]


@pytest.mark.heavy
def test_nearly_equal_particles():
    args = problem(4, ALIKE)
    # The force is a small difference of large sums.
    for factors in (args[4], args[5]):
        factors[:] = [t[:1] + 1e-5 * torch.randn_like(t) for t in factors]
    args[2] = torch.zeros_like(args[2])
    for got, expected in zip(flat(svgd_update(*args)), flat(oracle(*args))):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


@pytest.mark.heavy
def test_without_repulsion_it_mixes():
    args = problem(5, RAGGED)
    args[3] = torch.zeros_like(args[3])
    mix = [*args[2], *args[2]]
    for got, grad, weight in zip(flat(svgd_update(*args)), [*args[0], *args[1]], mix):
        torch.testing.assert_close(got, weight[:, None, None] * grad)


@pytest.mark.heavy
@pytest.mark.parametrize("full", [False, True], ids=["own", "mix"])
def test_nan_stays_in_its_layer(full):
    args = problem(3, RAGGED, full=full)
    clean = flat(svgd_update(*args))
    for tensors in (args[0], args[5]):
        tensors[2][1, 0, 0] = torch.nan
    args[2][2] = torch.nan
    args[3][2] = torch.nan
    layers = len(RAGGED)
    for i, (got, expected) in enumerate(zip(flat(svgd_update(*args)), clean)):
        if i % layers == 2:
            assert got.isnan().all()
        else:
            assert torch.equal(got, expected)


@pytest.mark.heavy
def test_nan_gradient_stays_in_its_particle():
    args = problem(4, RAGGED)
    clean = flat(svgd_update(*args))
    for grads in (args[0], args[1]):
        for grad in grads:
            grad[2] = torch.nan
    others = torch.tensor([0, 1, 3])
    for got, expected in zip(flat(svgd_update(*args)), clean):
        assert got[2].isnan().all()
        assert torch.equal(got[others], expected[others])


@pytest.mark.heavy
def test_two_runs_are_bitwise_equal():
    args = problem(4, LONG + RAGGED, full=True)
    for first, second in zip(flat(svgd_update(*args)), flat(svgd_update(*args))):
        assert torch.equal(first, second)


def test_no_features():
    for got in flat(svgd_update(*problem(3, [(0, 4, 2), (4, 0, 2), (0, 0, 1)]))):
        assert got.isfinite().all()


@pytest.mark.heavy
@pytest.mark.parametrize("full", [False, True], ids=["own", "mix"])
def test_opcheck(full):
    check_operator(torch.ops.multilora.svgd_update.default, tuple(problem(3, RAGGED, full=full)))


def test_asking_for_its_derivative_raises():
    args = problem(3, ONE)
    args[4][0].requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        svgd_update(*args)[0][0].sum().backward()


def test_wrong_arguments():
    def wrong(index, change):
        args = problem(3, RAGGED)
        args[index] = change(args[index])
        return args

    with pytest.raises(ValueError, match="got 4 and 5 for 5 layers"):
        svgd_update(*wrong(0, lambda grads: grads[:-1]))
    with pytest.raises(ValueError, match=r"like their factors; got \(3, 17, 3\)"):
        svgd_update(*wrong(0, lambda grads: [g.mT for g in grads]))
    with pytest.raises(TypeError, match=r"float64 for torch\.float32 at layer 0"):
        svgd_update(*wrong(1, lambda grads: [g.double() for g in grads]))
    with pytest.raises(ValueError, match=r"upstream \(5, 3, 3\).*got \(5, 3\) and"):
        svgd_update(*wrong(3, lambda upstream: upstream[..., 0]))
    with pytest.raises(ValueError, match=r"mix .*and \(4, 3\)"):
        svgd_update(*wrong(2, lambda mix: mix[1:]))
    with pytest.raises(ValueError, match="one device; got mix on meta"):
        svgd_update(*wrong(2, lambda mix: mix.to("meta")))
    with pytest.raises(ValueError, match=r"svgd_update needs lora_A .*layer 0"):
        svgd_update(*wrong(4, lambda lora_A: [A.mT for A in lora_A]))
