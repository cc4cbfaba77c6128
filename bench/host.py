"""python -m bench.host: what the host takes around the kernels, in microseconds of a CPU's time.

Launches are replaced by nothing, so no GPU is needed, and what remains is Python and PyTorch. All
of one run's rows are interleaved; only their ratios mean something on another machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

import multilora as ml
from bench import peers
from multilora.ops import dispatch, triton
from multilora.ops.triton import common


def functions(particles: int, rows: int, d_in: int, d_out: int, rank: int) -> dict[str, Callable]:
    """The timed calls, by name; all in bfloat16 with float32 factors."""
    common.compile_only(common.H200, lambda *_: None)
    half = {"dtype": torch.bfloat16}
    x, dy = torch.randn(particles, rows, d_in, **half), torch.randn(particles, rows, d_out, **half)
    weight, bias = torch.randn(d_out, d_in, **half), torch.randn(d_out, **half)
    A, B = torch.randn(particles, rank, d_in), torch.randn(particles, d_out, rank)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    arguments = (leaves[0], weight, *leaves[1:], bias, 2.0)
    operator = torch.ops.multilora.lora_linear.default

    def launches() -> None:
        _, shrunk = triton.lora_linear(x, weight, A, B, bias, 2.0)
        triton.lora_linear_backward(dy, x, weight, A, B, shrunk, 2.0, [True] * 3)

    def gradients(y: torch.Tensor) -> None:
        torch.autograd.grad(y, leaves, dy)

    def plain() -> None:
        factors = [t.to(x.dtype) for t in leaves[1:]]
        gradients(peers.lora_baddbmm(leaves[0], weight, *factors, bias, 2.0))

    linear = [leaves[0]]
    return {
        "Triton's launches": launches,
        "lora_linear (triton)": lambda: gradients(ml.lora_linear(*arguments)),
        "the registered operator (triton)": lambda: gradients(operator(*arguments)[0]),
        "base + baddbmm, with its products": plain,
        "F.linear, with its products": lambda: torch.autograd.grad(
            F.linear(leaves[0], weight, bias), linear, dy
        ),
    }


def measure(named: dict[str, Callable], rounds: int, calls: int = 5) -> dict[str, list[float]]:
    """This thread's CPU seconds per call, one sample per round, each round in a random order."""
    for function in named.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in named}
    order, shuffle = list(named), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = time.thread_time_ns()
            for _ in range(calls):
                named[name]()
            samples[name].append((time.thread_time_ns() - start) / calls * 1e-9)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Tensors are small, so that the allocator and the casts take no time.
    named = functions(particles=4, rows=16, d_in=64, d_out=64, rank=8)
    with mock.patch.object(dispatch, "module_of", lambda op, args: triton):
        samples = measure(named, args.rounds)
    first = statistics.median(samples["Triton's launches"])
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(
            f"{name:36} {median * 1e6:6.0f} µs (quartiles {low * 1e6:.0f}–{high * 1e6:.0f}), "
            f"{median / first:.2f} × the launches"
        )


if __name__ == "__main__":
    main()
