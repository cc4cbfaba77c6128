"""The stages of a comparison over runs that are made up: what is chosen, repeated and collected."""

import json
import math
import subprocess
import sys

import pytest
import torch

from multilora.app.compare import workers
from multilora.app.compare.plan import Run, make_plan
from multilora.app.compare.stages import Stages
from multilora.app.compare.suite import TaskEntry, recipe, rows

TOY = {"toy": TaskEntry("toy", "toy", {"task": "digits", "shots": 5, "steps": 20})}


def stages(root, names=("single", "sam", "single_scaled", "ensemble_soup"), trials=4, seeds=3):
    plan = make_plan(
        "quick",
        TOY,
        rows(names, "ensemble"),
        "ensemble",
        recipe()["space"],
        trials=trials,
        tune_seeds=2,
        seeds=seeds,
    )
    return Stages(plan, root)


@pytest.fixture
def made_up(monkeypatch):
    """Runs without training: their NLL is |log lr − log 0.01|. Returns the list of the jobs."""
    done = []

    def execute(job):
        done.append(job)
        nll = abs(math.log(job.settings.lr) - math.log(0.01)) + 1e-3 * (job.settings.seed % 7)
        measures = {"nll": nll, "seconds": 2.0, "calibrated": {"nll": nll / 2}, "ece": 0.1}
        if job.measure == "validation":
            measures = {"validation": {"nll": nll}, "seconds": 2.0}
        job.folder.mkdir(parents=True)
        (job.folder / "metrics.json").write_text(json.dumps(measures))
        if job.soups:
            soups = {kind: {"nll": 3.0} for kind in job.soups}
            (job.folder / "soups.json").write_text(json.dumps(soups))

    monkeypatch.setattr(workers, "execute", execute)
    return done


def test_the_lowest_mean_validation_nll_is_chosen(made_up, tmp_path):
    s = stages(tmp_path)
    assert s.run()
    rates = [0.003] + [c["lr"] for c in s.plan.trials["toy"]["sam"][1:]]
    best = min(range(4), key=lambda t: abs(math.log(rates[t]) - math.log(0.01)))
    assert s.chosen("toy") == {"single": best, "ensemble": best, "sam": best}
    found = s.evidence()
    assert found["chosen"]["toy"]["sam"]["settings"]["lr"] == rates[best]
    assert found["trials"]["toy"]["sam"][0]["seconds"] == 4.0
    assert len(found["trials"]["toy"]["sam"][0]["nll"]) == 2
    assert found["missing"] == []


def test_the_tuning_sees_validation_examples_only_and_the_final_runs_come_after(made_up, tmp_path):
    s = stages(tmp_path)
    s.run()
    tune = [job for job in made_up if "tune" in job.folder.name]
    final = [job for job in made_up if "final" in job.folder.name]
    assert made_up == tune + final
    assert {job.measure for job in tune} == {"validation"}
    assert {job.measure for job in final} == {"test"}
    assert not {j.settings.seed for j in tune} & {j.settings.seed for j in final}
    assert all(job.soups == () for job in tune)
    assert {job.settings.method for job in final if job.soups} == {"ensemble"}


def test_every_method_has_as_many_runs_as_the_folders_show(made_up, tmp_path):
    stages(tmp_path).run()
    counts = dict.fromkeys(("single", "ensemble", "sam"), 0)
    for folder in (tmp_path / "runs" / "toy").glob("*/tune-*"):
        counts[folder.parent.name] += 1
    assert set(counts.values()) == {8}


def test_rows_that_are_parts_of_others_are_read_from_their_runs(made_up, tmp_path):
    s = stages(tmp_path)
    s.run()
    finals = s.evidence()["finals"]["toy"]
    single, scaled = finals["single"], finals["single_scaled"]
    assert [*single] == [*scaled] == ["100", "101", "102"]
    assert scaled["100"]["nll"] == single["100"]["nll"] / 2
    assert scaled["100"]["ece"] == single["100"]["ece"]
    assert finals["ensemble_soup"]["101"] == {"nll": 3.0}
    assert not (tmp_path / "runs" / "toy" / "single_scaled").exists()


def test_the_control_is_the_reference_at_the_rows_trial(made_up, tmp_path):
    s = stages(tmp_path)
    s.run()
    found = s.evidence()
    chosen = s.chosen("toy")["sam"]
    folder = Run("toy", "ensemble", "final", chosen, 101).folder(tmp_path)
    control = json.loads((folder / "metrics.json").read_text())
    assert found["controls"]["toy"]["sam"]["101"] == control


def test_a_stopped_comparison_says_what_is_missing_and_goes_on(made_up, tmp_path):
    s = stages(tmp_path)
    s.deadline = -1.0
    assert not s.run() and made_up == []
    assert s.evidence()["missing"][0] == "toy, single: the tuning is not complete."
    s.deadline = math.inf
    s.run()
    whole = s.evidence()
    some = Run("toy", "sam", "final", s.chosen("toy")["sam"], 102).folder(tmp_path)
    (some / "metrics.json").unlink()
    some.rmdir()
    assert s.evidence()["missing"] == ["toy, SAM: 1 final runs."]
    before = len(made_up)
    s.run()
    assert [job.folder for job in made_up[before:]] == [some]
    assert s.evidence() == whole


def test_progress_counts_the_runs_of_a_stage_and_those_done_before(made_up, tmp_path):
    s, seen = stages(tmp_path), []
    s.on_run = lambda *call: seen.append(call)
    s.run()
    assert seen[:2] == [("toy: tuning", 1, 24), ("toy: tuning", 2, 24)]
    assert seen[23] == ("toy: tuning", 24, 24)
    first = [*seen]
    seen.clear()
    s.run()
    assert seen == first


def test_a_nan_is_never_chosen(made_up, tmp_path):
    s = stages(tmp_path)
    s.run()
    chosen = s.chosen("toy")["sam"]
    folder = Run("toy", "sam", "tune", chosen, s.plan.tune_seeds[0]).folder(tmp_path)
    (folder / "metrics.json").write_text('{"validation": {"nll": null}}')
    assert s.chosen("toy")["sam"] != chosen


def test_a_run_that_fails_is_named_and_no_other_starts(monkeypatch, tmp_path):
    def execute(job):
        raise OSError("no space left")

    monkeypatch.setattr(workers, "execute", execute)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match=r"toy/single/tune-00-100000: OSError: no space left$"):
        stages(tmp_path).run()
    assert torch.get_num_threads() == threads


def test_a_worker_ends_with_its_parent_in_the_middle_of_a_run():
    """Else it would write into a run that the comparison, started again, has begun anew."""
    run = "import time; print('there', flush=True); time.sleep(60)"
    code = (
        "import time; from multilora.app.compare.workers import _Worker; worker = _Worker(1); "
        f"worker.start(exec, {run!r}); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "there\n"
    parent.kill()
    parent.communicate(timeout=20)  # until nobody holds the pipe, which the worker has too
