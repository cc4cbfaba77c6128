"""Validation examples during a run: curves, the best step, patience; and folders of failed runs."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from command import numbers, refused
from multilora import metrics
from multilora.app.evaluation import evaluate, predictions, predictive
from multilora.app.folders import CHECKPOINT
from multilora.app.run import load_run, train
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import TASKS
from multilora.app.tasks.task import Task
from multilora.app.validation import Best

METHODS = {
    "ensemble": {},
    "ibdr": {"sigma": 0.05},
    "bbb": {"sigma": 0.05},
    "mc_dropout": {},
    "sgld": {},
    "svgd": {},
}


class Noisy(Dataset):
    """Images that every reading draws anew from all three generators."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        drawn = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.x[i] + 0.1 * drawn, self.y[i]


class Unread(Dataset):
    """A test set that must not be looked at."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        raise AssertionError("a test example was read")


def made_task(validation=True, test=None):
    """Three classes of points that overlap, with noisy labels: training fits their noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        y = torch.arange(count) % 3
        x = torch.randn(count, 6, generator=generator)
        x[range(count), y] += 1.5
        return x, y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    task = Task(
        base=base,
        targets=["0"],
        head="2",
        classes=["a", "b", "c"],
        train=Noisy(*draw(24)),
        test=TensorDataset(*draw(120)) if test is None else test,
    )
    return replace(task, validation=Noisy(*draw(60))) if validation else task


@pytest.fixture
def task(monkeypatch):
    """The command line's task is the made one."""
    monkeypatch.setattr(TASKS["digits"], "make", lambda options, seed, report: made_task())


def settings(method="ensemble", **given):
    args = tuple(METHODS[method].items())
    given = {"steps": 12, "particles": 2, "lr": 0.1, "batch_size": 8, "method_args": args} | given
    return recommended("digits", method, **given)


def history(out, *names):
    rows = json.loads((out / "history.json").read_text())
    return {n: {row["step"]: row[n] for row in rows if n in row} for n in names}


@pytest.mark.parametrize("method", METHODS)
def test_to_watch_does_not_change_a_run(method, task, tmp_path):
    one, two = tmp_path / "blind", tmp_path / "watched"
    train(settings(method), one, pictures=False)
    train(settings(method, validate_every=1), two, pictures=False)
    own = numbers(two)
    assert 1 <= own.pop("best_step") <= 12
    assert own == numbers(one)
    for file in one.glob("particle_*/*.safetensors"):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()
    names = ("loss", "particle_distance")
    assert history(one, *names) == history(two, *names)
    curves = history(two, "validation_nll", "validation_accuracy")
    assert [*curves["validation_nll"]] == [*curves["validation_accuracy"]] == [*range(1, 13)]
    assert history(one, "validation_nll") == {"validation_nll": {}}


@pytest.mark.parametrize("method", ["ensemble", "bbb", "mc_dropout"])
def test_the_best_step_is_what_a_run_ends_with(method, task, tmp_path):
    s = settings(method, select="best", validate_every=2, steps=40)
    train(s, tmp_path, pictures=False)
    curve = history(tmp_path, "validation_nll")["validation_nll"]
    best = min(curve, key=curve.get)
    assert [*curve] == [*range(2, 41, 2)] and best < 40, "the task must be one that overfits"
    found = numbers(tmp_path)
    assert found["best_step"] == best and found["steps_taken"] == 40
    # A run that ends at that step has the same particles; the schedule is that of 40 steps.
    with pytest.raises(KeyboardInterrupt):
        train(replace(s, select="last"), tmp_path / "cut", on_step=_cut_at(best), save_every=best)
    if method == "ensemble":
        state = torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)["parameters"]
        model, _, _ = load_run(tmp_path)
        saved = dict(model.named_parameters())
        assert all(torch.equal(saved[name], value) for name, value in state.items())


def _cut_at(last):
    def on_step(step, steps, stats):
        # A checkpoint is written after the call.
        if step == last + 1:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("method", ["bbb", "ensemble"])
def test_the_saved_particles_are_those_that_were_the_best(method, monkeypatch, tmp_path):
    """Without noise in the images, predicting again gives the lowest NLL of the history."""
    quiet = made_task()
    quiet = replace(quiet, validation=TensorDataset(quiet.validation.x, quiet.validation.y))
    monkeypatch.setattr(TASKS["digits"], "make", lambda *_: replace(quiet, base=made_task().base))
    s = settings(method, select="best", validate_every=3, steps=30)
    train(s, tmp_path, pictures=False)
    model, _, _ = load_run(tmp_path)
    log_p, y = predictions(model, quiet, quiet.validation)
    curve = history(tmp_path, "validation_nll")["validation_nll"]
    assert metrics.evaluate(log_p, y)["nll"] == pytest.approx(min(curve.values()), rel=1e-5)
    assert numbers(tmp_path)["validation"]["nll"] == pytest.approx(min(curve.values()), rel=1e-5)


def test_patience(task, tmp_path):
    s = settings(steps=200, lr=0.3, patience=3, validate_every=4)
    train(s, tmp_path, pictures=False)
    curve = history(tmp_path, "validation_nll")["validation_nll"]
    best = min(curve, key=curve.get)
    found = numbers(tmp_path)
    assert (found["best_step"], found["steps_taken"]) == (best, best + 3 * 4)
    assert max(curve) == best + 12 < 200


@pytest.mark.parametrize("step", [1, 6, 11])
@pytest.mark.parametrize("method", ["ensemble", "bbb"])
def test_a_stopped_run_ends_as_if_it_had_not_been(method, step, task, tmp_path):
    s = settings(method, steps=60, select="best", patience=4, validate_every=2)
    train(s, tmp_path / "whole", pictures=False, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(s, tmp_path / "cut", on_step=_cut_at(step), pictures=False, save_every=3)
    train(s, tmp_path / "cut", resume=True, pictures=False, save_every=3)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert (tmp_path / "cut/history.json").read_bytes() == (
        tmp_path / "whole/history.json"
    ).read_bytes()
    # Also once its patience is over.
    train(s, tmp_path / "cut", resume=True, pictures=False, save_every=3)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_checkpoints_without_validation_load_and_damaged_ones_are_named(task, tmp_path):
    s = settings(select="best", validate_every=1)
    train(s, tmp_path, pictures=False)
    file = tmp_path / CHECKPOINT
    state = torch.load(file, weights_only=True)
    for best in (
        {"step": 1},
        3,
        state["best"] | {"nll": "low"},
        state["best"] | {"parameters": {}},
    ):
        torch.save(state | {"best": best}, file)
        with pytest.raises(ValueError, match=r"checkpoint\.pt.*best"):
            train(s, tmp_path, resume=True, pictures=False)
    older = {name: value for name, value in state.items() if name != "best"}
    older["settings"] = {
        name: value
        for name, value in state["settings"].items()
        if name not in ("validate_every", "select", "patience")
    }
    torch.save(older, file)
    with pytest.raises(ValueError, match="other settings"):
        train(s, tmp_path, resume=True, pictures=False)
    train(settings(), tmp_path / "plain", pictures=False)
    state = torch.load(tmp_path / "plain" / CHECKPOINT, weights_only=True)
    del state["best"]
    torch.save(state, tmp_path / "plain" / CHECKPOINT)
    train(settings(), tmp_path / "plain", resume=True, pictures=False)


@pytest.mark.parametrize(
    "given, named",
    [
        ({"select": "best"}, "select = 'best'"),
        ({"patience": 2}, "patience = 2"),
        ({"validate_every": 5}, "validate_every = 5"),
    ],
)
def test_what_needs_validation_examples_says_so(given, named, monkeypatch, tmp_path):
    monkeypatch.setattr(TASKS["digits"], "make", lambda *_: made_task(validation=False))
    with pytest.raises(ValueError, match=rf"{named}: .*--validation N"):
        train(settings(**given), tmp_path / "run")
    with pytest.raises(ValueError, match="no validation examples to be measured"):
        train(settings(), tmp_path / "run", measure="validation")
    train(settings(**given, validation=9), tmp_path / "run", pictures=False)
    assert numbers(tmp_path / "run")["validation"]["num_examples"] == 9


def test_settings_that_contradict_each_other(task, tmp_path):
    with pytest.raises(ValueError, match="need validate_every > 0; got 0"):
        Settings(select="best", validate_every=0)
    with pytest.raises(ValueError, match=r"validation = 5: .* has validation examples of its own"):
        train(settings(validation=5), tmp_path / "run")
    assert Settings(steps=100).validation_interval == 0
    assert Settings(steps=100, patience=1).validation_interval == 5
    assert Settings(steps=3, select="best").validation_interval == 1


def test_a_search_reads_no_test_example(monkeypatch, tmp_path):
    monkeypatch.setattr(TASKS["digits"], "make", lambda *_: made_task(test=Unread()))
    result = train(settings(select="best"), tmp_path, measure="validation")
    assert result["validation"]["num_examples"] == 60 and "temperature" in result
    assert "accuracy" not in result and not [*tmp_path.glob("*.png")]
    assert "calibrated" not in result and result["steps_taken"] == 12
    with pytest.raises(AssertionError, match="a test example was read"):
        train(settings(), tmp_path / "all")


def test_the_temperature_is_that_of_the_validation_examples(task, tmp_path):
    train(settings(), tmp_path, pictures=False)
    model, loaded, s = load_run(tmp_path)
    torch.manual_seed(0)
    log_p, y = predictions(model, loaded, TensorDataset(*map(torch.stack, zip(*loaded.test))))
    found = numbers(tmp_path)
    scaled = metrics.evaluate(log_p, y, temperature=found["temperature"])
    assert found["calibrated"] == pytest.approx({m: scaled[m] for m in found["calibrated"]})
    assert found["calibrated"]["nll"] != found["nll"]
    assert found["calibrated_nll"] == pytest.approx(metrics.calibrated_nll(log_p, y))
    own, on_validation = predictions(model, loaded, _quiet(loaded.validation))
    fitted = metrics.fit_temperature(own, on_validation)
    # The images of the pool are noisy, and a little different in each reading.
    assert found["temperature"] == pytest.approx(fitted, rel=0.2)
    with predictive(model, s):
        few = replace(loaded, test=TensorDataset(*loaded.test[:99]), validation=None)
        assert not {"calibrated_nll", "temperature", "validation"} & evaluate(model, few)[0].keys()


def _quiet(data):
    return TensorDataset(data.x + 0.15, data.y)


def test_best_counts():
    best = Best()
    assert not best.ends(Settings(patience=1)) and not best.ends(Settings())
    best.waiting = 3
    assert best.ends(Settings(patience=3)) and not best.ends(Settings(patience=4))
    assert not best.ends(Settings())


# --- folders -------------------------------------------------------------------------------------


def test_a_run_that_failed_before_a_checkpoint_leaves_its_folder_free(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(settings(), tmp_path, on_step=_cut_at(3))
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]
    train(settings(steps=3), tmp_path, pictures=False)
    assert numbers(tmp_path)["steps_taken"] == 3


def test_a_run_is_replaced_only_on_demand_and_strangers_never(task, tmp_path):
    train(settings(particles=3), tmp_path)
    (tmp_path / ".run.json.12.tmp").touch()
    with pytest.raises(ValueError, match=r"holds a run already; .*--overwrite"):
        train(settings(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a run and other files: notes\.txt"):
        train(settings(), tmp_path, overwrite=True)
    assert (tmp_path / "metrics.json").is_file()
    (tmp_path / "notes.txt").unlink()
    train(settings(particles=2), tmp_path, overwrite=True, pictures=False)
    assert sorted(f.name for f in tmp_path.glob("particle_*")) == ["particle_0", "particle_1"]
    assert not [*tmp_path.glob("*.png")] and not [*tmp_path.glob(".run*")]
    (tmp_path / "particle_0" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        train(settings(), tmp_path, overwrite=True)


def test_options_that_have_no_use(tmp_path, capsys):
    refused(["train", "--seeds", "3", "--out", tmp_path / "run"], capsys, "--seeds", "--seed")
    both = ["train", "--resume", "--overwrite", "--out", tmp_path / "run"]
    refused(both, capsys, "--resume", "--overwrite")
    refused(["train", "--compare", "--shots", "3"], capsys, "compare has no --shots")
    assert not (tmp_path / "run").exists()
