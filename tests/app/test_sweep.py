"""The command `multilora sweep`: runs of a file, over a small task."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from command import refused
from documents import block
from killed import small_task
from models import FAMILIES
from multilora.app import cli, sweep
from multilora.many import RunArguments, fit_many
from multilora.many.sweep import Sweep


@pytest.fixture
def small(monkeypatch):
    """A task of rows in place of the digits, whose base need not be pretrained."""

    def make(settings, report=print):
        task = small_task()
        if not settings.validation:
            return task
        rest = torch.utils.data.Subset(task.train, range(settings.validation, 60))
        held = torch.utils.data.Subset(task.test, range(settings.validation))
        return replace(task, train=rest, validation=held)

    monkeypatch.setattr(sweep, "make_task", make)


def written(tmp_path, text):
    file = tmp_path / "runs.yaml"
    file.write_text(text)
    return file


FILE = """
task: digits
validation: 12
keep: 2
at_once: 2
defaults: {rank: 2, batch_size: 8, steps: 6, lr: 3e-2, eval_strategy: steps, eval_steps: 3}
grid: {rank: [1, 3], lr: [1e-2, 3e-2]}
runs:
  - {name: other, lr: 1e-3, accumulation: 2, steps: 4, seed: 5, lora_dropout: 0.1}
"""


def test_runs_of_a_file(tmp_path, small, capsys):
    file, out = written(tmp_path, FILE), tmp_path / "out"
    assert cli.main(["sweep", str(file), "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    names = ["rank=1,lr=1e-2", "rank=1,lr=3e-2", "rank=3,lr=1e-2", "rank=3,lr=3e-2", "other"]
    assert [row["name"] for row in table] == names and all(name in said for name in names)
    assert [row["steps"] for row in table] == [6, 6, 6, 6, 4]
    kept = {row["name"]: row for row in table if row["folder"]}
    assert len(kept) == 2 == len([path for path in out.iterdir() if path.is_dir()])
    for name, row in kept.items():
        # What was measured is what PEFT's model measures.
        task = small_task()
        base = peft.PeftModel.from_pretrained(task.base, out / name).eval()
        x, y = task.test.tensors
        right = (base(x).argmax(-1) == y).double().mean().item()
        assert row["test_accuracy"] == pytest.approx(right)
    ended = sorted(row["metric"] for row in table)
    assert sorted(row["metric"] for row in kept.values()) == ended[:2]
    # The command and the library train the same runs.
    asked = sweep.planned(sweep.read(file))
    task = sweep.make_task(asked.settings)
    options = {"at_once": 2, "head_init": "reset"}
    own = fit_many(task.base, sweep.runs_of(asked, task), **options)
    assert [row.train_loss for row in own] == [row["train_loss"] for row in table]


DIFFERENT = """
at_once: 2
defaults: {steps: 2, lr: 1e-2}
runs:
  - {name: a, rank: 1}
  - {name: b, rank: 3, lora_alpha: 8}
  - {name: c, target_modules: ['0', '2']}
  - {name: far, steps: 1, lr: 1e38}
"""


def test_adapters_that_differ_are_tested_together(tmp_path, monkeypatch, capsys):
    """In rank, alpha and layers. One that has diverged costs the others nothing."""
    torch.manual_seed(0)
    first, second, head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
    base = nn.Sequential(first, nn.GELU(), second, nn.GELU(), head)
    task = replace(small_task(), base=base, head="4")
    monkeypatch.setattr(sweep, "make_task", lambda *_: replace(task, base=copy.deepcopy(base)))
    out = tmp_path / "out"
    assert cli.main(["sweep", str(written(tmp_path, DIFFERENT)), "--out", str(out)]) == 0
    assert "run 'far' cannot be measured on the test set" in capsys.readouterr().out
    *table, far = json.loads((out / "table.json").read_text())
    assert far["status"] == "finished" and far["test_accuracy"] is None
    x, y = task.test.tensors
    for row in table:
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(base), out / row["name"]).eval()
        assert row["test_nll"] == pytest.approx(F.cross_entropy(alone(x), y).item(), rel=1e-5)


def test_a_sweep_goes_on(tmp_path, small, capsys):
    file, out = written(tmp_path, FILE), tmp_path / "out"
    command = ["sweep", file, "--out", out]
    assert cli.main([str(word) for word in command]) == 0
    first = json.loads((out / "table.json").read_text())
    refused(command, capsys, "holds a sweep already", "--resume")
    assert cli.main([str(word) for word in [*command, "--resume"]]) == 0
    assert json.loads((out / "table.json").read_text()) == first
    written(tmp_path, FILE.replace("keep: 2", "keep: 1"))
    refused([*command, "--resume"], capsys, "a sweep of another file of runs")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    refused(["sweep", file, "--out", other], capsys, "holds other files: notes.txt")


def test_a_sweep_goes_on_with_as_many_at_once(tmp_path, small):
    """As the checkpoint has it, whatever the file says."""
    file, out = written(tmp_path, FILE), tmp_path / "out"
    assert cli.main(["sweep", str(file), "--out", str(out), "--at-once", "1"]) == 0
    assert cli.main(["sweep", str(file), "--out", str(out), "--resume"]) == 0


def test_a_sweep_that_never_began_leaves_the_folder_free(tmp_path, small, capsys):
    out = tmp_path / "out"
    refused(["sweep", written(tmp_path, "runs: [{rank: 0}]"), "--out", out], capsys, "run 'run_0'")
    file = written(tmp_path, "runs: [{steps: 1}]")
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0


def test_all_runs_fail(tmp_path, small, monkeypatch):
    monkeypatch.setattr("killed.Augmented.__getitem__", lambda self, i: 1 / 0)
    file = written(tmp_path, "runs: [{steps: 3}]")
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert row["status"] == "failed" and "ZeroDivisionError" in row["error"]


BAD = {
    "key": ("run: []", "has the keys ['run']"),
    "run's key": ("runs: [{name: x, lr: 1, rnk: 2}]", "run 'x' has the keys ['rnk']"),
    "default's key": ("defaults: {rnk: 2}\nruns: [{}]", "defaults has the keys ['rnk']"),
    "twice": ("runs: [{lr: 1, learning_rate: 2}]", "run 'run_0' gives learning_rate twice"),
    "names": ("runs: [{name: a}, {name: a}]", "two runs have the name 'a'"),
    "nothing": ("task: digits", "got 0 runs"),
    "grid": ("grid: {lr: 3}", "grid must be names with a list"),
    "number": ("runs: [{lr: fast}]", "run 'run_0': lr must be a finite number; got 'fast'"),
    "part of a rank": ("runs: [{name: x, rank: 2.5}]", "run 'x': rank must be an integer"),
    "text": ("runs: [{name: x, rank: '4'}]", "run 'x': rank must be an integer"),
    "exponent": ("grid: {rank: [1e1]}", "run 'rank=1e1': rank must be an integer"),
    "steps": ("runs: [{name: x, steps: 1e1}]", "run 'x': steps must be an integer"),
    "nothing there": ("runs: [{name: x, steps: }]", "run 'x': steps must be an integer"),
    "flag": ("runs: [{name: x, use_rslora: 'yes'}]", "run 'x': use_rslora must be True or False"),
    "other flag": ("defaults: {dataloader_drop_last: 1}", "defaults: dataloader_drop_last must be"),
    "word": ("runs: [{name: x, lr_scheduler_type: 5}]", "run 'x': lr_scheduler_type must be a"),
    "schedule": ("runs: [{name: x, lr_scheduler_type: cosin}]", "run 'x': lr_scheduler_type must"),
    "options": ("runs: [{name: x, lr_scheduler_kwargs: 3}]", "run 'x': lr_scheduler_kwargs must"),
    "targets": ("runs: [{name: x, target_modules: 5}]", "run 'x': target_modules must be the"),
    "a target": ("runs: [{name: x, target_modules: [0, 3]}]", "run 'x': target_modules must be"),
    "no such layer": (
        "runs: [{name: x}, {name: y, target_modules: ['0', qkv]}]",
        "run 'y': target_modules: no layer is named 'qkv'",
    ),
    "no linear layer": (
        "at_once: 1\nruns: [{name: x, steps: 1}, {name: y, target_modules: ['1']}]",
        "run 'y': ",
    ),
    "name": ("runs: [{name: a/b}]", "run 'a/b': a name has letters"),
    "file": ("runs: [{name: Sweep.json}]", "run 'Sweep.json' has the name of a file"),
    "range": ("runs: [{name: x, lr: -1}]", "run 'x': learning_rate"),
    "rank": ("runs: [{name: x, rank: 0}]", "run 'x'"),
    "task": ("task: dogs\nruns: [{}]", "the tasks are"),
    "option": ("task: {name: digits, shot: 3}\nruns: [{}]", "'shot'"),
    "evaluation": ("runs: [{name: x, eval_strategy: epoch}]", "run 'x': eval_strategy needs"),
    "yaml": ("runs: [", "no file of runs"),
    "two lists": ("runs: [{steps: 1}]\nruns: [{steps: 2}]", "the key 'runs' stands there twice"),
    "two ranks": ("runs: [{rank: 2, rank: 4}]", "the key 'rank' stands there twice"),
    "no name": ("runs: [{name: }]", "runs[0]: name must be a word; got None"),
    "yes": ("runs: [{}, {name: yes}]", "runs[1]: name must be a word; got True"),
    "metric": ("runs: [{name: x, metric_for_best_model: f1}]", "run 'x': metric_for_best_model"),
    "list": ("[1]", "it holds a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_file_cannot_ask_for(tmp_path, small, capsys, case, monkeypatch):
    monkeypatch.setattr(Sweep, "run", None)  # nothing trains
    text, message = BAD[case]
    file = written(tmp_path, text)
    refused(["sweep", file, "--out", tmp_path / "out"], capsys, message)


def test_a_file_that_is_not_there(tmp_path, capsys):
    refused(["sweep", tmp_path / "none.yaml"], capsys, "none.yaml does not exist")


def test_every_field_of_a_run_is_a_key():
    values = {"lr": 1e-3, "warmup_steps": 2, "lr_scheduler_type": "cosine", "rank": 4}
    text = yaml.safe_dump({"runs": [values]}).replace("0.001", "1e-3")
    (run,) = sweep.planned(yaml.safe_load(text)).runs.values()
    assert run.pop("rank") == 4
    assert RunArguments(**run) == RunArguments(1e-3, warmup_steps=2, lr_scheduler_type="cosine")


def test_the_file_of_the_guide():
    text = block("docs/guides/many_adapters.md", "## The command", "yaml")
    asked = sweep.planned(yaml.safe_load(text))
    assert len(asked.runs) == 6 and asked.settings.validation == 20
    # The model need not be pretrained for that.
    own = {"base": FAMILIES["vit"].build(), "targets": ["qkv"], "head": "head"}
    task = replace(small_task(), **own, validation=small_task().test)
    for run in sweep.runs_of(asked, task):
        assert run.arguments.eval_strategy == "epoch"
    assert asked.runs["patient"]["early_stopping_patience"] == 5
