"""Runs of full copies: `multilora train --full`."""

import json

import pytest
from safetensors.torch import load_file

from command import on_any_machine
from multilora.app import cli
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import digits

SHORT = ["--steps", "6", "--shots", "4", "--lr", "1e-3", "--particles", "2", "--save-every", "3"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained once for this file, a little and on a part of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 60)
        patch.setattr(digits, "_load_digits", lambda: (images[:250], labels[:250]))
        yield


@pytest.mark.parametrize(
    "method",
    ["ensemble", *(pytest.param(m, marks=pytest.mark.slow) for m in ("svgd", "ibdr", "bbb"))],
)
def test_methods_train_copies_of_the_whole_model(method, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *SHORT, "--full", "--method", method, "--out", str(out)]) == 0
    assert "particle_0 … particle_1 (whole models)" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    base = digits.make(digits.Options(shots=4), 0).base
    assert metrics["trainable_per_particle"] == sum(p.numel() for p in base.parameters())
    assert metrics["rank"] is None and metrics["mutual_information"] > 0
    weights = [load_file(out / f"particle_{k}" / "model.safetensors") for k in range(2)]
    trained = "blocks.0.mlp.fc1.weight"
    assert not weights[0][trained].equal(base.state_dict()[trained])
    assert not weights[0][trained].equal(weights[1][trained])
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(metrics["nll"], abs=1e-6)


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path):
    settings = recommended("digits", "ensemble", full=True, steps=6, shots=4, lr=1e-3, particles=2)

    def interrupt(step, steps, stats):
        if step == 5:
            raise KeyboardInterrupt

    whole = training.train(settings, tmp_path / "whole", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=3, on_step=interrupt)
    resumed = training.train(settings, tmp_path / "run", save_every=3, resume=True)
    assert on_any_machine(resumed) == on_any_machine(whole)


def test_a_folder_of_the_other_kind_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *SHORT, "--full", "--method", "ensemble", "--out", str(out)]) == 0
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(settings | {"full": False}))
    capsys.readouterr()
    assert cli.main(["evaluate", str(out)]) == 1
    assert "is of another run: rank = 8" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["tfb", "laplace", "mc_dropout"])
def test_what_is_made_of_an_adapter_needs_one(method, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--full", "--method", method, "--out", str(out)]) == 1
    assert f"{method} makes particles of an adapter" in capsys.readouterr().err
    assert not out.exists()


def test_a_soup_of_copies_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *SHORT, "--full", "--method", "ensemble", "--out", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["export", str(out), str(tmp_path / "soup")]) == 1
    assert "full copies have none" in capsys.readouterr().err
