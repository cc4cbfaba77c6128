"""Operators, forward and backward, compared with the float64 oracles; called through child.py.

Every function returns the largest error of each result, in units of its dtype's epsilon and
relative to |oracle| + its root mean square.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import oracles
from compiled.launcher import executed, for_chip
from multilora.ops import reference, triton

SCALING = 1.5


def errors(results: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """name -> (value, oracle); the result is NaN where a value is."""
    return {name: _error(value, oracle) for name, (value, oracle) in results.items()}


def _error(value: Tensor, oracle: Tensor) -> float:
    assert value.shape == oracle.shape, (value.shape, oracle.shape)
    exact = oracle.double()
    size = exact.abs() + exact.square().mean().sqrt()
    off = (value.double() - exact).abs() / size.clamp_min(1e-300)
    return (off.max() / torch.finfo(value.dtype).eps).item()


@contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty hands out NaN: a kernel that does not write all of its output shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def kernels_of(module: str) -> set[str]:
    """The kernels that a module of multilora/ops/triton launches."""
    names = vars(importlib.import_module(f"multilora.ops.triton.{module}"))
    return {name for name in names if name.endswith("_kernel")}


def executed_with() -> dict[str, dict[str, set]]:
    """Everything that this process has executed: kernel -> constant argument -> values."""
    return {kernel: dict(meta) for kernel, meta in executed.items()}


def linear(
    sizes: tuple[int, int, int, int, int],
    dtype_name: str,
    shared: bool,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """lora_linear and its gradients; sizes: K, T, d_in, d_out, r."""
    x, weight, lora_A, lora_B, bias, upstream = _linear_tensors(sizes, dtype_name, shared)
    # Half-precision layers have float32 masters.
    with for_chip(capability, mode, seed, change), _poisoned():
        y, shrunk = triton.lora_linear(x, weight, lora_A, lora_B, bias, SCALING)
        dx, dA, dB = triton.lora_linear_backward(
            upstream, x, weight, lora_A, lora_B, shrunk, SCALING, [True, True, True]
        )

    def exact(x, lora_A, lora_B):
        return oracles.lora_linear(x, weight, lora_A, lora_B, bias, SCALING)

    leaves = [x, lora_A, lora_B]
    grads = oracles.double_gradients(exact, leaves, upstream)
    shrunk_exact = x.double() @ lora_A.double().mT
    results = {"y": (y, exact(*leaves)), "S": (shrunk, shrunk_exact)}
    results |= dict(zip(("dx", "dA", "dB"), zip(_as(x.dtype, dx, dA, dB), grads)))
    return errors(results)


def forward(
    sizes: tuple[int, int, int, int, int],
    dtype_name: str,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """lora_linear without its gradients."""
    x, weight, lora_A, lora_B, bias, _ = _linear_tensors(sizes, dtype_name, False)
    with for_chip(capability, mode, seed, change), _poisoned():
        y, shrunk = triton.lora_linear(x, weight, lora_A, lora_B, bias, SCALING)
    exact = oracles.lora_linear(x, weight, lora_A, lora_B, bias, SCALING)
    return errors({"y": (y, exact), "S": (shrunk, x.double() @ lora_A.double().mT)})


def linear_add(
    sizes: tuple[int, int, int, int, int], dtype_name: str, capability: int, mode: str
) -> dict[str, float]:
    """lora_add_, onto what a base layer computed, and its gradients."""
    x, weight, lora_A, lora_B, bias, upstream = _linear_tensors(sizes, dtype_name, False)
    y = (x @ weight.mT + bias).contiguous()
    before = y.double()
    with for_chip(capability, mode), _poisoned():
        shrunk = triton.lora_add_(y, x, lora_A, lora_B, SCALING)
        dx, dA, dB = triton.lora_linear_backward(
            upstream, x, None, lora_A, lora_B, shrunk, SCALING, [True, True, True]
        )

    def added(x, lora_A, lora_B):
        return oracles.lora_linear(x, torch.zeros_like(weight), lora_A, lora_B, None, SCALING)

    grads = oracles.double_gradients(added, [x, lora_A, lora_B], upstream)
    results = {"y": (y, before + added(x, lora_A, lora_B))}
    results |= dict(zip(("dx", "dA", "dB"), zip(_as(x.dtype, dx, dA, dB), grads)))
    return errors(results)


def _as(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Gradients of float32 masters are no more exact than the activations that they come from."""
    return [t.to(dtype) for t in tensors]


def _linear_tensors(sizes, dtype_name: str, shared: bool) -> list[Tensor]:
    torch.manual_seed(0)
    particles, rows, d_in, d_out, rank = sizes
    dtype = getattr(torch, dtype_name)
    master = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(1 if shared else particles, rows, d_in).to(dtype),
        (torch.randn(d_out, d_in) * d_in**-0.5).to(dtype),
        (torch.randn(particles, rank, d_in) * d_in**-0.5).to(master),
        (torch.randn(particles, d_out, rank) * rank**-0.5).to(master),
        torch.randn(d_out).to(dtype),
        torch.randn(particles, rows, d_out).to(dtype),
    ]


def grouped(
    sizes: tuple[tuple[int, ...], int, int],
    dtype_name: str,
    master_name: str,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """grouped_linear and its gradients; sizes: the rows of each group, d_in, d_out."""
    torch.manual_seed(0)
    counts, d_in, d_out = sizes
    dtype, master = getattr(torch, dtype_name), getattr(torch, master_name)
    x = torch.randn(sum(counts), d_in).to(dtype)
    weight = (torch.randn(len(counts), d_out, d_in) * d_in**-0.5).to(master)
    upstream = torch.randn(len(x), d_out).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    with for_chip(capability, mode, seed, change), _poisoned():
        y = triton.grouped_linear(x, weight, ends)
        grads = triton.grouped_linear_backward(upstream, x, weight, ends, [True, True])
    # Half-precision rows meet the matrices as rounded to their dtype.
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def exact(x, weight):
        return torch.einsum("ti,toi->to", x.double(), weight[groups])

    leaves = [x, weight.to(dtype).double()]
    exact_grads = oracles.double_gradients(exact, leaves, upstream)
    results = {"y": (y, exact(*leaves))}
    results |= dict(zip(("dx", "dW"), zip(grads, exact_grads)))
    return errors(results)


def geometry(
    layers: tuple[tuple[int, int, int], ...],
    particles: int,
    dtype_name: str,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """Gram matrices, distances, their gradients, SVGD's update; layers: d_in, d_out, r."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    lora_A = [torch.randn(particles, r, d_in).to(dtype) for d_in, _, r in layers]
    lora_B = [torch.randn(particles, d_out, r).to(dtype) for _, d_out, r in layers]
    scaling = [2.0 - 0.5 * i for i in range(len(layers))]
    grad_A, grad_B = [torch.randn_like(t) for t in lora_A], [torch.randn_like(t) for t in lora_B]
    double = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(len(layers), particles, particles, dtype=double)
    mixes = torch.rand(len(layers), particles, dtype=double), torch.rand_like(upstream)
    with for_chip(capability, mode, seed, change), _poisoned():
        gram, distances = (triton.traces(lora_A, lora_B, scaling, d) for d in (False, True))
        grads = triton.factor_gradients(upstream, lora_A, lora_B, scaling)
        updates = [
            triton.factor_gradients(upstream, lora_A, lora_B, scaling, mix, grad_A + grad_B)
            for mix in mixes
        ]
    factors = list(zip(lora_A, lora_B, scaling))
    grams = torch.stack([oracles.lora_gram(*layer) for layer in factors])
    results = {
        "gram": (gram, grams),
        "distances": (distances, torch.stack([oracles.pairwise_frobenius(*f) for f in factors])),
    }
    exact = [
        oracles.double_gradients(lambda a, b, s=s: oracles.lora_gram(a, b, s), [A, B], U)
        for A, B, s, U in zip(lora_A, lora_B, scaling, upstream)
    ]
    repelled = [dA for dA, _ in exact] + [dB for _, dB in exact]
    attracting = [t.double() for t in grad_A + grad_B]
    for i, (grad, oracle) in enumerate(zip(grads, repelled)):
        results[f"gradient {i}"] = (grad, oracle)
        for name, mix, update in zip(("own", "mixed"), mixes, updates):
            weights = mix[i % len(layers)].double()
            spec = "k,k...->k..." if weights.ndim == 1 else "kj,j...->k..."
            moved = torch.einsum(spec, weights, attracting[i]) + oracle
            results[f"{name} update {i}"] = (update[i], moved)
    return errors(results)


def gram(
    layer: tuple[int, int, int],
    particles: int,
    dtype_name: str,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """lora_gram of one layer (d_in, d_out, r), without its gradients."""
    torch.manual_seed(0)
    dtype, (d_in, d_out, rank) = getattr(torch, dtype_name), layer
    lora_A = torch.randn(particles, rank, d_in).to(dtype)
    lora_B = torch.randn(particles, d_out, rank).to(dtype)
    with for_chip(capability, mode, seed, change), _poisoned():
        value = triton.traces([lora_A], [lora_B], [SCALING], False)
    return errors({"gram": (value[0], oracles.lora_gram(lora_A, lora_B, SCALING))})


def loss(
    sizes: tuple[int, int, int],
    dtype_name: str,
    kind: str,
    scale: float,
    capability: int,
    mode: str,
    seed: int = 0,
    change=None,
) -> dict[str, float]:
    """particle_loss, gram_volume and their gradients; sizes: K, N, C."""
    torch.manual_seed(0)
    _, examples, classes = sizes
    logits = (torch.randn(*sizes) * scale).to(getattr(torch, dtype_name))
    targets = torch.randint(classes, (examples,))
    # One example that does not take part.
    targets[examples // 2] = -100
    with for_chip(capability, mode, seed, change), _poisoned():
        nll, divergence, *saved, count = triton.volume(logits, targets, 1e-4, kind, True)
        grad_nll, grad_divergence = torch.rand_like(nll), torch.full_like(divergence, 0.3)
        dz = triton.volume_backward(grad_divergence, logits, targets, *saved, grad_nll, count)
        value, stats, core = triton.volume(logits, targets, 1e-4, kind, False)
        grad = torch.rand_like(value)
        dz_volume = triton.volume_backward(grad, logits, targets, stats, core)

    z = logits.double()
    exact_nll, exact_divergence, *kept, count = reference.volume(z, targets, 1e-4, kind, True)
    exact_dz = reference.volume_backward(
        grad_divergence.double(), z, targets, *kept, grad_nll.double(), count
    )
    exact_value, *kept = reference.volume(z, targets, 1e-4, kind, False)
    exact_dz_volume = reference.volume_backward(grad.double(), z, targets, *kept)
    return errors(
        {
            "nll": (nll, exact_nll),
            "divergence": (divergence, exact_divergence),
            "dz": (dz, exact_dz),
            "value": (value, exact_value),
            "dz of the volume": (dz_volume, exact_dz_volume),
        }
    )


def nonfinite(
    sizes: tuple[int, int, int], kind: str, what: str, capability: int, mode: str
) -> tuple[str, str]:
    """Where results of planted NaN and infinities are not finite: of Triton, of the reference."""
    torch.manual_seed(0)
    particles, examples, classes = sizes
    logits, targets = torch.randn(*sizes), torch.randint(classes, (examples,))
    targets[0] = 2
    place = (1, 0) if what.endswith("row") else (1, 0, 1)
    logits[place] = float(what.removesuffix(" row"))

    def patterns(backend) -> str:
        nll, divergence, *saved, count = backend.volume(logits, targets, 1e-4, kind, True)
        grad_nll, grad = torch.ones(particles), torch.tensor(0.1)
        dz = backend.volume_backward(grad, logits, targets, *saved, grad_nll, count)
        value, *_ = backend.volume(logits, targets, 1e-4, kind, False)
        rows = torch.where(dz.isfinite().all(-1), 0.0, torch.nan)
        return " ".join(_pattern(t) for t in (nll, divergence, value, rows))

    with for_chip(capability, mode), _poisoned():
        found = patterns(triton)
    return found, patterns(reference)


def _pattern(values: Tensor) -> str:
    signs = {float("inf"): "+", float("-inf"): "-"}
    return "".join("N" if v != v else signs.get(v, ".") for v in values.flatten().tolist())
