"""The cases under pytest-benchmark; without it, a check of every peer.

`pytest bench --benchmark-enable` times, one table a case. `pytest bench` runs each body once.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import floors, memory, tune, tuning
from bench.cases import CASES
from bench.jobs import Context
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


def test_tuning_changes_an_answer():
    from multilora.ops.triton import common, configs

    rule, asked = configs.lora_gemm, {}
    sizes = (4, 64, 32, 48, 8, torch.bfloat16, common.H200)
    with tuning.answering({}, asked):
        default = configs.lora_gemm(*sizes)
    changed = replace(default, stages=default.stages + 1)
    (question,) = asked
    with tuning.answering({question: changed}, {}):
        assert configs.lora_gemm(*sizes) == changed
    assert configs.lora_gemm is rule


def test_tuning_keeps_what_is_right_and_fast(monkeypatch):
    """One configuration is wrong, one does not compile, one ended the process before, one is
    faster than the rule's; each is written down."""
    from multilora.ops.triton import common, configs

    def ours(inputs):
        def run():
            config = configs.lora_gemm(4, 64, 64, 96, 8, torch.bfloat16, common.H200)
            if config.block_m == 256:
                raise RuntimeError("out of shared memory")
            return {"y": inputs * (1.5 if config.group == 4 else 1.0)}

        return run

    def plain(inputs):
        return lambda: {"y": inputs.clone()}

    def seconds(self, run, answers, launched=False):
        return min((1.0 if c.block_k == 32 else 4.0 for c in answers.values()), default=0.5)

    monkeypatch.setattr(tuning.Tuner, "_time", seconds)
    peers = {"plain": plain, tuning.REFERENCE: plain, tuning.OURS: ours}
    case = Case("lora_linear forward", "a case", lambda d, _: torch.ones(3, dtype=d), peers)
    case = replace(case, work=SimpleNamespace(calls=None))
    context = Context(torch.device("cpu"), True, "", "")
    noted: list[str] = []
    context.note = noted.append
    first = tuning.Tuner(context, 60.0).tune(case)
    (entry,) = first["entries"]
    assert entry["config"]["block_k"] == 32 and not entry["ahead"]
    assert (first["before_us"], first["us"]) == (4e6, 1e6)
    assert all("block_m=256" in name for name in first["refused"])
    assert set(first["refused"].values()) == {"RuntimeError: out of shared memory"}
    assert first["wrong"] and all("group=4" in name for name in first["wrong"])
    fast = next(name for name in noted if "block_k=32" in name)
    context.without = {name: "the process ended" for name in noted if "block_k=32" in name}
    second = tuning.Tuner(context, 60.0).tune(case)
    assert second["refused"][fast] == "the process ended"
    assert second["entries"][0]["config"]["block_k"] == 64
    assert tuning.Tuner(context, 0.0).tune(case)["cut"].endswith("after 0 configurations")


def test_tuning_replaces_an_entry():
    keys = {"op": "lora_gemm", "capability": 90, "dtype": "bfloat16"}
    one, other = ({**keys, "sizes": {"rows": rows}, "us": 2.0} for rows in (1, 2))
    faster = {**one, "us": 1.0}
    assert tune.merge([one, other], [faster]) == [faster, other]


def test_floor_of_a_small_layer():
    """d_in 2, d_out 3, 5 rows of each of 4 particles, rank 1, counted by hand."""
    forward = floors.lora_linear(2, 3, 5, 4, 1, False, "forward")
    assert forward.flops == 4 * 5 * (2 * 2 * 3 + 2 * 1 * (2 + 3))
    assert forward.bytes == 2 * (4 * 5 * (2 + 3 + 1) + 2 * 3 + 3) + 4 * 4 * (2 + 3)
    both = floors.lora_linear(2, 3, 5, 4, 1, False, "fwd + bwd")
    assert both.flops == 2 * 4 * 5 * 2 * 2 * 3 + 3 * 4 * 5 * 2 * (2 + 3)
    assert floors.floor(floors.Work(79.0, 8.6), floors.Ceilings(79.0, 4.3, 1.0)) == 2.0


def test_prediction():
    """On two processors, of which the busier one has two of three programs."""
    least, ceilings = floors.Work(79.0, 4.3), floors.Ceilings(79.0, 4.3, 1.0)
    products = floors.Launch("", least, floors.Work(3 * 79.0, 4.3), 3)
    assert floors.predict(products, ceilings, 2) == pytest.approx(4.0 + floors.LAUNCH)
    memory = floors.Launch("", least, floors.Work(0.0, 2 * 4.3), 1)
    assert floors.predict(memory, ceilings, 2) == pytest.approx(4.0 + floors.LAUNCH)


def test_launches_of_a_small_layer():
    """One tile of the forward: padded to its blocks, with the cast of lora_A before it."""
    from multilora.ops.triton import common, configs

    cast, gemm = floors.launches(floors.lora_linear(64, 64, 64, 1, 8, False, "forward").calls)
    assert cast.does.bytes == 64 * 8 * (4 + 2)
    config = configs.lora_gemm(1, 64, 64, 64, 8, torch.bfloat16, common.H200)
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    assert (k, gemm.programs) == (64, 1)
    assert gemm.does.flops == 2 * m * (n * (64 + r) + 64 * r)
    assert gemm.least.flops == 2 * 64 * (64 * 64 + 2 * 64 * 8)
    assert gemm.does.bytes == 2 * (4 * 64 * 64 - 64 * 64 + 64 + 2 * 64 * 8) + 4 * 64 * 8


def test_every_kernel_has_a_floor():
    """And no kernel does less than it has to."""
    from multilora.ops import triton as backend

    found = [one for _, work in floors.problems() for one in floors.launches(work.calls)]
    sources = [file.read_text() for file in Path(backend.__file__).parent.glob("*.py")]
    kernels = {
        name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.M)
    }
    assert {one.name.split()[0] for one in found if one.name.startswith("_")} == kernels
    for one in found:
        assert one.does.bytes >= one.least.bytes, one
        assert floors.predict(one) >= floors.floor(one.least) + floors.LAUNCH, one


def test_page_of_floors():
    """FLOORS.md ends with what `python -m bench.floors` prints."""
    page = Path(floors.__file__).with_name("FLOORS.md").read_text()
    assert page.endswith(f"\n{floors.page()}\n")
