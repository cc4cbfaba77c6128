"""Readers of shifted and out-of-distribution test sets, on small folders in their layouts."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from multilora.integrations import shifts
from multilora.integrations.shifts import cifar_c, domains, matched, shifted_sets, unlabelled

BLOCK = 4  # images of a severity; the real files have 10,000
LABELS = np.tile([2, 0, 1, 2], 5)


def pixel(image):
    """The value of an image of one colour."""
    return int(pil_to_tensor(image)[0, 0, 0])


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value,) * 3).save(path)


@pytest.fixture
def cifar(tmp_path):
    """Image i of fog is of the value i, and of snow 100 + i."""
    root = tmp_path / "CIFAR-10-C"
    root.mkdir()
    np.save(root / "labels.npy", LABELS)
    for start, name in ((0, "fog"), (100, "snow")):
        values = np.arange(start, start + 5 * BLOCK, dtype=np.uint8)
        np.save(root / f"{name}.npy", np.broadcast_to(values[:, None, None, None], (20, 8, 8, 3)))
    return root


@pytest.fixture
def art(tmp_path):
    """DOMAIN/CLASS: two domains, each with an image of a bird and two of a car."""
    root = tmp_path / "art"
    for start, domain in ((0, "photo"), (10, "sketch")):
        save(root / domain / "bird" / "0.png", start)
        save(root / domain / "car" / "0.png", start + 1)
        save(root / domain / "car" / "1.png", start + 2)
    return root


def test_each_block_of_cifar_c_is_a_severity(cifar):
    sets = cifar_c(cifar, pixel)
    assert list(sets) == [f"{name}/{s}" for name in ("fog", "snow") for s in (1, 2, 3, 4, 5)]
    for start, name in ((0, "fog"), (100, "snow")):
        for severity in (1, 2, 3, 4, 5):
            data = sets[f"{name}/{severity}"]
            first = start + BLOCK * (severity - 1)
            assert [data[i] for i in range(len(data))] == [
                (first + i, label) for i, label in enumerate([2, 0, 1, 2])
            ]
    assert isinstance(sets["fog/1"].images, np.memmap)


def test_some_corruptions_and_severities(cifar):
    sets = cifar_c(cifar, pixel, ["snow"], (5, 2), num_classes=3)
    assert {name: data[0][0] for name, data in sets.items()} == {"snow/5": 116, "snow/2": 104}


def _short(root):
    np.save(root / "fog.npy", np.zeros((16, 8, 8, 3), np.uint8))


def _pickled(root):
    np.save(root / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage, options, message",
    [
        (None, {"corruptions": ["rain", "fog"]}, r"CIFAR-10-C has .*'fog', 'snow'\]; got \['rain'"),
        (None, {"corruptions": []}, "CIFAR-10-C has the corruptions"),
        (None, {"severities": (1, 6)}, r"severities must be some of .*; got \(1, 6\)"),
        (None, {"num_classes": 4}, "labels.npy has labels from 0 to 2; the task has 4 classes"),
        (None, {"num_classes": 2}, "labels.npy has labels from 0 to 2; the task has 2 classes"),
        (_short, {}, r"fog.npy must be uint8 \(20, .*five blocks of 4 images; got .*\(16, 8"),
        (
            lambda root: np.save(root / "fog.npy", np.zeros((20, 8, 8, 3))),
            {},
            r"fog.npy must be uint8 .*got float64",
        ),
        (
            lambda root: np.save(root / "fog.npy", np.zeros((20, 8, 8), np.uint8)),
            {},
            r"fog.npy must be uint8 .*got uint8 \(20, 8, 8\)",
        ),
        (_pickled, {}, "fog.npy is damaged"),
        (lambda root: (root / "fog.npy").write_bytes(b"no array"), {}, "fog.npy is damaged"),
        (lambda root: (root / "fog.npy").write_bytes(b""), {}, "fog.npy is damaged"),
        (
            lambda root: np.save(root / "labels.npy", LABELS[:18]),
            {},
            r"labels.npy must be integers in five blocks of equal length; got int64 \(18,\)",
        ),
        (
            lambda root: np.save(root / "labels.npy", LABELS / 1),
            {},
            "labels.npy must be integers .*float64",
        ),
        (lambda root: (root / "labels.npy").unlink(), {}, "labels.npy is missing"),
        (lambda root: [f.unlink() for f in root.glob("[fs]*.npy")], {}, r"corruptions \[\]; got"),
    ],
)
def test_what_is_wrong_with_cifar_c_is_named(cifar, damage, options, message):
    if damage is not None:
        damage(cifar)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cifar_c(cifar, pixel, **options)


def test_domains_as_folders(art):
    sets = domains(art, pixel)
    assert list(sets) == ["photo", "sketch"] and sets["sketch"].classes == ["bird", "car"]
    assert [sets["sketch"][i] for i in range(3)] == [(10, 0), (11, 1), (12, 1)]


@pytest.fixture
def listed(art):
    """DomainNet's lists sort without regard to case: The_Tower is behind bird and car."""
    save(art / "photo" / "The_Tower" / "0.png", 3)
    (art / "photo_test.txt").write_text(
        "photo/The_Tower/0.png 2\nphoto/bird/0.png 0\nphoto/car/1.png 1\n"
    )
    (art / "photo_train.txt").write_text("photo/car/0.png 1\n")
    return art


def test_domains_as_lists(listed):
    sets = domains(listed, pixel)
    assert list(sets) == ["photo"] and sets["photo"].classes == ["The_Tower", "bird", "car"]
    assert [sets["photo"][i] for i in range(3)] == [(3, 0), (0, 1), (2, 2)]
    assert [x for x, _ in domains(listed, pixel, "train")["photo"]] == [1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("photo/bird/0.png 0\nphoto/car/0.png 0\n", "1 labels of images in 2 folders"),
        ("photo/car/0.png 0\nphoto/car/1.png 1\n", "2 labels of images in 1 folders"),
        ("photo/bird/0.png\n", "photo_test.txt, line 1: `path label` is needed"),
        ("photo/bird/7.png 0\n", "line 1: the image .*7.png is missing"),
        ("", "photo_test.txt is empty"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(listed, text, message):
    (listed / "photo_test.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        domains(listed, pixel)


class Named:
    """A data set as torchvision has them, here with STL-10's name for a car."""

    classes = ("airplane", "car", "monkey")

    def __init__(self, field="labels"):
        setattr(self, field, np.array([1, 2, 0, 1]))

    def __getitem__(self, index):
        return 10 * index, -1


@pytest.mark.parametrize("field", ["labels", "targets"])
def test_classes_are_matched_by_name(field):
    said = []
    data = matched(Named(field), ["bird", "automobile", "airplane"], report=said.append)
    assert [data[i] for i in range(len(data))] == [(0, 1), (20, 2), (30, 1)]
    assert said == ["Named: 2 of its 3 classes are the task's, with 3 of 4 images"]


def test_aliases_hold_in_both_directions_and_own_names_come_first():
    other = Named()
    other.classes = ("airplane", "automobile", "monkey")
    assert len(matched(other, ["car", "bird"], report=list)) == 2
    # A task with both names keeps them apart.
    data = matched(Named(), ["automobile", "car"], report=list)
    assert [data[i][1] for i in range(2)] == [1, 1]
    assert matched(Named(), ["ape"], {"monkey": "ape"}, list)[0] == (10, 0)
    with pytest.raises(
        ValueError, match=r"no images of the task's classes cat, dog; its own are a"
    ):
        matched(Named(), ["cat", "dog"], report=list)


def test_the_layout_is_recognised(cifar, listed, tmp_path):
    def read(root, classes=("automobile", "bird")):
        return shifted_sets(root, pixel, classes, report=list)

    assert list(read(cifar, "abc")) == list(cifar_c(cifar, pixel))
    with pytest.raises(ValueError, match="the task has 2 classes"):
        read(cifar)
    # The lists leave the training images out.
    assert [x for x, _ in _items(read(listed)["photo"])] == [0, 2]
    for file in listed.glob("*.txt"):
        file.unlink()
    by_domain = read(listed)
    assert list(by_domain) == ["photo", "sketch"]
    assert _items(by_domain["sketch"]) == [(10, 1), (11, 0), (12, 0)]
    assert _items(read(listed / "photo")[""]) == [(0, 1), (1, 0), (2, 0)]
    (listed / "sketch").rename(listed / "val")
    (listed / "photo").rename(listed / "train")
    assert _items(read(listed)[""]) == [(10, 1), (11, 0), (12, 0)]


def test_lists_are_read_whatever_folders_they_name(tmp_path):
    save(tmp_path / "bird" / "0.png", 0)
    save(tmp_path / "car" / "0.png", 1)
    (tmp_path / "photo_test.txt").write_text("car/0.png 0\n")
    found = shifted_sets(tmp_path, pixel, ["bird", "car"], report=list)
    assert list(found) == ["photo"] and _items(found["photo"]) == [(1, 1)]


def _items(data):
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize("read", [lambda r: shifted_sets(r, pixel, "ab"), lambda r: domains(r, 0)])
def test_a_folder_of_no_layout(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        read(tmp_path / "none")
    save(tmp_path / "0.png", 0)
    with pytest.raises(ValueError, match=f"{tmp_path} (needs folders CLASS|has neither lists)"):
        read(tmp_path)


def test_a_class_without_images(tmp_path):
    save(tmp_path / "a" / "0.png", 0)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} needs folders CLASS of images: .*b"):
        shifted_sets(tmp_path, pixel, "ab")


def test_out_of_distribution_images_are_all_below_a_folder(art, tmp_path):
    (art / "photo" / "notes.txt").write_text("no image")
    assert _items(unlabelled(art, pixel)) == [(v, 0) for v in (0, 1, 2, 10, 11, 12)]
    (art / "photo").rename(art / "train")
    (art / "sketch").rename(art / "test")
    assert [x for x, _ in _items(unlabelled(art, pixel))] == [10, 11, 12]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        unlabelled(tmp_path / "empty", pixel)
    with pytest.raises(FileNotFoundError, match=r"the folder .*none does not exist"):
        unlabelled(tmp_path / "none", pixel)


def test_a_broken_image_is_named(art):
    (art / "photo" / "car" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"car/1.png cannot be read"):
        domains(art, pixel)["photo"][2]


def test_sets_go_through_a_loader(cifar):
    data = cifar_c(cifar, pil_to_tensor)["fog/2"]
    x, y = next(iter(torch.utils.data.DataLoader(data, 4)))
    assert x.shape == (4, 3, 8, 8) and x[:, 0, 0, 0].tolist() == [4, 5, 6, 7]
    assert y.tolist() == [2, 0, 1, 2] and y.dtype == torch.int64
    assert shifts.SEVERITIES == (1, 2, 3, 4, 5)
