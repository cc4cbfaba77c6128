"""Embeddings and buffers, which all particles share: read from their files, saved, refused."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import multilora as ml
from adapter_files import (
    GROWN,
    IDS,
    WEIGHTS,
    D,
    K,
    folders,
    llama,
    randomised,
    refusal,
    trained_by_peft,
    with_new_tokens,
)
from multilora import checkpoint

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_an_adapted_embedding_is_refused_by_name(tmp_path):
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json .*embed_tokens, an embedding"):
        ml.load_particle_model(llama(), [tmp_path, tmp_path])


def grown(base, seed=0):
    """The base with new tokens, whose rows were trained."""
    base.resize_token_embeddings(GROWN, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            module.weight[97:] = torch.randn(GROWN - 97, 16, generator=generator)
    return base


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"save": {"save_embedding_layers": True}},
        {"save": {"save_embedding_layers": True}, "modules_to_save": ["lm_head"]},
        {"save": {"save_embedding_layers": True, "safe_serialization": False}},
    ],
    ids=["head is a target", "saved", "saved beside its copies", "in a pickle"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_are_the_bases_are_read_over(options, tied, tmp_path):
    made = [trained_by_peft(tmp_path / f"{k}", k, **options) for k in range(2)]
    base = llama()
    embedding = base.get_input_embeddings().weight
    for load in (ml.load_particle_model, checkpoint.load_particles):
        again = load(base, [folder for folder, _ in made])
        model = base = again or base
        torch.testing.assert_close(
            model.eval()(IDS).logits, torch.stack([x for _, x in made]), atol=1e-6, rtol=1e-5
        )
    assert model.base.get_input_embeddings().weight is embedding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=["frozen", "copies", "copies of the head"],
)
def test_a_grown_vocabulary_that_peft_saved(tied, options, tmp_path):
    made = [
        trained_by_peft(
            tmp_path / f"{k}",
            k,
            base=grown(llama(tied)),
            save={"save_embedding_layers": True},
            **options,
        )
        for k in range(2)
    ]
    expected = torch.stack([logits for _, logits in made])
    paths = [folder for folder, _ in made]
    resized = llama(tied)
    resized.resize_token_embeddings(GROWN)
    for base in (llama(tied), resized):
        model = ml.load_particle_model(base, paths).eval()
        torch.testing.assert_close(model(with_new_tokens()).logits, expected, atol=1e-5, rtol=1e-4)
        assert model.base.config.vocab_size == GROWN
    # Into a model whose base has other rows yet.
    with torch.no_grad():
        for parameter in model.base.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == GROWN:
                parameter[97:] = 0
    checkpoint.load_particles(model, paths)
    torch.testing.assert_close(model(with_new_tokens()).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.cover
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["frozen", "head is a target", "copies of the head"],
)
def test_a_grown_vocabulary_is_saved_and_restored(named, tied, options, tmp_path):
    def fresh():
        if not named:
            return llama(tied)
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    llama(tied).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options)
    model = randomised(ml.get_particle_model(grown(fresh()), config, 2)).eval()
    expected = model(with_new_tokens()).logits
    model.save_pretrained(tmp_path / "particles")
    model.soup(tmp_path / "soup")
    paths = [tmp_path / f"particles/particle_{k}" for k in range(2)]
    for path in (tmp_path / "particles", paths):
        loaded = ml.load_particle_model(fresh(), path).eval()
        assert torch.equal(loaded(with_new_tokens()).logits, expected)
    for k, path in enumerate([*paths, tmp_path / "soup"]):
        base = fresh()
        base.resize_token_embeddings(GROWN)
        single = peft.PeftModel.from_pretrained(base, path).eval()
        logits = single(input_ids=with_new_tokens()).logits
        if k < 2:
            torch.testing.assert_close(logits, expected[k], atol=1e-5, rtol=1e-4)
        assert torch.equal(
            base.get_input_embeddings().weight, model.base.get_input_embeddings().weight
        )


def test_embeddings_are_saved_where_they_are_asked_for(tmp_path):
    key = "base_model.model.model.embed_tokens.weight"
    model = ml.get_particle_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), 2)
    for save, is_there in (("auto", False), (True, True), (False, False)):
        checkpoint.save_pretrained(model, tmp_path, save_embedding_layers=save)
        assert (key in load_file(tmp_path / "particle_0" / WEIGHTS)) == is_there
    with pytest.raises(ValueError, match="save_embedding_layers"):
        checkpoint.save_pretrained(model, tmp_path, save_embedding_layers="yes")


def _other_embedding(files):
    trained_by_peft(files[1], 1, base=grown(llama(), seed=5), save={"save_embedding_layers": True})
    return [str(files[1]), "same embedding"]


def _no_embedding(files):
    trained_by_peft(files[1], 1, base=grown(llama()), save={"save_embedding_layers": False})
    return [str(files[1]), "same embedding"]


def _another_size(files):
    base = grown(llama())
    base.resize_token_embeddings(110)
    trained_by_peft(files[1], 1, base=base, save={"save_embedding_layers": True})
    return ["103", "110", "share one base"]


def _no_input_embedding(files):
    for file in files:
        file = file / WEIGHTS
        loaded = load_file(file)
        del loaded["base_model.model.model.embed_tokens.weight"]
        save_file(loaded, file)
    return ["103 tokens, but not model.embed_tokens.weight", str(files[0])]


def _infinite(files):
    for file in files:
        loaded = load_file(file / WEIGHTS)
        loaded["base_model.model.lm_head.weight"][100, 3] = float("inf")
        save_file(loaded, file / WEIGHTS)
    return ["1 of 1648 numbers of lm_head.weight are not finite", str(files[0])]


def _other_width(files):
    for file in files:
        loaded = load_file(file / WEIGHTS)
        key = "base_model.model.model.embed_tokens.weight"
        save_file(loaded | {key: torch.ones(GROWN, 15)}, file / WEIGHTS)
    return ["(103, 15)", "(97, 16)", str(files[0])]


@pytest.mark.parametrize(
    "spoil",
    [
        _other_embedding,
        _no_embedding,
        _another_size,
        _no_input_embedding,
        _infinite,
        _other_width,
    ],
)
def test_embeddings_that_particles_cannot_share(spoil, tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    for k, path in enumerate(paths):
        trained_by_peft(path, k, base=grown(llama()), save={"save_embedding_layers": True})
    named = spoil(paths)
    message = refusal(ml.load_particle_model, llama(), paths, ValueError)
    assert all(text in message for text in named)


def test_the_base_is_as_it_was_where_the_particles_cannot_be_made(tmp_path, monkeypatch):
    path, _ = trained_by_peft(
        tmp_path / "a", base=grown(llama()), save={"save_embedding_layers": True}
    )

    def fails(*_, **__):
        raise ValueError("no particles today")

    monkeypatch.setattr(checkpoint, "get_particle_model", fails)
    assert "no particles today" in refusal(ml.load_particle_model, llama(), [path])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_buffers_that_differ_are_refused(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, D), nn.Tanh(), Scaled())

    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(base(), config, K)
    model.save_pretrained(tmp_path)
    key = "base_model.model.2.scale"
    for folder in folders(tmp_path):
        save_file(load_file(folder / WEIGHTS) | {key: torch.full((3,), 2.0)}, folder / WEIGHTS)
    loaded = ml.load_particle_model(base(), folders(tmp_path))
    assert loaded.base[2].module.scale.tolist() == [2.0] * 3
    folder = tmp_path / "particle_1"
    save_file(load_file(folder / WEIGHTS) | {key: torch.full((3,), 3.0)}, folder / WEIGHTS)
    for module, load in ((base(), ml.load_particle_model), (model, checkpoint.load_particles)):
        message = refusal(load, module, folders(tmp_path))
        assert f"particle_1/{WEIGHTS}: {key}" in message and "share buffers" in message
