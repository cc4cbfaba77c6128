"""Attacks from the command line: `evaluate --fgsm`, and the method "dverge"."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from command import numbers
from multilora.app import cli, report, steps
from multilora.app import run as training
from multilora.app.robust import attacked_accuracies
from multilora.app.settings import Settings
from multilora.app.tasks import digits, images
from multilora.app.tasks.task import Task
from multilora.methods import DVERGE, METHODS
from multilora.robustness import robust_accuracy

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained once for this file, a little and on a ninth of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 20)
        patch.setattr(digits, "_load_digits", lambda: (images[:200], labels[:200]))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished short run of dverge."""
    out = tmp_path_factory.mktemp("runs") / "dverge"
    training.train(settings(), out)
    return out


def settings(**changes):
    given = {
        "method": "dverge",
        "particles": 3,
        "steps": STEPS,
        "lr": 0.02,
        "method_args": (("steps", 2), ("epsilon", 0.1)),
        **changes,
    }
    return Settings.of({"task": "digits", "shots": 5, **given})


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_numbers(run, tmp_path):
    def killed(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(settings(), tmp_path / "run", save_every=2, on_step=killed)
    torch.manual_seed(99)  # whatever the process did before it goes on
    training.train(settings(), tmp_path / "run", save_every=2, resume=True)
    assert numbers(tmp_path / "run") == numbers(run)
    losses = [
        [row["loss"] for row in json.loads((folder / "history.json").read_text())]
        for folder in (tmp_path / "run", run)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_every_step_learns_from_the_batch_that_the_method_makes(tmp_path, monkeypatch):
    made, learnt = [], []
    batch, backward = DVERGE.batch, DVERGE.backward

    def backward_of(method, closure, scale=1.0):
        learnt.append((closure.args, closure()))
        assert (method.steps, method.epsilon) == (2, 0.1)
        assert (method.mean, method.std) == ((0.5,), (0.5,))
        return backward(method, closure, scale)

    def batch_of(method, x, y):
        made.append(batch(method, x, y))
        return made[-1]

    entry = METHODS["dverge"]
    monkeypatch.setattr(DVERGE, "backward", backward_of)
    monkeypatch.setitem(METHODS, "dverge", type(entry)(**vars(entry) | {"batch": batch_of}))
    training.train(settings(steps=2), tmp_path / "run")
    assert len(made) == len(learnt) == 2
    for (inputs, targets), ((model, x, y), (logits, answers)) in zip(made, learnt):
        assert inputs.shape[:2] == (3, 16) and logits.shape == (3, 16, 5)
        assert x is inputs and y is targets and answers is targets
        assert model.keywords == {"per_particle": True}


def test_evaluate_measures_the_accuracy_under_attack(run, capsys):
    assert cli.main(["evaluate", str(run), "--json", "--fgsm"]) == 0
    measured = json.loads(capsys.readouterr().out)
    attacked = measured.pop("fgsm")
    assert measured.items() <= numbers(run).items()
    model, task, _ = training.load_run(run)
    expected = robust_accuracy(model, DataLoader(task.test, 100), mean=0.5, std=0.5)
    assert [*attacked] == ["0.001", "0.005", "0.01", "0.03"]
    assert [*attacked.values()] == pytest.approx([*expected.values()], abs=1e-9)
    assert attacked["0.03"] <= attacked["0.001"] <= measured["accuracy"]
    report.print_table([("dverge", measured | {"fgsm": attacked})])
    table = capsys.readouterr().out
    for epsilon, accuracy in attacked.items():
        assert f"FGSM ε = {epsilon} ↑ | {accuracy:.3f}" in " ".join(table.split())
    assert "FGSM: on test images that" in table


def test_images_are_attacked_in_the_normalisation_of_their_model():
    base = images.create_base("vit_tiny_patch16_224", 2, pretrained=False, img_size=32)
    options = images.Options(model="vit_tiny_patch16_224", data="-", model_args=(("img_size", 32),))
    task = images.image_task(options, base, [], [], ["a", "b"], None)
    config = images.data_config(base)
    mean, std = task.normalisation
    assert (mean, std) == (config["mean"], config["std"]) and len(mean) == 3


def test_other_inputs_are_refused(run):
    model, task, _ = training.load_run(run)
    text = Task(base=task.base, targets=[], head=None, classes=[], train=[], test=[])
    with pytest.raises(ValueError, match="--fgsm needs a task whose inputs are images"):
        attacked_accuracies(model, text)
    with pytest.raises(ValueError, match="dverge needs a task whose inputs are images"):
        steps.make_method(settings(), model, 10, text.normalisation)


def test_one_particle_is_refused(tmp_path, capsys):
    command = ["train", "--method", "dverge", "--particles", "1", "--shots", "5", "--out"]
    assert cli.main([*command, str(tmp_path / "run")]) == 1
    assert "DVERGE needs two particles or more" in capsys.readouterr().err
