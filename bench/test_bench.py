"""The cases under pytest-benchmark; without it, a check of every peer.

`pytest bench --benchmark-enable` times, one table a case. `pytest bench` runs each body once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from bench import growth, many_runs, roofline, tune, tuning, unrelated
from bench.__main__ import listing
from bench.case import Case, Repetition, Work
from bench.cases import CASES
from bench.check import check
from bench.clocks import peak_memory
from bench.device import default_device
from bench.jobs import Context

DEVICE = default_device()


@functools.lru_cache(maxsize=1)
def _prepare(case: Case):
    """The runs of all peers and their check; kept for the case's next peer."""
    inputs = case.inputs(torch.float32, DEVICE)
    runs = {peer: make(inputs) for peer, make in case.peers.items()}
    return runs, check(case, runs, torch.float32, DEVICE)


def _synchronised(run: Repetition) -> Repetition:
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
    # This holds for any peer: a table with one wrong line compares nothing.
    assert not checked.failures, checked.failures
    benchmark.group = str(case)
    benchmark.name = peer
    benchmark(_synchronised(runs[peer]))


def test_memory_of_particles():
    """K = 8 at the same rows holds at most 1.3 times what one particle does; small images."""
    particles, one = (
        peak_memory(lambda k=k: growth.train(k, 8, "ensemble", 2, DEVICE, pixels=112), DEVICE)
        for k in (8, 1)
    )
    assert particles <= growth.ROWS_GOAL * one


def test_unrelated_runs_are_compared_only_where_they_are_equal(monkeypatch):
    case = many_runs.Training("digits", (1, 2), steps=1, rounds=2)
    about = (torch.float32, torch.device("cpu"), True, "wall")
    record = many_runs.measure_training(case, *about)
    assert not record["failures"] and len(record["speedup"]["PEFT in turn"]) == 3
    rate = unrelated.rate
    monkeypatch.setattr(unrelated, "rate", lambda run: rate(run) * (2 - run))
    # Rates that differ on one side only: the optimizers of PEFT are made behind ours.
    ours = many_runs.Ours

    def slower(runs, **options):
        made = ours(runs, **options)
        monkeypatch.setattr(unrelated, "rate", rate)
        return made

    monkeypatch.setattr(many_runs, "Ours", slower)
    wrong = many_runs.measure_training(case, *about)
    assert "differ" in wrong["failures"]["PEFT in turn"] and "speedup" not in wrong
    assert "WRONG" in many_runs.told(wrong)


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


def test_work_of_a_small_layer():
    """d_in 2, d_out 3, 5 rows of each of 4 particles, rank 1, counted by hand."""
    forward = roofline.lora_linear(2, 3, 5, 4, 1, False, "forward")
    assert forward.flops == 4 * 5 * (2 * 2 * 3 + 2 * 1 * (2 + 3))
    assert forward.bytes == 2 * (4 * 5 * (2 + 3 + 1) + 2 * 3 + 3) + 4 * 4 * (2 + 3)
    both = roofline.lora_linear(2, 3, 5, 4, 1, False, "fwd + bwd")
    assert both.flops == 2 * 4 * 5 * 2 * 2 * 3 + 3 * 4 * 5 * 2 * (2 + 3)
    assert roofline.floor(Work(79.0, 8.6), roofline.Ceilings(79.0, 4.3, 1.0)) == 2.0


def test_list_has_the_cases_and_the_records():
    text = listing("IBDR step")
    assert text.count("IBDR step, digits ViT") == 4 and "IBDR step, Llama 7B" in text
    assert "particle_loss" not in text
    assert "cpu-epyc-2-threads: " in text and " 0 with a failure" in text
