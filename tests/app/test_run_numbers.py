"""The numbers of a run: those of its last measurement, and of what it costs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import killed
from command import numbers
from multilora.app import run as training
from multilora.app.folders import CHECKPOINT
from multilora.app.tasks import digits


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """A task whose validation examples are the same whenever they are read."""

    def make(*_):
        made = killed.small_task()
        x, y = made.test.tensors
        # Some labels are wrong, so that the members and the draws differ in what they cost.
        labels = torch.where(torch.arange(len(y)) % 4 == 0, y.roll(1), y)
        return replace(made, validation=TensorDataset(x, labels))

    monkeypatch.setattr(digits, "make", make)


def settings(method="ensemble", **changes):
    given = {"particles": 3, "rank": 2, "steps": 6, "batch_size": 9, "lr": 0.1}
    return training.Settings(method=method, **given | changes)


def train(chosen, out, measure="test"):
    training.train(chosen, out, pictures=False, save_every=2, report=list, measure=measure)
    rows = json.loads((out / "history.json").read_text())
    return [(r["step"], r["validation_nll"]) for r in rows if "validation_nll" in r]


@pytest.mark.parametrize(
    "method, changes",
    [
        ("bbb", {"method_args": (("sigma", 0.3),)}),
        ("mc_dropout", {"lora_dropout": 0.3}),
        ("ensemble", {"combine": "logit"}),
    ],
)
def test_the_last_measurement_is_of_what_the_run_ends_with(method, changes, tmp_path):
    """With the draw, the masks and the way of combining of the final prediction.

    With measure="validation", since the masks of a test set would come before those of this one.
    """
    curve = train(settings(method, validate_every=3, **changes), tmp_path, measure="validation")
    assert curve[-1][0] == 6
    assert curve[-1][1] == pytest.approx(numbers(tmp_path)["validation"]["nll"], rel=1e-6)


def test_a_checkpoint_is_that_of_a_run_that_measured_nothing(tmp_path):
    chosen = settings("bbb", method_args=(("sigma", 0.3),))
    train(chosen, tmp_path / "blind")
    train(replace(chosen, validate_every=1), tmp_path / "watched")
    blind, watched = (
        torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("blind", "watched")
    )
    for part in ("parameters", "method", "optimizer"):
        torch.testing.assert_close(watched[part], blind[part], rtol=0, atol=0)
    assert torch.equal(watched["rng"], blind["rng"])


def test_of_equal_measurements_the_first_is_the_best(tmp_path):
    # A step of 1e-30 changes no float32 of this model.
    still = settings(lr=1e-30, weight_decay=0.0, validate_every=1, patience=2, select="best")
    curve = train(still, tmp_path)
    assert [step for step, _ in curve] == [1, 2, 3] and len({nll for _, nll in curve}) == 1
    found = numbers(tmp_path)
    assert (found["best_step"], found["steps_taken"]) == (1, 3)


def test_what_a_run_costs(tmp_path):
    """One adapter is trained, and a prediction runs it with three masks."""
    train(settings("mc_dropout", lora_dropout=0.1, validate_every=1), tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert found["forward_rows"] == 3 and found["steps_taken"] == len(state["step_ms"]) == 6
    assert found["seconds"] == pytest.approx(sum(state["step_ms"]) / 1000)
    # The kernel's own high-water mark in kilobytes, which later work can only raise.
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    assert 0.5 < found["peak_memory_mb"] / (int(line.split()[1]) / 1024) <= 1.01
