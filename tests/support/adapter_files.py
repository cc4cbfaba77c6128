"""Folders of adapters for the tests: small particles' and PEFT's own, and how they are refused."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import multilora as ml
from models import particle_tensors

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


def field(**values):
    def spoil(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


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
GROWN = 103


def with_new_tokens():
    ids = IDS.clone()
    ids[:, 0] = torch.tensor([98, GROWN - 1])
    return ids


def trained_by_peft(folder, seed=0, base=None, save=None, **config):
    """A folder as PEFT writes it, and the logits of the model that it was written from."""
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(base or llama(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(seed)
    randomised(model).save_pretrained(folder, **(save or {}))
    ids = IDS if base is None else with_new_tokens()
    return folder, model(input_ids=ids).logits.detach()


def assert_same_particles(loaded, model):
    """Bit for bit the same trainable tensors."""
    ours, theirs = particle_tensors(loaded), particle_tensors(model)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
