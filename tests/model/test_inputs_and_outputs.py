"""Inputs and outputs of a particle model: structures, batches, separate inputs per particle."""

import collections
import copy
import warnings
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers.modeling_outputs import CausalLMOutputWithPast

import multilora as ml
from models import FAMILIES, SequenceFirst, logits_of, particle_tensors, particles_of

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


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
