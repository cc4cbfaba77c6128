"""ml.lora_gram and ml.pairwise_frobenius: values, gradients, nearly equal particles, errors."""

import math

import pytest
import torch

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

pytestmark = oracles.each_backend("lora_gram")

# Inputs are float32 and exact, sums are float64, the result is rounded once to float32 (6e-8).
FP32 = 1e-5
# float64 throughout: a few hundred terms at 1e-16, and cancellation between random particles.
FP64 = 1e-12

GRAM = (ml.lora_gram, oracles.lora_gram)
DISTANCE = (ml.pairwise_frobenius, oracles.pairwise_frobenius)
both = pytest.mark.parametrize("function, oracle", [GRAM, DISTANCE], ids=["gram", "distance"])

# K, d_in, d_out, r
SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 7, 3),
    (2, 7, 3, 1),
    (3, 13, 17, 2),
    (5, 8, 64, 4),
    (7, 23, 5, 7),
    pytest.param((8, 37, 29, 16), marks=pytest.mark.heavy),
    pytest.param((3, 700, 300, 2), marks=pytest.mark.heavy),
]
# Some layers are alike, in no order; the particles agree.
RAGGED = [(4, 7, 11, 2), (4, 5, 3, 1), (4, 7, 11, 2), (4, 11, 7, 2), (4, 7, 11, 3), (4, 5, 3, 1)]
SCALINGS = [0.5, 2.0, -1.0, 0.25, 1.0, 3.0]


def factors(K, d_in, d_out, rank, dtype=torch.float32):
    return torch.randn(K, rank, d_in, dtype=dtype), torch.randn(K, d_out, rank, dtype=dtype)


def ragged(dtype=torch.float32):
    lora_A, lora_B = zip(*(factors(*shape, dtype) for shape in RAGGED))
    return list(lora_A), list(lora_B)


@both
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(function, oracle, shape, dtype, tolerance):
    lora_A, lora_B = factors(*shape, dtype)
    value = function(lora_A, lora_B, 0.5)
    assert value.dtype == dtype
    assert relative_error(value, oracle(lora_A, lora_B, 0.5)) < tolerance
    upstream = torch.randn_like(value)
    got = gradients(lambda A, B: function(A, B, 0.5), [lora_A, lora_B], upstream)
    expected = double_gradients(lambda A, B: oracle(A, B, 0.5), [lora_A, lora_B], upstream)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        assert relative_error(g, e) < tolerance


@pytest.mark.heavy
@both
def test_layers_of_any_shape(function, oracle):
    lora_A, lora_B = ragged()
    layers = len(lora_A)

    def of(function):
        def stacked(*factors):
            pairs = zip(factors[:layers], factors[layers:], SCALINGS)
            return torch.stack([function(A, B, s) for A, B, s in pairs])

        return stacked

    def together(*factors):
        return function(factors[:layers], factors[layers:], SCALINGS)

    leaves = [*lora_A, *lora_B]
    value = together(*leaves)
    assert value.shape == (layers, 4, 4)
    assert relative_error(value, of(oracle)(*leaves)) < FP32
    upstream = torch.randn_like(value)
    got = gradients(together, leaves, upstream)
    for g, e in zip(got, double_gradients(of(oracle), leaves, upstream)):
        assert relative_error(g, e) < FP32
    # One number stands for all layers.
    alike = function(lora_A, lora_B, 2.0)
    torch.testing.assert_close(alike, function(lora_A, lora_B, [2.0] * layers), rtol=0, atol=0)


@pytest.mark.heavy
@both
def test_more_layers_than_fit_in_one_launch(backend, function, oracle):
    # A CUDA launch's description of the layers has 4 KB, enough for 56 of them in the last stage.
    layers = 58 if backend == "cuda" else 8
    lora_A, lora_B = zip(*(factors(2, 3 + layer % 5, 4, 1) for layer in range(layers)))
    value = function(lora_A, lora_B, 0.5)
    expected = torch.stack([oracle(A, B, 0.5) for A, B in zip(lora_A, lora_B)])
    assert relative_error(value, expected) < FP32
    upstream = torch.randn_like(value)
    got = gradients(lambda *f: function(f[:layers], f[layers:], 0.5), [*lora_A, *lora_B], upstream)
    for layer, factor in enumerate(zip(lora_A, lora_B)):
        wanted = double_gradients(lambda A, B: oracle(A, B, 0.5), factor, upstream[layer])
        for g, e in zip((got[layer], got[layers + layer]), wanted):
            assert relative_error(g, e) < FP32


@both
def test_non_contiguous_views(function, oracle):
    lora_A, lora_B = factors(4, 7, 11, 3)
    A = lora_A.mT.contiguous().mT
    B = lora_B.repeat_interleave(2, 0)[::2]
    assert not A.is_contiguous() and not B.is_contiguous()
    assert relative_error(function(A, B), oracle(A, B)) < FP32
    # The gradient of a sum is expanded: every stride is zero.
    upstream = torch.ones(()).expand(4, 4)
    expected = double_gradients(oracle, [A, B], upstream)
    for g, e in zip(gradients(function, [A, B], upstream), expected):
        assert relative_error(g, e) < FP32


@both
@pytest.mark.parametrize("d_in, d_out", [(0, 3), (3, 0)])
def test_no_features(function, oracle, d_in, d_out):
    lora_A, lora_B = (t.requires_grad_() for t in factors(2, d_in, d_out, 2))
    value = function(lora_A, lora_B)
    assert torch.equal(value, torch.zeros(2, 2))
    value.sum().backward()
    for leaf in (lora_A, lora_B):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_nearly_equal_particles(gap):
    # D is 1e-6 (1e-10) of the traces that it is the difference of: more than float32 resolves.
    lora_A, lora_B = factors(1, 64, 48, 8)
    lora_A = lora_A + gap * torch.randn(4, 8, 64)
    lora_B = lora_B + gap * torch.randn(4, 48, 8)
    value = ml.pairwise_frobenius(lora_A, lora_B)
    expected = oracles.pairwise_frobenius(lora_A, lora_B)
    off = ~torch.eye(4, dtype=torch.bool)
    assert ((value - expected).abs()[off] < 0.01 * expected[off]).all()
    upstream = torch.randn(4, 4)
    got = gradients(ml.pairwise_frobenius, [lora_A, lora_B], upstream)
    wanted = double_gradients(oracles.pairwise_frobenius, [lora_A, lora_B], upstream)
    for g, e in zip(got, wanted):
        assert relative_error(g, e) < 0.01


@both
def test_particles_of_unequal_norms(function, oracle):
    # A gradient that has to do with the small particle alone keeps its digits beside the large one.
    lora_A, lora_B = factors(4, 37, 29, 8)
    for factor in (lora_A, lora_B):
        factor *= torch.tensor([1.0, 1e-5, 1e3, 1.0])[:, None, None]
    upstream = 1 - torch.eye(4)
    got = gradients(function, [lora_A, lora_B], upstream)
    wanted = double_gradients(oracle, [lora_A, lora_B], upstream)
    for g, e in zip(got, wanted):
        for particle in range(4):
            assert relative_error(g[particle], e[particle]) < FP32


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_distances_are_never_negative(size):
    for K, gap in ((2, 0.0), (5, 0.0), (8, 1e-8), (8, 1e-6)):
        lora_A, lora_B = factors(1, 31, 17, 4)
        lora_A = size * (lora_A + gap * torch.randn(K, 4, 31))
        lora_B = size * (lora_B + gap * torch.randn(K, 17, 4))
        D = ml.pairwise_frobenius(lora_A, lora_B)
        assert (D >= 0).all()
        assert torch.equal(D.diagonal(), torch.zeros(K))


def test_identical_particles_do_not_repel():
    lora_A, lora_B = (t.expand(3, -1, -1).contiguous() for t in factors(1, 7, 5, 2))
    for g in gradients(ml.pairwise_frobenius, [lora_A, lora_B], torch.rand(3, 3)):
        # Sums of equal terms of both signs, in float64: a few of its roundings are left.
        assert g.abs().max() < 1e-12


@both
def test_no_delta_weight_is_formed(function, oracle):
    d = 64
    lora_A, lora_B = (t.requires_grad_() for t in factors(3, d, d, 2))
    with Inside() as inside:
        function(lora_A, lora_B).sum().backward()
    largest = max(math.prod(shape) for _, _, outputs in inside.calls for shape in outputs)
    # Stacked factors have K r d = 384 elements, one ΔW has 4096.
    assert largest < d * d


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_factors(function, oracle, dtype):
    lora_A, lora_B = (t.to(dtype) for t in factors(4, 13, 17, 3))
    value = function(lora_A, lora_B, 0.5)
    assert value.dtype == torch.float32
    # The factors are exact; only the gradients are rounded to their dtype.
    assert relative_error(value, oracle(lora_A, lora_B, 0.5)) < FP32
    upstream = torch.randn(4, 4)
    got = gradients(lambda A, B: function(A, B, 0.5), [lora_A, lora_B], upstream)
    expected = double_gradients(lambda A, B: oracle(A, B, 0.5), [lora_A, lora_B], upstream)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        assert relative_error(g, e) < torch.finfo(dtype).eps


@pytest.mark.heavy
@both
def test_autocast_does_not_touch_it(function, oracle):
    lora_A, lora_B = factors(4, 13, 17, 3)

    def under_autocast(A, B):
        with torch.autocast(oracles.DEVICE, torch.bfloat16):
            return function(A, B)

    assert torch.equal(under_autocast(lora_A, lora_B), function(lora_A, lora_B))
    upstream = torch.randn(4, 4)
    for got, expected in zip(
        gradients(under_autocast, [lora_A, lora_B], upstream),
        gradients(function, [lora_A, lora_B], upstream),
    ):
        assert torch.equal(got, expected)


@pytest.mark.heavy
@both
def test_gradcheck(function, oracle, backend):
    factor = [t.requires_grad_() for t in factors(3, 3, 4, 2, torch.float64)]
    # Triton's interpreter takes half a minute for one difference an element.
    fast = backend == "triton"
    assert torch.autograd.gradcheck(lambda A, B: function(A, B, 0.5), factor, fast_mode=fast)


@pytest.mark.heavy
@both
def test_second_derivatives_are_right_or_refused(function, oracle):
    check_second_derivatives(function, factors(3, 3, 4, 2, torch.float64))


@pytest.mark.slow
def test_opcheck():
    lora_A, lora_B = ragged()
    for t in (*lora_A, *lora_B):
        t.requires_grad_()
    check_operator(torch.ops.multilora.lora_gram.default, (lora_A, lora_B, SCALINGS))
    check_operator(torch.ops.multilora.pairwise_frobenius.default, (lora_A, lora_B, SCALINGS))


@pytest.mark.heavy
def test_opcheck_backward():
    lora_A, lora_B = ragged()
    grad = torch.randn(len(RAGGED), 4, 4, dtype=torch.float64)
    args = (grad, lora_A, lora_B, SCALINGS)
    check_operator(torch.ops.multilora.lora_gram_backward.default, args)


def surrounded(lora_A, lora_B, head_A, head_B):
    """A kernel function of distances, over two layers of different shapes."""
    D = ml.pairwise_frobenius([lora_A.tanh(), head_A], [lora_B, head_B], [0.5, 2.0])
    return (-D / 100).exp() + ml.lora_gram(lora_A, lora_B)


# inductor gets the functions alone: see test_lora_linear.
@pytest.mark.slow
@pytest.mark.parametrize(
    "function, compiler", [(surrounded, "aot_eager"), (ml.lora_gram, "inductor")]
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(function, compiler, dynamic):
    problems = []
    for d_in in (7, 9, 12) if dynamic else (7,):
        tensors = [*factors(3, d_in, 11, 2), *factors(3, 5, d_in, 4)]
        problems.append(tensors if function is surrounded else tensors[:2])
    check_compiled(function, problems, compiler, dynamic)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda A, B: (A[0], B),
        lambda A, B: (A, B.mT),
        lambda A, B: (A[:2], B),
        lambda A, B: (A[:, :1], B),
        lambda A, B: (A[:0], B[:0]),
        lambda A, B: (A[:, :0], B[..., :0]),
    ],
    ids=["axes", "transposed", "particles", "rank", "no particles", "no rank"],
)
def test_wrong_shapes(function, oracle, change):
    lora_A, lora_B = change(*factors(3, 7, 11, 2))
    with pytest.raises(ValueError, match=function.__name__) as error:
        function(lora_A, lora_B)
    assert str(tuple(lora_A.shape)) in str(error.value)
    assert str(tuple(lora_B.shape)) in str(error.value)


@both
def test_wrong_lists(function, oracle):
    lora_A, lora_B = ragged()
    for A, B, scaling in (
        (lora_A, lora_B[:-1], 1.0),
        (lora_A, lora_B, [1.0, 2.0]),
        ([], [], 1.0),
    ):
        with pytest.raises(ValueError, match=f"got {len(A)}, {len(B)} and"):
            function(A, B, scaling)
    # The message names the layer that does not fit.
    lora_A[3], lora_B[3] = factors(5, 7, 11, 2)
    with pytest.raises(ValueError, match="at layer 3") as error:
        function(lora_A, lora_B)
    assert "(5, 2, 7)" in str(error.value) and "K = 4" in str(error.value)


@both
def test_another_device(function, oracle):
    lora_A, lora_B = factors(3, 7, 11, 2)
    with pytest.raises(ValueError, match=r"one device.*meta.*\(3, 2, 7\)"):
        function(lora_A, lora_B.to("meta"))
    with pytest.raises(ValueError, match=r"one device.*meta.*layer 1"):
        function([lora_A, lora_A.to("meta")], [lora_B, lora_B.to("meta")])


@both
def test_wrong_dtypes(function, oracle):
    lora_A, lora_B = factors(3, 7, 11, 2)
    with pytest.raises(TypeError, match=r"one floating dtype.*float64.*\(3, 2, 7\)"):
        function(lora_A.double(), lora_B)
    with pytest.raises(TypeError, match=r"one floating dtype.*float64.*layer 1"):
        function([lora_A, lora_A.double()], [lora_B, lora_B.double()])
    with pytest.raises(TypeError, match=r"one floating dtype.*int64"):
        function(lora_A.long(), lora_B.long())
