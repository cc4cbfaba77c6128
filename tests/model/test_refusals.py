"""Bases and arguments that get_particle_model refuses; it leaves the base unchanged."""

import copy
import dataclasses
from typing import Any

import peft
import pytest
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoftQConfig, LoraRuntimeConfig
from torch import Tensor, nn

import multilora as ml
from models import FAMILIES

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Odd(nn.Module):
    """Layers of every kind that particles refuse, beside some that they take."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.body = nn.Linear(8, 8)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.normed = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.body.bias.requires_grad_(False)
        self.dilated.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def snapshot(base: nn.Module) -> dict[str, Any]:
    """All that attaching particles could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "modules": [(n, type(m), id(m), m.training) for n, m in base.named_modules()],
        "tensors": [
            (n, id(t), t.requires_grad) for n, t in base.state_dict(keep_vars=True).items()
        ],
        "values": [t.tolist() for t in base.state_dict().values()],
        "attributes": [sorted(vars(m)) for m in base.modules()],
        "hooks": [len(getattr(m, hook)) for m in base.modules() for hook in hooks],
        "config": str(getattr(base, "config", None)),
    }


def assert_refused(base: nn.Module, error: type, match: str, *args: Any, **kwargs: Any) -> None:
    before = snapshot(base)
    with pytest.raises(error, match=match):
        ml.get_particle_model(base, *args, **kwargs)
    assert snapshot(base) == before


@pytest.mark.parametrize(
    "target",
    [
        "embedding",
        "grouped",
        "dilated",
        "circular",
        "conv1d",
        "attention.out_proj",
        "attention",
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
# PEFT wraps some layers before the one that is refused.
@pytest.mark.parametrize("others", [[], ["body"]], ids=["alone", "beside"])
def test_unsupported_target(target, others):
    config = peft.LoraConfig(r=2, target_modules=[*others, target])
    assert_refused(Odd(), TypeError, f"target '{target}'", config, K)


def test_batchnorm_in_a_head():
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["normed"])
    assert_refused(Odd(), TypeError, "'normed' contains BatchNorm", config, K)


def test_heads_in_heads():
    # PEFT finds modules by the ends of their names, so ["1"] can name a part of itself. Of two
    # stacked copies of one module only one could run.
    base = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    assert_refused(base, ValueError, "modules_to_save '1'", config, K)


BAD_ARGUMENTS = {
    "K=0": (
        {"num_particles": 0},
        ValueError,
        "num_particles must be an integer .* got 0",
    ),
    "K<0": ({"num_particles": -2}, ValueError, "num_particles .* got -2"),
    "K-float": ({"num_particles": 2.0}, ValueError, "num_particles .* got 2.0"),
    "K-bool": ({"num_particles": True}, ValueError, "num_particles .* got True"),
    "K-text": ({"num_particles": "3"}, ValueError, "num_particles .* got '3'"),
    "seeds-few": ({"seed": [1, 2]}, ValueError, "seed needs one integer or 3 of them; got 2"),
    "seeds-equal": ({"seed": [1, 2, 1]}, ValueError, "seeds must differ"),
    "seeds-text": ({"seed": [1, 2, "3"]}, (TypeError, ValueError), "seed"),
    "seeds-large": ({"seed": [1, 2, 2**64]}, (OverflowError, ValueError), "seed"),
    "seed-float": ({"seed": 1.5}, (TypeError, ValueError), "seed"),
    "head-init": ({"head_init": "zero"}, ValueError, 'head_init must be "reset" or "copy"'),
    "config-dict": ({"config": {"r": 2}}, TypeError, "peft.LoraConfig; got dict"),
    "config-ia3": (
        {"config": peft.IA3Config(target_modules=["body"])},
        TypeError,
        "peft.LoraConfig; got IA3Config",
    ),
    "no-target": ({"config": peft.LoraConfig(target_modules=["none"])}, ValueError, "none"),
    # Fails in PEFT after it has put adapters in.
    "task": (
        {"config": peft.LoraConfig(target_modules=["body"], task_type="CAUSAL_LM")},
        AttributeError,
        "prepare_inputs_for_generation",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    changes, error, match = BAD_ARGUMENTS[case]
    good = {"config": peft.LoraConfig(target_modules=["body"]), "num_particles": K}
    assert_refused(Odd(), error, match, **{**good, **changes})


def test_adapters_twice():
    config = peft.LoraConfig(r=2, target_modules=["0"])
    base = FAMILIES["mlp"].build()
    ml.get_particle_model(base, config, K)
    assert_refused(base, ValueError, "already has adapters", config, K)
    base = FAMILIES["mlp"].build()
    peft.get_peft_model(base, config)
    assert_refused(base, ValueError, "already has adapters", config, K)


def test_refusal_leaves_a_checkpointing_model_alone():
    # PEFT hooks the input embeddings of a model that checkpoints its activations.
    base = FAMILIES["llama"].build()
    base.gradient_checkpointing_enable()
    base.model.layers[1].self_attn.o_proj = nn.Embedding(16, 16)
    config = peft.LoraConfig(target_modules=["o_proj"])
    assert_refused(base, TypeError, r"layers\.1\.self_attn\.o_proj", config, K)


def test_configuration_is_untouched():
    # PEFT completes configurations in place.
    family = FAMILIES["bert"]
    config = family.config(target_modules="all-linear", task_type="SEQ_CLS")
    before = copy.deepcopy(config.to_dict())
    ml.get_particle_model(family.build(), config, K)
    assert config.to_dict() == before


SUPPORTED = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "modules_to_save",
    "fan_in_fan_out",
    "target_parameters",
    "task_type",
}
# Where a configuration comes from; no arithmetic.
PROVENANCE = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.parametrize("field", sorted(FIELDS - SUPPORTED - PROVENANCE))
def test_every_other_field_is_refused(field):
    # Whatever PEFT's version knows: a field that particles would silently ignore is refused.
    config = FAMILIES["mlp"].config()
    setattr(config, field, object())
    assert_refused(
        FAMILIES["mlp"].build(), NotImplementedError, rf"LoraConfig\.{field} = ", config, K
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, "loftq_config"),
        ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, "eva_config"),
        ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "corda_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights"),
        ({"init_lora_weights": False}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"megatron_core": "other"}, "megatron_core"),
        ({"use_qalora": True}, "use_qalora"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}, "runtime_config"),
    ],
)
def test_unsupported_options(changes, named):
    config = FAMILIES["mlp"].config(**changes)
    assert_refused(
        FAMILIES["mlp"].build(), NotImplementedError, rf"LoraConfig\.{named} = ", config, K
    )
