"""Adapter files that anybody made: which are refused, what refusing costs, and which are read."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multilora as ml
from adapter_files import (
    CONFIG,
    HEAD,
    IDS,
    INDEX,
    PICKLED,
    WEIGHTS,
    A,
    B,
    D,
    K,
    field,
    folders,
    llama,
    refusal,
    small_base,
    small_particles,
    trained_by_peft,
    without_list,
)
from multilora import checkpoint

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    small_particles().save_pretrained(path)
    return path


@pytest.fixture
def root(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "root")
    return tmp_path / "root"


# --- damage --------------------------------------------------------------------------------------


def header(content, data=b""):
    """A safetensors file with this header."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda file: file.write_bytes(struct.pack("<Q", len(content)) + content + data)


def f32(shape, *offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def write(content):
    return lambda file: file.write_bytes(content)


def instead(make):
    def spoil(file):
        file.unlink()
        make(file)

    return spoil


# Any file can be missing, be a folder, or hold something else.
ANY_FILE = {
    "missing": lambda file: file.unlink(),
    "folder": instead(Path.mkdir),
    "fifo": instead(os.mkfifo),
    "device": instead(lambda file: file.symlink_to("/dev/zero")),
    "link to nothing": instead(lambda file: file.symlink_to("/nonexistent")),
    "link to itself": instead(lambda file: file.symlink_to(file)),
    "links in a circle": instead(
        lambda file: (file.symlink_to(f"{file}.2"), Path(f"{file}.2").symlink_to(file))
    ),
    "link to a folder": instead(lambda file: file.symlink_to(file.parent)),
    "empty": write(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": write(bytes(1000)),
    "no UTF-8": write(b"\xff\xfe\x00\x80{}"),
    "pickle": write(pickle.dumps({"a": 1})),
}
JSON_FILE = {
    "nested": write(b"[" * 100_000),
    "nested objects": write(b'{"r":' * 100_000),
    "list": write(b"[]"),
    "number": write(b"3"),
    "null": write(b"null"),
    "text": write(b'"text"'),
    "twice": lambda file: file.write_bytes(file.read_bytes().rstrip()[:-1] + b', "r": 1, "r": 2}'),
    "huge integer": write(b'{"peft_type": "LORA", "format": 1, "r": ' + b"9" * 5000 + b"}"),
    "more behind": lambda file: file.write_bytes(file.read_bytes() + b"{}"),
}

CONFIG_FILE = ANY_FILE | JSON_FILE
CONFIG_FILE["no type"] = field(peft_type=None)
CONFIG_FILE["of another type"] = field(peft_type=["LORA"])
CONFIG_FILE["no task"] = field(task_type="COOKING")
CONFIG_FILE["no regular expression"] = field(target_modules="(")
CONFIG_FILE["no pattern"] = field(rank_pattern={"(": 2})
for name, values in {
    "r": ("2", 2.0, 0, -1, True, None, 10**400, [2]),
    "lora_alpha": ("8", None, [8], float("nan"), float("inf"), 1e308, 10**400, True),
    "lora_dropout": ("0", None, 2, -0.1, float("nan")),
    "rank_pattern": ([], "0", {"0": "2"}, {"0": 0}, {"0": 1.5}, {"0": None}),
    "alpha_pattern": ([1], {"0": float("inf")}, {"0": float("nan")}, {"0": 1e308}, {"0": "1"}),
    "use_rslora": ("yes", 1, None),
    "fan_in_fan_out": ("no",),
    "target_modules": (3, {"0": 1}, [["0"]], [None], ["nowhere"]),
    "exclude_modules": (3, [0]),
    "modules_to_save": ("2", 3, [3], {}),
    "layers_to_transform": ("0", [0.5], [None]),
    "layers_pattern": (3, [3]),
    "init_lora_weights": (3, None, [], "magic"),
    "base_model_name_or_path": (3, ["a"]),
    "revision": (3,),
    "task_type": (3, ["SEQ_CLS"]),
    "auto_mapping": ("a", [1]),
}.items():
    for value in values:
        CONFIG_FILE[f"{name} = {str(value)[:20]}"] = field(**{name: value})

INDEX_FILE = {**ANY_FILE, **JSON_FILE}
for name, values in {
    "format": (0, 3, "2", None, [], True, 2.0),
    "num_particles": (0, -1, "2", None, [], 10**9, 10**30, 2.0, True),
    "seeds": (None, 3, "01", {}, [0], [0, "1"], [0, None], [0, 1.5], [0, -1], [0, 2**63], [0, {}]),
    "files": (None, [], "x", {}, {"particle_0/x": {}}),
}.items():
    for value in values:
        INDEX_FILE[f"{name} = {str(value)[:20]}"] = field(**{name: value})


def tensors(**changes):
    """The tensors of the file but for those that are named by the letters A, B and HEAD."""
    changes = {{"A": A, "B": B, "HEAD": HEAD}[key]: change for key, change in changes.items()}

    def spoil(file):
        loaded = load_file(file)
        save_file({k: changes.get(k, lambda t: t)(t) for k, t in loaded.items()}, file)

    return spoil


WEIGHTS_FILE = ANY_FILE | {
    "torch.save": lambda file: torch.save({"a": torch.ones(1)}, file),
    "header of 2^62": write(struct.pack("<Q", 2**62)),
    "nested header": header(b"[" * 100_000),
    "header of text": header(b'"text"'),
    "header that is not UTF-8": header(b"\xff" * 64),
    "huge shape": header({A: f32([2**40, 2**20], 0, 0)}),
    "shape that overflows": header({A: f32([2**32, 2**32], 0, 0)}),
    "negative shape": header({A: f32([-2, 8], 0, 64)}, bytes(64)),
    "overlap": header({A: f32([2, 8], 0, 64), B: f32([8, 2], 0, 64)}, bytes(64)),
    "beyond the end": header({A: f32([2, 8], 0, 64)}),
    "twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(f32([1], 0, 4)).encode(),) * 2), bytes(4)),
    "one byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "NaN": tensors(B=lambda t: t * float("nan")),
    "infinite head": tensors(HEAD=lambda t: t / 0),
    "transposed": tensors(A=lambda t: t.T.contiguous()),
    "one number": tensors(A=lambda t: t[0, 0]),
    "empty tensor": tensors(A=lambda t: t[:0]),
    "float64 beyond float32": tensors(A=lambda t: torch.full(t.shape, 1e300, dtype=torch.float64)),
    "head beyond float32": tensors(HEAD=lambda t: torch.full(t.shape, -1e39, dtype=torch.float64)),
    "integers": tensors(A=lambda t: t.long()),
    "booleans": tensors(HEAD=lambda t: t > 0),
    "complex": tensors(B=lambda t: t.to(torch.complex64)),
    "eight bits": tensors(B=lambda t: t.to(torch.float8_e4m3fn)),
}

LOADS = {
    "load_particle_model": (small_base, ml.load_particle_model),
    "load_particles": (small_particles, checkpoint.load_particles),
}


@pytest.fixture(scope="module", params=LOADS)
def load(request):
    """A function of (module, path) that is refused what it is given, and a module for it."""
    make, function = LOADS[request.param]
    return make(), function


@pytest.mark.parametrize(
    ("name", "damage"),
    [(CONFIG, damage) for damage in CONFIG_FILE] + [(WEIGHTS, damage) for damage in WEIGHTS_FILE],
)
def test_a_damaged_file_is_named(name, damage, load, root):
    module, function = load
    spoil = {CONFIG: CONFIG_FILE, WEIGHTS: WEIGHTS_FILE}[name][damage]
    spoil(root / "particle_1" / name)
    assert f"particle_1/{name}" in refusal(function, module, root)
    without_list(root)
    for path in (root, folders(root)):
        message = refusal(function, module, path)
        # Values that fit no base are found after the configurations were compared.
        assert f"particle_1/{name}" in message or f"particle_0/{CONFIG}" in message


@pytest.mark.parametrize("damage", INDEX_FILE)
def test_a_damaged_index_is_named(damage, load, root):
    module, function = load
    INDEX_FILE[damage](root / INDEX)
    assert INDEX in refusal(function, module, root) or damage == "format = True"


@pytest.mark.parametrize("damage", ["missing", "file", "link to itself", "no name"])
def test_a_folder_that_is_none(damage, load, root):
    module, function = load
    folder = root / "particle_1"
    shutil.rmtree(folder)
    if damage == "file":
        folder.write_text("text")
    if damage == "link to itself":
        folder.symlink_to(folder)
    if damage == "no name":
        folder = root / "a\0b"
    for path in (root, [root / "particle_0", folder]):
        assert str(path if path == root else folder) in refusal(function, module, path)
    assert f"{INDEX}/{INDEX} is missing" in refusal(function, module, root / INDEX)


# --- what refusing costs -------------------------------------------------------------------------


@contextlib.contextmanager
def memory_below(mebibytes):
    """Fails where the process comes to need so much more memory inside."""

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert (peak() - before) / 1024 < mebibytes


def sparse(content, size):
    """A file that begins so, and of which the disk keeps no more."""

    def spoil(file):
        content(file)
        os.truncate(file, size)

    return spoil


def views(file):
    """A pickle of tensors of any shape over one number, under the names of the others."""
    loaded = load_file(file.with_name(WEIGHTS))
    file.with_name(WEIGHTS).unlink()
    one = torch.ones(1)
    torch.save(loaded | {A: one.expand(3_000_000, D), B: one.expand(D, 3_000_000)}, file)


class Allocates:
    def __reduce__(self):
        return bytearray, (1 << 29,)


def allocating(file):
    file.with_name(WEIGHTS).unlink()
    torch.save({A: Allocates()}, file)


def deflated(file):
    file.with_name(WEIGHTS).unlink()
    torch.save({A: torch.zeros(1 << 24)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert file.stat().st_size < 1 << 20


GIB = 1 << 30
DECLARED = {
    "rank": (CONFIG, field(r=3_000_000), "(3000000, 8)"),
    "rank of 10^18": (CONFIG, field(r=10**18), str(10**18)),
    "rank pattern": (CONFIG, field(rank_pattern={"0": 3_000_000}), "(3000000, 8)"),
    "rank of what is not there": (
        CONFIG,
        field(target_modules=["0", "2"], rank_pattern={"2": 10**9}, modules_to_save=None),
        "missing",
    ),
    "rank and numbers that do not exist": (PICKLED, views, "would take"),
    "a call that allocates": (PICKLED, allocating, "bytearray"),
    "compressed": (PICKLED, deflated, "compressed"),
    "sparse configuration": (CONFIG, sparse(write(b"{"), GIB), f"{GIB} bytes"),
    "sparse weights": (
        WEIGHTS,
        sparse(
            header(
                b"%-92s" % json.dumps({A: f32([(GIB - 100) // 32, 8], 0, GIB - 100 - 4)}).encode()
            ),
            GIB,
        ),
        "",
    ),
}


@pytest.mark.parametrize("declared", DECLARED)
def test_what_is_only_declared_is_not_allocated(declared, load, root):
    module, function = load
    name, spoil, reason = DECLARED[declared]
    without_list(root)
    # All of them, for that what one has is what the others have.
    for folder in folders(root):
        if name == CONFIG or folder.name == "particle_1":
            spoil(folder / name)
        if declared == "rank and numbers that do not exist":
            field(r=3_000_000)(folder / CONFIG)
    for path in (root, folders(root)):
        if path == root and name == PICKLED:
            continue  # in which nobody looks for it
        with memory_below(48):
            message = refusal(function, module, path)
        if function is ml.load_particle_model:
            assert reason in message
        assert name in message or CONFIG in message


@pytest.mark.parametrize("count", [10**6, 10**12, 10**30])
def test_a_number_of_particles_is_not_allocated(count, load, root):
    module, function = load
    for values in ({}, {"format": 1}):
        field(num_particles=count, **values)(root / INDEX)
        with memory_below(48):
            assert INDEX in refusal(function, module, root)
    (root / INDEX).write_text("{" + " " * (1 << 25) + "}")
    assert "bytes" in refusal(function, module, root)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_numbers_of_any_kind_are_cast(dtype, name, root):
    make, function = LOADS[name]
    module = make()
    for folder in folders(root):
        tensors(A=lambda t: t.to(dtype), HEAD=lambda t: t.to(dtype))(folder / WEIGHTS)
    model = function(module, folders(root)) or module
    for k, folder in enumerate(folders(root)):
        loaded = load_file(folder / WEIGHTS)
        assert torch.equal(model.adapters()[0].lora_A[k], loaded[A].float())
        assert torch.equal(dict(model.heads())["2"]["weight"][k], loaded[HEAD].float())


def test_numbers_beyond_the_half_precision_of_a_layer(saved, tmp_path):
    base = small_base().half()
    shutil.copytree(saved, tmp_path / "root")
    tensors(B=lambda t: torch.full(t.shape, 1e5))(tmp_path / "root/particle_1" / WEIGHTS)
    message = refusal(ml.load_particle_model, base, folders(tmp_path / "root"))
    assert "16 of 16 numbers" in message and "torch.float16" in message and "particle_1" in message
    for folder in folders(tmp_path / "root"):
        field(lora_alpha=1e6)(folder / CONFIG)
    message = refusal(ml.load_particle_model, base, folders(tmp_path / "root"))
    assert "lora_alpha = 1000000.0" in message and "torch.float16" in message


@pytest.mark.parametrize("kind", ["exact", "svd"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.adapters()[0].lora_A[1, 0].fill_(float("nan")),
        lambda model: model.adapters()[0].lora_B[0, 0].fill_(3e38),
        lambda model: dict(model.heads())["2"]["bias"][1].fill_(float("inf")),
        lambda model: dict(model.heads())["2"]["weight"][0, 1].fill_(float("nan")),
    ],
)
def test_a_soup_that_is_not_finite_is_refused(spoil, kind, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(small_base(), config, K)
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ValueError, match=r"not finite: .* numbers of (0|2)"):
        model.soup(tmp_path / "soup", kind)
    assert not (tmp_path / "soup").exists()


# --- pickles -------------------------------------------------------------------------------------


def test_weights_in_a_pickle_are_read(tmp_path):
    made = [
        trained_by_peft(tmp_path / f"{k}", k, save={"safe_serialization": bool(k)}) for k in (0, 1)
    ]
    assert (tmp_path / "0" / PICKLED).exists() and not (tmp_path / "0" / WEIGHTS).exists()
    model = ml.load_particle_model(llama(), [folder for folder, _ in made]).eval()
    expected = torch.stack([logits for _, logits in made])
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: torch.save({A: Evil(file.parent / "executed")}, file), "open"),
        (lambda file: torch.save([torch.ones(2)], file), "list"),
        (lambda file: torch.save({A: 3}, file), "int"),
        (lambda file: torch.save({3: torch.ones(2)}, file), "3"),
        (lambda file: torch.save({A: torch.ones(2).to_sparse()}, file), "sparse"),
        (lambda file: torch.save({"a": nn.Linear(2, 2)}, file), "Linear"),
        (lambda file: torch.save({A: torch.ones(2)}, file, _use_new_zipfile_serialization=False),
         PICKLED),
        (write(b""), PICKLED),
        (write(b"PK\x03\x04"), PICKLED),
        (write(pickle.dumps(Evil("executed"))), PICKLED),
        (lambda file: file.symlink_to(file), PICKLED),
        (Path.mkdir, "folder"),
        (os.mkfifo, "pipe"),
    ],
)  # fmt: skip
def test_a_pickle_of_anything_else_is_refused(spoil, reason, load, root):
    module, function = load
    file = root / "particle_1" / PICKLED
    (root / "particle_1" / WEIGHTS).unlink()
    spoil(file)
    message = refusal(function, module, folders(root))
    assert reason in message and "particle_1" in message
    assert not (root / "particle_1/executed").exists()
