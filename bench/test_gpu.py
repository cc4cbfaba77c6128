"""The GPU's bench, rehearsed on the CPU: planted faults, kills, and the plan at sizes for a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import multilora as ml
from bench import (
    bans,
    compare,
    journal,
    outside,
    probes,
    record,
    roofline,
    smoke,
)
from bench.case import Case, Unavailable
from bench.cases import gpu_cases
from bench.jobs import Context, shown
from bench.operators import linear_case
from bench.plan import stages
from bench.processes import ROOT
from bench.repetitions import LinearSize
from bench.supervise import Supervisor, Task

OURS = "multilora (reference)"
CPU = torch.device("cpu")


def _raise(error: Exception):
    raise error


# --- one case ------------------------------------------------------------------------------------


def _measure(case: Case, without=None) -> dict:
    return compare.measure_case(case, without or {}, roofline.H200, CPU, 0.0)


def _tiny(group: str) -> Case:
    return next(c for c in gpu_cases(["reference"], tiny=True) if c.group == group)


@pytest.mark.parametrize(
    "group",
    [
        "lora_linear fwd + bwd",
        "lora_linear forward",
        "lora_linear backward",
        "particle_loss fwd + bwd",
        "pairwise_frobenius fwd + bwd",
        "SVGD update",
        "IBDR step",
    ],
)
def test_gpu_case(group):
    case = _tiny(group)
    found = _measure(case)
    assert not found["failures"]
    ours = {name for name in case.peers if name.startswith("multilora")}
    assert OURS in ours
    assert found["launched_columns"]["x_best_peer"].keys() == ours
    assert found["rounds"] >= 3
    assert found["rounds"] >= 30 or "short_of_rounds" in found


def test_gpu_case_leaves_out_what_fails():
    """A peer that is wrong, raises or is missing gets a reason and no time; the others go on."""
    case = _tiny("particle_loss fwd + bwd")
    ours = case.peers[OURS]

    def wrong(inputs):
        run = ours(inputs)
        return lambda: {name: t * 1.5 for name, t in run().items()}

    def raising(inputs):
        raise RuntimeError("out of memory")

    def missing(inputs):
        raise Unavailable("it is not installed")

    def refusing(inputs):
        return lambda: _raise(ml.BackendUnavailableError("it takes no float32"))

    others = {
        "multilora (wrong)": wrong,
        "raising": raising,
        "missing": missing,
        "multilora (refusing)": refusing,
    }
    found = _measure(replace(case, peers={**case.peers, **others}))
    assert found["failures"].keys() == {"multilora (wrong)", "raising"}
    assert found["skipped"] == {
        "missing": "it is not installed",
        "multilora (refusing)": "it takes no float32",
    }
    timed = {*case.peers, case.yardstick[0]}
    assert found["launched"].keys() == timed
    assert not timed & others.keys()
    only_wrong = replace(case, peers={**case.peers, OURS: wrong})
    assert "launched" not in _measure(only_wrong)


def test_a_peer_that_fails_while_it_is_timed_costs_itself():
    case = _tiny("particle_loss fwd + bwd")
    ours = case.peers[OURS]

    sampled: list[str] = []

    def late(inputs):
        run = ours(inputs)
        return lambda: run() if "multilora (late)" not in sampled else 1 / 0

    changed = replace(case, peers={**case.peers, "multilora (late)": late})
    found = compare.measure_case(changed, {}, roofline.H200, CPU, 0.0, beat=sampled.append)
    assert found["failures"] == {
        "multilora (late)": "while it was timed: ZeroDivisionError: division by zero"
    }
    assert found["launched"].keys() == {*case.peers, case.yardstick[0]}


def test_a_backend_without_float32_is_timed_in_half_precision():
    case = _tiny("IBDR step")
    plain, ours = next(iter(case.peers)), "multilora (half, ignore)"

    def half_only(inputs):
        if next(inputs.frozen.parameters()).dtype == torch.float32:
            return lambda: _raise(ml.BackendUnavailableError("no float32"))
        return case.peers["multilora (reference, ignore)"](inputs)

    peers = {plain: case.peers[plain], ours: half_only}
    small = replace(case.stand_in, peers=peers)
    found = _measure(replace(case, peers=peers, stand_in=small))
    assert found["unchecked"] == {ours: "no float32"}
    assert found["loss"].keys() == found["errors"].keys() | {ours} and ours in found["launched"]
    assert not found["failures"] and not found["skipped"]


def test_what_a_peer_spoils_is_its_own():
    """Particles that a wrong kernel has filled with NaN are not those of the next peer."""
    case = _tiny("IBDR step")
    inputs = case.inputs(torch.float32, CPU)
    spoilt = case.peers[OURS](inputs)
    inputs.particles.requires_grad_(False)
    for p in inputs.particles.particle_parameters():
        p.fill_(torch.nan)
    assert spoilt()["loss"].isfinite() and case.peers[OURS](inputs)()["loss"].isfinite()


def test_gpu_cases_have_names_of_their_own():
    for tiny in (False, True):
        names = [str(case) for case in gpu_cases(["reference"], tiny)]
        assert len(set(names)) == len(names)


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_jobs_have_names_of_their_own(device):
    groups = [g for s in stages(device, False) for g in s.every_group()]
    names = [job.name for g in groups for job in g.jobs]
    assert len(set(names)) == len(names)
    assert len({g.name for g in groups}) == len(groups)


def test_page_has_the_plan():
    """docs/gpu.md has what `python -m bench.gpu --plan` prints."""
    assert f"\n{shown(stages('cuda', False))}\n" in (ROOT / "docs" / "gpu.md").read_text()


def test_plan_keeps_its_promises():
    """The results that are known after three minutes, and after ten."""
    ends, spent = {}, 0.0
    for stage in stages("cuda", False):
        spent += stage.seconds
        ends[stage.name] = spent / 60
    assert list(ends)[:5] == ["machine", "ceilings", "correctness", "ViT-B", "LLM"]
    assert ends["correctness"] <= 3.0
    assert ends["geometry, volume"] <= 10.0
    assert ends["profiles"] <= 20.0
    assert spent <= 30 * 60


def test_memory_of_the_largest_fits_or_is_skipped():
    """All cases fit a card of 78 GiB."""
    for stage in stages("cuda", False):
        for group in stage.groups:
            for job in group.jobs:
                assert job.memory < 0.95 * 78 * 2**30, job.name


# --- correctness before timing -------------------------------------------------------------------


def test_smoke_has_problems_that_the_reference_solves():
    """A problem whose own definition is wrong would have every kernel excluded."""
    context = Context(CPU, True, "", "")
    jobs = [job for group in smoke.groups(["reference"], tiny=True) for job in group.jobs]
    results = {job.name: job.run(context) for job in jobs}
    assert {"smoke: SVGD update, odd, 2 linears K5 r3, float64 (reference)"} < results.keys()
    assert not {name: r["failures"] for name, r in results.items() if r["failures"]}


def test_smoke_finds_what_is_wrong_or_changes(monkeypatch):
    case = linear_case(LinearSize(8, 6, 5, 2, 2, masters=True), "forward", ["reference"])
    make = case.peers[OURS]
    context = Context(CPU, True, "", "")

    def changing(inputs):
        run, calls = make(inputs), iter(range(1000))
        return lambda: {"y": run()["y"] * (1 + 1e-7 * (next(calls) > 2))}

    def wrong(inputs):
        run = make(inputs)
        return lambda: {"y": run()["y"] + 1.0}

    def result(maker):
        peers = {**case.peers, OURS: maker}
        return smoke.right(replace(case, peers=peers), "reference", torch.float32, context)

    assert not result(make)["failures"]
    assert "other bits" in result(changing)["failures"][OURS]
    assert "error" in result(wrong)["failures"][OURS]
    # A backend that does not take these sizes has not failed.
    refused = result(lambda inputs: lambda: _raise(ml.BackendUnavailableError("no float32")))
    assert refused["failures"] == {} and refused["skipped"] == {OURS: "no float32"}
    context.without = {OURS: "it broke"}
    assert result(make)["failures"] == {OURS: "it broke"}


def test_what_failed_its_correctness_is_not_timed():
    def failing(group, dtype="bfloat16"):
        why = {"multilora (triton)": "wrong"}
        of = {"group": group, "backend": "triton", "dtype": dtype, "failures": why}
        return {"smoke: something": of}

    peers = ["plain", "multilora (triton)", "multilora (triton, ignore)", "multilora (cuda)"]

    def left(case, results):
        return list(bans.not_timed(case, "bfloat16", peers, results))

    backward = failing("lora_linear fwd + bwd")
    assert left("lora_linear forward", backward) == []
    assert left("lora_linear backward", backward) == peers[1:3]
    assert left("IBDR step", backward) == peers[1:3]
    assert left("particle_loss forward", backward) == []
    assert left("lora_linear fwd + bwd", failing("lora_linear forward")) == peers[1:3]
    assert left("lora_linear forward", failing("lora_linear forward", "float16")) == []


def test_probes_run_on_a_cpu():
    """The probes that need no GPU; the reference answers them all."""
    found = {n: probe("reference", CPU, True) for n, probe in probes.PROBES.items()}
    assert not {name: r["failures"] for name, r in found.items() if r["failures"]}
    assert sum("skipped" not in r for r in found.values()) >= 5


# --- rehearsals ----------------------------------------------------------------------------------


def _command(folder, *more):
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--device", "cpu", "--out", "rehearsal"]
    return [*command, "--out-dir", str(folder), "--plan-of", "bench.planted", *more]


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _read(folder):
    return json.loads((folder / "rehearsal.json").read_text())


def test_planted_faults_cost_their_own_cases(tmp_path):
    command = _command(tmp_path, "--only", "faults")
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = _read(tmp_path)
    assert found["ended"] == "done" and not found["cut"]
    assert found["left_out"] == [f"four forward, sound {i}" for i in range(4)]
    faulty = "multilora (faulty)"
    whys = {case["name"]: case["failures"] | case["skipped"] for case in found["cases"]}
    # Not the peers beside it, not the cases beside it.
    assert {name for name, why in whys.items() if why} == {
        *("aborts", "hangs", "wrong", "out of memory", "missing package", "compile error")
    }
    assert all(why.keys() <= {faulty} for why in whys.values())
    assert "ended with SIGABRT" in whys["aborts"][faulty]
    assert "nothing was heard for 10 s" in whys["hangs"][faulty]
    assert whys["out of memory"][faulty] == "OutOfMemoryError: CUDA out of memory."
    assert whys["compile error"][faulty] == "RuntimeError: ptxas: error"
    assert whys["missing package"][faulty] == "nothing is not installed"
    assert "y: error 5.0e-01" in whys["wrong"][faulty]
    for case in found["cases"]:
        assert "multilora (sound)" in case["launched"]
    assert {(c["job"], c["peer"]) for c in found["crashes"]} == {
        ("one forward, aborts", faulty),
        ("two forward, hangs", faulty),
    }
    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and all(f.stat().st_size < 16 * 2**20 for f in files)


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL of the supervisor: its workers end, and the second call does what was left."""
    only = ("--only", "sound")
    first = subprocess.Popen(
        _command(tmp_path, *only, "--slow", "0.5"),
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
    )
    path = tmp_path / "rehearsal.journal.jsonl"
    end = time.time() + 100
    while (
        time.time() < end
        and "four forward, sound 1" not in journal.state(journal.read(path)).results
    ):
        time.sleep(0.05)
    children = _children(first.pid)
    assert children
    first.send_signal(signal.SIGKILL)
    first.wait()
    end = time.time() + 10
    while any(map(_alive, children)) and time.time() < end:
        time.sleep(0.05)
    assert not any(map(_alive, children))
    cut = _read(tmp_path)
    assert cut["ended"] == "not yet" and len(cut["left_out"]) >= 2
    with path.open("a") as file:
        file.write('{"event": "done", "job": "four forward, sound 3", "resu')

    done = subprocess.run(
        _command(tmp_path, *only), cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = _read(tmp_path)
    assert [case["name"] for case in found["cases"]] == [f"sound {i}" for i in range(4)]
    assert len(found["calls"]) == 2 and found["ended"] == "done" and not found["cut"]
    # Nothing that had a result ran again; what was cut short did, at most.
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran.count("four forward, sound 0") == ran.count("four forward, sound 1") == 1
    assert set(ran) == {f"four forward, sound {i}" for i in range(4)}


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- the journal and the record ------------------------------------------------------------------


def test_half_a_line_of_a_killed_run(tmp_path):
    path = tmp_path / "journal"
    path.write_text(json.dumps({"event": "begin", "job": "a"}) + '\n{"event": "do')
    opened = journal.Journal(path)
    opened.add(event="done", job="a", result={})
    assert [e["event"] for e in journal.read(path)] == ["begin", "done"]
    with pytest.raises(BlockingIOError, match="another run"):
        journal.Journal(path)


def test_state_of_a_journal():
    events = [
        {"event": "call"},
        {"event": "begin", "job": "a"},
        {"event": "done", "job": "a", "result": {"failures": {"": "x"}}},
        {"event": "begin", "job": "b"},
        {"event": "at", "job": "b", "peer": "p"},
    ]
    assert journal.state(events).open == {"b": "p"}
    crash = {"event": "crash", "job": "b", "peer": "p", "why": "w"}
    forget = {"event": "forget", "jobs": ["a"]}
    found = journal.state([*events, crash, forget])
    assert not found.open and not found.results and found.crashes == [crash]


def test_record_has_the_machine_and_the_cases():
    events = [
        {"event": "call", "commit": "c"},
        {
            "event": "done",
            "job": "machine",
            "result": {"machine": {"device": "d", "date": "2000"}, "failures": {}},
        },
        {"event": "done", "job": "lora_linear forward, 64→96 K4 T33 r16", "result": {}},
    ]
    found = record.build(events, stages("cpu", True), "gpu", True)
    assert (found["machine"]["device"], found["machine"]["date"]) == ("d", "2000")
    assert found["machine"]["commit"] == "c"
    assert [case["failures"] for case in found["cases"]] == [{}]
    assert "ceilings" in found["left_out"]


# --- commands ------------------------------------------------------------------------------------


def test_a_command_is_stopped(tmp_path):
    context = Context(CPU, True, str(tmp_path), "x")
    code, text = outside.run(["sh", "-c", "echo begun; sleep 100"], context, "slow", 1.0)
    assert code is None and "begun" in text
    assert "stopped after 1 s: begun" in outside.failed(code, text, 1.0)[""]
    assert "begun" in (tmp_path / "x.commands.log").read_text()


def test_report_of_the_tests_for_a_gpu(tmp_path):
    (tmp_path / "test_it.py").write_text(
        """
def test_right(record_property):
    record_property("error", 0.5)


def test_wrong(record_property):
    record_property("error", 2.0)
    assert 2.0 < 1.0, "y"
"""
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True)
    found = outside.junit(report)
    assert found.pop("failures").keys() == {"test_wrong"}
    assert found == {"test_right": 0.5, "test_wrong": 2.0}


def test_summary_of_tests():
    lines = [
        "[gw0] [ 25%] PASSED tests/ops/test_volume.py::test_values[reference-3 particles] ",
        "tests/ops/test_volume.py::test_errors[triton] FAILED                          [ 50%]",
        "[gw1] [ 75%] PASSED tests/ops/test_volume.py::test_empty",
        "tests/ops/test_volume.py::test_that_was_running",
    ]
    stopped = outside.summary([line.strip() for line in lines])
    assert stopped["outcomes"] == {"PASSED": 2, "FAILED": 1}
    assert stopped["failed"] == ["tests/ops/test_volume.py::test_errors[triton]"]
    last = "FAILED tests/ops/test_volume.py::test_errors[triton] - assert nan < 1e-05"
    assert outside.summary([*lines, last])["failed"] == [last]


def test_a_broken_context_costs_one_worker(tmp_path):
    """The tests behind it run in a new process."""
    (tmp_path / "test_it.py").write_text(
        """
import torch

broken = False


def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.synchronize = synchronize
torch.cuda.is_initialized = lambda: True


def test_first():
    pass


def test_that_breaks():
    global broken
    broken = True


def test_behind():
    assert not broken
"""
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "bench.broken_device", "-n", "1"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    found = outside.summary(done.stdout.splitlines())
    assert done.returncode == 1 and "crashed while running" in done.stdout, done.stdout
    assert "PASSED test_it.py::test_first" in done.stdout
    assert "PASSED test_it.py::test_behind" in done.stdout
    assert found["failed"] and all("test_that_breaks" in line for line in found["failed"])


def test_another_card_is_refused(tmp_path):
    """Nothing is run or forgotten: times of two cards must not stand side by side."""
    known = journal.Journal(tmp_path / "journal")
    for job, result in (("machine", {"machine": {"device": "one"}}), ("a", {"failures": {}})):
        known.add(event="done", job=job, result=result)

    class Elsewhere(Supervisor):
        def run_stage(self, stage, wanted):
            assert stage.name == "machine"
            result = {"machine": {"device": "another"}}
            self.journal.add(event="done", job="machine", result=result)

    plan = [stage for stage in stages("cpu", True) if stage.name in ("machine", "ViT-B")]
    task = Task("", "cpu", True, tmp_path, "x")
    found = Elsewhere(plan, known, time.time() + 60, task)
    assert "of one, this is another" in found.run(["a"])
    results = journal.state(known.events).results
    assert results["machine"]["machine"]["device"] == "one" and "a" in results
