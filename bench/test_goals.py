"""The goals of a record, and the profiles of what misses one."""

from __future__ import annotations

import pytest

from bench import goals, profiles
from bench.cases import gpu_cases
from bench.plan import stages

OURS = "multilora (reference)"


def _timed(group, name, **seconds):
    """A case's record: the base GEMM takes one second, the fastest plain peer two."""
    ours = {f"multilora ({peer})": s for peer, s in seconds.items()}
    times = {name: [s, s, s] for name, s in {**ours, "base GEMM": 1.0, "loop": 2.0}.items()}
    columns = {
        "x_yardstick": ours,
        "x_best_peer": {peer: [2.0 / s] * 3 for peer, s in ours.items()},
        "gbytes": {peer: 1.0 / s for peer, s in ours.items()},
    }
    case = {"group": group, "name": name, "launched": times, "kernel": times}
    return case | {"kernel_columns": columns, "launched_columns": columns}


def _judged(cases=(), others=None, ceilings=None):
    record = {"cases": list(cases), "others": others or {}, "ceilings": ceilings}
    return {one.goal: one for one in goals.judge(record)}


def test_goals_without_results_are_open():
    found = _judged()
    assert found and all(one.met is None and str(one).startswith("open") for one in found.values())


def test_goals_are_of_the_fastest_backend_and_the_widths():
    vit, decoder = "768→2304 K4 T12608 r16", "4096→4096 K4 T4096 r16"
    found = _judged(
        [
            _timed("lora_linear forward", vit, triton=1.3, cuda=1.1),
            _timed("lora_linear forward", decoder, triton=1.1),
            _timed("lora_linear forward", f"{vit} shared x", triton=2.5),
            _timed("lora_linear fwd + bwd", f"{vit}, torch.compile", triton=1.9),
        ]
    )
    over = found[f"lora_linear forward, {vit}: over the base GEMM"]
    assert over.met and (over.measured, over.by) == (1.1, "multilora (cuda), kernel")
    assert found[f"lora_linear forward, {decoder}: over the base GEMM"].met is False
    assert f"lora_linear forward, {vit} shared x: over the base GEMM" not in found
    assert found[f"lora_linear forward, {vit} shared x: the best peer over it"].met is False
    assert found[f"lora_linear fwd + bwd, {vit}, torch.compile: the best peer over it"].met


def test_goals_of_bytes_launches_and_plain_forms():
    both = "particle_loss fwd + bwd"
    large, small = _timed(both, "K4 N64 C32000", cuda=1.0), _timed(both, "K4 N1024 C100", triton=1)
    large["launches"] = {"multilora (cuda)": 3}
    small["kernel"] |= {"softmax, logdet": [6, 6, 6], "mask, Cholesky": [4, 4, 4]}
    geometry = _timed("pairwise_frobenius fwd + bwd", "ViT-B, 72 linears K8 r8", triton=1.5)
    found = _judged([large, small, geometry], ceilings={"bytes": 1.4e9})
    assert found[f"{both}, K4 N64 C32000: over its bytes"].measured == pytest.approx(1.4)
    assert found[f"{both}, K4 N64 C32000: launches"].met is False
    assert found[f"{both}, K4 N1024 C100: launches"].met is None
    assert found[f"{both}, K4 N1024 C100: plain PyTorch over it"].measured == 4.0
    assert found["pairwise_frobenius fwd + bwd, ViT-B: over its bytes"].met is False


def test_goals_of_steps_and_memory():
    eager = _timed("IBDR step", "ViT-B/16 K4 B64", **{"triton, ignore": 1.0, "reference": 3.0})
    eager["launched"] = {**eager["launched"], "PEFT loop": [1.9] * 3, "folded": [1.0] * 3}
    compiled = _timed("IBDR step", "ViT-B/16 K4 B64, torch.compile", **{"triton, compiled": 1.0})
    compiled["kernel"] = {**compiled["kernel"], "folded, compiled": [1.3] * 3}
    memory = {f"CLIP ViT-B/32, K = {k}": {"resident": held} for k, held in ((3, 100), (100, 115))}
    found = _judged([eager, compiled], memory)
    step = "IBDR step, ViT-B/16 K4"
    assert found[f"{step}, launched: a loop over PEFT models over it"].met is False
    assert found[f"{step}, kernel: a loop over PEFT models over it"].met is None
    assert found[f"{step}, kernel: the best compiled plain form over it"].measured == 1.3
    assert found["an SVGD step of CLIP ViT-B/32: memory of K = 100 over K = 3"].met


def test_goals_name_cases_of_the_plan():
    """Each number has its case in the plan, so that no goal stays open because of a name."""
    records = [
        _timed(case.group, case.name, **{"reference": 1.0}) | {"launches": {OURS: 1}}
        for case in gpu_cases(["reference"])
    ]
    for case in records:
        for peer in ("PEFT loop", "folded, compiled", "softmax, logdet"):
            case["kernel"][peer] = [9.0] * 3
    jobs = {job.name for s in stages("cuda", False) for g in s.groups for job in g.jobs}
    memory = {f"CLIP ViT-B/32, K = {k}": {"resident": 1} for k in (3, 100)}
    assert memory.keys() <= jobs
    found = _judged(records, memory, {"bytes": 1e9})
    assert len(found) > 60
    assert not [goal for goal, one in found.items() if one.measured is None]


# --- profiles -------------------------------------------------------------------------------------


def test_profiles_are_of_cases_in_the_plan():
    assert len(profiles.chosen("reference")) == sum(map(len, profiles.CHOSEN.values()))


def test_what_ncu_prints():
    text = """==PROF== Connected to process 1
==PROF== Profiling "gemm": 0%....100% - 9 passes
lora_linear fwd + bwd, 768→768 K4 T12608 r16
"ID","Process ID","Kernel Name","Grid Size","Section","Metric Name","Metric Unit","Metric Value"
"0","1","gemm","(132, 1, 1)","GPU Speed Of Light Throughput","Duration","us","95.2"
"0","1","gemm","(132, 1, 1)","GPU Speed Of Light Throughput","DRAM Throughput","%","61.5"
"0","1","gemm","(132, 1, 1)","Compute Workload Analysis","Tensor (FP)","%","70.1"
"0","1","gemm","(132, 1, 1)","Compute Workload Analysis","No Eligible","%","5"
"1","1","reduce","(8, 1, 1)","Launch Statistics","Registers Per Thread","register/thread","32"
==PROF== Disconnected from process 1
"""
    assert profiles.kernels(text) == [
        {
            "kernel": "gemm",
            "grid": "(132, 1, 1)",
            "Duration": "95.2 us",
            "DRAM Throughput": "61.5 %",
            "Tensor (FP)": "70.1 %",
        },
        {"kernel": "reduce", "grid": "(8, 1, 1)", "Registers Per Thread": "32 register/thread"},
    ]
    assert profiles.kernels("==ERROR== no permission\n") == []
