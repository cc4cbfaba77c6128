"""Run folders of somebody else's: nothing in them runs, and nothing huge is allocated for them."""

import json
import pickle
import resource
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from command import refused
from multilora.app import cli
from multilora.app import run as training
from multilora.app.settings import read_settings

MODEL_ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
COLOURS = {"blue": (20, 20, 200), "red": (200, 20, 20)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over a small ViT and its images."""
    top = tmp_path_factory.mktemp("finished")
    for part in ("train", "val"):
        for label, colour in COLOURS.items():
            (top / "images" / part / label).mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (16, 16), colour)
                image.save(top / "images" / part / label / f"{i}.png")
    assert cli.main(command(top / "images", top / "run")) == 0
    return top / "run"


def command(images, out):
    options = ["train", "--model", "vit_tiny_patch16_224", "--no-pretrained", "--model-args"]
    options += [f"{name}={value}" for name, value in MODEL_ARGS.items()]
    options += "--steps 1 --batch-size 2 --particles 2 --rank 2 --method ensemble".split()
    return [*options, "--data", str(images), "--out", str(out)]


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Runs:
    """The trace that a pickle of this leaves when it is read."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


@pytest.fixture
def sentinel(tmp_path):
    """A file that nothing may make."""
    file = tmp_path / "executed"
    yield file
    assert not file.exists()


def change(run, **values):
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(settings | values))


def both(run, capsys, *texts):
    """Neither evaluation nor export takes the folder."""
    refused(["evaluate", run], capsys, *texts)
    refused(["export", run, run.parent / "soup"], capsys, *texts)
    assert not (run.parent / "soup").exists()


def test_the_run_itself_is_taken(run):
    assert cli.main(["evaluate", str(run)]) == 0


def more(**arguments):
    return [[name, value] for name, value in (MODEL_ARGS | arguments).items()]


@pytest.mark.parametrize(
    "name, value",
    [
        ("checkpoint_path", "weights.pth"),
        ("pretrained_cfg", {"file": "weights.pth"}),
        ("pretrained_cfg_overlay", {"file": "weights.pth"}),
        ("cache_dir", "/somewhere"),
        ("trust_remote_code", True),
        ("code_revision", "main"),
        ("quantization_config", {"_target_": "os.system"}),
        ("norm_layer", "os.system"),
        ("img_size", 10**6),
        ("img_size", [32] * 1000),
        ("img_size", {"_target_": "os.system"}),
        ("depth", 10**9),
        ("embed_dim", -1),
        ("qkv_bias", "yes"),
        ("drop_rate", "0.1"),
        ("drop_rate", 1e300),
        ("global_pool", "../avg"),
    ],
)
def test_arguments_of_a_file_are_numbers_words_and_flags_of_known_names(
    run, capsys, sentinel, monkeypatch, name, value
):
    weights = run / "weights.pth"
    weights.write_bytes(pickle.dumps(Runs(sentinel)))
    monkeypatch.chdir(run)
    change(run, model_args=more(**{name: value}))
    both(run, capsys, "run.json", name)


@pytest.mark.parametrize(
    "model",
    ["hf-hub:anybody/model", "hf_hub:anybody/model", "local-dir:{run}", "{run}", "./vit", "a:b"],
)
def test_a_file_names_models_of_timm_alone(run, capsys, sentinel, model):
    (run / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(sentinel)))
    configuration = {"architecture": "vit_tiny_patch16_224", "model_args": MODEL_ARGS}
    (run / "config.json").write_text(json.dumps(configuration | {"pretrained_cfg": {}}))
    change(run, model=model.replace("{run}", str(run)), pretrained=True)
    both(run, capsys, "run.json", "--model")


@pytest.mark.parametrize(
    "values, text",
    [
        ({"particles": 10**9}, "particles"),
        ({"rank": 10**9}, "rank"),
        ({"rank": 3}, "rank = 3"),
        ({"particles": 3}, "particles = 3"),
        ({"particles": "2"}, "particles"),
        ({"seed": -1}, "seed"),
        ({"lr": [1]}, "lr"),
        ({"model": 5}, "model"),
        ({"model": None, "data": None, "task": "images"}, "--model"),
        ({"data": ["x"]}, "data"),
        ({"targets": [1]}, "targets"),
        ({"targets": "qkv"}, "run.json"),
        ({"model_args": [["depth"]]}, "run.json"),
        ({"model_args": 3}, "run.json"),
        ({"model_args": [["from_file", False]]}, "from_file"),
        ({"from_file": False}, "from_file"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"augment": "no"}, "augment"),
        ({"task": "nonsense"}, "nonsense"),
        ({"task": "vtab"}, "images"),
    ],
)
def test_settings_of_a_file_have_their_types_and_ranges(run, capsys, values, text):
    change(run, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both(run, capsys, text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{" + b" " * 2**21 + b"}", b"\xff", b"null"])
def test_a_settings_file_of_another_kind(run, capsys, content):
    (run / "run.json").write_bytes(content)
    both(run, capsys, "run.json", "is damaged")


@pytest.mark.slow
def test_a_model_that_fits_into_no_memory(run, capsys, monkeypatch):
    # Every number in its range, and the model made without storage.
    change(run, model_args=more(embed_dim=16384, depth=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both(run, capsys, "GiB")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_pickle_in_the_checkpoint(run, capsys, sentinel):
    torch.save(Runs(sentinel), run / "checkpoint.pt")
    both(run, capsys, "checkpoint.pt is damaged")
    refused([*command(run.parent / "images", run), "--resume"], capsys)
    # A file from the time before zip archives.
    torch.save(Runs(sentinel), run / "checkpoint.pt", _use_new_zipfile_serialization=False)
    both(run, capsys, "checkpoint.pt is damaged")


def test_a_checkpoint_that_unfolds(run, capsys):
    with zipfile.ZipFile(run / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data/0", bytes(2**25))
    assert (run / "checkpoint.pt").stat().st_size < 2**20
    both(run, capsys, "checkpoint.pt is damaged", "it unfolds to 33554432 bytes")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_in_an_adapter(run, capsys, sentinel, name):
    (run / "particle_0" / "adapter_model.safetensors").unlink()
    torch.save({"weight": Runs(sentinel)}, run / "particle_0" / name)
    both(run, capsys, "particle_0")


def test_an_adapter_names_no_module(run, capsys, sentinel, monkeypatch):
    """PEFT imports a module that megatron_core names."""
    (run / "evil.py").write_text(f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()")
    for folder in run.glob("particle_*"):
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        more = {"megatron_core": "evil", "megatron_config": {"hidden_size": 16}}
        file.write_text(json.dumps(config | more))
    index = json.loads((run / "multilora.json").read_text())
    (run / "multilora.json").write_text(json.dumps({**index, "format": 1, "files": {}}))
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    both(run, capsys, "megatron")
    assert "evil" not in sys.modules


def test_a_run_that_is_continued_writes_into_its_own_folder(run, tmp_path, capsys):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "adapter_config.json").write_text("of the user")
    shutil.rmtree(run / "particle_0")
    (run / "particle_0").symlink_to(tmp_path / "others")
    images = json.loads((run / "run.json").read_text())["data"]
    refused([*command(images, run), "--resume"], capsys, "particle_0 is a link")
    assert (tmp_path / "others" / "adapter_config.json").read_text() == "of the user"


def test_a_picture_is_not_written_through_a_link(run, tmp_path):
    (tmp_path / "text").write_text("of the user")

    def link(step, steps, stats):
        (tmp_path / "new" / "reliability.png").symlink_to(tmp_path / "text")

    settings = read_settings(run)
    training.train(settings, tmp_path / "new", report=lambda _: None, on_step=link)
    assert (tmp_path / "text").read_text() == "of the user"
    assert (tmp_path / "new" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_user_repeats_is_the_users_word(run, capsys):
    change(run, model="local-dir:nowhere", model_args=more(cache_dir="{nowhere}"))
    refused(["evaluate", run], capsys, "cache_dir")
    own = ["--model", "vit_tiny_patch16_224", "--model-args", "cache_dir=null"]
    assert cli.main(["evaluate", str(run), *own]) == 0
    refused(["evaluate", run, *own, "--data", run / "none"], capsys, "none does not exist")
    refused(["evaluate", run, *own, "--trust-remote-code"], capsys, "trust_remote_code is for")


# --- language models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A run over a small Llama, in a new folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    top = tmp_path_factory.mktemp("answered")
    words = {word: i for i, word in enumerate(["<unk>", "Answer:", "False", "True", "snow"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        top / "llama"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=5, num_attention_heads=2, max_position_embeddings=64, **sizes)
    )
    llama.save_pretrained(top / "llama")
    record = {"question": "is snow white", "passage": "snow", "answer": True}
    (top / "boolq.jsonl").write_text((json.dumps(record) + "\n") * 5)
    options = "train --task boolq --steps 1 --batch-size 2 --particles 1 --method single".split()
    options += ["--model", str(top / "llama"), "--data", str(top / "boolq.jsonl")]
    assert cli.main([*options, "--out", str(top / "run")]) == 0
    return top


@pytest.fixture
def theirs(answered, tmp_path):
    """A copy of that run, whose model is a copy of that Llama."""
    for name in ("llama", "run"):
        shutil.copytree(answered / name, tmp_path / name)
    change(tmp_path / "run", model=str(tmp_path / "llama"))
    return tmp_path


def configure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def code(folder, sentinel):
    """Code that transformers would load as the model's, its tokenizer's or its generation's."""
    text = f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()\n"
    (folder / "custom_generate").mkdir()
    for name in ("modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(text + "class Evil: pass\ndef generate(*_): pass\n")


AUTO_MAP = {
    "AutoConfig": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"],
}


def test_a_folder_elsewhere_is_data(theirs, sentinel):
    # Llama is known, so its own code runs and not the folder's.
    code(theirs / "llama", sentinel)
    configure(theirs / "llama", auto_map=AUTO_MAP)
    assert cli.main(["evaluate", str(theirs / "run")]) == 0


def test_code_of_a_model_needs_a_flag(theirs, capsys, sentinel):
    code(theirs / "llama", sentinel)
    configure(theirs / "llama", auto_map=AUTO_MAP, model_type="evil")
    both(theirs / "run", capsys, "--trust-remote-code")
    change(theirs / "run", model_args=[["trust_remote_code", True]])
    both(theirs / "run", capsys, "trust_remote_code")
    options = "train --task boolq --steps 1 --particles 1 --method single --out".split()
    more = ["--model", theirs / "llama", "--data", theirs / "boolq.jsonl"]
    shutil.copy(Path(json.loads((theirs / "run" / "run.json").read_text())["data"]), theirs)
    refused([*options, theirs / "new", *more], capsys, "--trust-remote-code")


def test_with_the_flag_that_code_runs(theirs, tmp_path):
    made = tmp_path / "made"
    code(theirs / "llama", made)
    configure(theirs / "llama", auto_map=AUTO_MAP, model_type="evil")
    cli.main(["evaluate", str(theirs / "run"), "--trust-remote-code"])
    assert made.exists()


def test_a_folder_inside_the_run_is_named_by_the_user_alone(theirs, capsys, monkeypatch):
    shutil.move(theirs / "llama", theirs / "run" / "llama")
    monkeypatch.chdir(theirs / "run")
    for name in (str(theirs / "run" / "llama"), "llama", "./llama/../llama", "."):
        change(theirs / "run", model=name)
        both(theirs / "run", capsys, "run's own folder")
    assert cli.main(["evaluate", str(theirs / "run"), "--model", "llama"]) == 0


def test_pickled_weights_of_a_model(theirs, capsys, sentinel):
    (theirs / "llama" / "model.safetensors").unlink()
    torch.save({"x": Runs(sentinel)}, theirs / "llama" / "pytorch_model.bin")
    both(theirs / "run", capsys, "could not load")


def test_adapters_in_the_folder_of_a_model(theirs, capsys):
    adapter = {"base_model_name_or_path": "anybody/model", "peft_type": "LORA"}
    (theirs / "llama" / "adapter_config.json").write_text(json.dumps(adapter))
    both(theirs / "run", capsys, "holds adapters")


@pytest.mark.parametrize(
    "values, text",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 65536, "intermediate_size": 2**18, "num_hidden_layers": 64}, "GiB"),
        ({"attn_implementation": "anybody/kernels"}, "attn_implementation"),
    ],
)
def test_the_configuration_of_a_model(theirs, capsys, values, text):
    configure(theirs / "llama", **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both(theirs / "run", capsys, text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_arguments_of_transformers(theirs, capsys):
    for name, value in {
        "attn_implementation": "anybody/kernels",
        "use_kernels": True,
        "subfolder": "../..",
        "gguf_file": "x",
        "adapter_kwargs": {},
        "revision": "refs/pr/1",
        "device_map": "auto",
    }.items():
        change(theirs / "run", model_args=[[name, value]])
        both(theirs / "run", capsys, name)
    change(
        theirs / "run", model_args=[["attn_implementation", "eager"], ["torch_dtype", "float32"]]
    )
    assert cli.main(["evaluate", str(theirs / "run")]) == 0
