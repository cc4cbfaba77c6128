"""Particle models: starts, what is refused, what goes in and out, training, copies, compilation."""

import collections
import copy
import dataclasses
import io
import random
import warnings
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoftQConfig, LoraRuntimeConfig
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.modeling_outputs import CausalLMOutputWithPast

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
from multilora.attach import particle_seeds

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


# --- starts --------------------------------------------------------------------------------------


def start(seed: Any = 0, particles: int = K, name: str = "vit", **kwargs: Any) -> dict[str, Tensor]:
    family = FAMILIES[name]
    model = ml.get_particle_model(family.build(), family.config(), particles, seed, **kwargs)
    return {key: tensor.detach() for key, tensor in particle_tensors(model).items()}


def redrawn(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that a seed decides: every A, and the matrices of heads."""
    return [t for key, t in tensors.items() if "lora_B" not in key and t.ndim > 2]


def test_same_seed_gives_same_start():
    first, second = start(4), start(4)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_seed_gives_other_start():
    for first, second in zip(redrawn(start(0)), redrawn(start(1))):
        for i in range(K):
            for j in range(K):
                assert not torch.equal(first[i], second[j])


def test_start_of_a_particle_does_not_depend_on_their_number():
    few, many = start(2, particles=2), start(2, particles=5)
    assert all(torch.equal(few[key], many[key][:2]) for key in few)


def test_seeds_name_particles():
    forward, backward = start([5, 8, 2]), start([2, 8, 5])
    assert all(torch.equal(forward[key], backward[key].flip(0)) for key in forward)
    assert all(torch.equal(start(particle_seeds(3, K))[key], t) for key, t in start(3).items())


@pytest.mark.parametrize("name", FAMILIES)
def test_particles_start_apart(name):
    tensors = start(name=name)
    drawn = redrawn(tensors)
    assert len(drawn) >= 2
    for tensor in drawn:
        for i in range(K):
            for j in range(i):
                assert not torch.equal(tensor[i], tensor[j])
    assert all(not t.any() for key, t in tensors.items() if "lora_B" in key)


def test_reset_keeps_the_scale_and_the_vectors_of_a_head():
    head = nn.Sequential(nn.LayerNorm(90), nn.Linear(90, 80))
    nn.init.normal_(head[0].weight)
    nn.init.normal_(head[1].weight, std=0.7)
    original = copy.deepcopy(head.state_dict())
    base = nn.ModuleDict({"body": nn.Linear(4, 90), "head": head})
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    ((_, head),) = ml.get_particle_model(base, config, K).heads()
    for k in range(K):
        # Both standard deviations are of 7200 draws: 0.8 % each, five of their joint error.
        assert head["1.weight"][k].std().item() == pytest.approx(0.7, rel=0.06)
        assert not torch.equal(head["1.weight"][k], original["1.weight"])
        for key in ("0.weight", "0.bias", "1.bias"):
            assert torch.equal(head[key][k], original[key])


def test_reset_moves_a_head_of_zeros():
    base = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 10))
    nn.init.zeros_(base[1].weight)
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    ((_, head),) = ml.get_particle_model(base, config, K).heads()
    # The deviation of nn.Linear's own start, to 5 errors of 3000 draws.
    expected = nn.Linear(300, 10).weight.std().item()
    assert head["weight"][0].std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_copied_heads_start_at_the_base_model(name):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    expected = logits_of(base(**inputs))
    model = ml.get_particle_model(base, family.config(), K, head_init="copy").eval()
    logits = logits_of(model(**inputs))
    assert logits.shape == (K, *expected.shape)
    for k in range(K):
        torch.testing.assert_close(
            logits[k], expected, rtol=family.tolerance, atol=family.tolerance
        )


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", ["lm_head", "embed_tokens"]), ("gpt2", ["wte"])]
)
@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_vocabularies_are_copied(name, heads):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    expected = base(**inputs).logits
    model = ml.get_particle_model(base, family.config(modules_to_save=heads), K).eval()
    assert len(model.heads()) == len(heads)
    logits = model(**inputs).logits
    torch.testing.assert_close(
        logits, expected.expand_as(logits), rtol=family.tolerance, atol=family.tolerance
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_only_stacked_tensors_train(name):
    family = FAMILIES[name]
    base = family.build()
    frozen = {id(p) for p in base.parameters()}
    model = ml.get_particle_model(base, family.config(), K)
    trainable = model.particle_parameters()
    assert {id(p) for p in trainable} == {id(p) for p in particle_tensors(model).values()}
    assert not frozen & {id(p) for p in trainable}
    assert all(p.shape[0] == K and p.is_leaf for p in trainable)
    logits_of(model(**family.inputs())).sum().backward()
    # B is zero, so A's gradient is exactly zero; but there must be one.
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_random_state_is_untouched():
    def state():
        return torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    before = state()
    start(7)
    after = state()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- what is refused -----------------------------------------------------------------------------


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
        ({"target_parameters": ["0.weight"]}, "target_parameters"),
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


# --- inputs and outputs --------------------------------------------------------------------------


class Point(NamedTuple):
    scores: Tensor
    extra: Any


class Nested(nn.Module):
    """Scores in any structure, beside things that have no batch axis."""

    def __init__(self, structure):
        super().__init__()
        self.layer = nn.Linear(6, 4, dtype=torch.float64)
        self.structure = structure

    def forward(self, x: Tensor) -> Any:
        return self.structure(self.layer(x))


# Its length is a multiple of the particles, but not particles times batch.
TABLE = torch.arange(3.0 * K)
STRUCTURES = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, TABLE, y.mean()),
    "list": lambda y: [y[:, 0], None, "text", 3],
    "dict": lambda y: {"scores": y, "table": TABLE},
    "ordered": lambda y: collections.OrderedDict(b=y, a=TABLE),
    "namedtuple": lambda y: Point(y, None),
    "nested": lambda y: {"a": [Point(y, (y.unsqueeze(1), TABLE))], "b": ((),)},
    "model-output": lambda y: CausalLMOutputWithPast(logits=y, hidden_states=(y, 2 * y)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_keep_their_structure(structure):
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    build = STRUCTURES[structure]
    model = particles_of(Nested(build), config, K)
    x = torch.randn(5, 6, dtype=torch.float64)
    # The same adapters, with the bare tensor coming out.
    plain = copy.deepcopy(model)
    plain.base.structure = lambda y: y
    scores = plain(x)
    out = model(x)
    assert scores.shape == (K, 5, 4)
    assert type(out) is type(build(scores[0]))
    for k in range(K):
        expected, treedef = tree_flatten(build(scores[k]))
        leaves, out_treedef = tree_flatten(out)
        assert treedef == out_treedef
        for leaf, want in zip(leaves, expected):
            if not isinstance(want, Tensor):
                assert leaf == want
            elif want is TABLE:
                assert torch.equal(leaf, TABLE)
            elif want.ndim == 0:
                # A mean over the batch is one over the particles too.
                torch.testing.assert_close(leaf, scores.mean())
            else:
                assert torch.equal(leaf[k], want)


class Structured(nn.Module):
    """Reads tensors from anywhere in its arguments."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, batch: dict, table: Tensor, *, flag: bool, more: Any = None) -> Tensor:
        assert flag is True
        assert table.shape == TABLE.shape
        first, (second, third) = batch["first"], batch["rest"]
        assert third == "name"
        y = self.layer(first) * second.unsqueeze(1) + table.sum()
        return y if more is None else y + more.shift


@pytest.mark.parametrize("per_particle", [False, True], ids=["shared", "per_particle"])
def test_inputs_may_be_nested(per_particle):
    model = particles_of(Structured(), peft.LoraConfig(r=2, target_modules=["layer"]), K)
    lead = (K, 5) if per_particle else (5,)
    first = torch.randn(*lead, 6, dtype=torch.float64)
    second = torch.randn(lead, dtype=torch.float64)
    more = collections.namedtuple("More", "shift")(torch.randn(*lead, 4, dtype=torch.float64))
    out = model(
        {"first": first, "rest": [second, "name"]},
        TABLE,
        flag=True,
        more=more,
        per_particle=per_particle,
    )
    (adapter,) = model.adapters()
    layer = model.base.layer.base_layer
    for k in range(K):
        x, factor, shift = (t[k] if per_particle else t for t in (first, second, more.shift))
        weight = layer.weight + adapter.scaling * adapter.lora_B[k] @ adapter.lora_A[k]
        expected = F.linear(x, weight, layer.bias) * factor[:, None] + TABLE.sum() + shift
        torch.testing.assert_close(out[k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_independent(name):
    # A batch of one, and one as long as the text (5 tokens), which must not be taken for each
    # other.
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K)
    inputs = family.inputs(batch=5)
    logits = logits_of(model(**inputs))
    for row in range(5):
        single = logits_of(model(**{key: t[row : row + 1] for key, t in inputs.items()}))
        assert single.shape == (K, 1, *logits.shape[2:])
        torch.testing.assert_close(
            single[:, 0], logits[:, row], rtol=family.tolerance, atol=family.tolerance
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_one_particle(name):
    family = FAMILIES[name]
    base = family.build()
    many = particles_of(base, family.config(), K)
    one = particles_of(base, family.config(), 1)
    with torch.no_grad():
        theirs = particle_tensors(many)
        for key, tensor in particle_tensors(one).items():
            tensor.copy_(theirs[key][:1])
    torch.testing.assert_close(
        logits_of(one(**family.inputs())),
        logits_of(many(**family.inputs()))[:1],
        rtol=family.tolerance,
        atol=family.tolerance,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_equals_repeated_per_particle_inputs(name):
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K)
    inputs = family.inputs()
    repeated = {key: t.expand(K, *t.shape) for key, t in inputs.items()}
    expected = logits_of(model(**repeated, per_particle=True))
    assert torch.equal(logits_of(model(**inputs)), expected)


@pytest.mark.parametrize(
    ("shape", "per_particle", "match"),
    [
        ((K + 1, 2, 6), True, r"\(K, B, \.\.\.\) with K = 3; got \(4, 2, 6\)"),
        ((2, 6), True, r"K = 3; got \(2, 6\)"),
        ((6,), True, "no tensor with a batch axis"),
        ((), False, "no tensor with a batch axis"),
    ],
)
def test_inputs_without_particles_or_batch(shape, per_particle, match):
    model = particles_of(FAMILIES["mlp"].build(), FAMILIES["mlp"].config(), K)
    with pytest.raises(ValueError, match=match):
        model(torch.zeros(shape, dtype=torch.float64), per_particle=per_particle)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("tokens", [5, K, 2 * K])
def test_sequence_first_layers_are_refused(tokens):
    model = ml.get_particle_model(SequenceFirst(), peft.LoraConfig(target_modules=["layer"]), K)
    with pytest.raises(ml.ParticleIsolationError, match="SequenceFirst does not keep"):
        model(torch.randn(4, tokens, 6))
    model.check_isolation = False
    with pytest.raises(ValueError, match=rf"multiple of 12 \(K = 3\); got \({tokens}, 12, 6\)"):
        model(torch.randn(4, tokens, 6))


class Reads(nn.Module):
    """Reads the weight of one layer instead of calling it."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight)


def test_layer_that_never_runs_warns_once():
    x = torch.randn(2, 6)
    model = ml.get_particle_model(Reads(), peft.LoraConfig(target_modules=["called", "read"]), K)
    with pytest.warns(UserWarning, match="1 of 2 particle layers did not run.*: read"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        ml.get_particle_model(Reads(), peft.LoraConfig(target_modules=["called"]), K)(x)


# --- particles do not leak into each other -------------------------------------------------------


def run_and_differentiate(model, inputs):
    model.zero_grad()
    logits = logits_of(model(**inputs, per_particle=True))
    cotangent = torch.randn(
        logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7)
    )
    (logits * cotangent).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.particle_parameters())]


@pytest.mark.parametrize("changed", ["parameters", "inputs"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_particle_feels_another(name, training, changed):
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K).train(training)
    inputs = family.particle_inputs(K)
    before = run_and_differentiate(model, inputs)
    if changed == "parameters":
        perturb(model, seed=9, particle=1)
    else:
        other = family.inputs(seed=55)
        # Not the mask alone: the rows that it hides are nobody's inputs.
        assert any(not torch.equal(inputs[key][1], other[key]) for key in inputs)
        for key in inputs:
            inputs[key][1] = other[key]
    after = run_and_differentiate(model, inputs)
    for old, new in zip(before, after):
        # Bit for bit: the same arithmetic on the same numbers.
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[2], new[2])
    # The change was felt where it was made. (The gradient of a last bias has no other.)
    differs = [not torch.equal(old[1], new[1]) for old, new in zip(before, after)]
    assert differs[0]
    assert sum(differs) >= len(differs) - 1


def test_dropout_in_a_head_is_a_mask_a_particle():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(9, 4))
    base = nn.ModuleDict({"body": nn.Linear(6, 9), "head": head}).double()
    base.forward = lambda x: base["head"](base["body"](x))
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    # Equal particles: what differs is the mask.
    model = ml.get_particle_model(base, config, K, head_init="copy")
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model.train()(x)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])
    y = model.eval()(x)
    torch.testing.assert_close(y, y[:1].expand_as(y), rtol=1e-12, atol=1e-12)


# --- BatchNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call_train", [False, True], ids=["as-made", "train()"])
def test_batchnorm_keeps_its_statistics(call_train, tmp_path):
    # A fresh module is in training mode, and so are those that users pass.
    base = SmallCnn().train()
    plain = copy.deepcopy(base).eval()
    model = ml.get_particle_model(base, FAMILIES["cnn"].config(), K)
    if call_train:
        model.train()
    assert model.training
    assert model.base.head.training
    statistics = copy.deepcopy(dict(model.base.norm.named_buffers()))
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    y.sum().backward()
    for key, buffer in model.base.norm.named_buffers():
        assert torch.equal(buffer, statistics[key])
    model.save_pretrained(tmp_path)
    for k in range(K):
        # A float32 network of four layers: sums of at most 54 terms of order one.
        torch.testing.assert_close(
            y[k], load_peft(plain, tmp_path / f"particle_{k}")(x), rtol=1e-4, atol=1e-5
        )


# --- precision -----------------------------------------------------------------------------------


# The luck of one rounding of bfloat16.
ROUNDING = 2**-8


def assert_as_exact_as_peft(name, path, half_base, autocast):
    """Errors of logits and gradients against float64: at most twice those of PEFT.

    PEFT too keeps its adapters in the base's dtype here (`autocast_adapter_dtype=False`), which
    is what particles compute in; their masters alone are float32.
    """
    family = FAMILIES[name]
    dtype = torch.bfloat16 if half_base else torch.float32
    base, inputs = family.build(torch.float32).to(dtype), family.inputs(batch=4, dtype=dtype)
    # The reference starts from the same rounded numbers.
    exact_base = copy.deepcopy(base).double()
    exact_inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    model = particles_of(base, family.config(), K)
    model.save_pretrained(path)

    def run(net, inputs, cotangent, reduced):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and reduced):
            logits = logits_of(net(**inputs))
        (logits * cotangent).sum().backward()
        return logits.detach().double()

    with torch.no_grad():
        shape = logits_of(model(**inputs)).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    logits = {"ours": run(model, inputs, cotangent, True), "peft": [], "exact": []}
    gradients = {"ours": [], "peft": [], "exact": []}
    for k in range(K):
        folder = str(path / f"particle_{k}")
        exact = load_peft(exact_base, folder)
        logits["exact"].append(run(exact, exact_inputs, cotangent[k].double(), False))
        single = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), folder, is_trainable=True, autocast_adapter_dtype=False
        ).eval()
        logits["peft"].append(run(single, inputs, cotangent[k], True))
        ours, theirs = particle_tensors(model), peft_tensors(single)
        for key, parameter in peft_tensors(exact).items():
            gradients["exact"].append(parameter.grad.flatten())
            gradients["peft"].append(theirs[key].grad.flatten())
            gradients["ours"].append(ours[key].grad[k].flatten())
    exact_logits, exact_gradients = torch.stack(logits["exact"]), torch.cat(gradients["exact"])
    error = relative_error(logits["ours"], exact_logits)
    assert error <= 2 * relative_error(torch.stack(logits["peft"]), exact_logits) + ROUNDING
    # The reduced precision was at work.
    assert error > 1e-4
    error = relative_error(torch.cat(gradients["ours"]), exact_gradients)
    assert error <= 2 * relative_error(torch.cat(gradients["peft"]), exact_gradients) + ROUNDING
    for parameter in model.particle_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_is_as_exact_as_peft(name, tmp_path):
    assert_as_exact_as_peft(name, tmp_path, half_base=False, autocast=True)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_base_has_float32_masters(name, autocast, tmp_path):
    assert_as_exact_as_peft(name, tmp_path, half_base=True, autocast=autocast)


def test_half_precision_embeddings():
    # The masters are float32; what the next layer reads must be the model's dtype.
    family = FAMILIES["llama"]
    base = family.build(torch.bfloat16)
    inputs = family.inputs()
    expected = base(**inputs).logits
    config = family.config(modules_to_save=["embed_tokens", "lm_head"])
    logits = ml.get_particle_model(base, config, K).eval()(**inputs).logits
    assert logits.dtype == torch.bfloat16
    # The starts are the base model; a GEMM of other shape may round each of two layers otherwise.
    assert relative_error(logits, expected.expand_as(logits)) < 4 * ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 8 * ROUNDING), (torch.float64, 1e-5)]
)
def test_to_dtype(name, dtype, error):
    # bfloat16: some layers of one rounding each; float64: float32's own error.
    family = FAMILIES[name]
    model = particles_of(family.build(torch.float32), family.config(), K)
    before = logits_of(model(**family.inputs(dtype=torch.float32)))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = logits_of(model(**family.inputs(dtype=dtype)))
    assert after.dtype == dtype
    after.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.particle_parameters())
    assert relative_error(after, before) < error


# --- state, copies, files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_round_trip(name):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    model = particles_of(base, family.config(), K, seed=1)
    other = particles_of(base, family.config(), K, seed=2)
    perturb(other, seed=3)
    expected = logits_of(model(**inputs))
    assert not torch.allclose(logits_of(other(**inputs)), expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits_of(other(**inputs)), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        particles_of(base, family.config(), K + 1).load_state_dict(model.state_dict())


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", ["vit", "llama", "cnn"])
def test_copies_are_whole_and_separate(name, used, duplicate):
    family = FAMILIES[name]
    model = particles_of(family.build(), family.config(), K)
    if used:
        model(**family.inputs(batch=4))
    twin = duplicate(model)
    expected = logits_of(model(**family.inputs()))
    assert torch.equal(logits_of(twin(**family.inputs())), expected)
    perturb(twin, seed=9)
    assert not torch.equal(logits_of(twin(**family.inputs())), expected)
    assert torch.equal(logits_of(model(**family.inputs())), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copy_still_checks_rows(duplicate):
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    twin = duplicate(ml.get_particle_model(SequenceFirst(), config, K))
    with pytest.raises(ml.ParticleIsolationError):
        twin(torch.randn(4, 5, 6))
    twin.check_isolation = False
    with pytest.raises(ValueError, match="multiple of 12"):
        twin(torch.randn(4, 5, 6))


def test_failing_forward_leaves_no_trace():
    family = FAMILIES["mlp"]
    model = particles_of(family.build(), family.config(), K)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(2, 5, dtype=torch.float64))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(pickled(model)(**family.inputs()), model(**family.inputs()))


# --- activation checkpointing --------------------------------------------------------------------


def _checkpoint_timm(model):
    model.base.set_grad_checkpointing(True)


def _checkpoint_hf(use_reentrant):
    def enable(model):
        model.base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    return enable


@pytest.mark.parametrize(
    ("name", "enable"),
    [
        pytest.param("vit", _checkpoint_timm, id="vit"),
        *(
            pytest.param(name, _checkpoint_hf(reentrant), id=f"{name}-reentrant={reentrant}")
            for name in ("llama", "gpt2", "bert")
            for reentrant in (False, True)
        ),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(name, enable, dropout):
    family = FAMILIES[name]
    config = family.config(lora_dropout=dropout)
    model = particles_of(family.build(), config, K).train()
    inputs = family.particle_inputs(K)
    torch.manual_seed(3)
    expected = run_and_differentiate(model, inputs)
    calls = []
    for _, layer in model.lora_layers():
        layer.register_forward_hook(lambda *_: calls.append(1))
    enable(model)
    torch.manual_seed(3)
    actual = run_and_differentiate(model, inputs)
    # It was on: layers ran again in the backward pass.
    assert len(calls) > len(model.adapters())
    for value, want in zip(actual, expected):
        assert torch.equal(value, want)


# --- torch.compile -------------------------------------------------------------------------------


def train(forward, model, batches):
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=1e-2)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.repeat(K), reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TinyVit(VisionTransformer):
    """One block: compilation is the slowest thing here, and it grows with the depth."""

    def __init__(self, head: nn.Module | None = None):
        super().__init__(
            img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5
        )
        self.head = self.head if head is None else head


@pytest.mark.parametrize(
    ("head", "backend", "sizes"),
    [
        # One batch size: its C++ compiler takes most of a minute for each graph.
        pytest.param(None, "inductor", (4, 4, 4), id="linear-head"),
        # Traced and differentiated as for inductor. The second size makes the graph dynamic, the
        # third uses it.
        pytest.param(
            lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)),
            "aot_eager",
            (4, 4, 6, 7),
            id="deep-head",
        ),
    ],
)
def test_compiled_vit_trains_as_eager(head, backend, sizes):
    base = TinyVit(head and head())
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    model = particles_of(base, config, K).train()
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]
    losses = train(compiled, model, batches)
    expected = train(eager, eager, batches)
    # Fused kernels sum in another order, and AdamW's first steps divide gradients by their size.
    assert losses == pytest.approx(expected, rel=1e-4)
    x = batches[-1][0]
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-3, atol=1e-3)


# --- models of other kinds -----------------------------------------------------------------------


def test_model_without_a_vocabulary():
    # transformers' vision models have no input embeddings to ask for.
    base = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = base(x).logits
    config = peft.LoraConfig(
        r=2, target_modules=["convolution"], modules_to_save=["classifier"], task_type=None
    )
    logits = ml.get_particle_model(base, config, K, head_init="copy").eval()(x).logits
    # float32 convolutions in another order of sums.
    torch.testing.assert_close(logits, expected.expand_as(logits), rtol=1e-4, atol=1e-5)


def test_predict_leaves_the_mode_alone():
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(lora_dropout=0.5), K).train()
    probabilities = ml.predict(model, **family.inputs())
    assert model.training
    assert not probabilities.requires_grad
    expected = model.eval()(**family.inputs()).softmax(-1)
    assert torch.equal(probabilities, expected)


def test_names_of_version_0_1():
    from multilora import attach, checkpoint, layers, model, optim, separate

    assert model.get_particle_model is attach.get_particle_model
    assert model.particle_seeds is attach.particle_seeds
    assert layers.LoraForeignLinear is layers.LoraOpaqueLinear
    assert layers.is_foreign_linear is layers.has_own_forward
    assert checkpoint.save_pretrained is ml.ParticleModel.save_pretrained
    assert checkpoint.soup is ml.ParticleModel.soup
    assert optim.separate_parameters is separate.separate_parameters
    with pytest.raises(AttributeError, match=r"'multilora.model' has no attribute 'particles'"):
        _ = model.particles
