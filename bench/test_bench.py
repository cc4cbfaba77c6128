"""The cases under pytest-benchmark; without it, a check of every peer.

`pytest bench --benchmark-enable` times, one table a case. `pytest bench` runs each body once.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench import memory
from bench.cases import CASES
from bench.measure import Case, Run, check, default_device, peak_memory

DEVICE = default_device()


@functools.lru_cache(maxsize=1)
def _prepare(case: Case):
    """The runs of all peers and their check; kept for the case's next peer."""
    inputs = case.inputs(torch.float32, DEVICE)
    runs = {peer: make(inputs) for peer, make in case.peers.items()}
    return runs, check(case, runs, torch.float32, DEVICE)


def _synchronised(run: Run) -> Run:
    if DEVICE.type == "cpu":
        return run

    def waited():
        outputs = run()
        torch.cuda.synchronize()
        return outputs

    return waited


@pytest.mark.parametrize(
    ("case", "peer"),
    [pytest.param(case, peer, id=f"{case}, {peer}") for case in CASES for peer in case.peers],
)
def test_case(benchmark, case, peer):
    runs, checked = _prepare(case)
    # Of any peer: a table with one wrong line compares nothing.
    assert not checked.failures, checked.failures
    benchmark.group = str(case)
    benchmark.name = peer
    benchmark(_synchronised(runs[peer]))


def test_memory_of_particles():
    """K = 8 at the same rows holds at most 1.3 times what one particle does; small images."""
    particles, one = (
        peak_memory(lambda k=k: memory.train(k, 8, "ensemble", 2, DEVICE, pixels=112), DEVICE)
        for k in (8, 1)
    )
    assert particles <= memory.GOAL * one
