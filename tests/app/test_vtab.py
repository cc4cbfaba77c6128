"""VTAB-1K through the command line, on a small tree of images; timm's transforms; the recipe."""

import inspect
import json
import shutil
from dataclasses import fields

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.functional import pil_to_tensor

import multilora as ml
from command import numbers
from documents import recipe
from multilora.app import cli, recipes, steps
from multilora.app import run as training
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import TASKS
from multilora.app.tasks import vtab as vtab_task
from multilora.app.tasks.images import Augmented, create_base, image_folder
from multilora.app.tasks.vtab import vtab

NAME = "vit_tiny_patch16_224.augreg_in21k"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODEL = ["--model", NAME, "--no-pretrained", "--model-args"]
MODEL += [f"{key}={value}" for key, value in MODEL_ARGS.items()]
#: What makes a recipe short, behind its own options.
SHORT = ["--no-pretrained", *MODEL[3:], "--steps", "2", "--batch-size", "4"]
PARTS = {"train800": 16, "val200": 8, "test": 12}


@pytest.fixture
def kitti(tmp_path):
    """The four classes of a data set of VTAB-1K as colours; images are not square."""
    root = tmp_path / "vtab-1k" / "kitti"
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[150, 0, 0], [0, 150, 0], [0, 0, 150], [150, 150, 0]])
    lines = {}
    for part, size in PARTS.items():
        (root / "images" / part).mkdir(parents=True)
        lines[part] = []
        for i in range(size):
            pixels = torch.randint(0, 100, (28, 44, 3), generator=generator) + colours[i % 4]
            path = f"images/{part}/{i:06}.png"
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / path)
            lines[part].append(f"{path} {i % 4}\n")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for part, content in lines.items():
        (root / f"{part}.txt").write_text("".join(content))
    return root


def base(num_classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_base(NAME, num_classes, pretrained=False, **MODEL_ARGS)


def test_train_and_evaluate(kitti, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--task", "vtab", "--data", str(kitti), *MODEL, "--steps", "25"]
    command += ["--batch-size", "8", "--particles", "2", "--lr", "0.01", "--out", str(out)]
    assert cli.main(command) == 0
    metrics = numbers(out)
    assert metrics["num_examples"] == PARTS["test"]
    assert metrics["accuracy"] > 0.7  # colour is easy
    # The recipe supplies everything that was not given.
    settings = json.loads((out / "run.json").read_text())
    assert settings["weight_decay"] == 1e-4 and settings["targets"] == ["qkv"]
    assert dict(settings["method_args"])["alpha"] == 0.08
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-6)
    # Other data are measured in place of the run's: half of the test images, with wrong labels.
    other = shutil.copytree(kitti, tmp_path / "other" / "kitti")
    lines = [line.split() for line in (kitti / "test.txt").read_text().splitlines()[:6]]
    wrong = [f"{path} {(int(label) + 1) % 4}\n" for path, label in lines]
    (other / "test.txt").write_text("".join(wrong))
    assert cli.main(["evaluate", str(out), "--data", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_examples"] == 6 and found["accuracy"] < 0.3


def test_the_recipe_of_the_guide_for_vtab(kitti, tmp_path, monkeypatch):
    kitti.rename(kitti.parent / "cifar")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*recipe("--task vtab"), *SHORT]) == 0
    assert numbers(tmp_path / "runs" / "cifar")["num_examples"] == PARTS["test"]
    settings = json.loads((tmp_path / "runs" / "cifar" / "run.json").read_text())
    assert settings["model"] == NAME.replace("tiny", "base") and settings["particles"] == 4
    particle = json.loads((tmp_path / "runs/cifar/particle_3/adapter_config.json").read_text())
    assert particle["r"] == 8 and particle["lora_alpha"] == 8


def test_the_recipe_of_the_guide_for_images(kitti, tmp_path, monkeypatch):
    for part, folder in (("train800", "train"), ("val200", "val")):
        for i in range(PARTS[part]):
            name = f"{i:06}.png"
            path = tmp_path / "PHOTOS" / folder / "red green blue brown".split()[i % 4] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (kitti / "images" / part / name).rename(path)
    monkeypatch.chdir(tmp_path)
    augmented = []
    load = Augmented.__getitem__
    monkeypatch.setattr(
        Augmented, "__getitem__", lambda self, i: (augmented.append(i), load(self, i))[1]
    )
    assert cli.main([*recipe("--augment"), *SHORT]) == 0
    assert len(augmented) == 8
    assert numbers(tmp_path / "runs" / "photos")["num_examples"] == PARTS["val200"]
    settings = json.loads((tmp_path / "runs" / "photos" / "run.json").read_text())
    assert settings["model"] == "vit_small_patch16_224"


@pytest.mark.parametrize(
    "split, train, test",
    [("test", ["train800", "val200"], ["test"]), ("tune", ["train800"], ["val200"])],
)
def test_splits(kitti, split, train, test):
    model = base()
    found = vtab(kitti, model, split, **MODEL_ARGS)
    for part, names in zip(found, (train, test)):
        expected = [
            (kitti / "images" / n / f"{i:06}.png", i % 4) for n in names for i in range(PARTS[n])
        ]
        assert part.samples == expected
    assert found[2] == ["0", "1", "2", "3"]


def test_images_are_squeezed_whole_and_normalised_as_the_model_was_trained(kitti):
    model = base()
    config = resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.5, 0.5)  # of this checkpoint, not ImageNet's
    train, _, _ = vtab(kitti, model, **MODEL_ARGS)
    x, y = train[5]
    image = Image.open(kitti / "images" / "train800" / "000005.png")
    pixels = pil_to_tensor(image.resize((32, 32), Image.BICUBIC))
    assert y == 1
    torch.testing.assert_close(x, pixels / 255 * 2 - 1, rtol=0, atol=1e-6)


def test_augmentation_depends_on_seed_epoch_and_index(kitti):
    train, test, _ = vtab(kitti, base(), augment=True, seed=3, **MODEL_ARGS)
    assert isinstance(train, Augmented) and not isinstance(test, Augmented)
    state = torch.get_rng_state()
    first = train[2][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(train[2][0], first)
    train.set_epoch(1)
    assert not torch.equal(train[2][0], first)
    other, _, _ = vtab(kitti, base(), augment=True, seed=4, **MODEL_ARGS)
    assert not torch.equal(other[2][0], first)


@pytest.mark.slow
def test_an_augmented_run_resumes_to_the_same_numbers(kitti, tmp_path):
    settings = recommended(
        "vtab",
        data=str(kitti),
        model=NAME,
        pretrained=False,
        model_args=tuple(MODEL_ARGS.items()),
        augment=True,
        particles=2,
        steps=9,
        batch_size=8,
        split="tune",
    )

    def interrupt(step, steps, stats):
        if step == 5:  # in the third epoch; the last checkpoint is of the second
            raise KeyboardInterrupt

    train, _, _ = vtab(kitti, base(), "tune", augment=True, **MODEL_ARGS)
    next(iter(steps.Batches(train, settings, done=5)))
    assert train.epoch == 2
    whole = training.train(settings, tmp_path / "whole", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=3, on_step=interrupt)
    training.train(settings, tmp_path / "run", save_every=3, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert whole["num_examples"] == PARTS["val200"]


def test_an_image_folder_is_augmented_on_request(kitti):
    # Its parts serve as two classes here.
    train, test, classes = image_folder(
        kitti / "images", base(), augment=True, seed=0, **MODEL_ARGS
    )
    assert classes == ["test", "train800", "val200"]
    train.set_epoch(1)
    again = train[0][0]
    train.set_epoch(0)
    assert not torch.equal(train[0][0], again)
    config = resolve_model_data_config(base(), args=MODEL_ARGS)
    expected = create_transform(**config)(test.dataset.loader(test.dataset.samples[4][0]))
    assert torch.equal(test[0][0], expected)


def _append(kitti, line):
    with open(kitti / "test.txt", "a") as file:
        file.write(line)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "test.txt").unlink(), "the list .*test.txt is missing"),
        (lambda root: (root / "test.txt").write_text(""), "the list .*test.txt is empty"),
        (lambda root: _append(root, "images/a.png\n"), r"test.txt, line 13: .*'images/a.png'"),
        (lambda root: _append(root, "images/a.png two\n"), "test.txt, line 13: .*two"),
        (lambda root: _append(root, "images/a.png -1\n"), "test.txt, line 13: .*-1"),
        (lambda root: _append(root, "images/a.png 4\n"), r"line 13: label 4 .* not in \[0, 4\)"),
        (lambda root: _append(root, "images/a.png 3\n"), "line 13: the image .*a.png is missing"),
        (
            lambda root: (root / "images/test/000003.png").write_bytes(b"no image"),
            "000003.png cannot be read",
        ),
    ],
)
def test_damaged_data_is_named(kitti, damage, message):
    damage(kitti)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _, test, _ = vtab(kitti, base(), **MODEL_ARGS)
        test[3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "vtab"], "needs --data"),
        (["--task", "vtab", "--data", "{kitti}/images"], "the 19 are cifar, caltech101"),
        (["--data", "{kitti}/images", *MODEL, "--split", "tune"], "split = 'tune' is for"),
        (
            ["--augment"],
            "augment = True is for the tasks images, vtab, clip; got the task 'digits'",
        ),
        (
            ["--task", "vtab", "--data", "{kitti}", *MODEL, "--classes", "vocabulary"],
            "winogrande_s",
        ),
        (["--task", "vtab", "--data", "{kitti}", *MODEL, "--targets", "q"], r"among ['fc1', 'fc2'"),
        (["--task", "vtab", "--data", "{kitti}", *MODEL, "--method-args", "beat=1"], "'beta'"),
    ],
)
def test_train_says_what_is_wrong(kitti, tmp_path, capsys, arguments, message):
    arguments = [a.replace("{kitti}", str(kitti)) for a in arguments]
    assert cli.main(["train", "--steps", "1", *arguments, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, task", [("vtab1k", "vtab"), ("clip", "clip"), ("commonsense", "boolq")]
)
def test_a_recipe_is_applicable_and_says_where_numbers_are_from(name, task):
    recipe = recipes.read(name)
    options = TASKS[task].Options
    known = {field.name for kind in (Settings, options) for field in fields(kind)}
    methods = {"ibdr": ml.IBDR, "svgd": ml.SVGD, "ensemble": ml.Ensemble, "single": ml.Ensemble}
    assert recipe["sources"].keys() == {"paper", "benchmark", "ours"}
    for dataset, about in recipe["datasets"].items():
        # The numbers of a data set need their source.
        assert not (about.keys() & {"settings", "methods"}) or about["settings_source"]
        for method, kind in methods.items():
            merged = recipes.settings(recipe, dataset, method)
            assert merged.keys() <= known
            assert merged["method_args"].keys() <= inspect.signature(kind).parameters.keys()


def test_the_data_sets_are_the_19_of_the_paper():
    known = recipes.read("vtab1k")["datasets"].values()
    groups = [about["group"] for about in known]
    sizes = {group: groups.count(group) for group in set(groups)}
    assert sizes == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(about["classes"] for about in known) == 940


def test_a_data_set_overrides_the_recipe():
    recipe = {
        "ours": {
            "settings": {"lr": 1, "rank": 8},
            "methods": {"ibdr": {"particles": 4, "method_args": {"alpha": 1, "rho": 2}}},
        },
        "datasets": {
            "a": {"settings": {"lr": 3}, "methods": {"ibdr": {"method_args": {"rho": 5}}}},
            "b": {},
        },
    }
    merged = recipes.settings(recipe, "a", "ibdr")
    assert merged == {"lr": 3, "rank": 8, "particles": 4, "method_args": {"alpha": 1, "rho": 5}}
    assert recipes.settings(recipe, "b", "ibdr")["method_args"] == {"alpha": 1, "rho": 2}
    assert recipes.settings(recipe, "a", "svgd") == {"lr": 3, "rank": 8, "method_args": {}}
    with pytest.raises(ValueError, match="one of a, b; got 'c'"):
        recipes.settings(recipe, "c", "ibdr")


def test_given_settings_win_over_the_recipe(kitti):
    settings = recommended("vtab", "ibdr", str(kitti), lr=0.5, method_args={"alpha": 0.1})
    assert settings.lr == 0.5 and settings.steps == 1500
    assert settings.options.model == "vit_base_patch16_224.augreg_in21k"
    assert dict(settings.method_args)["alpha"] == 0.1
    assert dict(settings.method_args)["rho"] == 0.03
    assert recommended("vtab", "svgd", str(kitti)).particles == 5
    options = vtab_task.Options(
        data=str(kitti), model=NAME, pretrained=False, model_args=tuple(MODEL_ARGS.items())
    )
    task = vtab_task.make(options, seed=0)
    model = steps.particle_model(task, settings)
    assert steps.make_method(settings, model, 1000).alpha == 0.1
    assert [a.scaling for a in model.adapters()] == [1.0, 1.0]
