"""Runs whose particles are made after the training: `multilora train --method tfb` and laplace."""

import json

import peft
import pytest
import torch

from command import on_any_machine
from multilora.app import cli, posthoc
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import digits
from multilora.methods import METHODS

SHORT = {"steps": 8, "shots": 4, "lr": 0.02, "particles": 3}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained once for this file, a little and on a part of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 60)
        patch.setattr(digits, "_load_digits", lambda: (images[:250], labels[:250]))
        yield


def settings(method, **method_args):
    if method == "laplace":
        pytest.importorskip("laplace", reason="the extra laplace is not installed")
    return recommended("digits", method, method_args=tuple(method_args.items()), **SHORT)


@pytest.mark.parametrize("method", ["tfb", "laplace"])
def test_one_particle_is_trained_and_k_are_saved(method, tmp_path, capsys):
    trained = []
    result = training.train(
        settings(method), tmp_path / "run", on_step=lambda *step: trained.append(step)
    )
    assert len(trained) == 8 and result["particles"] == 3
    assert len(result["member_accuracy"]) == 3 and result["mutual_information"] > 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(len(p) == 1 for p in state["parameters"].values())
    for k in range(3):
        assert isinstance(
            peft.PeftConfig.from_pretrained(tmp_path / "run" / f"particle_{k}"), peft.LoraConfig
        )
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(result["nll"], abs=1e-6)
    assert again["member_nll"] == pytest.approx(result["member_nll"], abs=1e-6)


@pytest.mark.parametrize(
    "method, stop",
    [
        ("tfb", "particles"),
        pytest.param("tfb", "training", marks=pytest.mark.slow),
        pytest.param("laplace", "particles", marks=pytest.mark.slow),
        pytest.param("laplace", "training", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_to_the_same_numbers(method, stop, tmp_path, monkeypatch):
    whole = training.train(settings(method), tmp_path / "whole", save_every=4)

    def interrupt(step, steps, stats):
        if stop == "training" and step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stop == "particles":
            patch.setattr(posthoc.posthoc, METHOD[method], _interrupted)
        training.train(settings(method), tmp_path / "run", save_every=4, on_step=interrupt)
    assert not (tmp_path / "run" / "multilora.json").exists()
    resumed = training.train(settings(method), tmp_path / "run", save_every=4, resume=True)
    assert on_any_machine(resumed) == on_any_machine(whole)


METHOD = {"tfb": "bayesianize", "laplace": "laplace"}


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_more_tolerance_gives_more_noise(tmp_path):
    results = [
        training.train(settings("tfb", tolerance=t), tmp_path / str(t)) for t in (0.0, 1e-3, 0.3)
    ]
    information = [r["mutual_information"] for r in results]
    assert information[0] < information[1] < information[2]


def test_laplace_takes_the_last_layer_of_a_task_with_a_head(tmp_path, monkeypatch):
    seen = {}

    def laplace(path, base, loader, num_particles, **options):
        seen.update(options, examples=sum(len(y) for _, y in loader))
        raise KeyboardInterrupt

    monkeypatch.setattr(posthoc.posthoc, "laplace", laplace)
    for given, subset in (({}, "last_layer"), ({"subset": "all"}, "all")):
        with pytest.raises(KeyboardInterrupt):
            training.train(settings("laplace", **given), tmp_path / subset)
        assert seen["subset"] == subset and seen["structure"] == "kron"
        assert seen["examples"] == 20  # the training examples, all of them


@pytest.mark.parametrize(
    "method, wrong, message",
    [
        ("tfb", "tolerance=-1", "tolerance must be a finite number >= 0; got -1"),
        ("tfb", "tolerance=much", "tolerance of tfb is a number"),
        ("tfb", "steps=0", "steps must be an integer in"),
        ("tfb", "anchors=0", "anchors must be an integer >= 1"),
        ("tfb", "structure=full", "tfb has the arguments"),
        ("laplace", "structure=lowrank", 'structure must be "kron", "diag" or "full"'),
        ("laplace", "subset=some", 'subset must be "all" or "last_layer"'),
        ("laplace", "prior_precision=0", "must be a finite number > 0; got 0"),
    ],
)
def test_wrong_arguments_are_found_before_the_training(method, wrong, message, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--method", method, "--method-args", wrong, "--out", str(out)]
    assert cli.main(command) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_the_method_s_own_arguments_reach_it(tmp_path, monkeypatch):
    made = {}
    entry = METHODS["tfb"]

    def make(model, *, loss="particle", particle_chunk=None):
        made.update(loss=loss, particle_chunk=particle_chunk)
        return entry.make(model, loss=loss, particle_chunk=particle_chunk)

    changed = type(entry)(make, 10, entry.summary, posthoc="tfb")
    monkeypatch.setitem(METHODS, "tfb", changed)
    training.train(settings("tfb", tolerance=0.1, particle_chunk=2), tmp_path / "run")
    assert made == {"loss": "particle", "particle_chunk": 2}


def test_a_missing_package_is_found_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(posthoc.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "run"
    assert cli.main(["train", "--method", "laplace", "--out", str(out)]) == 1
    assert "pip install 'multilora[laplace]'" in capsys.readouterr().err
    assert not out.exists()
