"""Shifted and out-of-distribution sets through the command line, and what evaluation reports."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

import multilora as ml
from command import numbers, refused
from multilora.app import cli
from multilora.app import run as training
from multilora.app.other_data import add_sets
from multilora.app.report import print_sets
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import digits, images, vtab
from multilora.app.tasks.task import Task
from multilora.integrations.corruptions import STRENGTHS, corrupt

# --- what is reported ----------------------------------------------------------------------------


def examples(count, scale):
    return TensorDataset(scale * torch.randn(count, 3), torch.arange(count) % 4)


@pytest.fixture
def task():
    return Task(
        base=nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)),
        targets=["0"],
        head="2",
        classes=list("abcd"),
        train=examples(8, 1.0),
        test=examples(40, 2.0),
        shifted={"near": examples(24, 1.0), "far": examples(32, 5.0)},
        ood={"small": examples(12, 0.1), "large": examples(20, 9.0)},
    )


@pytest.fixture
def model(task):
    config = peft.LoraConfig(r=2, target_modules=task.targets, modules_to_save=[task.head])
    model = ml.get_particle_model(task.base, config, 3, head_init="reset")
    for p in model.particle_parameters():
        nn.init.normal_(p)
    return model


def by_hand(model, data, combine):
    """Predictive probabilities (N, C), their entropy (N,) and the mutual information (N,)."""
    with torch.no_grad():
        z = model(data.tensors[0]).double()
    members = z.softmax(-1)
    p = members.mean(0) if combine == "prob" else z.mean(0).softmax(-1)
    mean = members.mean(0)
    information = (members * (members.log() - mean.log())).sum(-1).mean(0)
    return p, torch.special.entr(p).sum(-1), information


@pytest.mark.parametrize("combine", ["prob", "logit"])
def test_every_set_is_measured(task, model, combine):
    result, predictions, targets = training.evaluate(model.eval(), task, 7, 2, combine)
    _, entropy, information = by_hand(model, task.test, combine)
    assert result["combine"] == combine and predictions.shape == (3, 40, 4)
    assert torch.equal(targets, task.test.tensors[1])
    for kind, sets in (("shifted", task.shifted), ("ood", task.ood)):
        assert list(result[kind]) == list(sets)
        for name, data in sets.items():
            p, other, other_information = by_hand(model, data, combine)
            is_other = np.repeat([0, 1], [40, len(data)])
            expected = {
                "entropy": other.mean(),
                "mutual_information": other_information.mean(),
                "auroc": roc_auc_score(is_other, torch.cat([entropy, other])),
                "auroc_mi": roc_auc_score(is_other, torch.cat([information, other_information])),
            }
            y = data.tensors[1]
            if kind == "shifted":
                expected["accuracy"] = (p.argmax(-1) == y).double().mean()
                expected["nll"] = -p[range(len(y)), y].log().mean()
                expected["brier"] = (p - nn.functional.one_hot(y, 4)).square().sum(-1).mean()
            measured = result[kind][name]
            for measure, value in expected.items():
                assert measured[measure] == pytest.approx(float(value), rel=1e-5), measure
            assert ("ece" in measured) == ("accuracy" in measured) == (kind == "shifted")


def test_the_means_over_sets_have_their_old_names(task, model):
    result, _, _ = training.evaluate(model, task)
    near, far = result["shifted"]["near"], result["shifted"]["far"]
    corrupted = result["corrupted"]
    for measure in ("accuracy", "nll", "ece", "brier", "mutual_information"):
        assert corrupted[measure] == pytest.approx((near[measure] + far[measure]) / 2)
    assert corrupted["near_accuracy"] == near["accuracy"] != corrupted["accuracy"]
    assert corrupted.keys() == {
        *("accuracy", "nll", "ece", "brier", "mutual_information"),
        *("near_accuracy", "far_accuracy"),
    }
    small, large = result["ood"]["small"], result["ood"]["large"]
    for old, new in {
        "auroc_ood": "auroc",
        "auroc_ood_mi": "auroc_mi",
        "ood_entropy": "entropy",
        "ood_mutual_information": "mutual_information",
    }.items():
        assert result[old] == pytest.approx((small[new] + large[new]) / 2)
    # A single set gives the very numbers of `metrics.evaluate`.
    large = task.ood["large"]
    one, p, y = training.evaluate(model, replace(task, shifted={}, ood={"large": large}))
    other = ml.predict(model, large.tensors[0], log=True)
    direct = ml.metrics.evaluate(p.log(), y, ood_logits=other)
    assert one["auroc_ood"] == pytest.approx(direct["auroc_ood"])
    assert "shifted" not in one and "corrupted" not in one
    none, _, _ = training.evaluate(model, replace(task, shifted={}, ood={}))
    assert "ood" not in none and "auroc_ood" not in none


def test_labels_of_other_classes_are_not_read(task, model):
    x, _ = task.ood["large"].tensors
    ood = {"labels": TensorDataset(x, torch.full((len(x),), 99)), "large": task.ood["large"]}
    result, _, _ = training.evaluate(model, replace(task, ood=ood))
    assert result["ood"]["labels"] == result["ood"]["large"]


def test_a_table_has_a_row_for_every_set(task, model, capsys):
    result, _, _ = training.evaluate(model, task)
    print_sets(result)
    said = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if "|" in line}
    assert {"test", "near", "far", "small", "large"} <= rows.keys()
    for value in (result["shifted"]["far"]["nll"], result["shifted"]["far"]["auroc"]):
        assert f" {value:.3f} " in rows["far"]
    assert "AUROC: how well" in said


# --- the digits' own sets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The digits ViT is pretrained hardly at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 3)
        yield


def test_the_digits_keep_their_sets(cache):
    task = digits.make(digits.Options(), 0, list)
    assert list(task.shifted) == ["noise", "blur", "contrast"] and list(task.ood) == ["source"]
    assert [len(data) for data in task.shifted.values()] == 3 * [3 * len(task.test)]
    assert set(task.ood["source"].tensors[1].tolist()) == {0, 1, 2, 3, 4}
    (mean,), (std,) = task.normalisation
    pixels = task.test.tensors[0] * std + mean
    assert pixels.min() == 0 and pixels.max() == 1


def test_corruptions_come_beside_a_tasks_own_sets(cache):
    task = digits.make(digits.Options(), 0, list)
    more = add_sets(task, Settings(corrupt=True), list)
    own = [*task.shifted]
    assert list(more.shifted)[:3] == own and len(more.shifted) == 3 + 5 * len(STRENGTHS)
    x, y = task.test[5]
    noisy, label = more.shifted["noise/2"][5]
    assert label == y
    torch.testing.assert_close(noisy, corrupt((x + 1) / 2, "noise", 2, seed=5) * 2 - 1)
    assert list(task.shifted) == own


def test_the_digits_read_no_files(cache, tmp_path):
    task = digits.make(digits.Options(), 0, list)
    for settings in (Settings(shift=(("a", "b"),)), Settings(ood=(("a", "b"),))):
        with pytest.raises(ValueError, match="vtab, clip, text, sentiment; got the task 'digits'"):
            add_sets(task, settings, list)
    with pytest.raises(ValueError, match="--corrupt is for tasks of images"):
        add_sets(replace(task, normalisation=None), Settings(corrupt=True), list)


# --- settings ------------------------------------------------------------------------------------


def test_what_is_measured_is_no_setting_of_training(tmp_path):
    plain = recommended("digits", "ensemble")
    asked = recommended(
        "digits", "ensemble", shift=(("a", "b"),), ood=[["c", "d"]], corrupt=True, combine="logit"
    )
    assert asked.ood == (("c", "d"),)
    assert asked.flat() == plain.flat() | {"combine": "logit"}
    # A folder of before has no `combine`.
    older = {name: value for name, value in plain.flat().items() if name != "combine"}
    assert Settings.of_file(older) == plain


@pytest.mark.parametrize(
    "name, value", [("shift", [["a", "/etc"]]), ("ood", [["a", "/etc"]]), ("corrupt", True)]
)
def test_a_folder_decides_nothing_about_other_data(tmp_path, capsys, name, value):
    flat = Settings().flat() | {name: value}
    (tmp_path / "run.json").write_text(json.dumps(flat))
    refused(["evaluate", tmp_path], capsys, "run.json", f"a file cannot give ['{name}']")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"shift": (("a", "b"), ("a", "c"))}, "shift must have different names"),
        ({"shift": (("a", 3),)}, "shift must be pairs of a name and a path"),
        ({"ood": (("", "b"),)}, "ood must be pairs of a name and a path"),
        ({"ood": "a=b"}, "ood must be pairs"),
        ({"combine": "mean"}, 'combine must be "prob" or "logit"; got'),
        ({"corrupt": 1}, "corrupt must be True or False"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_a_pair_needs_both_sides(capsys):
    for text in ("a", "a=", "=b"):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "run", "--shift", text])
        assert "NAME=PATH is needed" in capsys.readouterr().err
    args = cli._parser().parse_args("evaluate --shift a=~/b --shift c=d=e run".split())
    (_, home), other = args.shift
    assert other == ("c", "d=e") and home.endswith("/b") and "~" not in home and args.dir == "run"


# --- the command ---------------------------------------------------------------------------------

ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODEL = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--model-args"]
MODEL += [f"{name}={value}" for name, value in ARGS.items()]
TRAIN = ["train", *MODEL, *"--steps 6 --lr 0.02 --batch-size 4 --particles 2 --rank 2".split()]
TRAIN += ["--method", "ensemble"]


def colour(path, channel, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 120, (16, 16, 3), generator=generator)
    pixels[..., channel] += 120
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes by colour, two domains of them, a CIFAR-C and images of a third colour."""
    root, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for part, count in (("photos/train", 6), ("photos/val", 5), ("art/ink", 3), ("art/oil", 4)):
        for channel, name in enumerate(("automobile", "bird")):
            name = "car" if part == "art/oil" and channel == 0 else name
            for i in range(count):
                colour(root / part / name / f"{i}.png", channel, generator)
    for i in range(6):
        colour(root / "other" / f"{i}.png", 2, generator)
    (root / "C").mkdir()
    np.save(root / "C" / "labels.npy", np.tile([0, 1], 10))
    fog = torch.randint(0, 256, (20, 16, 16, 3), generator=generator).to(torch.uint8)
    np.save(root / "C" / "fog.npy", fog.numpy())
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    command = [*TRAIN, "--data", data / "photos", "--shift", f"art={data / 'art'}"]
    command += ["--ood", f"blue={data / 'other'}", "--combine", "logit", "--out", out]
    command += ["--validation", "3", "--select", "best"]
    assert cli.main([str(word) for word in command]) == 0
    return out


def evaluated(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_a_run_measures_the_sets_that_were_asked_for(run, data, capsys):
    metrics = numbers(run)
    assert metrics["combine"] == "logit" and metrics["num_examples"] == 10
    assert list(metrics["shifted"]) == ["art/ink", "art/oil"] and list(metrics["ood"]) == ["blue"]
    assert json.loads((run / "run.json").read_text()).keys().isdisjoint({"shift", "ood", "corrupt"})

    again, _ = evaluated(capsys, run)
    assert again["combine"] == "logit" and not again.keys() & {"shifted", "ood", "corrupted"}
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-5)

    more = ["--shift", f"art={data / 'art'}", "--shift", f"c={data / 'C'}"]
    more += ["--ood", f"blue={data / 'other'}", "--combine", "prob", "--corrupt"]
    found, said = evaluated(capsys, run, *more)
    assert found["combine"] == "prob" and found["nll"] != metrics["nll"]
    assert found["accuracy"] != 0.5 and "art/oil: 2 of its 2 classes" in said
    kinds = ["art/ink", "art/oil", *(f"c/fog/{s}" for s in (1, 2, 3, 4, 5))]
    assert list(found["shifted"])[:7] == kinds and len(found["shifted"]) == 7 + 30
    assert found["shifted"]["art/oil"]["accuracy"] == metrics["shifted"]["art/oil"]["accuracy"]

    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--ood", f"blue={data / 'other'}"]) == 0
    assert "| blue" in capsys.readouterr().out


def test_the_sets_are_prepared_as_the_test_images_are(run, data):
    """By the evaluation's transform, with the labels of the task's classes."""
    model, task, _ = training.load_run(run, report=list, shift=(("art", str(data / "art")),))
    result, _, _ = training.evaluate(model, task)
    right = []
    for label, name in enumerate(("car", "bird")):
        for file in sorted((data / "art" / "oil" / name).iterdir()):
            x = task.transform(Image.open(file).convert("RGB"))
            p = ml.predict(model, x[None]).mean(0)
            right.append(p.argmax(-1).item() == label)
    assert result["shifted"]["art/oil"]["accuracy"] == pytest.approx(np.mean(right))
    # The same pixels in the validation images and through `normalisation`.
    mean, std = (torch.tensor(v)[:, None, None] for v in task.normalisation)
    x, _ = task.test[0]
    image = Image.open(task.test.samples[0][0])
    assert image.size == (16, 16)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    cropped = task.transform(image) * std + mean
    torch.testing.assert_close(x * std + mean, cropped)
    assert (cropped.mean((1, 2)) - pixels.mean((1, 2))).abs().max() < 0.05


def test_other_data_is_measured_in_place_of_the_runs(run, data, tmp_path, capsys):
    for channel, name in enumerate(("automobile", "bird")):
        for part, count in (("train", 1), ("val", 3)):
            for i in range(count):
                # The colours are the other way round, so the labels are wrong for the run.
                generator = torch.Generator().manual_seed(i)
                colour(tmp_path / "swapped" / part / name / f"{i}.png", 1 - channel, generator)
    own, _ = evaluated(capsys, run)
    other, _ = evaluated(capsys, run, "--data", tmp_path / "swapped")
    assert other["num_examples"] == 6
    assert own["accuracy"] > 0.5 > other["accuracy"]
    # Its two training images hold out none, and choose no soup.
    how = ["evaluate", run, "--data", tmp_path / "swapped", "--soup", "greedy"]
    refused(how, capsys, "--soup greedy is chosen on the run's own data: leave out --data")
    (tmp_path / "swapped" / "train" / "cat").mkdir()
    refused(["evaluate", run, "--data", tmp_path / "swapped"], capsys, "cat")


@pytest.mark.parametrize(
    "more, texts",
    [
        (["--shift", "x={data}/none"], ["data", "none does not exist"]),
        (["--shift", "x={data}/other"], ["other needs folders CLASS"]),
        (["--ood", "x={data}/C"], ["C holds no images"]),
        (["--shift", "x={data}/art", "--shift", "x={data}/C"], ["different names"]),
        (
            ["--shift", "art={data}/art", "--shift", "art/ink={data}/art/ink"],
            ["'art/ink' is there"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(run, data, capsys, more, texts):
    refused(["evaluate", run, *(a.replace("{data}", str(data)) for a in more)], capsys, *texts)


def test_training_does_not_begin_with_data_that_does_not_fit(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "_take_steps", None)
    command = [*TRAIN, "--data", data / "photos", "--out", tmp_path / "run", "--shift", "x=none"]
    refused(command, capsys, "the folder none does not exist")


def test_vtab_reads_other_sets_as_its_own(data, tmp_path):
    """Its protocol resizes the whole image, and its classes are numbers."""
    root = tmp_path / "kitti"
    for i in range(4):
        colour(root / f"{i}.png", i % 3, torch.Generator().manual_seed(i))
    for name in ("train800val200.txt", "test.txt"):
        (root / name).write_text("".join(f"{i}.png {i}\n" for i in range(4)))
    options = vtab.Options(
        model="vit_tiny_patch16_224",
        data=str(root),
        pretrained=False,
        model_args=tuple(ARGS.items()),
    )
    task = vtab.make(options, 0)
    wide = Image.new("RGB", (40, 16))
    wide.paste((255, 255, 255), (0, 0, 8, 16))
    whole = task.transform(wide)
    assert torch.equal(whole, task.test.transform(wide)) and whole[0, 8, 0] > 0.5
    cropped = images.transforms(task.base, **ARGS)[1](wide)
    assert cropped.max() < -0.5  # its centre has none of the white
    message = "photos has no images of the task's classes 0, 1, 2, 3; its own are automobile, bird"
    with pytest.raises(ValueError, match=message):
        add_sets(task, Settings(shift=(("x", str(data / "photos")),)), list)
