"""Folders of particles that are damaged or another model's are refused by name."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multilora as ml
from adapter_files import CONFIG, INDEX, WEIGHTS, assert_same_particles
from adapter_files import contents as files
from models import FAMILIES, SmallCnn, particles_of, perturb
from multilora import checkpoint

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K = 3


# --- damage --------------------------------------------------------------------------------------


PARTICLE = "particle_1"


def _edit_index(**changes):
    def damage(path):
        index = json.loads((path / INDEX).read_text())
        (path / INDEX).write_text(json.dumps({**index, **changes}))

    return damage


def _drop_from_index(*keys):
    def damage(path):
        index = inner = json.loads((path / INDEX).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        (path / INDEX).write_text(json.dumps(index))

    return damage


def _forget_the_list(path):
    """The folder as the first format has it: without sizes and digests."""
    _drop_from_index("files")(path)
    _edit_index(format=1)(path)


def _edit_config(**changes):
    def damage(path):
        file = path / PARTICLE / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def _edit_all_configs(**changes):
    def damage(path):
        for k in range(K):
            file = path / f"particle_{k}" / CONFIG
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def _edit_weights(edit):
    def damage(path):
        file = path / PARTICLE / WEIGHTS
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return damage


def _remove(name):
    return lambda path: (path / name).unlink()


def _truncate(name, keep=0.5):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(keep * len(content))])

    return damage


def _flip(name, position):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[position] ^= 1
        (path / name).write_bytes(content)

    return damage


def _mix(path):
    family = FAMILIES["mlp"]
    other = particles_of(family.build(), family.config(), K, seed=7)
    other.save_pretrained(path.parent / "other")
    shutil.copytree(path.parent / "other" / PARTICLE, path / PARTICLE, dirs_exist_ok=True)


def _write(name, content):
    return lambda path: (path / name).write_bytes(content)


KEY_A, KEY_B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
HEAD = "base_model.model.4.weight"
WEIGHTS_1, CONFIG_1 = f"{PARTICLE}/{WEIGHTS}", f"{PARTICLE}/{CONFIG}"

# The damage to the folder, the error, and the words that its message must contain.
DAMAGE = {
    "no-path": (shutil.rmtree, FileNotFoundError, [INDEX]),
    "no-index": (_remove(INDEX), FileNotFoundError, [INDEX]),
    "truncated-index": (_truncate(INDEX), ValueError, [INDEX, "damaged"]),
    "binary-index": (_write(INDEX, b"\xff\xfe\x00\x80"), ValueError, [INDEX]),
    "list-index": (_write(INDEX, b"[]"), ValueError, [INDEX, "damaged"]),
    "no-seeds": (_drop_from_index("seeds"), ValueError, [INDEX, "seeds"]),
    "seeds-number": (_edit_index(seeds=3), ValueError, [INDEX]),
    "seeds-text": (_edit_index(seeds=["a", "b", "c"]), ValueError, [INDEX]),
    "seeds-too-few": (_edit_index(seeds=[1, 2]), ValueError, [INDEX, "3 particles, 2 seeds"]),
    "no-particles": (_edit_index(num_particles=0, seeds=[]), ValueError, [INDEX, "0 particles"]),
    "negative-particles": (_edit_index(num_particles=-1), ValueError, [INDEX, "-1 particles"]),
    "text-particles": (_edit_index(num_particles="3"), ValueError, [INDEX, "'3' particles"]),
    "fewer-particles": (
        _edit_index(num_particles=2, seeds=[1, 2]),
        ValueError,
        [INDEX, "particle_2", "2 particles"],
    ),
    "more-particles": (
        _edit_index(num_particles=4, seeds=[1, 2, 3, 4]),
        ValueError,
        [INDEX, "particle_3", "4 particles"],
    ),
    "other-format": (_edit_index(format=3), ValueError, [INDEX, "format 3"]),
    "no-list": (_drop_from_index("files"), ValueError, [INDEX, "files"]),
    "number-for-list": (_edit_index(files=5), ValueError, [INDEX, "damaged"]),
    "file-not-listed": (_drop_from_index("files", WEIGHTS_1), ValueError, [INDEX, WEIGHTS_1]),
    "no-sizes": (
        _edit_index(files={f"particle_{k}/{f}": 5 for k in range(K) for f in (CONFIG, WEIGHTS)}),
        ValueError,
        [INDEX, f"particle_0/{CONFIG} has 5"],
    ),
    "no-particle": (lambda path: shutil.rmtree(path / PARTICLE), FileNotFoundError, [CONFIG_1]),
    "no-config": (_remove(CONFIG_1), FileNotFoundError, [CONFIG_1]),
    "no-weights": (_remove(WEIGHTS_1), FileNotFoundError, [WEIGHTS_1]),
    "truncated-config": (_truncate(CONFIG_1), ValueError, [CONFIG_1, "bytes", "lists"]),
    "truncated-weights": (_truncate(WEIGHTS_1, 0.99), ValueError, [WEIGHTS_1, "bytes", "lists"]),
    "empty-weights": (_write(WEIGHTS_1, b""), ValueError, [WEIGHTS_1, "has 0 bytes", "lists"]),
    "flipped-weights": (_flip(WEIGHTS_1, -1), ValueError, [WEIGHTS_1, "SHA-256", INDEX]),
    "flipped-header": (_flip(WEIGHTS_1, 9), ValueError, [WEIGHTS_1, "damaged"]),
    "flipped-config": (_flip(CONFIG_1, 5), ValueError, [CONFIG_1, "SHA-256", INDEX]),
    "particle-of-another-save": (_mix, ValueError, [WEIGHTS_1, "of another save", INDEX]),
}

# The same of files that no list describes: the first format, and folders of anybody's.
EDITS = {
    "no-particle": (lambda path: shutil.rmtree(path / PARTICLE), FileNotFoundError, [CONFIG_1]),
    "no-weights": (_remove(WEIGHTS_1), FileNotFoundError, [WEIGHTS_1]),
    "truncated-config": (_truncate(CONFIG_1), ValueError, [CONFIG_1]),
    "binary-config": (_write(CONFIG_1, b"\xff\xfe\x00\x80"), ValueError, [CONFIG_1]),
    "list-config": (_write(CONFIG_1, b"[]"), ValueError, [CONFIG_1]),
    "empty-config": (_write(CONFIG_1, b"{}"), ValueError, [CONFIG_1]),
    "other-rank": (_edit_config(r=3), ValueError, [CONFIG_1, "r = 3"]),
    "other-alpha": (_edit_config(lora_alpha=9), ValueError, [CONFIG_1, "lora_alpha = 9"]),
    "other-targets": (
        _edit_config(target_modules=["0"]),
        ValueError,
        [CONFIG_1, "target_modules = "],
    ),
    "other-scaling": (_edit_config(use_rslora=True), ValueError, [CONFIG_1, "use_rslora = True"]),
    "other-kind": (_edit_config(peft_type="LOHA"), ValueError, [CONFIG_1, "LOHA"]),
    "dora": (_edit_all_configs(use_dora=True), ValueError, [f"particle_0/{CONFIG}", "use_dora"]),
    "truncated-header": (_truncate(WEIGHTS_1, 0.1), ValueError, [WEIGHTS_1, "damaged"]),
    "truncated-weights": (_truncate(WEIGHTS_1, 0.99), ValueError, [WEIGHTS_1, "damaged"]),
    "empty-weights": (_write(WEIGHTS_1, b""), ValueError, [WEIGHTS_1, "damaged"]),
    "no-safetensors": (_write(WEIGHTS_1, b"PK\x03\x04"), ValueError, [WEIGHTS_1, "damaged"]),
    "missing-factor": (
        _edit_weights(lambda tensors: tensors.pop(KEY_B)),
        ValueError,
        [WEIGHTS_1, f"missing ['{KEY_B}']"],
    ),
    "missing-head": (
        _edit_weights(lambda tensors: tensors.pop(HEAD)),
        ValueError,
        [WEIGHTS_1, f"missing ['{HEAD}']"],
    ),
    "extra-tensor": (
        _edit_weights(lambda tensors: tensors.update({"other.weight": torch.zeros(2)})),
        ValueError,
        [WEIGHTS_1, "unexpected ['other.weight']"],
    ),
    "other-shape": (
        _edit_weights(lambda tensors: tensors.update({KEY_A: torch.zeros(2, 7)})),
        ValueError,
        [WEIGHTS_1, KEY_A, "(2, 7)", "(2, 6)"],
    ),
    # The same number of elements in another shape.
    "transposed": (
        _edit_weights(lambda tensors: tensors.update({KEY_A: torch.zeros(6, 2)})),
        ValueError,
        [WEIGHTS_1, KEY_A, "(6, 2)", "(2, 6)"],
    ),
    "nan": (
        _edit_weights(lambda tensors: tensors[KEY_B][0].fill_(torch.nan)),
        ValueError,
        [WEIGHTS_1, f"2 of 18 numbers of {KEY_B} are not finite"],
    ),
    "infinite-head": (
        _edit_weights(lambda tensors: tensors[HEAD][1, 2].fill_(-torch.inf)),
        ValueError,
        [WEIGHTS_1, f"1 of 28 numbers of {HEAD} are not finite"],
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    family = FAMILIES["mlp"]
    particles_of(family.build(), family.config(), K).save_pretrained(path)
    return path


def refusal(error, path):
    """The message with which `path` is refused, which leaves its files as they are."""
    root = path if isinstance(path, Path) else path[0].parent
    before = files(root)
    with pytest.raises(error) as raised:
        ml.load_particle_model(FAMILIES["mlp"].build(), path)
    assert files(root) == before
    return str(raised.value)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_damage_is_named(damage, saved, tmp_path):
    do, error, named = DAMAGE[damage]
    path = tmp_path / "particles"
    shutil.copytree(saved, path)
    # The folder that is damaged below is whole before.
    ml.load_particle_model(FAMILIES["mlp"].build(), path)
    do(path)
    message = refusal(error, path)
    for text in named:
        assert text in message


@pytest.mark.parametrize("damage", EDITS)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_damage_without_a_list_is_named(damage, saved, tmp_path):
    do, error, named = EDITS[damage]
    path = tmp_path / "particles"
    shutil.copytree(saved, path)
    do(path)
    # Where the files are listed, any change is one too many.
    assert named[0] in refusal((ValueError, FileNotFoundError), path)
    _forget_the_list(path)
    for where in (path, [path / f"particle_{k}" for k in range(K)]):
        message = refusal(error, where)
        for text in named:
            assert text in message


def test_the_first_format_is_read(saved, tmp_path):
    path = tmp_path / "particles"
    shutil.copytree(saved, path)
    _forget_the_list(path)
    first = ml.load_particle_model(FAMILIES["mlp"].build(), path)
    assert_same_particles(first, ml.load_particle_model(FAMILIES["mlp"].build(), saved))
    # The next save lists them.
    first.save_pretrained(path)
    assert files(path) == files(saved)


def _wider():
    return nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 4))


def _more_classes():
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 5))


def _shorter():
    return nn.Sequential(nn.Linear(6, 9), nn.GELU())


def _other_layer():
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Identity(), nn.GELU(), nn.Linear(9, 4))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (_wider, ["(2, 6)", "(2, 8)", WEIGHTS]),
        (_more_classes, ["base_model.model.4.", WEIGHTS]),
        (_shorter, ["base_model.model.2.lora_A.weight", WEIGHTS]),
        # PEFT finds no layer that it could adapt, or one that it cannot.
        (SmallCnn, ["particle_0"]),
        (_other_layer, ["particle_0"]),
    ],
    ids=["wider", "more-classes", "shorter", "other-names", "other-layer"],
)
def test_other_base_model_is_named(other, named, saved):
    with pytest.raises(ValueError, match="particle_0") as raised:
        ml.load_particle_model(other(), saved)
    for text in named:
        assert text in str(raised.value)


def test_adapters_of_other_kinds_are_named(saved, tmp_path):
    family = FAMILIES["mlp"]
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    peft.get_peft_model(family.build(), config).save_pretrained(tmp_path / "ia3")
    folders = [saved / "particle_0", tmp_path / "ia3"]
    with pytest.raises(ValueError, match=r"ia3/adapter_config.json is a .*IA3 adapter"):
        ml.load_particle_model(family.build(), folders)


@pytest.mark.parametrize("reason", ["missing", "config"])
def test_base_is_untouched_by_files_that_cannot_be_read(reason, saved, tmp_path):
    path = tmp_path / "particles"
    shutil.copytree(saved, path)
    (path / PARTICLE / {"missing": WEIGHTS, "config": CONFIG}[reason]).unlink()
    base = FAMILIES["mlp"].build()
    with pytest.raises(FileNotFoundError):
        ml.load_particle_model(base, path)
    # So the same base can be used with whole files.
    ml.load_particle_model(base, saved)


def test_loading_onto_an_adapted_base(saved):
    base = FAMILIES["mlp"].build()
    ml.load_particle_model(base, saved)
    with pytest.raises(ValueError, match="already has adapters"):
        ml.load_particle_model(base, saved)


# --- into a model that is there ------------------------------------------------------------------


def test_particles_are_loaded_in_place(saved):
    family = FAMILIES["mlp"]
    source = ml.load_particle_model(family.build(), saved)
    model = particles_of(family.build(), family.config(), K, seed=7)
    before = list(model.particle_parameters())
    optimizer = torch.optim.SGD(before, lr=0.1)
    for path in (saved, [saved / f"particle_{k}" for k in range(K)]):
        perturb(model, seed=3)
        checkpoint.load_particles(model, path)
        assert_same_particles(model, source)
    assert all(a is b for a, b in zip(model.particle_parameters(), before, strict=True))
    assert model.seeds != source.seeds
    # It is these that the optimizer moves.
    for parameter in before:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for moved, was in zip(before, source.particle_parameters(), strict=True):
        torch.testing.assert_close(moved, was - 0.1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda f: particles_of(f.build(), f.config(), 2), [INDEX, "3 particles", "has 2"]),
        (lambda f: particles_of(f.build(), f.config(r=3), K), [CONFIG, "r = 2", "r = 3"]),
        (
            lambda f: particles_of(f.build(), f.config(lora_alpha=5), K),
            [CONFIG, "lora_alpha = 3", "lora_alpha = 5"],
        ),
        (
            lambda f: particles_of(f.build(), f.config(alpha_pattern={"0": 9}), K),
            [CONFIG, "alpha_pattern = {}", "{'0': 9}"],
        ),
        (
            lambda f: particles_of(f.build(), f.config(target_modules=["0"]), K),
            [WEIGHTS, "unexpected", "model.2.lora_A"],
        ),
        (
            lambda f: particles_of(f.build(), f.config(modules_to_save=None), K),
            [WEIGHTS, "unexpected", HEAD],
        ),
        (lambda f: particles_of(_wider(), f.config(), K), [WEIGHTS, KEY_A, "(2, 6)", "(2, 8)"]),
    ],
    ids=["fewer", "rank", "alpha", "alpha-pattern", "targets", "no-head", "wider"],
)
def test_particles_of_another_model_are_refused(make, named, saved):
    model = make(FAMILIES["mlp"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="particle") as raised:
        checkpoint.load_particles(model, saved)
    for text in named:
        assert text in str(raised.value)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_the_last_of_the_particles_is_checked_before_the_first_is_loaded(saved, tmp_path):
    path = tmp_path / "particles"
    shutil.copytree(saved, path)
    _forget_the_list(path)
    last = path / f"particle_{K - 1}" / WEIGHTS
    save_file(load_file(last) | {KEY_A: torch.zeros(2, 7)}, last)
    family = FAMILIES["mlp"]
    model = particles_of(family.build(), family.config(), K, seed=7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"particle_{K - 1}.*\(2, 7\)"):
        checkpoint.load_particles(model, path)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
