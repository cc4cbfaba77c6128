"""A particle's place goes to another run, while the others go on."""

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, perturb

K = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save:UserWarning")


def config(r=2, targets=("qkv",), **fields):
    return peft.LoraConfig(r=r, lora_alpha=3, target_modules=list(targets), **fields)


def particles():
    configs = [config(2), config(3, ["qkv", "attn.proj"]), config(1, modules_to_save=["head"])]
    base = FAMILIES["vit"].build()
    model = ml.get_particle_model(base, configs, seed=[1, 2, 3], head_init="copy")
    perturb(model)
    return model.eval()


def start_of(new, seed):
    """What the adapter would be alone: its names, and its tensors of their true shapes."""
    alone = ml.get_particle_model(FAMILIES["vit"].build(), new, 1, seed=[seed], head_init="copy")
    return {name: p[0] for name, p in alone.named_parameters() if p.requires_grad}


def own(model, k):
    """Particle k's tensors, by their names in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    leaves = (p for p in model.particle_parameters(separate=True) if p.particle == k)
    return {names[id(leaf.stacked)]: leaf.detach() for leaf in leaves}


NEW = {
    "smaller": config(1),
    "of other layers": config(2, ["fc1"]),
    "larger": config(7, ["qkv", "proj"], use_rslora=True),
    "with a head": config(2, modules_to_save=["head", "norm1"]),
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
def test_it_starts_as_it_would_alone_and_nobody_else_moves(new, tmp_path):
    model, x = particles(), FAMILIES["vit"].inputs(4)
    before, seeds = model(**x), model.seeds
    model.replace_particle(1, new, seed=9)
    assert model.seeds == (seeds[0], 9, seeds[2]) and model.peft_configs[1].r == new.r
    after = model(**x)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], **CLOSE)
    torch.testing.assert_close(after[1], FAMILIES["vit"].build()(**x), **CLOSE)
    mine, alone = own(model, 1), start_of(new, 9)
    assert mine.keys() == alone.keys()
    for name, t in alone.items():
        assert torch.equal(mine[name].reshape(t.shape), t), name
    perturb(model, seed=5)
    model.save_pretrained(tmp_path)
    for k in range(K):
        base = FAMILIES["vit"].build()
        one = peft.PeftModel.from_pretrained(base, tmp_path / f"particle_{k}").eval()
        torch.testing.assert_close(one(**x), model(**x)[k], **CLOSE)


def test_leaves_of_the_others_and_their_optimizers_go_on():
    model, twin = particles(), particles()
    x, y = FAMILIES["vit"].inputs(4)["x"], torch.tensor([0, 1, 2, 3])
    runs = {}
    for m in (model, twin):
        leaves = m.particle_parameters(separate=True)
        runs[m] = [
            torch.optim.AdamW([p for p in leaves if p.particle == k], lr=1e-2) for k in range(K)
        ]
    for step in range(6):
        if step == 3:
            model.replace_particle(1, NEW["larger"], seed=4)
            new = [p for p in model.particle_parameters(separate=True) if p.particle == 1]
            runs[model][1] = torch.optim.AdamW(new, lr=1e-2)
        for m, optimizers in runs.items():
            ml.Ensemble(m).backward(lambda m=m: (m(x), y))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for k in (0, 2):
        theirs = own(twin, k)
        for name, t in own(model, k).items():
            torch.testing.assert_close(t, theirs[name], **CLOSE)
    assert any(t.abs().max() > 1e-3 for n, t in own(model, 1).items() if n.endswith("lora_B"))


def test_gradients_that_accumulate_are_kept():
    model = particles()
    model(**FAMILIES["vit"].inputs(4)).square().sum().backward()
    leaves = [p for p in model.particle_parameters(separate=True) if p.particle != 1]
    before = [leaf.grad.clone() for leaf in leaves]
    model.replace_particle(1, NEW["larger"], seed=4)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, before))


def test_a_head_of_another_width():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    each = [peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]) for _ in range(K)]
    model = ml.get_particle_model(
        net, each, seed=[1, 2, 3], heads={"2": [3, None, 4]}, head_init="copy"
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x)
    model.replace_particle(1, seed=8, heads={"2": 9})
    after = model(x)
    assert [t.shape[1] for t in after] == [3, 9, 4]
    for k in (0, 2):
        torch.testing.assert_close(after[k], before[k], **CLOSE)
    model.replace_particle(2, seed=9)  # as it was, with another start
    assert [t.shape[1] for t in model(x)] == [3, 9, 4]
    for again in ({"config": each[0]}, {"heads": {"2": None}}):
        model.replace_particle(0, seed=8, heads={"2": 3})
        model.replace_particle(0, seed=8, **{"heads": None, **again})  # the base's own head
        assert [t.shape[1] for t in model(x)] == [5, 9, 4]
        torch.testing.assert_close(model.particle(0)(x), net_of(model)(x), **CLOSE)


def net_with_a_new_head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()


@pytest.mark.filterwarnings("default:modules_to_save:UserWarning")
def test_a_head_that_is_new_to_the_model_starts_as_it_would_alone():
    plain = peft.LoraConfig(r=2, target_modules=["0"])
    headed = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(net_with_a_new_head(), [plain] * K, seed=[1, 2, 3])
    with pytest.warns(UserWarning, match=r"\['2'\] start from weights drawn anew"):
        model.replace_particle(1, headed, seed=8)
    with pytest.warns(UserWarning, match="drawn anew"):
        alone = ml.get_particle_model(net_with_a_new_head(), headed, 1, seed=[8])
    mine = own(model, 1)
    assert "base.2.module.weight" in mine
    for name, p in alone.named_parameters():
        if p.requires_grad:
            assert torch.equal(mine[name], p[0]), name
    assert not torch.equal(mine["base.2.module.weight"], net_with_a_new_head()[2].weight)
    model.head_init = "copy"
    model.replace_particle(0, headed, seed=8)
    assert torch.equal(own(model, 0)["base.2.module.weight"], net_with_a_new_head()[2].weight)


def test_a_shared_trunk_ends_below_the_new_adapters():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    torch.manual_seed(0)
    last = peft.LoraConfig(r=2, target_modules=["blocks.2"])
    model = ml.get_particle_model(Blocks().double(), [last] * K, seed=[1, 2, 3], share_trunk=True)
    model.replace_particle(1, peft.LoraConfig(r=3, target_modules=["blocks.0"]), seed=4)
    perturb(model)
    shared, x = model.eval().share_trunk, torch.randn(4, 5).double()
    together = model(x)
    model.share_trunk = False
    torch.testing.assert_close(together, model(x), **CLOSE)
    assert shared is True and type(dict(model.lora_layers())["blocks.0"]).__name__ == "LoraLinear"


def test_a_model_of_one_repeats_what_replaced_its_particle():
    base = FAMILIES["vit"].build()
    first = config(4, modules_to_save=["head"])
    model = ml.get_particle_model(base, [first], seed=[1], head_init="copy")
    model.replace_particle(0, config(2), seed=5)
    perturb(model)
    x = FAMILIES["vit"].inputs(4)
    alone = model.eval()(**x)[0]
    model.repeat(3)
    for one in model(**x):
        torch.testing.assert_close(one, alone, **CLOSE)
    assert {p.particle for p in model.particle_parameters(separate=True)} == {0, 1, 2}


def net_of(model):
    """The base without particles, as a function."""

    def base(x):
        with model.base_only():
            return model(x)

    return base


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.replace_particle(3), ValueError, "there are 3 particles; got 3"),
        (lambda m: m.replace_particle(0, config(2, ["nothing"])), ValueError, "nothing"),
        (lambda m: m.replace_particle(0, config(2, lora_bias=True)), NotImplementedError, "bias"),
        (lambda m: m.replace_particle(0, config(2, ["head"])), ValueError, "'head' is saved"),
        (lambda m: m.replace_particle(0, seed=-1), ValueError, "seed"),
        (lambda m: m.replace_particle(0, heads={"head": 3}), ValueError, "not among the modules"),
    ],
)
def test_what_is_refused_changes_nothing(call, error, message):
    model, twin = particles(), particles()
    with pytest.raises(error, match=message):
        call(model)
    x = FAMILIES["vit"].inputs(2)
    assert torch.equal(model(**x), twin(**x)) and model.seeds == twin.seeds
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in twin.named_parameters()
    }
    with model.particles(0, 2), pytest.raises(RuntimeError, match="replace_particle"):
        model.replace_particle(0)
