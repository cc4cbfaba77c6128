"""ml.gram_volume and ml.particle_loss: values, gradients, extreme logits, ignored targets."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
import oracles
from multilora.ops import volume
from oracles import (
    check_compiled,
    check_operator,
    check_second_derivatives,
    double_gradients,
    gradients,
    relative_error,
)

pytestmark = oracles.each_backend("gram_volume")

# The value is a sum of logarithms of eigenvalues >= eps = 1e-4 of a matrix that float32 knows to
# about 1e-7; divided by its own size, K log(1/eps), the error stays below 1e-5. In the gradient the
# same error meets the inverse of the matrix, 1/eps: 1e-7 / 1e-4 = 1e-3.
VALUE, GRADIENT = 1e-5, 2e-3

kinds = pytest.mark.parametrize("kind", ["logdet", "det"])

# K, N, C
SHAPES = [
    (1, 1, 3),
    (1, 7, 5),
    (2, 13, 3),
    (3, 11, 7),
    (4, 5, 5),
    (7, 3, 4),
    *(
        pytest.param(size, marks=pytest.mark.heavy)
        for size in [(5, 7, 5), (5, 9, 10), (8, 9, 3), (8, 3, 101)]
    ),
]


def problem(K=3, N=7, C=5, dtype=torch.float32):
    return torch.randn(K, N, C, dtype=dtype), torch.randint(C, (N,))


def of(function, targets, kind="logdet", eps=1e-4):
    return lambda logits: function(logits, targets, eps, kind)


@kinds
@pytest.mark.parametrize(
    "dtype, value_tolerance, gradient_tolerance",
    # The condition of the matrix, 1/eps = 1e4, times float64's 1e-16, with room for many terms.
    [(torch.float32, VALUE, GRADIENT), (torch.float64, 1e-10, 1e-10)],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, kind, dtype, value_tolerance, gradient_tolerance):
    logits, targets = problem(*shape, dtype)
    value = ml.gram_volume(logits, targets, kind=kind)
    assert value.dtype == dtype
    upstream = torch.randn(shape[1], dtype=dtype)
    (got,) = gradients(of(ml.gram_volume, targets, kind), [logits], upstream)
    expected = oracles.gram_volume(logits, targets, kind=kind)
    (gradient,) = double_gradients(of(oracles.gram_volume, targets, kind), [logits], upstream)
    K, _, C = shape
    if K == 1 or (kind == "det" and K > C - 1):
        # Constant: the gradient is rounding, 1e-7, and there is no other size to compare it with.
        assert got.abs().max() < 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-12)
        return
    if kind == "det":
        # A sum of products of G's entries, which are at most 1: its error is absolute.
        assert (value - expected).abs().max() < 0.1 * value_tolerance
    else:
        assert relative_error(value, expected) < value_tolerance
    assert relative_error(got, gradient) < gradient_tolerance


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 10.0])
def test_other_eps(eps):
    logits, targets = problem(4, 9, 7)
    value = ml.gram_volume(logits, targets, eps)
    # The value's error grows as 1e-7 / eps once eps is below the smallest eigenvalue.
    assert relative_error(value, oracles.gram_volume(logits, targets, eps)) < max(1e-5, 1e-9 / eps)


@kinds
def test_volume_of_one_particle_and_of_orthogonal_ones(kind):
    # Closed forms: G = [1], and G = I where each particle is sure of another class.
    targets = torch.zeros(2, dtype=torch.int64)
    one = ml.gram_volume(torch.randn(1, 2, 4, dtype=torch.float64), targets, 1e-4, kind)
    sure = 50 * torch.eye(4, dtype=torch.float64)[1:, None].expand(3, 2, 4)
    three = ml.gram_volume(sure, targets, 1e-4, kind)
    log = torch.tensor(1 + 1e4, dtype=torch.float64).log()
    expected = (-log, -3 * log) if kind == "logdet" else (-1.0, -1.0)
    for value, number in zip((one, three), expected):
        torch.testing.assert_close(value, torch.full_like(value, float(number)), rtol=1e-12, atol=0)


@kinds
def test_gradient_of_the_true_logit_is_zero(kind):
    logits, targets = problem(3, 11, 7)
    (got,) = gradients(of(ml.gram_volume, targets, kind), [logits], torch.randn(11))
    at_target = got.gather(-1, targets.expand(3, -1)[..., None])
    assert torch.equal(at_target, torch.zeros_like(at_target))
    assert (got != 0).sum() == 3 * 11 * 6
    # And so the value does not move with it.
    moved = logits.scatter_add(-1, targets.expand(3, -1)[..., None], torch.randn(3, 11, 1))
    value = ml.gram_volume(logits, targets, kind=kind)
    assert torch.equal(ml.gram_volume(moved, targets, kind=kind), value)


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("K", [2, 4, 8])
def test_identical_particles_have_no_gradient(kind, K):
    logits, targets = problem(1, 13, 5)
    logits = logits.expand(K, -1, -1).contiguous()
    (got,) = gradients(of(ml.gram_volume, targets, kind), [logits], torch.ones(13))
    # Zero up to the rounding 1e-7 of G, times at most 2/eps, and a sum of K terms.
    assert got.abs().max() < 1e-2
    (exact,) = gradients(of(ml.gram_volume, targets, kind), [logits.double()], torch.ones(13))
    assert exact.abs().max() < 1e-10


@pytest.mark.heavy
def test_nearly_equal_particles():
    # This is why eps = 1e-4: the float32 error of the value stays near 1e-4 absolute.
    logits, targets = problem(1, 31, 10)
    for gap in (1e-1, 1e-2, 1e-3, 1e-4):
        close = logits + gap * torch.randn(5, 31, 10)
        value = ml.gram_volume(close, targets)
        assert (value - oracles.gram_volume(close, targets)).abs().max() < 5e-3, gap


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [30.0, 60.0, 300.0])
def test_true_class_far_ahead(kind, dtype, gap):
    # p_y = 1 to all digits: the other probabilities are 0 in half precision, and 0/0 normalised.
    logits, targets = problem(4, 9, 7)
    logits = (logits + gap * F.one_hot(targets, 7)).to(dtype)
    value = ml.gram_volume(logits, targets, kind=kind)
    assert value.dtype == torch.float32
    assert relative_error(value, oracles.gram_volume(logits, targets, kind=kind)) < 10 * VALUE
    (got,) = gradients(of(ml.gram_volume, targets, kind), [logits], torch.ones(9))
    (expected,) = double_gradients(of(oracles.gram_volume, targets, kind), [logits], torch.ones(9))
    assert got.dtype == dtype and got.abs().max() > 0
    assert relative_error(got, expected) < GRADIENT + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype):
    # exp(1e4) overflows and exp(−1e4) underflows; particles that are sure are orthogonal.
    logits, targets = problem(4, 9, 7)
    logits = (1e4 * logits).to(dtype).requires_grad_()
    value = ml.gram_volume(logits, targets)
    assert relative_error(value, oracles.gram_volume(logits.detach(), targets)) < 1e-3
    nll, divergence = ml.particle_loss(logits, targets)
    (value.sum() + nll.sum() + divergence).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("K", [3, 8], ids=["K<C", "K>C"])
@pytest.mark.parametrize("junk", [0.5, float("nan"), float("inf"), -float("inf")])
def test_ignored_targets(kind, K, junk):
    logits, targets = problem(K, 7, 5)
    ignored = torch.tensor([1, 4, 6])
    targets[ignored] = -100
    clean = logits.clone()
    logits[:, ignored] = junk
    kept = targets != -100
    value = ml.gram_volume(logits, targets, kind=kind)
    assert torch.equal(value[ignored], torch.zeros(3))
    torch.testing.assert_close(
        value[kept], ml.gram_volume(clean[:, kept], targets[kept], kind=kind)
    )
    (got,) = gradients(of(ml.gram_volume, targets, kind), [logits], torch.ones(7))
    assert torch.equal(got[:, ignored], torch.zeros(K, 3, 5))
    (expected,) = gradients(
        of(ml.gram_volume, targets[kept], kind), [clean[:, kept].contiguous()], torch.ones(4)
    )
    torch.testing.assert_close(got[:, kept], expected)

    leaf = logits.requires_grad_()
    nll, divergence = ml.particle_loss(leaf, targets, kind=kind)
    torch.testing.assert_close(nll, mean_cross_entropy(clean[:, kept], targets[kept]))
    torch.testing.assert_close(divergence, value[kept].mean())
    (nll.sum() + divergence).backward()
    assert torch.equal(leaf.grad[:, ignored], torch.zeros(K, 3, 5))
    assert leaf.grad[:, kept].isfinite().all() and leaf.grad[:, kept].abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*with C = 2")
@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("C", [5, 2])
@kinds
def test_without_valid_targets(kind, C, N):
    logits = torch.randn(3, N, C, requires_grad=True)
    targets = torch.full((N,), -100)
    value = ml.gram_volume(logits, targets, kind=kind)
    nll, divergence = ml.particle_loss(logits, targets, kind=kind)
    assert torch.equal(value, torch.zeros(N))
    assert torch.equal(nll, torch.zeros(3)) and torch.equal(divergence, torch.zeros(()))
    (value.sum() + nll.sum() + divergence).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("name", ["gram_volume", "particle_loss"])
def test_two_classes(name, kind, monkeypatch):
    monkeypatch.setattr(volume, "_warned_two_classes", False)
    logits, targets = problem(3, 7, 2)
    logits.requires_grad_()
    with pytest.warns(UserWarning, match=rf"{name}: with C = 2.*\(3, 7, 2\)"):
        result = getattr(ml, name)(logits, targets, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        value = ml.gram_volume(logits, targets, kind=kind)
        nll, divergence = ml.particle_loss(logits, targets, kind=kind)
    torch.testing.assert_close(result, value if name == "gram_volume" else (nll, divergence))
    assert torch.equal(value, torch.zeros(7)) and divergence == 0
    (value.sum() + divergence).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    torch.testing.assert_close(nll, mean_cross_entropy(logits, targets))


def mean_cross_entropy(logits, targets):
    """F.cross_entropy of each particle, (K,)."""
    return torch.stack([F.cross_entropy(z.to(torch.float32), targets) for z in logits])


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_particle_loss_is_cross_entropy_and_mean_volume(shape, dtype, kind):
    logits, targets = (t.to(dtype) if t.is_floating_point() else t for t in problem(*shape))
    targets[::4] = -100 if shape[1] > 1 else targets[0]
    weights = torch.randn(shape[0])

    def fused(logits):
        nll, divergence = ml.particle_loss(logits, targets, kind=kind)
        return (weights.to(nll.dtype) * nll).sum() + 0.5 * divergence

    def apart(logits):
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        nll = torch.stack([F.cross_entropy(z, targets) for z in wide])
        volumes = ml.gram_volume(wide, targets, kind=kind)[targets != -100]
        return (weights.to(nll.dtype) * nll).sum() + 0.5 * volumes.mean()

    nll, divergence = ml.particle_loss(logits, targets, kind=kind)
    assert nll.shape == (shape[0],) and divergence.shape == ()
    assert nll.dtype == torch.promote_types(dtype, torch.float32) == divergence.dtype
    torch.testing.assert_close(fused(logits), apart(logits))
    (got,) = gradients(fused, [logits], torch.ones(()))
    (expected,) = gradients(apart, [logits], torch.ones(()))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [30.0, -30.0, 200.0, -200.0])
def test_particle_loss_of_extreme_logits(gap, dtype):
    logits, targets = problem(4, 9, 7)
    logits = (logits + gap * F.one_hot(targets, 7)).to(dtype)

    def exact(logits):
        # log(1 + Σ_{c≠y} exp(z_c − z_y)): log Σ exp(z) − z_y loses a loss of 1e-13 even in float64.
        own = logits.gather(-1, targets.expand(4, -1)[..., None])
        others = (logits - own).exp() * (1 - F.one_hot(targets, 7))
        return others.sum(-1).log1p().mean(-1)

    # A logarithm of size 30 or 200 is known to 6e-8 of it; at −200 all is below float32's range.
    tolerance = {"rtol": 1e-6 * abs(gap), "atol": 1e-40}
    nll, _ = ml.particle_loss(logits, targets)
    torch.testing.assert_close(nll.double(), exact(logits.double()), **tolerance)
    (got,) = gradients(lambda z: ml.particle_loss(z, targets)[0], [logits], torch.ones(4))
    (wanted,) = double_gradients(exact, [logits], torch.ones(4))
    assert got.dtype == dtype
    tolerance["rtol"] += torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("output", [0, 1], ids=["nll", "divergence"])
def test_one_output_of_particle_loss_alone(output):
    # The other output then receives no gradient.
    logits, targets = problem()
    apart = (
        lambda z: mean_cross_entropy(z, targets).sum(),
        lambda z: ml.gram_volume(z, targets).mean(),
    )
    (got,) = gradients(
        lambda z: ml.particle_loss(z, targets)[output].sum(), [logits], torch.ones(())
    )
    (expected,) = gradients(apart[output], [logits], torch.ones(()))
    torch.testing.assert_close(got, expected)


def test_non_contiguous_logits():
    logits, targets = problem(3, 7, 5)
    targets = targets.repeat_interleave(2)[::2]
    by_class = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not by_class.is_contiguous() and not targets.is_contiguous()
    assert torch.equal(ml.gram_volume(by_class, targets), ml.gram_volume(logits, targets))
    upstream = torch.ones(()).expand(7)
    (got,) = gradients(of(ml.gram_volume, targets), [by_class], upstream)
    (expected,) = gradients(of(ml.gram_volume, targets), [logits], upstream)
    assert torch.equal(got, expected)


@pytest.mark.cover
@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 4, 4)], ids=["K<C", "K>C"])
def test_gradcheck(shape, kind, backend):
    logits, targets = problem(*shape, torch.float64)
    targets[1] = -100
    logits.requires_grad_()
    # A large eps: finite differences of a function with curvature 1/eps² have no digits.
    # Triton's interpreter takes minutes for one difference an element; fast_mode takes a few.
    fast = backend == "triton"
    for function in (ml.gram_volume, ml.particle_loss):
        of_logits = of(function, targets, kind, 0.1)
        assert torch.autograd.gradcheck(of_logits, (logits,), fast_mode=fast)


@pytest.mark.cover
@pytest.mark.heavy
@pytest.mark.parametrize(
    "shape, kind",
    [((3, 7, 5), "logdet"), ((6, 7, 4), "det"), ((4, 7, 4), "logdet"), ((3, 7, 2), "det")],
    ids=["K<C", "K>C", "K=C", "C=2"],
)
@pytest.mark.parametrize("name", ["gram_volume", "particle_loss"])
def test_opcheck(name, shape, kind):
    logits, targets = problem(*shape)
    op = getattr(torch.ops.multilora, name).default
    check_operator(op, (logits.requires_grad_(), targets, 1e-4, kind))


@pytest.mark.cover
@pytest.mark.heavy
@pytest.mark.parametrize("shape", [(3, 7, 5), (6, 7, 4)], ids=["K<C", "K>C"])
def test_opcheck_backward(shape):
    logits, targets = problem(*shape)
    operators = torch.ops.multilora
    _, stats, core = operators.gram_volume(logits, targets, 1e-4, "logdet")
    saved = (logits, targets, stats, core)
    check_operator(operators.gram_volume_backward.default, (torch.randn(7), *saved))
    grads = (torch.randn(shape[0]), torch.randn(()))
    count = torch.tensor(7.0)
    check_operator(operators.particle_loss_backward.default, (*grads, *saved, count))


def surrounded(logits, targets):
    nll, divergence = ml.particle_loss(logits.tanh(), targets)
    return nll.exp() + divergence * ml.gram_volume(logits, targets, 1e-3, "det").mean()


# inductor gets the functions alone: see test_lora_linear.
@pytest.mark.slow
@pytest.mark.parametrize(
    "function, compiler",
    [(surrounded, "aot_eager"), (ml.gram_volume, "inductor"), (ml.particle_loss, "inductor")],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(function, compiler, dynamic):
    sizes = (7, 8, 13) if dynamic else (7,)
    check_compiled(function, [list(problem(3, N, 5)) for N in sizes], compiler, dynamic)


def test_autocast_does_not_touch_it():
    logits, targets = problem(4, 9, 7)
    with torch.autocast(oracles.DEVICE, torch.bfloat16):
        value = ml.gram_volume(logits, targets)
        nll, divergence = ml.particle_loss(logits, targets)
    assert torch.equal(value, ml.gram_volume(logits, targets))
    expected = ml.particle_loss(logits, targets)
    assert torch.equal(nll, expected[0]) and torch.equal(divergence, expected[1])


@pytest.mark.heavy
def test_second_derivatives_are_right_or_refused():
    logits, targets = problem(3, 4, 5, torch.float64)
    check_second_derivatives(of(ml.gram_volume, targets, eps=0.1), [logits])
    check_second_derivatives(of(ml.particle_loss, targets, eps=0.1), [logits])


# Several chunks of classes, ragged ends, rows that start at any address and at multiples of 16
# numbers, several programs an example, and more particles than one thread holds.
LARGE = [
    (4, 1, 8207),
    (4, 1, 8192),
    (8, 1, 4101),
    (5, 2, 700),
    (16, 1, 600),
    (16, 1, 1100),
    (32, 1, 70),
]


@pytest.mark.heavy
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_many_particles_and_classes(shape):
    logits, targets = problem(*shape)
    logits *= 3
    targets[0] = shape[2] - 1
    value = ml.gram_volume(logits, targets)
    assert relative_error(value, oracles.gram_volume(logits, targets)) < VALUE

    def exact(logits):
        nll = torch.stack([F.cross_entropy(z, targets) for z in logits])
        return nll.square().sum() + oracles.gram_volume(logits, targets).mean()

    def fused(logits):
        nll, divergence = ml.particle_loss(logits, targets)
        return nll.square().sum() + divergence

    (got,) = gradients(fused, [logits], torch.ones(()))
    (expected,) = double_gradients(exact, [logits], torch.ones(()))
    assert relative_error(got, expected) < GRADIENT
    (half,) = gradients(fused, [logits.bfloat16()], torch.ones(()))
    (expected,) = double_gradients(exact, [logits.bfloat16()], torch.ones(()))
    assert relative_error(half, expected) < GRADIENT + torch.finfo(torch.bfloat16).eps


@pytest.mark.heavy
@pytest.mark.parametrize("shape", [(3, 7, 5), (8, 1, 4101), (17, 2, 70)], ids=str)
def test_repeated_runs_are_equal_to_the_bit(shape):
    logits, targets = problem(*shape)

    def run():
        leaf = logits.clone().requires_grad_()
        nll, divergence = ml.particle_loss(leaf, targets)
        (nll.sum() + divergence).backward()
        return nll, divergence, leaf.grad

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(4, 5, 7), (8, 2, 600), (6, 2, 4)], ids=str)
def test_a_broken_row_stays_in_its_example(shape, junk, kind):
    logits, targets = problem(*shape)
    targets[:] = 1
    broken = logits.clone()
    broken[2, 0, 3] = junk
    value = ml.gram_volume(broken, targets, kind=kind)
    assert torch.equal(value[1:], ml.gram_volume(logits, targets, kind=kind)[1:])
    constant = kind == "det" and shape[0] > shape[2] - 1
    assert constant or value[0].isnan()
    nll, _ = ml.particle_loss(broken, targets, kind=kind)
    assert nll.isfinite().sum() == shape[0] - 1
    (got,) = gradients(of(ml.gram_volume, targets, kind), [broken], torch.ones(shape[1]))
    (expected,) = gradients(of(ml.gram_volume, targets, kind), [logits], torch.ones(shape[1]))
    assert torch.equal(got[:, 1:], expected[:, 1:])


def test_more_particles_than_the_gpus_kernels_hold(backend):
    logits, targets = problem(33, 2, 40)
    if backend in ("reference", "cpu"):
        value = ml.gram_volume(logits, targets)
        assert relative_error(value, oracles.gram_volume(logits, targets)) < VALUE
        return
    for function in (ml.gram_volume, ml.particle_loss):
        with pytest.raises(
            ml.BackendUnavailableError, match=r"\(33, 2, 40\).*\(2,\).*32 particles.*otherwise="
        ):
            function(logits, targets)
    with ml.use_backend(backend, otherwise="reference"):
        value = ml.gram_volume(logits.requires_grad_(), targets)
    # The gradient goes where the value went.
    value.sum().backward()
    assert relative_error(value, oracles.gram_volume(logits, targets)) < VALUE
    assert logits.grad.isfinite().all()


functions = pytest.mark.parametrize("function", [ml.gram_volume, ml.particle_loss])


@functions
@pytest.mark.parametrize("wrong", [5, -1, -99, 1000])
@pytest.mark.skipif(
    oracles.DEVICE != "cpu",
    reason="a GPU reports it at the next synchronisation, and does no work after that",
)
def test_targets_out_of_range(function, wrong):
    logits, targets = problem()
    targets[3] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 5\).*got {wrong}.*\(3, 7, 5\).*\(7,\)"):
        function(logits, targets)


@functions
@pytest.mark.parametrize(
    "logits, targets",
    [((3, 7), (7,)), ((3, 7, 5), (6,)), ((3, 7, 5), (3, 7)), ((0, 7, 5), (7,)), ((3, 7, 1), (7,))],
    ids=str,
)
def test_wrong_shapes(function, logits, targets):
    with pytest.raises(ValueError, match=function.__name__) as error:
        function(torch.randn(logits), torch.zeros(targets, dtype=torch.int64))
    assert str(logits) in str(error.value) and str(targets) in str(error.value)


@functions
def test_wrong_dtypes_and_devices(function):
    logits, targets = problem()
    with pytest.raises(TypeError, match=r"int64 targets.*int32.*\(3, 7, 5\)"):
        function(logits, targets.int())
    with pytest.raises(TypeError, match=r"floating logits.*int64.*\(3, 7, 5\)"):
        function(logits.long(), targets)
    with pytest.raises(ValueError, match=r"one device.*meta.*\(3, 7, 5\)"):
        function(logits, targets.to("meta"))


@functions
def test_wrong_eps_and_kind(function):
    logits, targets = problem()
    for eps in (0.0, -1e-4, 1e-7, float("nan"), float("inf"), 1e7):
        with pytest.raises(ValueError, match=r"1e-06 <= eps.*\(3, 7, 5\)"):
            function(logits, targets, eps)
    # float64 resolves more.
    function(logits.double(), targets, 1e-7)
    with pytest.raises(ValueError, match=r"kind in .*got 'volume'"):
        function(logits, targets, kind="volume")
