"""Folders of particles: what PEFT reads in them, and what comes back from PEFT's and from ours."""

import copy
import json
import warnings

import peft
import pytest
import torch

import multilora as ml
from adapter_files import CONFIG, WEIGHTS, assert_same_particles
from adapter_files import contents as files
from models import (
    FAMILIES,
    load_peft,
    logits_of,
    particle_tensors,
    particles_of,
    peft_tensors,
    perturb,
)
from multilora import particle_folders

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K = 3


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
