"""`--model FOLDER` and `--model-args checkpoint_path=FILE`: timm models from the disk."""

import json
import socket

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from command import refused
from multilora.app import cli
from multilora.app import run as training
from multilora.app.tasks import images
from multilora.app.tasks.images import create_base

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
SHORT = "--steps 1 --batch-size 2 --particles 2 --rank 2 --method ensemble".split()
MODEL_ARGS = [f"{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module", autouse=True)
def no_network():
    def refuse(*args):
        raise OSError("a test of local models wants the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def saved():
    """A model with a head of five classes."""
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=5, **SIZES)


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """The model as timm saves it."""
    top = tmp_path_factory.mktemp("models") / "vit"
    save_for_hf(saved, top, model_args=SIZES, safe_serialization=True)
    return top


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    top = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        for label in ("blue", "red"):
            (top / part / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (16, 16), label).save(top / part / label / f"{i}.png")
    return top


def assert_has_weights(model, saved, classes=2):
    """All weights are the saved ones but those of the head, which is new."""
    state, expected = model.state_dict(), saved.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if name.startswith("head."):
            assert len(value) == classes
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("written", ["{folder}", "local-dir:{folder}", "./vit", "vit"])
def test_a_folder_is_a_model(folder, saved, written, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert_has_weights(create_base(written.replace("{folder}", str(folder)), 2), saved)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_has_the_weights(saved, tmp_path, kind, classes):
    file = tmp_path / f"weights.{kind}"
    (save_file if kind == "safetensors" else torch.save)(saved.state_dict(), file)
    model = create_base(NAME, classes, checkpoint_path=str(file), **SIZES)
    assert_has_weights(model, saved, classes)
    assert model.training is False


def test_the_names_of_timm_come_before_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert create_base(NAME, 2, pretrained=False, **SIZES).num_classes == 2


def test_random_weights_of_a_folders_architecture(folder, saved):
    model = create_base(str(folder), 3, pretrained=False)
    assert model.num_classes == 3
    assert model.blocks[0].attn.qkv.weight.shape == saved.blocks[0].attn.qkv.weight.shape
    assert not torch.equal(model.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_a_run_over_a_folder(folder, data, saved, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--model", str(folder), "--data", str(data), *SHORT, "--out", str(out)]
    assert cli.main(command) == 0
    model, task, _ = training.load_run(out, model=str(folder))
    qkv = dict(model.lora_layers())["blocks.0.attn.qkv"].base_layer
    assert torch.equal(qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert task.test[0][0].shape == (3, 16, 16)  # as the folder's config.json says
    assert cli.main(["evaluate", str(out), "--model", str(folder)]) == 0
    # The run's folder, which may be anybody's, may not name it.
    refused(["evaluate", out], capsys, "run.json", "is none of timm's own", "--model")


def test_a_run_over_a_file(data, saved, tmp_path, capsys):
    file, out = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(saved.state_dict(), file)
    command = ["train", "--model", NAME, "--data", str(data), *SHORT, "--out", str(out)]
    given = ["--model-args", f"checkpoint_path={file}"]
    assert cli.main([*command, *given, *MODEL_ARGS]) == 0
    assert cli.main(["evaluate", str(out), *given]) == 0
    refused(["evaluate", out], capsys, "run.json", "checkpoint_path", "--model-args")
    file.unlink()
    refused(["evaluate", out, *given], capsys, f"the checkpoint {file} does not exist")


def test_a_file_names_no_folder_beside_it(folder, data, tmp_path, capsys, monkeypatch):
    """A bare word in run.json is a model of timm's, not a folder where the command runs."""
    monkeypatch.chdir(folder.parent)
    out = tmp_path / "run"
    command = ["train", "--model", "vit", "--data", str(data), *SHORT, "--out", str(out)]
    assert cli.main(command) == 0
    assert json.loads((out / "run.json").read_text())["model"] == "vit"
    refused(["evaluate", out], capsys, "the model 'vit' is none of timm's own", "--model")
    assert cli.main(["evaluate", str(out), "--model", "vit"]) == 0
    with pytest.raises(RuntimeError, match="Unknown model"):
        create_base("vit", 2, from_file=True)


@pytest.mark.parametrize(
    "name, text",
    [
        ("{tmp}/none", "the model's folder {tmp}/none does not exist"),
        ("local-dir:none", "the model's folder none does not exist"),
        ("timm/vit_tiny", "starts with hf-hub:"),
        ("{tmp}", "{tmp} is no model of timm: it has no config.json"),
    ],
)
def test_a_missing_folder_is_named(name, text, data, tmp_path, capsys):
    name, text = (t.replace("{tmp}", str(tmp_path)) for t in (name, text))
    refused(["train", "--model", name, "--data", data, "--out", tmp_path / "run"], capsys, text)


def test_a_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match="No suitable checkpoints found") as error:
        create_base(str(tmp_path), 2)
    assert "network" not in str(error.value)


def test_weights_of_another_model(folder, saved, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.0.attn.qkv.bias"]
    save_file({**weights, "strange": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.bias"):
        create_base(str(tmp_path), 2)
    path = str(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"lacks \['blocks\.0\.attn\.qkv\.bias'\].*'strange'"):
        create_base(NAME, 2, checkpoint_path=path, **SIZES)
    for change in ({"strange": torch.zeros(1)}, {"blocks.0.attn.qkv.bias": None}):
        one = {n: w for n, w in {**saved.state_dict(), **change}.items() if w is not None}
        save_file(one, tmp_path / "one.safetensors")
        with pytest.raises(RuntimeError, match=f"of another model.*{next(iter(change))}"):
            create_base(NAME, 2, checkpoint_path=str(tmp_path / "one.safetensors"), **SIZES)
    with pytest.raises(RuntimeError, match="size mismatch"):
        create_base(NAME, 2, checkpoint_path=path, **{**SIZES, "embed_dim": 32})


def test_the_options_reach_the_model(folder, data):
    options = images.Options(
        model=str(folder), data=str(data), model_args=(("drop_path_rate", 0.5),)
    )
    task = images.make(options, 0)
    assert task.base.num_classes == 2 and (task.targets, task.head) == (["qkv"], "head")
