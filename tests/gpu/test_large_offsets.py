"""Offsets beyond 2³¹: sampled rows, and the factors' gradients, against float64 or float32.

On a CPU the tensors are small, which only rehearses the tests.
"""

import pytest
import torch

import multilora as ml
from multilora.ops.dispatch import backends_of

DEVICE = torch.get_default_device()
ON_GPU = DEVICE.type == "cuda"
#: ‖error‖ / ‖exact‖ of bfloat16 outputs: a few roundings, and far from a wrong offset.
TOLERANCE = 2e-2

pytestmark = pytest.mark.gpu


def on_backends_of(operator):
    # On a CPU, backend "cuda" executes its kernels' PTX, which is slow.
    names = [b for b in backends_of(operator, DEVICE.type) if ON_GPU or b != "cuda"]
    return pytest.mark.parametrize("backend", names)


def draw(*shape, std=1.0, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype).mul_(std)


def error_of(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def spread(rows, count):
    """The first row, the last one and some between."""
    return torch.linspace(0, rows - 1, count, dtype=torch.float64).long()


@pytest.mark.slow
@on_backends_of("lora_linear")
@pytest.mark.parametrize("wide", ["in", "out"])
def test_lora_linear(wide, backend, record_property):
    if backend == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GEMM is one for compute capability 9.0 (Hopper)")
    rows = 2**19 + 77 if ON_GPU else 300
    widths = (1024, 64) if ON_GPU else (48, 16)
    assert not ON_GPU or 4 * rows * max(widths) > 2**31
    d_in, d_out = widths if wide == "in" else widths[::-1]
    x, dy = draw(4, rows, d_in).requires_grad_(), draw(4, rows, d_out)
    weight, bias = draw(d_out, d_in, std=d_in**-0.5), draw(d_out, std=0.1)
    A = draw(4, 8, d_in, std=d_in**-0.5, dtype=torch.float32).requires_grad_()
    B = draw(4, d_out, 8, std=0.1, dtype=torch.float32).requires_grad_()
    with ml.use_backend(backend):
        y = ml.lora_linear(x, weight, A, B, bias, 2.0)
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    y, x, A, B = (t.detach() for t in (y, x, A, B))

    sample = spread(rows, 64)
    W64, A64, B64 = weight.double(), A.double(), B.double()
    x64, dy64 = x[:, sample].double(), dy[:, sample].double()
    expected_y = x64 @ W64.T + bias.double() + 2.0 * (x64 @ A64.mT) @ B64.mT
    expected_dx = dy64 @ W64 + 2.0 * (dy64 @ B64) @ A64
    expected_dA, expected_dB = torch.zeros_like(A64), torch.zeros_like(B64)
    for start in range(0, rows, 2**16):
        part = slice(start, start + 2**16)
        x32, dy32 = x[:, part].float(), dy[:, part].float()
        expected_dA += 2.0 * ((dy32 @ B).mT @ x32).double()
        expected_dB += 2.0 * (dy32.mT @ (x32 @ A.mT)).double()
    errors = {
        "y": error_of(y[:, sample], expected_y),
        "dx": error_of(dx[:, sample], expected_dx),
        "dA": error_of(dA, expected_dA),
        "dB": error_of(dB, expected_dB),
    }
    record_property("error", max(errors.values()))
    for name, error in errors.items():
        assert error < TOLERANCE, name


@on_backends_of("particle_loss")
def test_particle_loss(backend, record_property):
    rows, classes = (17_000, 32_000) if ON_GPU else (20, 50)
    assert not ON_GPU or 4 * rows * classes > 2**31
    logits, targets = draw(4, rows, classes), torch.randint(classes, (rows,))
    z = logits.detach().requires_grad_()
    with ml.use_backend(backend):
        nll, divergence = ml.particle_loss(z, targets)
        (dz,) = torch.autograd.grad(nll.sum() + 0.02 * divergence, z)

    exact_nll, exact_divergence = torch.zeros(4, dtype=torch.float64), 0.0
    sample = spread(rows, min(rows, 32))
    with ml.use_backend("reference"):
        for start in range(0, rows, 1024):
            part = slice(start, start + 1024)
            share = len(targets[part]) / rows
            one_nll, one = ml.particle_loss(logits[:, part].float(), targets[part])
            exact_nll += one_nll.double() * share
            exact_divergence += one.double() * share
        small = logits[:, sample].double().requires_grad_()
        one_nll, one = ml.particle_loss(small, targets[sample])
        (expected,) = torch.autograd.grad(one_nll.sum() + 0.02 * one, small)
    # A mean over all rows divides by more than one over the sample.
    expected = expected * (len(sample) / rows)
    errors = {
        "nll": error_of(nll.detach(), exact_nll),
        "divergence": error_of(divergence.detach(), exact_divergence),
        "dz": error_of(dz[:, sample], expected),
    }
    record_property("error", max(errors.values()))
    for name, error in errors.items():
        assert error < TOLERANCE, name
