"""Operators on inputs as they occur: particles that hardly differ, many for few classes,
no memory, other kinds of derivatives, frozen tensors that somebody wants to train.

Every answer is right, or an error that names the operator.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import multilora as ml
import oracles
from multilora.ops import grouped_linear, lora_add, svgd_update
from oracles import relative_error

_, on_each_backend = oracles.each_backend("gram_volume")

FLOAT32 = torch.finfo(torch.float32).eps

# K, C: fewer particles than classes in registers and in products, as many, and more.
SHAPES = [(2, 3), (4, 10), (8, 300), (20, 40), (5, 5), (17, 4), (32, 9)]
# More than the GPU's kernels take.
LARGE = [(64, 9), (150, 5), (500, 5), (100, 300)]


def alike(K, N, C, gap, dtype=torch.float32):
    """Logits of particles that are `gap` apart, and targets."""
    logits = torch.randn(1, N, C) + gap * torch.randn(K, N, C)
    return logits.to(dtype), torch.arange(N) % C


def run(logits, targets, eps=1e-4, kind="logdet"):
    """gram_volume and its gradient."""
    leaf = logits.detach().requires_grad_()
    value = ml.gram_volume(leaf, targets, eps, kind)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert gradient.dtype == logits.dtype
    return value.detach(), gradient


def exact(logits, targets, eps=1e-4, kind="logdet"):
    """The same in float64, of the smaller of the two matrices."""
    leaf = logits.detach().double().requires_grad_()
    K, _, C = leaf.shape
    rest = leaf.scatter(-1, targets.expand(K, -1)[..., None], -torch.inf).softmax(-1)
    f = (rest / rest.norm(dim=-1, keepdim=True)).transpose(0, 1)
    gram = f @ f.mT if K < C else f.mT @ f
    if kind == "det":
        value = -torch.linalg.det(gram)
    else:
        value = -torch.linalg.slogdet(torch.eye(len(gram[0])).double() + gram / eps).logabsdet
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


# --- the volume of particles that hardly differ --------------------------------------------------


def check_logdet(K, C, gap, eps, dtype):
    logits, targets = alike(K, 3, C, gap, dtype)
    value, gradient = run(logits, targets, eps)
    expected, slope = exact(logits, targets, eps)
    # Rounding the logits moves the value by at most its slope, 1/(2·√eps) for each of K particles.
    assert (value - expected).abs().max() < K * FLOAT32 / eps**0.5 + 10 * FLOAT32 * K
    error = (gradient.double() - slope).abs().max()
    rounded = (torch.finfo(dtype).eps + FLOAT32) * slope.abs().max() + 1e-8
    if K >= C:
        # All in float64, but for the norms that are saved; f̃_i has 1/K of the volume or less.
        assert error < rounded + 4 * FLOAT32 / K
    else:
        # A sum of K predictions as they are rounded, which meet the inverse of G, at most 1/eps.
        assert error < rounded + (4 + K**0.5) * FLOAT32 / eps


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
@pytest.mark.parametrize("gap", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_each_backend
def test_logdet_of_nearly_equal_particles(backend, shape, gap, eps, dtype):
    check_logdet(*shape, gap, eps, dtype)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
@pytest.mark.parametrize("gap", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_logdet_of_many_nearly_equal_particles(shape, gap, eps, name):
    with ml.use_backend(name):
        check_logdet(*shape, gap, eps, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("K, C", [(5, 5), (64, 5), (200, 10), (500, 5)])
def test_identical_particles_have_no_gradient(K, C, name, dtype):
    # One eigenvalue, K, at any K; expanded, as a head that all particles share gives them.
    logits = torch.randn(1, 16, C).to(dtype).expand(K, 16, C)
    targets = torch.arange(16) % C
    targets[3] = -100
    with ml.use_backend(name):
        value, gradient = run(logits, targets)
        leaf = logits.detach().requires_grad_()
        _, divergence = ml.particle_loss(leaf, targets)
        (of_loss,) = torch.autograd.grad(divergence, leaf)
    expected = torch.full((16,), -math.log1p(K / 1e-4), dtype=value.dtype)
    expected[3] = 0
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(divergence.detach(), expected[targets >= 0].mean())
    # This is the error of the norms, which are saved in float32.
    assert gradient.abs().max() < 2e-7 and of_loss.abs().max() < 2e-7


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_smallest_eps_of_float64(name):
    targets = torch.zeros(4, dtype=torch.int64)
    for K, C, smallest in [(4, 7, 1e-12), (64, 9, 1e-12), (500, 5, 5.6e-11)]:
        logits = torch.randn(1, 4, C, dtype=torch.float64).expand(K, 4, C)
        with ml.use_backend(name):
            value, gradient = run(logits, targets, smallest)
            with pytest.raises(ValueError, match=rf"<= eps <= 1e6 .* {K} particles"):
                ml.gram_volume(logits, targets, smallest / 1.1)
        # G has the rounding of float64, K² · 1e-16 at most, beside eps.
        assert (value + math.log1p(K / smallest)).abs().max() < 0.1
        assert gradient.abs().max() < 2e-3


@pytest.mark.parametrize(
    "K, C, gap", [(2, 5, 1e-4), (2, 5, 1e-2), (3, 7, 1e-4), (3, 7, 1e-2), (8, 129, 0.1)]
)
@on_each_backend
def test_det_of_nearly_equal_particles(backend, K, C, gap):
    logits, targets = alike(K, 3, C, gap)
    value, gradient = run(logits, targets, kind="det")
    expected, slope = exact(logits, targets, kind="det")
    # Predictions that are rounded, beside the gaps between them.
    assert relative_error(value, expected) < 20 * FLOAT32 / gap
    assert relative_error(gradient, slope) < 100 * FLOAT32 / gap


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(3, 7), (8, 129), (32, 40)], ids=str)
@on_each_backend
def test_det_without_a_volume(backend, shape, gap, dtype):
    # The determinant is below what float32 resolves, and rounding must not make it larger.
    logits, targets = alike(shape[0], 3, shape[1], gap, dtype)
    targets[1] = -100
    value, gradient = run(logits, targets, kind="det")
    _, slope = exact(logits[:, ::2], targets[::2], kind="det")
    assert value.abs().max() < 1e-10
    assert (gradient[:, ::2].double() - slope).abs().max() < 1e-10
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))


def test_ibdr_steps_with_more_particles_than_classes():
    import peft
    from torch import nn

    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    # With one head and B = 0 all particles begin as one.
    model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["0"]), 500)
    method = ml.IBDR(model)
    x, y = torch.randn(4, 6), torch.randint(5, (4,))
    stats = method.backward(lambda: (model(x), y))
    assert all(math.isfinite(float(stats[name])) for name in ("loss", "nll", "divergence"))
    assert all(p.grad.isfinite().all() for p in model.particle_parameters())


# --- a kernel that gets no memory ----------------------------------------------------------------

STARVED = """
import resource, sys, torch, multilora as ml
from pathlib import Path
threads, shape, room = int(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3]) << 20
torch.set_num_threads(threads)
logits, targets = torch.randn(shape), torch.zeros(shape[1], dtype=torch.int64)
small = torch.randn(4, 300, 50), torch.zeros(300, dtype=torch.int64)
before = ml.gram_volume(*small)  # wakes the threads
ahead = torch.empty(2 * shape[1] * min(shape[0], shape[2]) ** 2)  # what the outputs may take
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
del ahead
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
try:
    ml.gram_volume(logits, targets)
except MemoryError as error:
    print(type(error).__name__)
print(torch.equal(ml.gram_volume(*small), before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_without_memory_raises(threads):
    # The matrices of a vector's lanes take more than 100 MB, and the outputs little.
    program = [sys.executable, "-c", STARVED, str(threads), "(1500, 2, 1501)", "24"]
    environment = {**os.environ, "MULTILORA_BACKEND": "cpu", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.split() == ["MemoryError", "True"]


# --- forward-mode derivatives --------------------------------------------------------------------

K = 3
weight, bias = torch.randn(4, 6), torch.randn(4)
lora_A, lora_B, targets = torch.randn(K, 2, 6), torch.randn(K, 4, 2), torch.arange(5) % 4
rows, outputs, logits = torch.randn(K, 5, 6), torch.randn(K, 5, 4), torch.randn(K, 5, 4)
mix = torch.rand(1, K, K)
ends = torch.tensor([1, 1, 5]).int()

# An operator, and the tensors that it can have tangents for.
OPERATORS = {
    "lora_linear": (ml.lora_linear, (rows, weight, lora_A, lora_B, bias)),
    "lora_add": (lambda y, *args: lora_add(y.clone(), *args), (outputs, rows, lora_A, lora_B)),
    "grouped_linear": (lambda x, w: grouped_linear(x, w, ends), (rows[0], lora_A)),
    "lora_gram": (ml.lora_gram, (lora_A, lora_B)),
    "pairwise_frobenius": (lambda A, B: ml.pairwise_frobenius([A], [B]), (lora_A, lora_B)),
    "gram_volume": (lambda z: ml.gram_volume(z, targets), (logits,)),
    "particle_loss": (lambda z: ml.particle_loss(z, targets), (logits,)),
    "svgd_update": (
        lambda gA, gB, mix, up, A, B: svgd_update([gA], [gB], mix, up, [A], [B]),
        (lora_A, lora_B, mix, mix, lora_A, lora_B),
    ),
}


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


WAYS = {
    "make_dual": dual,
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "linearize": torch.func.linearize,
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
    "of a leaf": lambda f, x: dual(f, x.clone().requires_grad_()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_refused(name, way):
    operator, tensors = OPERATORS[name]
    for i, tensor in enumerate(tensors):

        def function(x, i=i):
            return operator(*tensors[:i], x, *tensors[i + 1 :])

        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            WAYS[way](function, tensor)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_run_beside_forward_mode(name):
    # A level of dual numbers that does not reach their arguments.
    operator, tensors = OPERATORS[name]
    expected = operator(*tensors)
    with forward_ad.dual_level():
        other = forward_ad.make_dual(torch.ones(2), torch.ones(2)) * 3
        torch.testing.assert_close(operator(*tensors), expected, rtol=0, atol=0)
        assert torch.equal(forward_ad.unpack_dual(other).tangent, torch.full((2,), 3.0))


# --- frozen tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_tensor_that_requires_a_gradient_is_refused(name):
    frozen = {"weight": weight.clone(), "bias": bias.clone()}
    frozen[name].requires_grad_()

    def linear(frozen):
        return ml.lora_linear(rows, frozen["weight"], lora_A, lora_B, frozen["bias"])

    shape = str(tuple(frozen[name].shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"lora_linear.* {name} {shape}.*{name}\.detach\(\)"):
        linear(frozen)
    # A function of a trained tensor is refused too.
    with pytest.raises(ValueError, match=rf"{name}\.detach\(\)"):
        linear({**frozen, name: 2 * frozen[name]})
    expected = ml.lora_linear(rows, weight, lora_A, lora_B, bias)
    with torch.no_grad():
        assert torch.equal(linear(frozen), expected)
    assert torch.equal(linear({**frozen, name: frozen[name].detach()}), expected)


@pytest.mark.parametrize("scaling", [math.nan, math.inf, -math.inf])
def test_a_scaling_that_is_no_number_is_refused(scaling):
    A, B, grad = torch.randn(3, 2, 6), torch.randn(3, 4, 2), torch.eye(3)
    calls = {
        "lora_linear": lambda: ml.lora_linear(
            torch.randn(3, 5, 6), torch.randn(4, 6), A, B, None, scaling
        ),
        "lora_add": lambda: lora_add(torch.randn(3, 5, 4), torch.randn(3, 5, 6), A, B, scaling),
        "lora_gram": lambda: ml.lora_gram([A, A], [B, B], [1.0, scaling]),
        "pairwise_frobenius": lambda: ml.pairwise_frobenius(A, B, scaling),
        "svgd_update": lambda: svgd_update([A], [B], grad[None], grad[None], [A], [B], scaling),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="scaling must be a finite number"):
            pytest.fail(f"{name} took {scaling}: {call()}")
