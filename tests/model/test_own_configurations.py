"""Particles with configurations of their own: ranks, scalings, targets, dropout, heads."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES
from multilora import layers
from multilora.checkpoint import load_particles
from multilora.peft_format import read_tensors

K = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SEEDS = [11, 12, 13]
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save:UserWarning")


def configurations():
    """Three that differ in all that PEFT's files can hold."""
    return [
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        peft.LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj"]),
        peft.LoraConfig(
            r=3,
            lora_alpha=8,
            target_modules=["v_proj", "up_proj"],
            rank_pattern={"layers.0.self_attn.v_proj": 4},
            init_lora_weights="gaussian",
            modules_to_save=["lm_head"],
        ),
    ]


def particles(configs=None, **options):
    options = {"seed": SEEDS, "head_init": "copy"} | options
    base = FAMILIES["llama"].build()
    configs = configurations() if configs is None else configs
    return ml.get_particle_model(base, configs, **options).eval()


@torch.no_grad()
def moved(model):
    """The same model with noise on all factors, padding included."""
    generator = torch.Generator().manual_seed(0)
    for p in model.particle_parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    return model


def paddings(model):
    for _, layer in model.lora_layers():
        for k in range(model.num_particles):
            rank = layer.adapted_by(k).rank
            yield layer.lora_A[k, rank:]
            yield layer.lora_B[k, :, rank:]


def is_padded_with_zeros(model):
    assert sum(t.numel() for t in paddings(model)) > 100
    return all(not t.detach().any() for t in paddings(model))


def test_files_hold_true_ranks_and_peft_computes_the_same(tmp_path):
    model, ids = moved(particles()), FAMILIES["llama"].inputs(3)
    logits = model(**ids).logits
    assert (logits[0] - logits[1]).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    for k, config in enumerate(configurations()):
        plain = FAMILIES["llama"].build()
        one = peft.PeftModel.from_pretrained(plain, tmp_path / f"particle_{k}").eval()
        assert one.peft_config["default"].r == config.r
        torch.testing.assert_close(one(**ids).logits, logits[k], **CLOSE)
        torch.testing.assert_close(model.particle(k)(**ids).logits, logits[k], **CLOSE)
    back = ml.load_particle_model(FAMILIES["llama"].build(), tmp_path).eval()
    assert torch.equal(back(**ids).logits, logits) and back.seeds == model.seeds
    assert [c.r for c in back.peft_configs] == [2, 5, 3] and not back.is_uniform
    # Any of them, in any order, as adapters that were trained apart.
    chosen = [tmp_path / f"particle_{k}" for k in (2, 0)]
    with pytest.raises(ValueError, match=r"own_configurations=True"):
        ml.load_particle_model(FAMILIES["llama"].build(), chosen)
    plain = FAMILIES["llama"].build()
    some = ml.load_particle_model(plain, chosen, own_configurations=True).eval()
    torch.testing.assert_close(some(**ids).logits, logits[[2, 0]], **CLOSE)
    # And into a model of the same configurations.
    other = particles()
    load_particles(other, tmp_path)
    load_particles(other, [tmp_path / f"particle_{k}" for k in range(K)])
    assert torch.equal(other(**ids).logits, logits)
    with pytest.raises(ValueError, match=r"particle_0.*r = 2; the model has r = 5"):
        load_particles(particles([configurations()[1]] * K), tmp_path)


@pytest.mark.parametrize("index", [[0, 2, 1, 1, 0, 2], [1, 1, 0, 1], [2, 0]])
@pytest.mark.parametrize("rows", ["kernel", "apart", "padded"])
@pytest.mark.parametrize("trains", [True, False])
def test_rows_of_unlike_particles(index, rows, trains, monkeypatch, request):
    """However a CPU computes them: in its kernel, one after another, or with padded ranks."""
    monkeypatch.setattr(layers, "MANY_NUMBERS", 10**9 if rows == "padded" else 0)
    block = ml.use_backend("cpu" if rows == "kernel" else "reference")
    block.__enter__()
    request.addfinalizer(lambda: block.__exit__(None, None, None))
    model, ids = moved(particles()), FAMILIES["llama"].inputs(len(index))["input_ids"]
    params = model.particle_parameters()

    def gradients(logits):
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        return torch.autograd.grad((logits * weights).sum(), params, materialize_grads=True)

    with torch.set_grad_enabled(trains):
        got = model(ids, particle=index).logits
        alone = [model.particle(k)(ids[n : n + 1]).logits for n, k in enumerate(index)]
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)
    if trains:
        for one, other in zip(gradients(got), gradients(torch.cat(alone))):
            torch.testing.assert_close(one, other, **CLOSE)


def test_adapters_of_one_rank_on_other_layers():
    each = [
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        for targets in (["q_proj", "v_proj"], ["up_proj", "down_proj"])
    ]
    model = moved(particles(each, seed=SEEDS[:2]))
    ids, index = FAMILIES["llama"].inputs(4)["input_ids"], [0, 1, 1, 0]
    with torch.no_grad():
        rows = model(ids, particle=index).logits
        alone = [model.particle(k)(ids[n : n + 1]).logits for n, k in enumerate(index)]
    torch.testing.assert_close(rows, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1]])
def test_rows_have_their_particles_dropout(index, monkeypatch):
    monkeypatch.setattr(layers, "MANY_NUMBERS", 0)
    each = [
        peft.LoraConfig(r=r, target_modules=["q_proj"], lora_dropout=rate)
        for r, rate in ((2, 0.0), (3, 0.5))
    ]
    model = moved(particles(each, seed=SEEDS[:2])).train()
    ids = FAMILIES["llama"].inputs(len(index))["input_ids"]
    first, second = (model(ids, particle=index).logits for _ in range(2))
    for n, k in enumerate(index):
        assert torch.equal(first[n], second[n]) == (k == 0)
    first.sum().backward()


def test_a_bias_of_the_base_that_trains_gets_its_gradient():
    torch.manual_seed(0)
    each = [peft.LoraConfig(r=r, target_modules=["0"]) for r in (2, 3)]
    model = ml.get_particle_model(nn.Sequential(nn.Linear(4, 3)).double(), each, seed=[1, 2])
    bias = model.base[0].base_layer.bias.requires_grad_()
    model(torch.ones(3, 4).double(), particle=[0, 1, 1]).sum().backward()
    assert torch.equal(bias.grad, torch.full((3,), 3.0).double())


def test_a_particle_starts_as_it_would_alone():
    model = particles()
    together = dict(model.lora_layers())
    for k, config in enumerate(configurations()):
        alone = particles(config, num_particles=1, seed=[SEEDS[k]])
        layers = dict(alone.lora_layers())
        assert {n for n, layer in together.items() if layer.adapted_by(k).rank} == layers.keys()
        for name, layer in layers.items():
            own = together[name].part("lora_A", together[name].lora_A, k)
            assert torch.equal(own, layer.lora_A[0])
    assert is_padded_with_zeros(model)
    assert [len(set(layer.each)) > 1 for layer in together.values()] == [True] * len(together)


class Noisy(torch.optim.SGD):
    """It moves every number, as a sampler does."""

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.ones_like(p), alpha=1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: Noisy(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("rows", [None, [2, 0, 1, 1], [0, 1, 1, 2, 2, 0]])
def test_padding_stays_zero(optimizer, rows):
    model, inputs = particles(), FAMILIES["llama"].inputs(2)
    method = ml.Ensemble(model)

    @torch.no_grad()
    def run():
        model(**FAMILIES["llama"].inputs(2 if rows is None else len(rows)), particle=rows)

    run()  # the first one of a kind is checked, by other means
    steps = optimizer(model.particle_parameters())
    targets = inputs["input_ids"]
    for _ in range(3):
        method.backward(lambda: (model(**inputs).logits, targets))
        assert all(not t.any() for t in gradients_of_padding(model))
        steps.step()
        steps.zero_grad()
    run()
    assert is_padded_with_zeros(model)


def test_padding_of_assigned_factors_is_cleared():
    model, x = particles(), FAMILIES["llama"].inputs(2)
    with torch.no_grad():
        model(**x)
        dirty = {n: t.clone() for n, t in model.state_dict().items()}
        for name, t in dirty.items():
            if ".lora_" in name:
                t.add_(1)
        before = {n: t._version for n, t in model.named_parameters()}
        model.load_state_dict(dirty, assign=True)
        assert not is_padded_with_zeros(model)
        for name, t in model.named_parameters():
            while t._version < before[name]:  # versions alone do not tell
                torch.autograd.graph.increment_version(t)
            assert t._version == before[name]
        model(**x)
    assert is_padded_with_zeros(model)


def test_particles_that_are_made_in_inference_mode():
    x = FAMILIES["llama"].inputs(2)
    expected = particles()(**x).logits.detach()
    with torch.inference_mode():
        model = particles()
        torch.testing.assert_close(model(**x).logits, expected, rtol=1e-9, atol=1e-9)
        rows = model(**x, particle=[K - 1, 0]).logits
    torch.testing.assert_close(rows[0], expected[K - 1, 0], rtol=1e-9, atol=1e-9)


def gradients_of_padding(model):
    for _, layer in model.lora_layers():
        for k in range(model.num_particles):
            rank = layer.adapted_by(k).rank
            yield layer.lora_A.grad[k, rank:]
            yield layer.lora_B.grad[k, :, rank:]


def test_separate_parameters_have_the_true_shapes(tmp_path):
    model = moved(particles())
    model.save_pretrained(tmp_path)
    leaves = model.particle_parameters(separate=True)
    for k in range(K):
        one = peft.PeftModel.from_pretrained(
            FAMILIES["llama"].build(), tmp_path / f"particle_{k}", is_trainable=True
        )
        shapes = sorted(tuple(p.shape) for p in one.parameters() if p.requires_grad)
        assert sorted(tuple(leaf.shape) for leaf in leaves if leaf.particle == k) == shapes
    # Their gradients are parts of the stacked ones, and clearing one keeps the others.
    inputs = FAMILIES["llama"].inputs(2)
    model(**inputs).logits.square().mean().backward()
    before = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        if leaf.particle == 1:
            leaf.grad = None
    for leaf, grad in zip(leaves, before):
        assert leaf.grad is None if leaf.particle == 1 else torch.equal(leaf.grad, grad)
    for leaf in leaves:
        leaf.grad = None
    assert all(p.grad is None for p in model.particle_parameters())


def dense(model):
    """ΔW (K, d_out, d_in) of every layer, from the true factors."""
    for _, layer in model.lora_layers():
        A, B = layer.lora_A, layer.lora_B
        yield torch.stack(
            [
                a.scaling * B[k, :, : a.rank] @ A[k, : a.rank]
                for k, a in enumerate(layer.adapted_by(k) for k in range(model.num_particles))
            ]
        )


def test_cosines_and_distances_ignore_padding():
    model = moved(particles())
    whole = torch.cat([W.flatten(1) for W in dense(model)], 1).detach()
    unit = whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.cosines(), unit @ unit.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("repulse", ["own", "stein"])
def test_svgd_is_that_of_the_true_updates(repulse):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    configs = [
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]),
        peft.LoraConfig(r=3, lora_alpha=1, target_modules=["0"]),
        peft.LoraConfig(r=1, target_modules=["2", "0"]),
    ]
    model = moved(ml.get_particle_model(net, configs, seed=SEEDS))
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 5, (9,))
    method = ml.SVGD(model, gamma=0.7, drive="mix", repulse=repulse)
    method.backward(lambda: (model(x), y))
    got = [p.grad.clone() for p in model.particle_parameters()]
    losses = [nn.functional.cross_entropy(model.particle(k)(x), y) for k in range(K)]
    drives = torch.autograd.grad(sum(losses), model.particle_parameters())
    pairs = list(zip(*[iter(model.particle_parameters())] * 2))
    i, j = torch.triu_indices(K, K, 1)
    for layer, (W, factors) in enumerate(zip(dense(model), pairs)):
        D = (W[:, None] - W).flatten(2).square().sum(-1)
        width = D.detach()[i, j].median() / math.log(K + 1)
        k = (-D / width).exp().detach()
        # ∇_i of k_ij moves the first particle, −∇_j the second one.
        first, second = (W, W.detach()) if repulse == "own" else (W.detach(), W)
        sign = 1.0 if repulse == "own" else -1.0
        apart = (-(first[:, None] - second).flatten(2).square().sum(-1) / width).exp()
        for f, factor in enumerate(factors):
            drive = torch.einsum("ij,jab->iab", k, drives[2 * layer + f]) / K
            if repulse == "own":
                force = torch.autograd.grad(apart.sum(), factor, retain_graph=True)[0]
            else:
                force = stein(apart, factor)
            expected = (drive + sign * 0.7 / K * force) * masks(model)[layer][f]
            torch.testing.assert_close(got[2 * layer + f], expected, rtol=1e-9, atol=1e-11)


def masks(model):
    """1 for a number of a particle, 0 for padding: of A and of B, for every layer."""
    found = []
    for _, layer in model.lora_layers():
        A, B = torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
        for k in range(model.num_particles):
            rank = layer.adapted_by(k).rank
            A[k, :rank], B[k, :, :rank] = 1, 1
        found.append((A, B))
    return found


def stein(apart, factor):
    """Σ_j ∇_j k_ij in the coordinates of particle j's factors, (K, ...)."""
    rows = []
    for i in range(K):
        rows.append(torch.autograd.grad(apart[i].sum(), factor, retain_graph=True)[0].sum(0))
    return torch.stack(rows)


def test_particles_run_a_few_at_a_time():
    model, inputs = moved(particles()), FAMILIES["llama"].inputs(2)
    whole = model(**inputs).logits
    for chunk in (1, 2):
        parts = model.in_chunks(chunk, lambda: model(**inputs).logits)
        torch.testing.assert_close(parts, whole, **CLOSE)
    loop = copy.deepcopy(model)
    loop.fold = "loop"
    torch.testing.assert_close(loop(**inputs).logits, whole, **CLOSE)


def test_dropout_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    rates = (0.0, 0.25, 0.75)
    configs = [peft.LoraConfig(r=2, lora_dropout=p, target_modules=["0"]) for p in rates]
    model = moved(ml.get_particle_model(net, configs, seed=SEEDS))
    x = torch.randn(1, 4, dtype=torch.float64)
    draws = model.train()(x.expand(20_000, 4))
    torch.testing.assert_close(draws[0], model.eval()(x)[0].expand(20_000, 3), **CLOSE)
    (layer,) = (layer for _, layer in model.lora_layers())
    for k, p in enumerate(rates):
        update = layer.adapted_by(k).scaling * (layer.lora_B[k] @ layer.lora_A[k])
        variance = p / (1 - p) * (update**2 @ x[0] ** 2)
        torch.testing.assert_close(draws[k].mean(0), model(x)[k, 0], rtol=0, atol=0.1)
        torch.testing.assert_close(draws[k].var(0), variance, rtol=0.1, atol=1e-12)


def heads(entries, base=None):
    torch.manual_seed(0)
    net = base or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    config = {"r": 2, "target_modules": ["0"], "modules_to_save": ["2"]}
    configs = [peft.LoraConfig(**config) for _ in entries]
    return ml.get_particle_model(net, configs, seed=SEEDS, heads={"2": entries})


def test_scalings_and_rates_outlive_other_dtypes():
    configs = [
        peft.LoraConfig(r=r, lora_alpha=1, lora_dropout=0.1, target_modules=["0"]) for r in (2, 3)
    ]
    net = nn.Sequential(nn.Linear(4, 4)).double()
    model = ml.get_particle_model(net, configs, seed=[1, 2])
    layer = model.base[0]
    before = layer.scales.clone(), layer.rates.clone()
    model.to(torch.bfloat16)
    assert layer.scales.dtype == layer.rates.dtype == torch.float32
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.double()
    assert torch.equal(layer.scales, before[0]) and torch.equal(layer.rates, before[1])


def test_heads_of_other_widths(tmp_path):
    start = nn.Linear(8, 7).double()
    model, x = moved(heads([3, None, start])), torch.randn(6, 4, dtype=torch.float64)
    logits = model(x)
    assert [tuple(t.shape) for t in logits] == [(6, 3), (6, 5), (6, 7)]
    rows = model(x, particle=[0, 2, 1, 1, 0, 2])
    for n, k in enumerate([0, 2, 1, 1, 0, 2]):
        torch.testing.assert_close(rows[n, : logits[k].shape[1]], logits[k][n], **CLOSE)
    model.save_pretrained(tmp_path)
    for k, width in enumerate((3, 5, 7)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        net[2] = nn.Linear(8, width).double()
        one = peft.PeftModel.from_pretrained(net, tmp_path / f"particle_{k}")
        torch.testing.assert_close(one(x), logits[k], **CLOSE)
        torch.testing.assert_close(model.particle(k)(x), logits[k], **CLOSE)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    back = ml.load_particle_model(net, tmp_path)
    for ours, theirs in zip(back(x), logits):
        assert torch.equal(ours, theirs)
    with pytest.raises(NotImplementedError, match="widths of their own"):
        ml.predict(model, x)
    with model.base_only():
        assert model(x).shape == (6, 5)


def test_a_head_starts_as_given():
    start = nn.Linear(8, 7).double()
    model = heads([3, None, start])
    weight = model.get_parameter("base.2.module.weight")
    assert weight.shape == (K, 7, 8)
    assert torch.equal(weight[2], start.weight)
    assert 0.1 < weight[0, :3].std() < 0.3 and weight[0, :3].abs().max() <= 8**-0.5
    assert not weight[0, 3:].any() and not weight[1, 5:].any()


def test_what_a_particle_does_not_save_it_does_not_train(tmp_path):
    model, inputs = particles(), FAMILIES["llama"].inputs(2)
    head = model.get_parameter("base.lm_head.module.weight")
    model(**inputs).logits.square().mean().backward()
    assert not head.grad[:2].any() and head.grad[2].any()
    with torch.no_grad():
        head += 1.0  # only the third particle's counts
    base = FAMILIES["llama"].build()(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits[:2], base.expand(2, *base.shape), **CLOSE)
    model.save_pretrained(tmp_path)
    names = [read_tensors(tmp_path / f"particle_{k}/adapter_model.safetensors") for k in range(K)]
    assert ["lm_head" in " ".join(tensors) for tensors in names] == [False, False, True]


REFUSED = [
    (lambda: particles([]), ValueError, "0 configurations"),
    (lambda: particles(num_particles=2), ValueError, "3 configurations.*num_particles=2"),
    (lambda: particles([*configurations()[:2], None]), TypeError, "particle 2: config must be"),
    (
        lambda: particles([*configurations()[:2], peft.LoraConfig(target_modules=["nothing"])]),
        ValueError,
        "particle 2: .*nothing",
    ),
    (
        lambda: particles(
            [configurations()[2], peft.LoraConfig(target_modules=["lm_head"])], seed=0
        ),
        ValueError,
        r"particles \[0\] save a copy of 'lm_head', in which particles \[1\] adapt",
    ),
    (lambda: heads([3, 4]), ValueError, "one integer or 2"),
    (lambda: heads([3, "4", None]), TypeError, "particle 1 of '2' needs a number of outputs"),
    (lambda: heads([3, nn.Linear(9, 2), None]), ValueError, "particle 1 of '2' is Linear"),
    (
        lambda: particles(heads={"lm_head": [3, None, None]}),
        ValueError,
        "particle 0 of 'lm_head' has a head of its own, and modules_to_save do not name it",
    ),
    (lambda: particles(heads={"norm": [1, 2, 3]}), ValueError, "'norm' is not among the modules"),
    (lambda: particles(heads={"lm_head": [None]}), ValueError, "needs 3 entries"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_does_not_fit_names_the_particle(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_needs_equal_particles_says_so(tmp_path):
    model = particles()
    for call in (
        lambda: model.soup(tmp_path),
        lambda: model.mixtures(torch.ones(1, K).double()).__enter__(),
        lambda: ml.mc_dropout(model).__enter__(),
        lambda: ml.Variational(model, num_data=9),
        lambda: ml.SVGD(model),  # one head of three is trained
    ):
        with pytest.raises(NotImplementedError, match=r"one configuration|the same ones"):
            call()
