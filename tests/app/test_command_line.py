"""The command line beside other people's files, with damaged caches, odd numbers and odd models."""

import argparse
import json
import math
import multiprocessing
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

from command import refused
from multilora.app import cli
from multilora.app.settings import Settings
from multilora.app.tasks import commonsense, digits, small_images, task, vtab
from multilora.app.tasks import images as images_task
from multilora.app.tasks.images import (
    classifiers,
    create_base,
    default_targets,
    image_folder,
    working_layers,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained hardly at all, on a part of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 3)
        patch.setattr(digits, "_load_digits", lambda: (images[:300], labels[:300]))
        yield


SHORT = "train --steps 2 --shots 2 --particles 2 --rank 2 --method ensemble".split()


# --- files of the user's -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main([*SHORT, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "name",
    ["metrics.json", "reliability.png", "checkpoint.pt", "multilora.json", "notes", "particle_0/x"],
)
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_train_replaces_no_files_of_the_users(tmp_path, capsys, name, more):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("of the user")
    refused([*SHORT, "--out", tmp_path / "folder", *more], capsys, name.partition("/")[0])
    compare = ["compare", "--out", tmp_path / "folder"]
    refused(compare, capsys, str(tmp_path / "folder"), "holds files but no comparison")
    assert file.read_text() == "of the user"
    assert {f for f in (tmp_path / "folder").rglob("*") if f.is_file()} == {file}


@pytest.mark.slow
def test_an_empty_folder_and_what_a_kill_left_are_free(tmp_path):
    (tmp_path / ".run.json.0123.tmp").write_text("{")
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 0


@pytest.mark.slow
def test_export_replaces_its_own_files_and_no_others(run, tmp_path, capsys):
    out = tmp_path / "soup"
    assert cli.main(["export", str(run), str(out)]) == 0
    exact = (out / "adapter_model.safetensors").read_bytes()
    assert cli.main(["export", str(run), str(out), "--soup", "svd"]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() != exact
    for name in ("adapter_model.safetensors", "adapter_config.json", "notes"):
        other = tmp_path / f"with-{name}"
        assert cli.main(["export", str(run), str(other)]) == 0
        (other / name).write_text("of the user")
        refused(["export", run, other], capsys, str(other), name)
        assert (other / name).read_text() == "of the user"
    refused(["export", run, run], capsys, str(run))
    (tmp_path / "file").write_text("of the user")
    refused(["export", run, tmp_path / "file"], capsys, "file is a file")
    assert (tmp_path / "file").read_text() == "of the user"


def test_a_record_of_kernels_replaces_an_older_one_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("multilora.tools.kernels.machine_code.native_reports", lambda *_: [])
    file = tmp_path / "record.json"
    for text in ("of the user", "[]", '{"target": "sm_90"}'):
        file.write_text(text)
        refused(["kernels", "--out", file, "--only", "nothing"], capsys, str(file), "not a record")
        assert file.read_text() == text
    # An older record is not an obstacle: only the next check refuses.
    file.write_text(json.dumps(dict.fromkeys("target triton ptxas nvcc kernels".split())))
    refused(["kernels", "--out", file, "--only", "nothing"], capsys, "'nothing' in its name")


# --- caches --------------------------------------------------------------------------------------


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def _other_weights(file):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _other_weights,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: (file.unlink(), file.symlink_to("nowhere")),
    ],
)
def test_a_damaged_cache_is_made_again_with_a_word(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MULTILORA_CACHE", str(tmp_path))
    said = []
    expected = digits.make(digits.Options(shots=2), 0, said.append).base.state_dict()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert len(said) == 1
    again = digits.make(digits.Options(shots=2), 0, said.append).base.state_dict()
    assert f"{file} is damaged and made again" in said[1]
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]
    digits.make(digits.Options(shots=2), 0, said.append)
    assert len(said) == 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("of the user")
    monkeypatch.setenv("MULTILORA_CACHE", str(tmp_path / "file" / "cache"))
    said = []
    digits.make(digits.Options(shots=2), 0, said.append)
    assert "cannot be kept" in said[-1]


def _write_many(file, weights):
    for _ in range(30):
        small_images.write_cache(file, weights)


def test_processes_that_make_a_cache_at_the_same_time(tmp_path):
    weights = {"x": torch.arange(1000.0)}
    file = tmp_path / "cache.safetensors"
    small_images.write_cache(file, weights)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(file, weights)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert torch.equal(small_images.read_cache(file, weights)["x"], weights["x"])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [file]


# --- numbers -------------------------------------------------------------------------------------

NONSENSE = [math.nan, math.inf, -1, 0, 10**30, "x"]
#: Where one of these means something.
FROM_ZERO = (
    "seed weight_decay lora_dropout label_smoothing mixup validation validate_every patience alpha "
    "max_hours"
).split()
MEANT = {name: [0] for name in FROM_ZERO}
#: One of each kind: a setting is a field of one of them.
SETTINGS = [
    Settings(),
    digits.Options(),
    vtab.Options(model="m", data="d"),
    commonsense.Options(task="boolq", model="m", data="d"),
]
NUMBERS = {
    field.name: settings
    for settings in SETTINGS
    for field in fields(settings)
    if field.type in ("int", "float", "float | None", "int | None")
}
#: The options of `train` that are not settings, and the options of `kernels`.
OTHERS = ["save_every", "seeds"]
OF_KERNELS = ["particles", "rank", "batch_size", "classes", "jobs"]


def of_settings():
    return [
        (name, value)
        for name in NUMBERS
        for value in NONSENSE
        if value not in MEANT.get(name, ()) or value is math.nan
    ]


@pytest.mark.parametrize("name, value", of_settings())
def test_a_setting_that_means_nothing_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got"):
        replace(NUMBERS[name], **{name: value})


def test_other_fields_are_refused_by_name_too():
    assert len(NUMBERS) == 17
    for settings in SETTINGS:
        for field in fields(settings):
            # No file and no option gives these two.
            if field.name in NUMBERS or field.name in ("task", "from_file"):
                continue
            for value in (math.nan, -1, 0, object()):
                with pytest.raises((ValueError, TypeError), match=field.name):
                    replace(settings, **{field.name: value})
    with pytest.raises(ValueError, match="img_size = nan"):
        vtab.Options(model="m", data="d", model_args=(("img_size", math.nan),))


def options():
    """Every option that takes a number, with its command."""
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [
        (name, action.option_strings[0], action.dest)
        for name, command in commands.choices.items()
        for action in command._actions
        if action.type in (int, float)
    ]


def test_every_option_refuses_what_means_nothing(tmp_path, capsys):
    numeric = options()
    by_command = {
        "train": {*NUMBERS, *OTHERS},
        "kernels": {*OF_KERNELS},
        "export": {"alpha"},
        "compare": {"trials", "tune_seeds", "seeds", "steps", "jobs", "max_hours"},
        "sweep": {"at_once", "save_every"},
    }
    assert {(c, dest) for c, _, dest in numeric} == {
        (c, dest) for c, dests in by_command.items() for dest in dests
    }
    for command, option, dest in numeric:
        for value in NONSENSE:
            if value in MEANT.get(dest, ()):
                continue
            task = []
            if dest == "max_length":
                task = ["--task", "boolq", "--model", "m", "--data", "d"]
            folders = {"export": ["no run", str(tmp_path / "out")], "sweep": ["no file"]}
            arguments = [command, *folders.get(command, []), *task, option, str(value)]
            if command in ("train", "compare", "sweep"):
                arguments += ["--out", str(tmp_path / "run")]
            try:
                code = cli.main(arguments)
            except SystemExit as exit:  # argparse's own check of int and float
                code = exit.code
            said = capsys.readouterr().err
            assert code in (1, 2), arguments
            assert option in said or f"{dest} must be" in said, (arguments, said)
    assert not (tmp_path / "run").exists()


def test_more_shots_than_there_are_examples(tmp_path, capsys):
    refused([*SHORT, "--shots", "200", "--out", tmp_path / "run"], capsys, "shots must be", "200")


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes in two parts, of grey noise; small, and 16 pixels wide."""
    top = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (top / part / label).mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(0, 256, (16, 16), generator=generator).to(torch.uint8)
                Image.fromarray(pixels.numpy()).convert("RGB").save(top / part / label / f"{i}.png")
    return top


VIT = "img_size=16 patch_size=8 embed_dim=16 depth=1 num_heads=2".split()
VIT_ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def train(images, out, model, *more, model_args=VIT):
    options = "--no-pretrained --steps 1 --batch-size 2 --particles 2 --rank 2 --method ensemble"
    options = ["train", "--model", model, *options.split(), *more]
    options += ["--model-args", *model_args] if model_args else []
    return [*options, "--data", str(images), "--out", str(out)]


def particle(out):
    folder = out / "particle_0"
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def ran(out):
    """Whether each adapter has learnt: B begins at zero."""
    return {n: bool(t.any()) for n, t in particle(out)[1].items() if "lora_B" in n}


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_model_that_reads_weights_has_other_targets(images, tmp_path, model, capsys):
    out = tmp_path / "run"
    assert cli.main(train(images, out, model)) == 0
    assert all(ran(out).values()) and not any("qkv" in name for name in ran(out))
    # Asked for by name, that layer would be trained and have no effect.
    refused(train(images, tmp_path / "qkv", model, "--targets", "qkv"), capsys, "adapters", "qkv")
    assert not (tmp_path / "qkv" / "metrics.json").exists()


def test_swin_v2_has_targets_whose_rows_are_images():
    args = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    base = create_base("swinv2_tiny_window8_256", 2, False, window_size=4, **args)
    targets = default_targets(base, working_layers(base, **args))
    # qkv.weight is read, and the layers of cpb_mlp see a table of positions.
    assert targets == ["attn.proj", "fc1", "fc2", "reduction"]


def test_a_distilled_model_trains_both_heads(images, tmp_path):
    out = tmp_path / "run"
    assert cli.main(train(images, out, "deit_tiny_distilled_patch16_224")) == 0
    config, tensors = particle(out)
    assert config["modules_to_save"] == ["head", "head_dist"]
    options = images_task.Options(
        model="deit_tiny_distilled_patch16_224",
        data=str(images),
        pretrained=False,
        model_args=tuple(VIT_ARGS.items()),
    )
    task = images_task.make(options, seed=0)
    new = task.base.state_dict()
    for name in ("head", "head_dist"):
        assert not torch.equal(tensors[f"base_model.model.{name}.weight"], new[f"{name}.weight"])
    assert cli.main(["evaluate", str(out)]) == 0


@pytest.mark.slow
def test_a_convolutional_network_has_its_convolutions(images, tmp_path, capsys):
    out = tmp_path / "run"
    small = ["layers=[1,1,1,1]", "channels=[8,8,8,8]", "stem_width=8"]
    assert cli.main(train(images, out, "resnet10t", model_args=small)) == 0
    assert all(name.endswith("weight") for name in ran(out))
    assert any("conv1" in name for name in ran(out))
    more = ["--targets", "qkv"]
    refused(
        train(images, tmp_path / "no", "resnet10t", *more, model_args=small),
        capsys,
        "has no layers ['qkv']",
        "conv1",
    )
    assert cli.main(["evaluate", str(out)]) == 0


def test_only_plain_convolutions_are_chosen():
    grouped = create_base("resnext26ts", 2, False)
    working = working_layers(grouped, img_size=32)
    groups = {n for n, m in grouped.named_modules() if getattr(m, "groups", 1) > 1}
    assert working and groups and not groups & set(working)
    targets = default_targets(grouped, working)
    matched = {
        name
        for name, _ in grouped.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    }
    assert matched == set(working)


class Pooled(nn.Module):
    """A convolution, the mean over pixels and a head, as timm's models have them."""

    num_classes = 2
    pretrained_cfg: ClassVar = {}

    def __init__(self, convolution):
        super().__init__()
        self.convolution, self.fc = convolution, nn.Linear(4, 2)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.convolution(x).mean((2, 3)))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d, Conv2dSame, "dilated", "reflected"])
def test_convolutions_with_an_arithmetic_of_their_own_do_not_count(kind):
    more = {"dilated": {"dilation": 2}, "reflected": {"padding_mode": "reflect", "padding": 1}}
    kind, more = (nn.Conv2d, more[kind]) if isinstance(kind, str) else (kind, {})
    model = Pooled(kind(3, 4, 3, **more))
    assert working_layers(model, img_size=8) == {}
    with pytest.raises(ValueError, match="Pooled has no layer that particles can adapt"):
        default_targets(model, {})
    assert working_layers(Pooled(nn.Conv2d(3, 4, 3)), img_size=8) == {"convolution": 4}


def test_a_training_with_a_loss_of_its_own_is_refused():
    with pytest.raises(ValueError, match="in training mode the model returns a tuple"):
        task.call_and_pass(lambda x: (x, x), torch.zeros(1), torch.zeros(1))


def test_a_head_with_batch_norm_trains_the_linears_inside(images, tmp_path):
    base = create_base("levit_128s", 2, False)
    assert classifiers(base) == ("head.linear", "head_dist.linear")


def test_one_channel(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        cli.main(train(images, out, "vit_tiny_patch16_224", model_args=[*VIT, "in_chans=1"])) == 0
    )
    assert cli.main(["evaluate", str(out)]) == 0
    base = create_base("vit_tiny_patch16_224", 2, False, in_chans=1, **VIT_ARGS)
    data, _, _ = image_folder(images, base, in_chans=1, **VIT_ARGS)
    x = data.transform(Image.new("RGB", (16, 16), (200, 100, 50)))
    # The luminance, of this model's mean and standard deviation of 0.5.
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255 * 2 - 1
    torch.testing.assert_close(x, torch.full((1, 16, 16), grey), rtol=0, atol=1e-6)
    refused(
        train(images, tmp_path / "two", "vit_tiny_patch16_224", model_args=[*VIT, "in_chans=2"]),
        capsys,
        "in_chans = 2",
    )


def test_images_of_another_aspect(images, tmp_path):
    args = ["img_size=[16,24]", *VIT[1:]]
    assert cli.main(train(images, tmp_path / "run", "vit_tiny_patch16_224", model_args=args)) == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "model, args, text",
    [
        ("no_such_model", [], "no_such_model"),
        (
            "vit_tiny_patch16_224",
            ["img_size=15", "patch_size=16", "depth=1"],
            "does not run on images",
        ),
        ("vit_tiny_patch16_224", [*VIT, "colour=1"], "colour"),
        ("vit_tiny_patch16_224", [*VIT[:4], "num_heads=3"], "timm could not create"),
        ("vit_tiny_patch16_224", [*VIT, "num_classes=7"], "num_classes"),
        ("vit_tiny_patch16_224", [*VIT, "seed=7"], "seed"),
        ("vit_tiny_patch16_224", [*VIT, "features_only=true", "out_indices=[0]"], "Feature"),
    ],
)
def test_a_model_that_cannot_train_is_refused_with_a_line(
    images, tmp_path, capsys, model, args, text
):
    refused(train(images, tmp_path / "run", model, model_args=args), capsys, text)


def test_an_image_that_is_none(images, tmp_path, capsys):
    import shutil

    shutil.copytree(images, tmp_path / "images")
    for i, content in enumerate((b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(100))):
        (tmp_path / "images" / "train" / "a" / "0.png").write_bytes(content)
        out = tmp_path / f"run-{i}"
        refused(train(tmp_path / "images", out, "vit_tiny_patch16_224"), capsys, "0.png")


def test_no_test_images(images, tmp_path, capsys):
    folder = images / "train"
    refused(train(folder, tmp_path / "run", "vit_tiny_patch16_224"), capsys, "test set is empty")


def test_the_folder_of_a_run_that_was_refused_stays_free(images, tmp_path, capsys):
    out = tmp_path / "run"
    refused(train(images, out, "vit_tiny_patch16_224", "--targets", "x"), capsys, "no layers")
    assert cli.main(train(images, out, "vit_tiny_patch16_224")) == 0
    assert os.listdir(out) and isinstance(out, Path)
