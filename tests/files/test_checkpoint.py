"""Folders of particles: what PEFT reads in them, what comes back, soups, and damage."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multilora as ml
from models import (
    FAMILIES,
    SmallCnn,
    load_peft,
    logits_of,
    particle_tensors,
    particles_of,
    peft_tensors,
    perturb,
)
from multilora import checkpoint, particle_folders

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K = 3
INDEX = "multilora.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def assert_same_particles(loaded, model):
    """Bit for bit the same trainable tensors."""
    ours, theirs = particle_tensors(loaded), particle_tensors(model)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


def files(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# --- PEFT reads what particles write -------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_every_particle_whole(name, tmp_path):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), K)
    model.save_pretrained(tmp_path)
    expected = logits_of(model(**inputs))
    for k in range(K):
        folder = tmp_path / f"particle_{k}"
        assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            single = load_peft(base, folder)
            result = single.load_adapter(str(folder), "again")
        messages = [str(w.message) for w in caught]
        assert not [m for m in messages if "adapter keys" in m or "missing" in m.lower()]
        assert not result.missing_keys
        assert not result.unexpected_keys
        torch.testing.assert_close(
            logits_of(single(**inputs)), expected[k], rtol=family.tolerance, atol=family.tolerance
        )


def test_files_name_the_base_and_the_options(tmp_path):
    family = FAMILIES["bert"]
    base = family.build()
    base.name_or_path = base.config.name_or_path = "somebody/model"
    config = family.config(
        rank_pattern={"layer.0.attention.self.query": 4},
        use_rslora=True,
        lora_dropout=0.1,
        modules_to_save=None,
        task_type="SEQ_CLS",
    )
    ml.get_particle_model(base, config, K).save_pretrained(tmp_path)
    for k in range(K):
        saved = json.loads((tmp_path / f"particle_{k}" / CONFIG).read_text())
        assert saved["base_model_name_or_path"] == "somebody/model"
        assert saved["peft_type"] == "LORA"
        assert saved["task_type"] == "SEQ_CLS"
        assert saved["rank_pattern"] == {"layer.0.attention.self.query": 4}
        assert saved["use_rslora"] is True
        assert saved["lora_dropout"] == 0.1
        assert set(saved["target_modules"]) == {"query", "value"}
        assert "classifier" in saved["modules_to_save"]
        assert saved["inference_mode"] is True


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_load_gives_the_saved_model(name, tmp_path):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), K, seed=[4, 9, 2])
    model.save_pretrained(str(tmp_path))
    loaded = ml.load_particle_model(base, str(tmp_path)).eval()
    assert_same_particles(loaded, model)
    assert loaded.num_particles == K
    assert loaded.seeds == (4, 9, 2)
    assert torch.equal(logits_of(loaded(**inputs)), logits_of(model(**inputs)))
    # It trains on: everything that was trainable still is, and nothing else.
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cnn", {"use_rslora": True, "rank_pattern": {"stem": 4}, "alpha_pattern": {"wide": 9}}),
        ("cnn", {"lora_dropout": 0.25, "modules_to_save": None, "init_lora_weights": "gaussian"}),
        ("cnn", {"target_modules": r"(stem|point)", "exclude_modules": ["point"]}),
        # PEFT adds the classifier to the modules to save, at every load.
        ("bert", {"task_type": "SEQ_CLS"}),
    ],
    ids=["patterns", "dropout", "regex", "task"],
)
def test_options_come_back(name, changes, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    model = particles_of(base, family.config(**changes), K)
    model.save_pretrained(tmp_path)
    loaded = ml.load_particle_model(base, tmp_path)
    assert_same_particles(loaded, model)
    layers = [
        (name, layer.rank, layer.scaling, layer.dropout) for name, layer in model.lora_layers()
    ]
    assert layers == [
        (name, layer.rank, layer.scaling, layer.dropout) for name, layer in loaded.lora_layers()
    ]
    # Written again, it is the same configuration: nothing is lost on the way, or doubled.
    loaded.save_pretrained(tmp_path / "again")
    for k in range(K):
        first, again = (
            json.loads((path / f"particle_{k}" / CONFIG).read_text())
            for path in (tmp_path, tmp_path / "again")
        )
        for saved in (first, again):
            # PEFT keeps sets of names, whose order is that of the process.
            for key in ("target_modules", "exclude_modules"):
                if isinstance(saved[key], list):
                    saved[key] = sorted(saved[key])
        assert again == first


def test_half_precision_base_keeps_its_masters(tmp_path):
    family = FAMILIES["vit"]
    base = family.build(torch.bfloat16)
    model = particles_of(base, family.config(), K)
    model.save_pretrained(tmp_path)
    loaded = ml.load_particle_model(copy.deepcopy(base), tmp_path).eval()
    assert_same_particles(loaded, model)
    assert {p.dtype for p in loaded.particle_parameters()} == {torch.float32}
    inputs = family.inputs(dtype=torch.bfloat16)
    logits = loaded(**inputs)
    assert torch.equal(logits, model(**inputs))
    for k in range(K):
        single = load_peft(base, tmp_path / f"particle_{k}")
        for key, parameter in peft_tensors(single).items():
            stored = particle_tensors(model)[key][k].reshape(parameter.shape)
            assert torch.equal(parameter, stored.to(parameter.dtype))
        # Two blocks of bfloat16 (2⁻⁸ a rounding), whose low-rank parts PEFT keeps in float32.
        expected = single(**inputs).float()
        assert (logits[k].float() - expected).norm() < 8 * 2**-8 * expected.norm()


def test_saving_is_repeatable(tmp_path):
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(), K)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b" / "deeper")
    assert files(tmp_path / "a") == files(tmp_path / "b" / "deeper")
    assert len(files(tmp_path / "a")) == 2 * K + 1


def test_saving_overwrites(tmp_path):
    family = FAMILIES["mlp"]
    base = family.build()
    model = particles_of(base, family.config(), K)
    model.save_pretrained(tmp_path)
    old = files(tmp_path)
    perturb(model, seed=5)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) != old
    assert_same_particles(ml.load_particle_model(base, tmp_path), model)
    fewer = particles_of(family.build(), family.config(), 2)
    fewer.save_pretrained(tmp_path)
    assert_same_particles(ml.load_particle_model(family.build(), tmp_path), fewer)


def test_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    family = FAMILIES["mlp"]
    base = family.build()
    model = particles_of(base, family.config(), K)
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model)

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(particle_folders, "save_file", full_disk)
    perturb(model, seed=5)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert_same_particles(ml.load_particle_model(base, tmp_path), before)


# --- adapters that PEFT trained ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama", "bert", "cnn"])
def test_adapters_trained_by_peft_become_particles(name, tmp_path):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    tasks = {"llama": {"task_type": "CAUSAL_LM"}, "bert": {"task_type": "SEQ_CLS"}}
    folders, expected = [], []
    for k in range(K):
        torch.manual_seed(k)
        config = family.config(init_lora_weights=True, **tasks.get(name, {}))
        single = peft.get_peft_model(copy.deepcopy(base), config).eval()
        optimizer = torch.optim.SGD([p for p in single.parameters() if p.requires_grad], lr=1.0)
        for step in range(2):
            optimizer.zero_grad()
            logits_of(single(**family.inputs(seed=10 * k + step))).square().mean().backward()
            optimizer.step()
        folders.append(tmp_path / f"run {k}")
        single.save_pretrained(folders[-1])
        expected.append(logits_of(single(**inputs)))
    # One run was interrupted and resumed.
    load_peft(base, folders[1]).save_pretrained(folders[1])
    model = ml.load_particle_model(base, [str(folders[0]), *folders[1:]]).eval()
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    logits = logits_of(model(**inputs))
    for k in range(K):
        torch.testing.assert_close(
            logits[k], expected[k], rtol=family.tolerance, atol=family.tolerance
        )
    # The order of the list is the order of the particles, and they save as any others.
    model.save_pretrained(tmp_path / "all")
    assert_same_particles(ml.load_particle_model(family.build(), tmp_path / "all"), model)


def test_no_adapters_at_all():
    with pytest.raises(ValueError, match=r"at least one|empty|no adapter"):
        ml.load_particle_model(FAMILIES["mlp"].build(), [])


# --- soups ---------------------------------------------------------------------------------------


def merged_weights(base, folder):
    """The weights after PEFT has merged the adapter, by name in the plain model."""
    single = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return single.merge_and_unload().state_dict()


SOUPS = [
    pytest.param("vit", {}, id="vit"),
    pytest.param("vit", {"use_rslora": True, "r": 3}, id="rslora"),
    pytest.param(
        "vit",
        {
            "rank_pattern": {"qkv": 4, "blocks.1.attn.proj": 1},
            "alpha_pattern": {"patch_embed.proj": 2},
        },
        id="rank-pattern",
    ),
    pytest.param(
        "vit",
        {
            "rank_pattern": {"blocks.0.attn.qkv": 5},
            "alpha_pattern": {"blocks.0.attn.proj": 7, "qkv": 2},
            "use_rslora": True,
        },
        id="all-patterns",
    ),
    pytest.param("gpt2", {}, id="conv1d"),
    pytest.param("cnn", {"rank_pattern": {"stem": 3}, "alpha_pattern": {"wide": 9}}, id="conv"),
    pytest.param("llama", {"layers_to_transform": [1]}, id="layers"),
    pytest.param("bert", {"modules_to_save": None, "task_type": "SEQ_CLS"}, id="seq-cls"),
    # More ranks than the matrix has.
    pytest.param("mlp", {"r": 12, "rank_pattern": {"2": 1}}, id="rank-12"),
]


def mean_of_particles(base, model, path):
    """The plain model's weights plus the mean ΔW, by way of PEFT's merge of every particle."""
    model.save_pretrained(path)
    merged = [merged_weights(base, path / f"particle_{k}") for k in range(model.num_particles)]
    return {
        key: torch.stack([weights[key] for weights in merged]).mean(0)
        for key, weight in merged[0].items()
        if weight.is_floating_point()
    }


@pytest.mark.parametrize(("name", "changes"), SOUPS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_exact_soup_is_the_mean_of_the_weights(name, changes, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    model = particles_of(base, family.config(**changes), K)
    expected = mean_of_particles(base, model, tmp_path)
    model.soup(tmp_path / "soup")
    actual = merged_weights(base, tmp_path / "soup")
    changed = 0
    for key, weight in expected.items():
        torch.testing.assert_close(actual[key], weight, rtol=1e-13, atol=1e-13)
        changed += not torch.equal(weight, base.state_dict()[key])
    assert changed >= len(model.adapters())


@pytest.mark.parametrize(("name", "changes"), SOUPS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_svd_soup_is_the_best_of_its_rank(name, changes, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    model = particles_of(base, family.config(**changes), K)
    mean = mean_of_particles(base, model, tmp_path)
    model.soup(str(tmp_path / "soup"), kind="svd")
    actual = merged_weights(base, tmp_path / "soup")
    tensors = load_file(tmp_path / "soup" / WEIGHTS)
    for layer_name, layer in model.lora_layers():
        key = f"{layer_name}.weight"
        plain = base.state_dict()[key]
        u, s, vh = torch.linalg.svd((mean[key] - plain).flatten(1), full_matrices=False)
        rank = layer.rank
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        # The subtraction leaves roundings of the weights; the singular values are of order one.
        torch.testing.assert_close((actual[key] - plain).flatten(1), best, rtol=1e-9, atol=1e-12)
        assert tensors[f"base_model.model.{layer_name}.lora_A.weight"].shape[0] == rank
    for name_, head in model.heads():
        for inner in head:
            key = f"{name_}.{inner}"
            torch.testing.assert_close(actual[key], mean[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["exact", "svd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_soup_is_an_adapter_like_any_other(name, kind, tmp_path):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), K)
    state = copy.deepcopy(model.state_dict())
    model.soup(tmp_path, kind)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        single = load_peft(base, tmp_path)
        result = single.load_adapter(str(tmp_path), "again")
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    assert not result.missing_keys
    assert not result.unexpected_keys
    # A particle model of one reads it too.
    loaded = ml.load_particle_model(base, [tmp_path]).eval()
    torch.testing.assert_close(
        logits_of(loaded(**inputs))[0],
        logits_of(single(**inputs)),
        rtol=family.tolerance,
        atol=family.tolerance,
    )


@pytest.mark.parametrize("kind", ["exact", "svd"])
def test_soup_of_names_that_end_alike(kind, tmp_path):
    # PEFT's patterns match the ends of names: the rank of "proj" must not reach "body.proj".
    base = nn.ModuleDict({"proj": nn.Linear(20, 20), "body": nn.ModuleDict()}).double()
    base["body"]["proj"] = nn.Linear(20, 20, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["proj"], rank_pattern={"body.proj": 4})
    model = particles_of(base, config, K)
    model.soup(tmp_path, kind)
    single = peft_tensors(load_peft(base, tmp_path))
    factor = K if kind == "exact" else 1
    assert single["proj.lora_A.weight"].shape == (2 * factor, 20)
    assert single["body.proj.lora_A.weight"].shape == (4 * factor, 20)
    saved = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(t, saved[f"base_model.model.{key}"]) for key, t in single.items())


@pytest.mark.parametrize("kind", ["exact", "svd"])
def test_soup_of_one_is_that_particle(kind, tmp_path):
    family = FAMILIES["vit"]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), 1)
    model.soup(tmp_path, kind)
    torch.testing.assert_close(
        load_peft(base, tmp_path)(**inputs), model(**inputs)[0], rtol=1e-11, atol=1e-11
    )


def test_soup_of_a_half_precision_model(tmp_path):
    family = FAMILIES["vit"]
    base = family.build(torch.bfloat16)
    model = particles_of(base, family.config(), K)
    for kind in ("exact", "svd"):
        model.soup(tmp_path, kind)
        assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_unknown_kind_of_soup(tmp_path):
    family = FAMILIES["mlp"]
    model = particles_of(family.build(), family.config(), K)
    with pytest.raises(ValueError, match='"exact" or "svd"; got \'mean\''):
        model.soup(tmp_path / "soup", kind="mean")
    assert not (tmp_path / "soup").exists()


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

# What is done to the folder, the error, and what its message must name.
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
    # As many numbers in another shape.
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
    # What is damaged below is whole before.
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
