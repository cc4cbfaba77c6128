"""Soups, MC dropout, label smoothing and mixup from the command line."""

import json

import pytest
import torch
import torch.nn.functional as F

import multilora as ml
from command import numbers, refused
from multilora.app import cli, steps
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import digits

SHORT = ["--steps", "6", "--shots", "10", "--save-every", "6", "--lr", "0.02"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained once for this file, hardly, and on a part of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 8)
        patch.setattr(digits, "_load_digits", lambda: (images[:300], labels[:300]))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short ensemble with twenty of its fifty training examples held out."""
    out = tmp_path_factory.mktemp("runs") / "ensemble"
    command = ["train", *SHORT, "--method", "ensemble", "--particles", "3", "--validation", "20"]
    assert cli.main([*command, "--out", str(out)]) == 0
    return out


def test_validation_examples_are_neither_trained_on_nor_tested_on(run):
    _, task, settings = training.load_run(run)
    pixels = [
        {tuple(x.flatten().tolist()) for x, _ in data}
        for data in (task.train, task.validation, task.test)
    ]
    assert [len(data) for data in (task.train, task.validation)] == [30, 20]
    assert all(not a & b for a, b in zip(pixels, pixels[1:] + pixels[:1]))
    whole = recommended("digits", "ensemble", seed=settings.seed, shots=10)
    assert {tuple(x.flatten().tolist()) for x, _ in training.make_task(whole).train} == (
        pixels[0] | pixels[1]
    )


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_evaluate_measures_a_soup_beside_the_particles(run, kind, capsys):
    assert cli.main(["evaluate", str(run), "--soup", kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["ensemble", f"soup ({kind})", "best particle"]
    assert found["ensemble"]["nll"] == pytest.approx(numbers(run)["nll"], rel=1e-6)
    model, task, _ = training.load_run(run)
    x, y = task.test[:]
    val_x, val_y = (torch.stack(part) for part in zip(*task.validation))
    own = (ml.predict(model, val_x).argmax(-1) == val_y).double().mean(1)
    best = found["best particle"]
    assert best["weights"] == F.one_hot(own.argmax(), 3).tolist()
    weights = torch.tensor([found[f"soup ({kind})"]["weights"], best["weights"]])
    with model.mixtures(weights):
        p = ml.predict(model, x, log=True).double()
    nll = -p.gather(-1, y.expand(2, -1)[..., None]).mean((1, 2))
    assert [found[f"soup ({kind})"]["nll"], best["nll"]] == pytest.approx(nll.tolist(), rel=1e-5)
    if kind == "uniform":
        assert found["soup (uniform)"]["weights"] == pytest.approx([1 / 3] * 3)
    assert cli.main(["evaluate", str(run), "--soup", kind]) == 0
    table = capsys.readouterr().out
    assert "best particle" in table and f"soup ({kind})" in table


@pytest.mark.filterwarnings("ignore:wise scales the adapters")
@pytest.mark.parametrize(
    "options",
    [["greedy"], pytest.param(["wise"], marks=pytest.mark.slow), ["wise", "--alpha", "0.25"]],
)
def test_an_exported_soup_measures_as_it_did(run, options, tmp_path, capsys):
    out = tmp_path / "soup"
    assert cli.main(["export", str(run), str(out), "--soup", *options]) == 0
    assert "with weights" in capsys.readouterr().out
    assert cli.main(["evaluate", str(run), "--adapter", str(out), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    model, task, _ = training.load_run(run)
    if len(options) == 3:
        weights = torch.full((3,), 0.25 / 3)
    else:
        assert cli.main(["evaluate", str(run), "--soup", options[0], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        weights = torch.tensor(found[f"soup ({options[0]})"]["weights"])
    with model.mixtures(weights[None]):
        expected, _, _ = training.evaluate(model, task)
    assert measured["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_a_soup_without_validation_examples(run, tmp_path, capsys):
    plain = tmp_path / "plain"
    command = ["train", *SHORT, "--steps", "1", "--method", "ensemble", "--particles", "2"]
    assert cli.main([*command, "--out", str(plain)]) == 0
    capsys.readouterr()
    refused(["evaluate", plain, "--soup", "greedy"], capsys, "train with --validation N")
    refused(["export", plain, tmp_path / "a", "--soup", "wise"], capsys, "held out none")
    assert not (tmp_path / "a").exists()
    assert cli.main(["evaluate", str(plain), "--soup", "uniform", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["ensemble", "soup (uniform)"]
    refused(["export", run, tmp_path / "a", "--alpha", "0.5"], capsys, "--alpha is for --soup wise")
    refused(["evaluate", run, "--adapter", "x", "--soup", "greedy"], capsys, "leave out --soup")
    more = ["--validation", "50", "--out", tmp_path / "b"]
    refused(["train", *SHORT, *more], capsys, "validation = 50 of 50 training examples")


def test_mc_dropout_trains_one_particle_and_predicts_with_many_masks(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", *SHORT, "--method", "mc_dropout", "--particles", "4", "--out", str(out)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert f"{out} holds particle_0 (PEFT" in said and not (out / "particle_1").exists()
    metrics = numbers(out)
    assert metrics["particles"] == len(metrics["member_accuracy"]) == 4
    assert metrics["mutual_information"] > 1e-6 and metrics["trainable_per_particle"] > 1000
    assert json.loads((out / "run.json").read_text())["lora_dropout"] == 0.1
    for _ in range(2):
        assert cli.main(["evaluate", str(out), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["member_nll"] == metrics["member_nll"]
    # Without masks the same particle predicts otherwise.
    model, task, _ = training.load_run(out)
    assert model.num_particles == 1
    assert training.evaluate(model, task)[0]["nll"] != pytest.approx(metrics["nll"], rel=1e-4)
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(settings | {"method": "ensemble"}))
    refused(["evaluate", out], capsys, "is of another run: particles = 4", "have 1")


def test_label_smoothing_and_mixup_reach_the_loss(tmp_path, monkeypatch):
    options = {"shots": 10, "particles": 2, "steps": 1, "seed": 3}
    seen = []

    def learn(model, x, y):
        seen.append((x, y))
        return model(x), y

    make = training.make_task
    monkeypatch.setattr(
        training, "make_task", lambda *args: training.replace(make(*args), learn=learn)
    )
    plain = recommended("digits", "ensemble", **options)
    training.train(plain, tmp_path / "plain")
    torch.manual_seed(3)
    smooth = recommended("digits", "ensemble", label_smoothing=0.2, mixup=0.5, **options)
    training.train(smooth, tmp_path / "smooth")
    (x, y), (mixed, soft) = seen
    # Two classes at most, and the images are mixed as their labels are.
    target = F.one_hot(y, 5).float()
    share = soft.sub(target.roll(1, 0)).div(target - target.roll(1, 0)).nanmean()
    assert 0 < share < 1
    torch.testing.assert_close(soft, share * target + (1 - share) * target.roll(1, 0))
    torch.testing.assert_close(mixed, share * x + (1 - share) * x.roll(1, 0))
    # At the start B is zero; the loss is that of the smoothed and mixed targets.
    history = json.loads((tmp_path / "smooth" / "history.json").read_text())
    model = steps.particle_model(make(smooth), smooth)
    with torch.no_grad():
        log_p = model(mixed).log_softmax(-1)
    expected = -((0.8 * soft + 0.2 / 5) * log_p).sum(-1).mean()
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_mixup_resumes_to_the_same_numbers(tmp_path):
    settings = recommended(
        "digits", "ensemble", shots=10, particles=2, steps=8, mixup=0.4, label_smoothing=0.1
    )

    def interrupt(step, steps, stats):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "cut", save_every=4, on_step=interrupt)
    training.train(settings, tmp_path / "cut", save_every=4, resume=True)
    training.train(settings, tmp_path / "whole", save_every=4)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    histories = [json.loads((tmp_path / n / "history.json").read_text()) for n in ("cut", "whole")]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--label-smoothing", "1.5"], "label_smoothing must be"),
        (["--mixup", "-1"], "mixup must be"),
        (["--label-smoothing", "0.1", "--method-args", "loss=particle"], "leave out one of it"),
    ],
)
def test_wrong_options(more, text, tmp_path, capsys):
    refused(["train", *SHORT, *more, "--out", tmp_path / "run"], capsys, text)
    assert not (tmp_path / "run").exists()


def test_mixup_is_for_images():
    task = digits.make(digits.Options(shots=2), 0)
    words = training.replace(task, collate=lambda examples: examples)
    with pytest.raises(ValueError, match="mixup is for tasks of images"):
        steps.collate(recommended("digits", "ensemble", mixup=1.0), words)
