"""Soups: one adapter with the mean of the particles' weights, exact or the best of its rank."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import multilora as ml
from adapter_files import WEIGHTS
from models import FAMILIES, load_peft, logits_of, particles_of, peft_tensors

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K = 3


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
