"""What only a GPU can show: graphs made by torch.compile, and offsets beyond 2³¹.

Each check runs on one backend and returns what it saw; "failures" names what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import multilora as ml
from bench import repetitions
from bench.check import reason
from bench.device import check_device
from bench.repetitions import LinearSize
from multilora.ops.dispatch import missing_reason

#: ‖error‖ / ‖exact‖ of bfloat16 outputs: a few roundings, and far from a wrong offset.
_BFLOAT16 = 2e-2


def compiled(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """torch.compile(mode="reduce-overhead"), both directions, against eager mode, bit by bit."""
    size = LinearSize(64, 96, 33, masters=True) if tiny else LinearSize(768, 768, 197, masters=True)
    linear = size.inputs(torch.bfloat16, device)
    logits = repetitions.logits_inputs(4, 64, 100, torch.bfloat16, device)
    leaves = [linear.x, linear.lora_A, linear.lora_B]

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ml.lora_linear(x, linear.weight, A, B, linear.bias, linear.scaling)

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        return ml.particle_loss(z, logits.targets)

    def distances(A: Tensor, B: Tensor) -> Tensor:
        return ml.pairwise_frobenius(A, B, linear.scaling)

    functions = {
        "lora_linear": (layer, leaves),
        "particle_loss": (loss, [logits.logits]),
        "pairwise_frobenius": (distances, leaves[1:]),
    }
    mode = "reduce-overhead" if device.type == "cuda" else None

    def same(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        eager = _with_gradients(function, inputs)
        torch.compiler.reset()
        compiled = torch.compile(function, mode=mode, fullgraph=True)
        # The first calls compile and record, the last one replays.
        for _ in range(4):
            found = _with_gradients(compiled, inputs)
        return all(torch.equal(a, b) for a, b in zip(eager, found))

    computations = {name: partial(same, *problem) for name, problem in functions.items()}
    return on_backend(backend, computations, lambda equal: equal, device)


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    torch.compiler.cudagraph_mark_step_begin()
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    # The next replay writes over a graph's outputs.
    return [t.detach().clone() for t in (*outputs, *grads)]


def large_offsets(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Tensors of more than 2³¹ elements: sampled rows, and the factors' gradients, against
    float64 or float32."""
    rows = 300 if tiny else 2**19 + 77
    wide, narrow = (48, 16) if tiny else (1024, 64)
    assert tiny or 4 * rows * wide > 2**31
    computations = {
        f"lora_linear {a} to {b}": lambda a=a, b=b: _large_linear(a, b, rows, device)
        for a, b in ((narrow, wide), (wide, narrow))
    }
    examples, classes = (20, 50) if tiny else (17_000, 32_000)
    computations["particle_loss"] = lambda: _large_loss(examples, classes, device)
    return on_backend(backend, computations, lambda error: error < _BFLOAT16, device)


def _large_linear(d_in: int, d_out: int, rows: int, device: torch.device) -> float:
    """The worst relative error of y, dx, dA and dB."""
    i = LinearSize(d_in, d_out, rows, masters=True).inputs(torch.bfloat16, device)
    x, A, B = (t.detach().requires_grad_() for t in (i.x, i.lora_A, i.lora_B))
    y = ml.lora_linear(x, i.weight, A, B, i.bias, i.scaling)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), i.dy)
    y, x = y.detach(), x.detach()
    # Of every particle the first rows, the last ones and some between.
    sample = torch.linspace(0, rows - 1, 64, dtype=torch.float64).long().to(device)
    exact = [t.double() for t in (i.weight, i.lora_A, i.lora_B, i.bias)]
    weight, A64, B64, bias = exact
    x64, dy64 = x[:, sample].double(), i.dy[:, sample].double()
    expected_y = x64 @ weight.T + bias + i.scaling * (x64 @ A64.mT) @ B64.mT
    expected_dx = dy64 @ weight + i.scaling * (dy64 @ B64) @ A64
    pairs = [(y[:, sample], expected_y), (dx[:, sample], expected_dx)]
    expected_dA, expected_dB = torch.zeros_like(A64), torch.zeros_like(B64)
    for start in range(0, rows, 2**16):
        part = slice(start, start + 2**16)
        x32, dy32 = x[:, part].float(), i.dy[:, part].float()
        low_A, low_B = i.lora_A, i.lora_B
        expected_dA += i.scaling * ((dy32 @ low_B).mT @ x32).double()
        expected_dB += i.scaling * (dy32.mT @ (x32 @ low_A.mT)).double()
    pairs += [(dA, expected_dA), (dB, expected_dB)]
    return max(_error(*pair) for pair in pairs)


def _large_loss(rows: int, classes: int, device: torch.device) -> float:
    """The worst relative error of the losses and of sampled rows of the gradient."""
    i = repetitions.logits_inputs(4, rows, classes, torch.bfloat16, device)
    z = i.logits.detach().requires_grad_()
    nll, divergence = ml.particle_loss(z, i.targets)
    (dz,) = torch.autograd.grad(nll.sum() + 0.02 * divergence, z)
    exact_nll, exact_divergence = torch.zeros(4, dtype=torch.float64, device=device), 0.0
    with ml.use_backend("reference"):
        for start in range(0, rows, 1024):
            part = slice(start, start + 1024)
            one_nll, one = ml.particle_loss(i.logits[:, part].float(), i.targets[part])
            share = len(i.targets[part]) / rows
            exact_nll += one_nll.double() * share
            exact_divergence += one.double() * share
        sample = torch.linspace(0, rows - 1, 32, dtype=torch.float64).long().to(device)
        small = i.logits[:, sample].double().requires_grad_()
        one_nll, one = ml.particle_loss(small, i.targets[sample])
        (expected,) = torch.autograd.grad(one_nll.sum() + 0.02 * one, small)
    # A mean over all rows divides by more than one over the sample.
    expected = expected * (len(sample) / rows)
    return max(
        _error(nll.detach(), exact_nll),
        _error(divergence.detach(), exact_divergence),
        _error(dz[:, sample], expected),
    )


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def on_backend(
    backend: str,
    computations: dict[str, Callable[[], Any]],
    right: Callable[[Any], bool],
    device: torch.device,
) -> dict[str, Any]:
    """What each computation gave on that backend, and the failures. Raises BrokenDevice where the
    device works no longer: what comes after would be blamed for it."""
    result: dict[str, Any] = {"failures": {}}
    missing = missing_reason(backend)
    if missing is not None:
        return result | {"skipped": {backend: missing}}
    for name, compute in computations.items():
        try:
            with ml.use_backend(backend):
                result[name] = compute()
            if device.type == "cuda":
                # What went wrong on the device is raised here.
                torch.cuda.synchronize(device)
            if not right(result[name]):
                result["failures"][name] = str(result[name])
        except Exception as error:
            result["failures"][name] = reason(error)
            check_device(error, device)
    return result


#: Determinism, and graphs captured by hand, are checked with every case.
CHECKS = {"torch.compile": compiled, "large offsets": large_offsets}
