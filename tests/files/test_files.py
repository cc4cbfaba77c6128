"""Adapter folders that anybody made: what is read, what is refused, and what refusing costs."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import multilora as ml
from multilora import checkpoint

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K, D = 2, 8
INDEX, CONFIG = "multilora.json", "adapter_config.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
A, B, HEAD = (f"base_model.model.{key}.weight" for key in ("0.lora_A", "0.lora_B", "2"))


def small_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))


def small_particles(seed=0):
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    return randomised(ml.get_particle_model(small_base(), config, K, seed=seed).eval())


def randomised(model):
    """Noise on everything that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    small_particles().save_pretrained(path)
    return path


@pytest.fixture
def root(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "root")
    return tmp_path / "root"


def folders(root):
    return [root / f"particle_{k}" for k in range(K)]


def without_list(root):
    """The folder as the first format has it: no sizes and digests that would show every change."""
    index = json.loads((root / INDEX).read_text())
    (root / INDEX).write_text(json.dumps({**index, "format": 1}))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, str(module)


def refusal(load, module, path, *errors):
    """The error with which load(module, path) refuses, which leaves the module as it is."""
    tensors, structure = state(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(errors or (ValueError, FileNotFoundError)) as raised:
            load(module, path)
    assert type(raised.value) in (ValueError, FileNotFoundError)
    assert str(module) == structure
    assert all(torch.equal(t, tensors[name]) for name, t in module.state_dict().items())
    return str(raised.value)


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


# Of any file: it is not there, is no file, or holds nothing of the kind.
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


def field(**values):
    def spoil(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


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
    "header that is no UTF-8": header(b"\xff" * 64),
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


# --- configurations of the same forward ----------------------------------------------------------


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.tensor([[5, 9, 96, 3], [7, 1, 2, 90]])


def trained_by_peft(folder, seed=0, base=None, save=None, **config):
    """A folder as PEFT writes it, and the logits of the model that it was written from."""
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(base or llama(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(seed)
    randomised(model).save_pretrained(folder, **(save or {}))
    ids = IDS if base is None else with_new_tokens()
    return folder, model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_how_an_adapter_began_does_not_matter(init, tmp_path):
    known = init not in ("eva", "mica")  # which need data, or a later PEFT
    folder, expected = trained_by_peft(tmp_path / "a", init_lora_weights=init if known else True)
    field(init_lora_weights=init)(folder / CONFIG)
    model = ml.load_particle_model(llama(), [folder]).eval()
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-6, rtol=1e-5)
    # It is written as an adapter that PEFT would begin plainly.
    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b/particle_0" / CONFIG).read_text())["init_lora_weights"]
    assert written == (init if init == "gaussian" else True)
    single = peft.PeftModel.from_pretrained(llama(), tmp_path / "b/particle_0").eval()
    torch.testing.assert_close(single(input_ids=IDS).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_another_base_is_refused(init, tmp_path):
    made = init in ("pissa", "olora")
    options = {"init_lora_weights": init if made else True}
    folder, expected = trained_by_peft(tmp_path / "a", **options)
    if made:
        # The base itself with these factors is another function.
        plain = copy.deepcopy(folder)
        field(init_lora_weights=True)(plain / CONFIG)
        other = peft.PeftModel.from_pretrained(llama(), plain)(input_ids=IDS).logits
        assert (other - expected).abs().max() > 2e-5
    field(init_lora_weights=init)(folder / CONFIG)
    message = refusal(ml.load_particle_model, llama(), [folder])
    assert init in message and "base's weights" in message and CONFIG in message


def test_fields_without_effect_are_no_reason(tmp_path):
    folder, expected = trained_by_peft(tmp_path / "a", lora_dropout=0.3)
    field(
        runtime_config={"ephemeral_gpu_offload": True},
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        corda_config={},
        megatron_core="elsewhere",
        qalora_group_size=8,
        rank_pattern=None,
        alpha_pattern=None,
        a_field_of_a_later_peft=None,
    )(folder / CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ml.load_particle_model(llama(), [folder]).eval()
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-6, rtol=1e-5)
    assert model.peft_config.lora_dropout == 0.3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["q_proj.weight"]),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 1}),
        ("a_field_of_a_later_peft", True),
    ],
)
def test_fields_that_change_the_forward_are_refused_by_name(key, value, tmp_path):
    folder, _ = trained_by_peft(tmp_path / "a")
    field(**{key: value})(folder / CONFIG)
    message = refusal(ml.load_particle_model, llama(), [folder], ValueError)
    assert f"{key} = {value!r}" in message and str(folder / CONFIG) in message


def test_differences_without_effect_are_kept_from_the_first(tmp_path):
    made = [trained_by_peft(tmp_path / f"{k}", seed=k) for k in range(2)]
    changes = {"lora_dropout": 0.5, "init_lora_weights": "gaussian", "task_type": None}
    field(**changes, revision="x", base_model_name_or_path="y", inference_mode=False)(
        made[1][0] / CONFIG
    )
    with pytest.warns(
        UserWarning, match=r"lora_dropout.*task_type.*0/adapter_config.json are kept"
    ):
        model = ml.load_particle_model(llama(), [folder for folder, _ in made]).eval()
    assert model.peft_config.lora_dropout == 0 and model.peft_config.task_type == "CAUSAL_LM"
    expected = torch.stack([logits for _, logits in made])
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    field(task_type="SEQ_2_SEQ_LM")(made[1][0] / CONFIG)
    assert "task_type" in refusal(ml.load_particle_model, llama(), [f for f, _ in made])


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


# --- embeddings ----------------------------------------------------------------------------------


def test_an_adapted_embedding_is_refused_by_name(tmp_path):
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json .*embed_tokens, an embedding"):
        ml.load_particle_model(llama(), [tmp_path, tmp_path])


GROWN = 103


def with_new_tokens():
    ids = IDS.clone()
    ids[:, 0] = torch.tensor([98, GROWN - 1])
    return ids


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


# --- soups, and what particles share -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "svd"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.adapters()[0].lora_A[1, 0].fill_(float("nan")),
        lambda model: model.adapters()[0].lora_B[0, 0].fill_(3e38),
        lambda model: dict(model.heads())["2"]["bias"][1].fill_(float("inf")),
        lambda model: dict(model.heads())["2"]["weight"].fill_(3e38),
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
