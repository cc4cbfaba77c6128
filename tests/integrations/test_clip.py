"""CLIP's zero-shot classifier as a base, and the command line's task over it."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import multilora as ml
from command import numbers, refused
from documents import block, recipe
from models import load_peft, particles_of
from multilora.app import cli, steps
from multilora.app.settings import recommended
from multilora.app.tasks import clip as task
from multilora.integrations import clip
from multilora.integrations.image_files import read_image

NAMES = ["red fox", "owl", "blue whale"]
WORDS = "a photo sketch of red fox owl blue whale . pad end".split()
K = 3


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word, and the end's behind them, as CLIP's."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="pad"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    end = len(WORDS) - 1
    words.post_processor = processors.TemplateProcessing(
        single="$A end", special_tokens=[("end", end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end")


def make_clip(dtype=torch.float64):
    widths = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": 0, "eos_token_id": len(WORDS) - 1, "pad_token_id": len(WORDS) - 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=widths
            | ids
            | {"vocab_size": len(WORDS), "max_position_embeddings": 9, "projection_dim": 8},
            vision_config=widths | {"image_size": 16, "patch_size": 8, "projection_dim": 8},
            projection_dim=8,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def images(batch=4):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def zero_shot(model, tokenizer, template=clip.TEMPLATE, image=None):
    tokens = tokenizer([template.format(n) for n in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = images() if image is None else image
        return model(**tokens, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("template", [clip.TEMPLATE, "sketch of {}"])
def test_the_classifier_is_zero_shot_clip(tokenizer, template):
    model = make_clip()
    base = clip.classifier(model, NAMES, template, tokenizer)
    expected = zero_shot(model, tokenizer, template)
    with torch.no_grad():
        torch.testing.assert_close(base(images()), expected, atol=1e-12, rtol=0)
        # Particles begin there: their B is zero.
        config = peft.LoraConfig(r=2, target_modules=list(clip.TARGETS))
        together = ml.get_particle_model(base, config, K).eval()(images())
    torch.testing.assert_close(together, expected.expand(K, 4, 3), atol=1e-12, rtol=0)
    assert expected.std() > 0.1


def test_many_classes_are_read_in_parts(tokenizer, monkeypatch):
    model = make_clip()
    monkeypatch.setattr(clip, "_PROMPTS", 2)
    base = clip.classifier(model, NAMES, tokenizer=tokenizer)
    expected = zero_shot(model, tokenizer)
    torch.testing.assert_close(base(images()), expected, atol=1e-12, rtol=0)


def test_particles_are_pefts_adapters(tokenizer, tmp_path):
    base = clip.classifier(make_clip(), NAMES, tokenizer=tokenizer)
    model = particles_of(base, peft.LoraConfig(r=2, target_modules=list(clip.TARGETS)), K)
    names = {adapter.name for adapter in model.adapters()}
    assert len(names) == 4 and all(name.startswith("vision_model.") for name in names)
    assert not any("head" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        together = model(images())
        for k in range(K):
            alone = load_peft(base, tmp_path / f"particle_{k}")(images())
            torch.testing.assert_close(together[k], alone, atol=1e-10, rtol=0)
        assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "names, how, message",
    [
        (NAMES, {"template": "a photo"}, r"template needs \{\} .*; got 'a photo'"),
        (["owl"], {}, r"at least two class names; got \['owl'\]"),
        ("owl", {}, "at least two class names; got 'owl'"),
        (NAMES, {"tokenizer": None}, "its tokenizer is needed"),
        (["owl", "red " * 5], {}, "has 11 tokens and the text encoder reads 9; .*red"),
    ],
)
def test_what_a_classifier_needs(tokenizer, names, how, message):
    with pytest.raises(ValueError, match=message):
        clip.classifier(make_clip(), names, **{"tokenizer": tokenizer} | how)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="must be a CLIPModel, its name or folder; got Linear"):
        clip.classifier(torch.nn.Linear(2, 2), NAMES)


# --- the task ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A saved CLIP, and images of three classes that differ in colour."""
    top = tmp_path_factory.mktemp("clip")
    make_clip(torch.float32).save_pretrained(top / "model")
    tokenizer.save_pretrained(top / "model")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for channel, name in enumerate(("blue_whale", "owl", "red_fox")):
            folder = top / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(0, 100, (24, 20, 3), generator=generator)
                pixels[..., 2 - channel] += 150
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return top


def test_the_example_of_the_guide(folders, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CLIP_OR_FOLDER").symlink_to(folders / "model")
    scope = {}
    exec(block("docs/guides/clip.md", "## A zero-shot classifier as a base", "python"), scope)
    with torch.no_grad():
        logits = scope["model"](images().float())
    expected = zero_shot(make_clip(), tokenizer).float().expand(5, 4, 3)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_recipe_on_a_folder_of_images(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CLIP_OR_FOLDER").symlink_to(folders / "model")
    (tmp_path / "PHOTOS").symlink_to(folders / "images")
    # The classes are unlike the prompts of a random model: it has a lot to learn.
    how = ["--steps", "15", "--lr", "0.02", "--batch-size", "9"]
    assert cli.main([*recipe("--task clip"), *how]) == 0
    out = tmp_path / "runs" / "clip"
    settings = json.loads((out / "run.json").read_text())
    assert (settings["particles"], settings["rank"]) == (5, 4)
    assert dict(settings["method_args"]) == {"gamma": 0.002}
    assert numbers(out)["accuracy"] > 0.8
    adapter = json.loads((out / "particle_0" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"fc1", "fc2"} and not adapter["modules_to_save"]
    assert cli.main(["evaluate", str(out)]) == 0
    other = tmp_path / "other"
    for name, source in (("blue_whale", "owl"), ("owl", "red_fox"), ("red_fox", "blue_whale")):
        for part in ("train", "val"):
            shutil.copytree(folders / "images" / part / source, other / part / name)
    (other / "val" / "owl" / "0.png").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--data", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_examples"] == 17 and found["accuracy"] < 0.2
    # Other classes are another frozen head, over which the particles were not trained.
    for part in ("train", "val"):
        (other / part / "owl").rename(other / part / "fox")
    refused(["evaluate", out, "--data", other], capsys, "trained over another base model")


def test_the_task_is_zero_shot_clip_with_its_images(folders, tokenizer):
    data = {"model": str(folders / "model"), "data": str(folders / "images")}
    options = task.Options(**data, template="sketch of {}")
    made = task.make(options, seed=0)
    assert made.classes == ["blue_whale", "owl", "red_fox"] and made.head is None
    image, label = made.test[13]
    assert (tuple(image.shape), label) == ((3, 16, 16), 2)
    # What --shift, --corrupt, --fgsm and DVERGE need; and the text's head is frozen.
    raw = read_image(sorted((folders / "images" / "val" / "red_fox").iterdir())[0])
    assert made.transform(raw).shape == image.shape
    assert made.normalisation[0] == OPENAI_CLIP_MEAN and made.normalisation[1] == OPENAI_CLIP_STD
    assert not made.base.head.weight.requires_grad
    # CLIP's own mean and standard deviation of red.
    pixels = image[0] * 0.26862954 + 0.48145466
    assert pixels.min() > 150 / 255 - 0.01 and pixels.max() < 1 and 0.75 < pixels.mean() < 0.82
    model = CLIPModel.from_pretrained(folders / "model")
    prompts = ["sketch of blue whale", "sketch of owl", "sketch of red fox"]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=image[None]).logits_per_image
        torch.testing.assert_close(made.base(image[None]), expected, atol=1e-4, rtol=1e-4)
        by_folder = clip.classifier(folders / "model", NAMES)(image[None])
    by_name = zero_shot(model.double(), tokenizer, image=image[None].double())
    torch.testing.assert_close(by_folder.double(), by_name, atol=1e-4, rtol=1e-4)


def test_recommended_settings_are_bellas():
    data = {"model": "m", "data": "d"}
    for method, particles in (("svgd", 5), ("ensemble", 5), ("single", 1)):
        settings = recommended("clip", method, **data)
        assert (settings.particles, settings.rank) == (particles, 4)
        assert settings.options.targets == ("fc1", "fc2")


def test_full_copies_of_a_model_without_a_new_head_are_set_apart(folders):
    data = {"model": str(folders / "model"), "data": str(folders / "images")}
    settings = recommended("clip", "ensemble", particles=2, full=True, **data)
    made = task.make(settings.options, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = steps.particle_model(made, settings)
    apart = [p for p in model.particle_parameters() if p.ndim > 2]
    assert len(apart) > 5
    for p in apart:
        off = (p[0] - p[1]).std() / p[0].std()
        assert 0.005 < off < 0.03
    single = recommended("clip", "single", full=True, **data)
    (copy,) = steps.particle_model(task.make(single.options, 0), single).stacked_modules()
    assert all(torch.equal(p[0], q) for p, q in copy[1].originals().items())


def test_a_random_model_is_drawn_by_the_seed(folders):
    data = {"model": str(folders / "model"), "data": str(folders / "images")}
    options = task.Options(**data, pretrained=False)
    one, same, other = (task.make(options, seed).base.head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_the_task_refuses(folders, tmp_path, capsys):
    train = ["train", "--task", "clip", "--data", str(folders / "images"), "--steps", "1"]
    out = ["--out", str(tmp_path / "run")]
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    refused(
        [*train, "--model", tmp_path / "bert", *out], capsys, "must be a CLIPModel", "got BertModel"
    )
    refused([*train, "--model", tmp_path / "nowhere", *out], capsys, "could not load", "nowhere")
    model = folders / "model"
    refused([*train, "--model", model, "--targets", "qkv", *out], capsys, "no layers ['qkv']")
    refused([*train, "--model", model, "--template", "photo", *out], capsys, "template needs {}")
    refused([*train, *out], capsys, "the task 'clip' needs both --model and --data")


def test_a_run_may_not_bring_its_model(folders, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(folders / "model", out / "model")
    settings = recommended("clip", "single", model=str(out / "model"), data="d").flat()
    (out / "run.json").write_text(json.dumps(settings))
    refused(["evaluate", out], capsys, "lies in the run's own folder")
