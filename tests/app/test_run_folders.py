"""Folders of runs that failed, and of runs that are to be replaced."""

import json
import os

import pytest
import torch

import killed
from adapter_files import contents
from command import numbers, refused
from multilora import atomic
from multilora.app import cli, folders
from multilora.app import run as training
from multilora.app.tasks import digits


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(digits, "make", killed.small_task)


def settings(**changes):
    return killed.settings("ensemble", **{"steps": 6} | changes)


def train(chosen, out, **how):
    training.train(chosen, out, **{"pictures": False, "report": list} | how)
    return numbers(out)


def fail(at):
    def on_step(step, *_):
        if step == at:
            raise FloatingPointError(f"step {step}")

    return on_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run of seed 1, with pictures, and that of one with seed 2."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make", killed.small_task)
        for seed in (1, 2):
            train(settings(seed=seed), root / str(seed), pictures=True)
    return root


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the first."""
    for name, content in contents(whole / "1").items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def same(out, other):
    """Whether two runs have the same particles and numbers."""
    ours, theirs = (
        {n: f for n, f in contents(o).items() if n.startswith("particle_")} for o in (out, other)
    )
    return ours == theirs and numbers(out) == numbers(other)


# --- a run that failed before its first checkpoint -----------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lr": 0.01, "seed": 2}])
def test_a_run_without_a_checkpoint_leaves_its_folder_free(changes, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="step 3"):
        train(settings(seed=1), out, on_step=fail(3))
    # What a process leaves that is killed while it writes.
    (out / ".checkpoint.pt.01ab.tmp").write_bytes(b"half")
    (out / ".run.json.01ab.tmp").write_bytes(b"half")
    assert train(settings(**{"seed": 1} | changes), out)["seed"] == changes.get("seed", 1)
    assert changes or same(out, whole / "1")
    kept = json.loads((out / "run.json").read_text())
    assert kept["lr"] == changes.get("lr", 3e-3) and not list(out.glob(".*"))


def test_the_first_step_of_a_model_that_cannot_train(tmp_path, monkeypatch, whole):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(settings(seed=1), out)
    assert (out / "run.json").is_file()
    train(settings(seed=1), out)
    assert same(out, whole / "1")


def test_a_run_with_a_checkpoint_is_not_replaced_by_accident(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        train(settings(), out, on_step=fail(4), save_every=2)
    before = contents(out)
    for chosen in (settings(), settings(lr=0.01)):
        with pytest.raises(ValueError, match="a run already; continue it with --resume, replace"):
            train(chosen, out)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["notes", "metrics.json", "particle_0/README.md"])
def test_files_beside_a_run_without_a_checkpoint_stay(name, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        train(settings(), out, on_step=fail(1))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("of the user")
    with pytest.raises(ValueError, match="holds a run already"):
        train(settings(), out)
    assert (out / name).read_text() == "of the user"


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt", "particle_0"])
def test_links_are_refused(name, how, tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with pytest.raises(FloatingPointError):
        train(settings(), out, on_step=fail(1))
    if name == "particle_0":
        elsewhere.mkdir()
    else:
        elsewhere.write_bytes((out / "run.json").read_bytes())
    (out / name).unlink(missing_ok=True)
    os.symlink(elsewhere, out / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is a link; a run writes into its own folder only"):
        train(settings(), out, **how)
    assert contents(tmp_path) == before and (out / name).is_symlink()


# --- overwrite -----------------------------------------------------------------------------------


def test_a_new_run_takes_the_place_of_an_old_one(run, whole, capsys):
    fewer = settings(seed=2, particles=2)
    train(fewer, run, overwrite=True)
    assert {f.name for f in run.glob("particle_*")} == {"particle_0", "particle_1"}
    assert not list(run.glob("*.png"))  # of the run that is gone
    train(settings(seed=2), run, overwrite=True)
    assert same(run, whole / "2")
    model, _, kept = training.load_run(run, report=list)
    assert (kept.seed, model.num_particles) == (2, 3)


def test_a_run_that_diverged_is_started_anew(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        train(settings(seed=2, lr=0.5), out, on_step=fail(4), save_every=2)
    train(settings(seed=1), out, overwrite=True)
    assert same(out, whole / "1")


@pytest.mark.parametrize("left", [atomic._STAGING + "01ab", atomic._COMMIT])
def test_what_a_killed_save_left_is_replaced_too(left, run, whole):
    (run / left / "particle_0").mkdir(parents=True)
    (run / "particle_0" / "adapter_config.json").rename(
        run / left / "particle_0" / "adapter_config.json"
    )
    (run / "multilora.json").rename(run / left / "multilora.json")
    (run / "run.json").write_text("damaged")
    train(settings(seed=2), run, overwrite=True)
    assert same(run, whole / "2") and not list(run.glob(".*"))


@pytest.mark.parametrize(
    "name",
    [
        "notes",
        "soup/adapter_config.json",
        "particle_0/README.md",
        "particle_0/run.json",
        "particle_x/adapter_config.json",
        "particle_0/deeper/adapter_config.json",
        ".multilora-commit/notes",
    ],
)
def test_other_files_are_never_removed(name, run):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("of the user")
    before = contents(run)
    first = name if "/deeper" not in name else "particle_0/deeper"
    with pytest.raises(ValueError, match="files that are not of its run") as raised:
        train(settings(seed=2), run, overwrite=True)
    assert first in str(raised.value) or first.split("/")[0] in str(raised.value)
    assert contents(run) == before
    # Nor where they come after the check.
    folders.clear_run_folder(run)
    assert {*contents(run)} == {"run.json", name}


def test_an_empty_folder_of_the_users_stays(run):
    (run / "mine").mkdir()
    with pytest.raises(ValueError, match=r"not of its run.*: mine;"):
        train(settings(seed=2), run, overwrite=True)
    folders.clear_run_folder(run)
    assert (run / "mine").is_dir()


def test_nothing_is_removed_for_settings_that_are_wrong(run, monkeypatch):
    before = contents(run)
    for wrong, text in (
        (settings(method_args=(("magic", 1),)), "magic"),
        (settings(select="best"), "no validation examples"),
        (settings(validation=60), "validation = 60 of 60"),
        (settings(mixup=0.2), "mixup is for tasks of images"),
    ):
        with pytest.raises(ValueError, match=text):
            train(wrong, run, overwrite=True)
        assert contents(run) == before
    with pytest.raises(ValueError, match="give one of them"):
        train(settings(), run, overwrite=True, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize("removed", [0, 3, 9])
def test_who_is_killed_while_removing_leaves_a_run(removed, run, whole, monkeypatch):
    unlink, calls = type(run).unlink, []

    def dying(path, *args, **kwargs):
        if len(calls) == removed:
            raise KeyboardInterrupt
        calls.append(path)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(run), "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            train(settings(seed=2), run, overwrite=True)
    train(settings(seed=2), run, overwrite=True)
    assert same(run, whole / "2")


def test_a_folder_without_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.json").write_text("of the user")
    with pytest.raises(ValueError, match="holds no run but other files"):
        train(settings(), tmp_path, overwrite=True)
    assert (tmp_path / "metrics.json").read_text() == "of the user"
    new = tmp_path / "new"
    assert train(settings(), new, overwrite=True)["seed"] == 0


def test_the_command(run, whole, capsys):
    command = "train --method ensemble --particles 3 --rank 2 --steps 6 --batch-size 8".split()
    command += ["--seed", "2", "--out", str(run)]
    refused(command, capsys, "replace it with --overwrite")
    refused([*command, "--overwrite", "--resume"], capsys, "--resume")
    assert cli.main([*command, "--overwrite"]) == 0
    assert same(run, whole / "2") and torch.load(run / "checkpoint.pt", weights_only=True)


def test_a_task_that_has_its_data_takes_no_others(run, tmp_path, capsys):
    text = "is for the tasks images, vtab, clip, text, sentiment"
    refused(["evaluate", run, "--data", tmp_path], capsys, text, "got the task 'digits'")
