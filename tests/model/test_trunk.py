"""The shared trunk: fewer rows below the cut, the same numbers."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import multilora as ml
from models import FAMILIES, logits_of, particles_of

K = 5


class Counted(nn.Module):
    """A block that counts the rows it is given."""

    def __init__(self):
        super().__init__()
        self.linear, self.rows = nn.Linear(6, 6), []

    def forward(self, x, shift=None):
        self.rows.append(len(x))
        return torch.tanh(self.linear(x) if shift is None else self.linear(x) + shift)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x, shift=None):
        for block in self.blocks:
            x = block(x, shift)
        return self.head(x)


def tower(share=True, **options):
    """Two of four blocks adapted, and the head saved."""
    torch.manual_seed(0)
    targets = [f"blocks.{i}.linear" for i in (2, 3)]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"])
    model = ml.get_particle_model(Tower().double(), config, K, share_trunk=share, **options)
    for adapter in model.adapters():
        nn.init.normal_(adapter.lora_B)
    return model


def rows_of(model, *args, **kwargs):
    """How many rows every block is given in a forward."""
    model(*args, **kwargs)  # with the isolation check
    for block in model.base.blocks:
        block.rows.clear()
    model(*args, **kwargs)
    return [block.rows for block in model.base.blocks]


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 6, dtype=torch.float64, generator=generator), torch.arange(4) % 3


@pytest.mark.parametrize("cut", [True, "blocks.2", "blocks.1", False])
def test_rows_and_numbers(cut):
    x, y = data()
    plain, model = tower(False), tower(cut)
    assert model.share_trunk == cut
    below = {True: 2, "blocks.2": 2, "blocks.1": 1, False: 0}[cut]
    assert rows_of(model, x) == [[4]] * below + [[4 * K]] * (4 - below)
    torch.testing.assert_close(model(x), plain(x))
    own = x.expand(K, 4, 6) + torch.arange(K).view(K, 1, 1)
    assert rows_of(model, own, per_particle=True) == [[4 * K]] * 4
    torch.testing.assert_close(model(own, per_particle=True), plain(own, per_particle=True))
    for m in (plain, model):
        ml.IBDR(m, particle_chunk=2).backward(lambda m=m: (m(x), y))
    for p, q in zip(plain.particle_parameters(), model.particle_parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_arguments_of_later_blocks_are_repeated_and_others_are_not():
    x, _ = data()
    plain, model = tower(False), tower()
    for shift in (torch.randn(4, 6).double(), torch.randn(1, 6).double(), torch.tensor(0.5)):
        torch.testing.assert_close(model(x, shift=shift), plain(x, shift=shift))


def test_it_can_be_switched_at_any_time():
    model, (x, _) = tower(), data()
    expected = model(x)
    model.share_trunk = False
    assert rows_of(model, x) == [[4 * K]] * 4
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.base.modules())
    torch.testing.assert_close(model(x), expected)
    model.share_trunk = "blocks.1"
    assert rows_of(model, x) == [[4], [4 * K], [4 * K], [4 * K]]


def test_rows_at_the_cut_are_computed_once_and_used_again():
    model, (x, y) = tower(), data()
    expected = model(x)
    rows = model.trunk(x)
    for block in model.base.blocks:
        block.rows.clear()
    for _ in range(3):
        torch.testing.assert_close(model(rows), expected)
    assert [len(block.rows) for block in model.base.blocks] == [0, 0, 3, 3]
    grads = []
    for closure in (lambda: (model(x), y), lambda: (model(rows), y)):
        model.zero_grad()
        ml.IBDR(model, particle_chunk=2).backward(closure)
        grads.append([p.grad.clone() for p in model.particle_parameters()])
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="trunk needs share_trunk"):
        tower(False).trunk(x)


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_families(family, checkpointing):
    lora = {
        "vit": {"target_modules": r"blocks\.1\..*(qkv|fc1)"},
        "llama": {"target_modules": r".*layers\.1.*(q_proj|down_proj)"},
        "gpt2": {"target_modules": r".*h\.1\..*c_attn"},
        "bert": {"target_modules": r".*layer\.1\..*query"},
    }[family]
    family = FAMILIES[family]
    model = particles_of(family.build(), family.config(**lora), K).train()
    inputs = family.inputs(batch=3)
    results = []
    if checkpointing:
        enable = getattr(model.base, "gradient_checkpointing_enable", None)
        enable({"use_reentrant": False}) if enable else model.base.set_grad_checkpointing(True)
    for share in (False, True):
        model.share_trunk = share
        logits = logits_of(model(**inputs))
        model.zero_grad()
        logits.double().square().sum().backward()
        results.append([logits, *(p.grad for p in model.particle_parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=max(family.tolerance, 1e-9) * 10)


def test_hidden_states_below_the_cut_are_those_of_all_particles():
    family = FAMILIES["llama"]
    config = family.config(target_modules=r".*layers\.1.*(q_proj|down_proj)")
    model = particles_of(family.build(), config, K)
    inputs = family.inputs(batch=2)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    model.share_trunk = True
    for a, b in zip(model(**inputs, output_hidden_states=True).hidden_states, expected):
        assert a.shape == b.shape and a.shape[:2] == (K, 2)
        torch.testing.assert_close(a, b)


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpoint_repeats_the_rows_of_its_forward():
    # Its second run is outside of the model's forward, and of two models in one backward.
    x = data()[0].requires_grad_()
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
        blocks = [Checkpointed(b) if wrap else b for b in blocks]
        name = "2.block.0" if wrap else "2.0"
        base = nn.Sequential(*blocks).double()
        model = ml.get_particle_model(
            base, peft.LoraConfig(r=2, target_modules=[name]), K, share_trunk=name.split(".")[0]
        )
        nn.init.normal_(model.adapters()[0].lora_B, generator=torch.Generator().manual_seed(1))
        both = model(x).square().sum() + model.particle(1)(x).sum()
        results.append(torch.autograd.grad(both, [x, *model.particle_parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_separate(duplicate):
    model, (x, _) = tower(), data()
    expected = model(x)
    twin = duplicate(model)
    assert rows_of(twin, x)[0] == [4]
    twin.adapters()[0].lora_B.data.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)
    twin.share_trunk = False
    assert rows_of(twin, x)[0] == [4 * K] and rows_of(model, x)[0] == [4]


def test_what_cannot_be_cut():
    config = peft.LoraConfig(r=2, target_modules=["head"])
    with pytest.warns(UserWarning, match=r"no nn\.ModuleList or nn\.Sequential holds all"):
        model = ml.get_particle_model(Tower(), config, K, share_trunk=True)
    assert rows_of(model, torch.randn(3, 6))[0] == [3 * K]
    with pytest.raises(AttributeError, match="9"):
        ml.get_particle_model(Tower(), config, K, share_trunk="blocks.9")
    with pytest.raises(ValueError, match="in a loop nothing runs together"):
        ml.get_particle_model(Tower(), config, K, share_trunk=True, fold="loop")


def test_a_promise_that_is_broken_at_once_is_found():
    class Skips(Tower):
        def forward(self, x):
            start = x
            for block in self.blocks:
                x = block(x)
            return self.head(x + start)

    config = peft.LoraConfig(r=2, target_modules=[r"blocks.3.linear"])
    model = ml.get_particle_model(Skips(), config, K, share_trunk=True)
    with pytest.raises(ml.ParticleIsolationError):
        model(torch.randn(3, 6))
