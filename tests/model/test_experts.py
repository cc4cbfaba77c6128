"""Adapters on transformers' banks of experts (target_parameters): PEFT's, particle by particle."""

import copy
import functools
import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.integrations import moe

import multilora as ml
from models import load_peft, particles_of, peft_tensors
from multilora.attach import particle_seeds
from multilora.checkpoint import load_particles
from multilora.experts import Factors, LoraExperts, matrices, parameters_of, run_bank
from multilora.forward_state import ForwardState
from multilora.optim import EachParticle, clip_grad_norm_
from multilora.peft_tensors import of_particle
from multilora.posthoc.laplace import _as_peft_loads_it

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

K, EXPERTS, TOKENS = 3, 4, 40
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# float64 and some hundred operations; 20 steps of AdamW divide by small gradients.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

# The class, its configuration's own sizes, and the name of its router.
KINDS = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}, "gate"),
    "qwen3": (
        "Qwen3Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8},
        "gate",
    ),
    "gpt-oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 8}, "router"),
}


@functools.cache
def _base(kind):
    torch.manual_seed(0)
    name, sizes, _ = KINDS[kind]
    common = {
        "vocab_size": TOKENS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = getattr(transformers, f"{name}Config")(**common, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        # Biases too, and routers that choose between experts.
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    # Its grouped product takes no float64.
    model.set_experts_implementation("eager")
    return model.double().eval()


def base_of(kind):
    return copy.deepcopy(_base(kind))


def tokens(seed=3):
    return torch.randint(TOKENS, (2, 6), generator=torch.Generator().manual_seed(seed))


def config_of(*parameters, **fields):
    fields = {"r": 2, "lora_alpha": 5, "target_modules": []} | fields
    return peft.LoraConfig(target_parameters=list(parameters or (UP, DOWN)), **fields)


def loss_of(logits, ids):
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), ids[:, 1:].flatten())


def names(tensors):
    return {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


def own(model, particle, of=lambda p: p.detach()):
    """One particle's tensors, or what `of` makes of them, in PEFT's shapes and by its names."""
    stacked = {p: of(p) for p in model.particle_parameters()}
    return names(of_particle(model.base, particle, stacked))


def expert_layers(model):
    return [layer for _, layer in model.lora_layers() if isinstance(layer, LoraExperts)]


# --- equality with PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, others",
    [
        ("mixtral", False),
        ("qwen3", True),
        ("gpt-oss", True),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
        pytest.param("qwen3", False, marks=pytest.mark.slow),
        pytest.param("gpt-oss", False, marks=pytest.mark.slow),
    ],
)
def test_outputs_gradients_and_training(kind, others, tmp_path):
    base, router = base_of(kind), KINDS[kind][2]
    fields = {"target_modules": ["q_proj"], "modules_to_save": [router]} if others else {}
    model = particles_of(base, config_of(**fields), K, head_init="copy")
    model.save_pretrained(tmp_path)
    singles = [load_peft(base, tmp_path / f"particle_{k}") for k in range(K)]
    ids, chosen = tokens(), []
    routers = [m for n, m in model.base.named_modules() if n.endswith(f".{router}")]
    hook = routers[-1].register_forward_hook(lambda m, args, out: chosen.append(out[-1]))
    logits = model(ids).logits
    hook.remove()
    # The particles' routers choose different experts for the same tokens.
    picked = chosen[-1].unflatten(0, (K, -1)).sort(-1).values
    assert not torch.equal(picked[0], picked[1]) and not torch.equal(picked[1], picked[2])
    assert (logits[0] - logits[1]).abs().max() > 1e-3

    ours = torch.optim.AdamW(model.particle_parameters(), 1e-2)
    theirs = [torch.optim.AdamW(peft_tensors(single).values(), 1e-2) for single in singles]
    for step in range(20):
        ours.zero_grad()
        logits = model(ids).logits
        sum(loss_of(z, ids) for z in logits).backward()
        for k, (single, optimizer) in enumerate(zip(singles, theirs)):
            optimizer.zero_grad()
            expected = single(ids).logits
            loss_of(expected, ids).backward()
            torch.testing.assert_close(logits[k], expected, **CLOSE)
            if step == 0:
                grads = {n: p.grad for n, p in peft_tensors(single).items()}
                torch.testing.assert_close(own(model, k, lambda p: p.grad), grads, **CLOSE)
            optimizer.step()
        ours.step()
    for k, single in enumerate(singles):
        trained = {n: p.detach() for n, p in peft_tensors(single).items()}
        torch.testing.assert_close(own(model, k), trained, **CLOSE)


def check_saved(kind, config, path):
    """What is saved is the same function in PEFT and here."""
    base, ids = base_of(kind), tokens()
    model = particles_of(base, config, K)
    model.save_pretrained(path)
    with torch.no_grad():
        logits = model(ids).logits
        for k in range(K):
            torch.testing.assert_close(
                load_peft(base, path / f"particle_{k}")(ids).logits, logits[k], **CLOSE
            )
        again = ml.load_particle_model(base_of(kind), path)
        assert torch.equal(again(ids).logits, logits)
        assert (logits - base(ids).logits).abs().amax((1, 2, 3)).min() > 1e-3
    return model


@pytest.mark.parametrize("parameter", [UP, DOWN])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_one_of_two_parameters(kind, parameter, tmp_path):
    model = check_saved(kind, config_of(parameter), tmp_path)
    last = parameter.rpartition(".")[2]
    assert [layer.parameter for layer in expert_layers(model)] == [last] * 2


# PEFT says so of every pattern for a parameter, and honours them.
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*:RuntimeWarning")
def test_patterns(tmp_path):
    patterns = {
        "rank_pattern": {DOWN: 3, "layers.1.mlp.experts.gate_up_proj": 1},
        "alpha_pattern": {"layers.0.mlp.experts.down_proj": 7},
        "use_rslora": True,
    }
    model = check_saved("qwen3", config_of(**patterns), tmp_path)
    found = [(layer.parameter, layer.rank, layer.scaling) for layer in expert_layers(model)]
    assert found == [
        ("down_proj", 3, 7 / math.sqrt(3)),
        ("gate_up_proj", 2, 5 / math.sqrt(2)),
        ("down_proj", 3, 5 / math.sqrt(3)),
        ("gate_up_proj", 1, 5.0),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_peft_saved(kind, tmp_path):
    base, ids, folders, expected = base_of(kind), tokens(), [], []
    for k in range(2):
        torch.manual_seed(k)
        single = peft.get_peft_model(base_of(kind), config_of(init_lora_weights=False)).eval()
        single.save_pretrained(tmp_path / str(k))
        folders.append(tmp_path / str(k))
        expected.append(single(ids).logits)
    model = ml.load_particle_model(base, folders)
    torch.testing.assert_close(model(ids).logits, torch.stack(expected), **CLOSE)
    # And into a model that is there.
    other = particles_of(base_of(kind), config_of(), 2)
    load_particles(other, folders)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_damaged_folders_are_refused(tmp_path):
    model = particles_of(base_of("mixtral"), config_of(), 1)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "particle_0" / "adapter_config.json").read_text()
    broken = tmp_path / "broken"
    broken.mkdir()
    weights = (tmp_path / "particle_0" / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights)
    # Ranks are only believed where the tensors have them.
    changed = config.replace('"r": 2', '"r": 3')
    for text, message in (
        (changed, r"lora_A.weight has shape \(8, \d+\), .* needs \(12, "),
        (config.replace(f'"{DOWN}"', '""'), "unexpected"),
        (config.replace(f'"{DOWN}"', "3"), "target_parameters = .* is not a list of texts"),
    ):
        assert text != config
        (broken / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ml.load_particle_model(base_of("mixtral"), [broken])


def test_folders_with_other_parameters_are_refused(tmp_path):
    single = peft.get_peft_model(base_of("mixtral"), config_of("q_proj.weight"))
    single.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json .*q_proj\.weight, of a Linear"):
        ml.load_particle_model(base_of("mixtral"), [tmp_path])


def test_starts():
    # As PEFT draws one matrix (E·r, d_in), in the order of its layers.
    model = ml.get_particle_model(base_of("qwen3"), config_of(), K, seed=5)
    for k, seed in enumerate(particle_seeds(5, K)):
        generator = torch.Generator().manual_seed(seed)
        for layer in expert_layers(model):
            flat = torch.empty(layer.lora_A[k].flatten(0, 1).shape)
            nn.init.kaiming_uniform_(flat, a=math.sqrt(5), generator=generator)
            assert torch.equal(layer.lora_A[k].flatten(0, 1), flat.double())
            assert not layer.lora_B[k].any()
    model = ml.get_particle_model(base_of("qwen3"), config_of(r=4, init_lora_weights="gaussian"), 1)
    drawn = torch.cat([layer.lora_A.detach().flatten() for layer in expert_layers(model)])
    assert abs(drawn.std() - 1 / 4) < 0.02


# --- the layer ----------------------------------------------------------------------------------


@moe.use_experts_implementation(has_gate=False, has_post_expert_norm=True)
class PlainBank(nn.Module):
    """Experts without a gate, and with a norm behind them."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.GELU()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, 48, 16))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 16, 48))
        self.post_expert_norm = nn.LayerNorm(16)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def banks():
    inside = "model.layers.0.mlp.experts"
    return {kind: base_of(kind).get_submodule(inside) for kind in ("mixtral", "gpt-oss")} | {
        "plain": PlainBank(None).double()
    }


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "plain"])
def test_unequal_rows_and_choices_of_no_one(name):
    # Particle 1 has no row, and expert 2 is nobody's choice.
    bank = banks()[name].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, ends = random(9, 16), [2, 2, 9]
    index = torch.tensor([0, 1, 3])[torch.randint(3, (9, 2), generator=generator)]
    weights = random(9, 2)
    factors = {}
    for parameter, scaling in zip(parameters_of(bank), (0.5, 2.0)):
        _, d_out, d_in = matrices(bank, parameter).shape
        A, B = random(K, EXPERTS, 3, d_in), random(K, EXPERTS, d_out, 3)
        factors[parameter] = Factors(A, B, scaling)
    y = run_bank(bank, x, index, weights, factors, ends)
    for k, (start, end) in enumerate(zip([0, *ends], ends)):
        changed = copy.deepcopy(bank)
        for parameter, (A, B, scaling) in factors.items():
            matrices(changed, parameter).data.add_(scaling * (B[k] @ A[k]))
        rows = slice(start, end)
        expected = moe.batched_mm_experts_forward(changed, x[rows], index[rows], weights[rows])
        torch.testing.assert_close(y[rows], expected, rtol=1e-12, atol=1e-12)


def test_banks_of_older_transformers_say_less():
    base, ids = base_of("mixtral"), tokens()
    logits = particles_of(base, config_of(), K)(ids).logits
    for layer in base.model.layers:
        for name in ("has_gate", "has_post_expert_norm", "_is_expert_parallel"):
            delattr(layer.mlp.experts, name)
    assert torch.equal(particles_of(base, config_of(), K)(ids).logits, logits)


def test_one_after_another_and_some_of_them():
    base, ids = base_of("mixtral"), tokens()
    model = particles_of(base, config_of(), K)
    logits = model(ids).logits
    loop = particles_of(base, config_of(), K, fold="loop")
    torch.testing.assert_close(loop(ids).logits, logits, **CLOSE)
    with model.particles(1, 3):
        torch.testing.assert_close(model(ids).logits, logits[1:], **CLOSE)
    torch.testing.assert_close(model.particle(1)(ids).logits, logits[1], **CLOSE)
    with model.base_only():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, **CLOSE)


def test_half_precision_has_float32_masters():
    base = base_of("qwen3").bfloat16()
    model = particles_of(base, config_of(), 2)
    assert {layer.lora_A.dtype for layer in expert_layers(model)} == {torch.float32}
    layer = expert_layers(model)[0]
    x = torch.randn(6, 16)
    index, weights = torch.randint(EXPERTS, (6, 2)), torch.rand(6, 2)
    y = layer_alone(layer, x.bfloat16(), index, weights)
    exact = layer_alone(copy.deepcopy(layer).float(), x.bfloat16().float(), index, weights)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    # In float32 under autocast, where the layer's products are those of half precision.
    with torch.autocast("cpu", torch.bfloat16):
        y = layer_alone(copy.deepcopy(layer).float(), x, index, weights)
    exact = layer_alone(copy.deepcopy(layer).float(), x, index, weights)
    assert 1e-4 * exact.norm() < (y.float() - exact).norm() < 0.02 * exact.norm()


def layer_alone(layer, *args):
    """The layer with its first particle."""
    with ForwardState(None, 1, part=lambda p: p[:1]).active():
        return layer(*args)


@pytest.mark.slow
def test_compile():
    model = particles_of(base_of("gpt-oss"), config_of(), 2)
    layer = expert_layers(model)[0]
    x = torch.randn(6, 16, dtype=torch.float64)
    index, weights = torch.randint(EXPERTS, (6, 2)), torch.rand(6, 2, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradients(function):
        y = function(x, index, weights)
        return [y, *torch.autograd.grad(y.sum(), [layer.lora_A, layer.lora_B])]

    state = ForwardState(None, 2, rows=6)
    with state.active():
        expected = gradients(layer)
    torch.testing.assert_close(gradients(compiled), expected)


# --- methods and other tools --------------------------------------------------------------------


def test_every_expert_is_an_adapter():
    model = particles_of(base_of("mixtral"), config_of(), K)
    adapters = model.adapters()
    assert [a.name for a in adapters[:2]] == [
        "model.layers.0.mlp.experts.down_proj[0]",
        "model.layers.0.mlp.experts.down_proj[1]",
    ]
    assert len(adapters) == 2 * 2 * EXPERTS
    first = adapters[1]
    assert first.lora_A.shape == (K, 2, 24) and first.lora_B.shape == (K, 16, 2)
    (grad,) = torch.autograd.grad(first.lora_A.sum(), first.parameters[0])
    assert grad[:, 1].eq(1).all() and grad.sum() == first.lora_A.numel()
    # Cosines of the updates as they are.
    flat = torch.cat([a.scaling * (a.lora_B @ a.lora_A).flatten(1) for a in adapters], 1)
    expected = F.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(model.cosines(), expected.detach(), **CLOSE)


class Apart(nn.Module):
    """The model with a parameter for every expert, as methods see other adapters."""

    def __init__(self, model):
        super().__init__()
        self.whole = [model]
        self.processes, self.num_particles = model.processes, model.num_particles
        found = [
            a._replace(lora_A=nn.Parameter(a.lora_A.clone()), lora_B=nn.Parameter(a.lora_B.clone()))
            for a in model.adapters()
        ]
        self.found = [a._replace(parameters=(a.lora_A, a.lora_B), expert=None) for a in found]

    def adapters(self):
        return self.found

    def particle_parameters(self):
        return [p for adapter in self.found for p in adapter.parameters]

    def heads(self):
        return []

    def forward(self, ids):
        (model,) = self.whole
        tensors = {}
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            mine = [
                ours.parameters[i]
                for theirs, ours in zip(model.adapters(), self.found)
                for i in (0, 1)
                if theirs.parameters[i] is parameter
            ]
            if mine:
                tensors[name] = torch.stack(mine, 1)
        return torch.func.functional_call(model, tensors, (ids,))


METHODS = {
    "own": lambda m: ml.SVGD(m, gamma=0.3),
    "stein, global, mixed": lambda m: ml.SVGD(
        m, gamma=0.3, repulse="stein", scope="global", drive="mix"
    ),
    "density, prior": lambda m: ml.SVGD(m, gamma=0.3, normalise="density", prior_precision=0.1),
    "weights": lambda m: ml.MutualLearning(m, alpha=0.5, beta=0, features=None, start=0),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_treat_experts_as_adapters(name):
    model = particles_of(base_of("mixtral"), config_of(), K)
    apart, ids = Apart(model), tokens()
    gradients = []
    for m in (model, apart):
        method = METHODS[name](m)
        method.backward(lambda m=m: (m(ids).logits[:, :, :-1].flatten(1, 2), ids[:, 1:].flatten()))
        gradients.append([p.grad for p in m.particle_parameters()])
    whole = dict(zip(model.particle_parameters(), gradients[0]))
    for theirs, ours in zip(model.adapters(), apart.adapters()):
        for stacked, alone in zip(theirs.parameters, ours.parameters):
            torch.testing.assert_close(whole[stacked][:, theirs.expert], alone.grad, **CLOSE)
            assert alone.grad.any()


def test_a_copy_of_a_method_moves_its_own_experts():
    model, ids = particles_of(base_of("mixtral"), config_of(DOWN), K), tokens()
    both = [(model, ml.SVGD(model, gamma=0.3))]
    both.append(copy.deepcopy(both[0]))
    for m, method in both:
        method.backward(lambda m=m: (m(ids).logits[:, :, :-1].flatten(1, 2), ids[:, 1:].flatten()))
    ours, theirs = ([p.grad for p in m.particle_parameters()] for m, _ in both)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(ours, theirs))
    assert len(ours) == 4


def test_separate_parameters_and_clipping():
    config, ids = config_of(), tokens()
    stepped = []
    for separate in (False, True):
        model = particles_of(base_of("mixtral"), config, K)
        parameters = model.particle_parameters(separate=separate)
        optimizer = torch.optim.AdamW(parameters, 1e-2)
        if separate:
            optimizer = EachParticle(parameters, lambda g: torch.optim.AdamW(g, 1e-2))
        for _ in range(2):
            optimizer.zero_grad()
            sum(loss_of(z, ids) for z in model(ids).logits).backward()
            norms = clip_grad_norm_(model, 0.1)
            assert norms.shape == (K,) and norms.min() > 0.1
            optimizer.step()
        stepped.append([p.detach().clone() for p in model.particle_parameters()])
    torch.testing.assert_close(*stepped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "svd"])
def test_soups(kind, tmp_path):
    base, ids = base_of("gpt-oss"), tokens()
    model = particles_of(base, config_of(), K)
    # Of one particle, the best approximation is exact.
    weights = torch.tensor([0.5, 0.0, 0.25] if kind == "exact" else [0.0, 1.0, 0.0])
    lost = model.soup(tmp_path, kind, weights)["relative_error"]
    assert set(lost) == {f"model.layers.{i}.{name}" for i in (0, 1) for name in (UP, DOWN)}
    assert max(lost.values()) < 1e-12
    with torch.no_grad():
        soup = load_peft(base, tmp_path)(ids).logits
        with model.mixtures(weights[None]):
            torch.testing.assert_close(model(ids).logits[0], soup, **CLOSE)
    if kind == "svd":
        torch.testing.assert_close(soup, model(ids).logits[1], **CLOSE)


def test_posterior_of_one_adapter_is_refused(tmp_path):
    model = particles_of(base_of("mixtral"), config_of(), 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="target_parameters, for which laplace"):
        _as_peft_loads_it(tmp_path / "particle_0", base_of("mixtral"), None, "all")
    with pytest.raises(NotImplementedError, match="experts of target_parameters"):
        ml.posthoc.bayesianize(model, lambda m: 0.0, tolerance=0.1, num_particles=2)


# --- refusals -----------------------------------------------------------------------------------


class OtherBank(nn.Module):
    """Experts with a forward of their own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "kind, parameter, message",
    [
        ("mixtral", "q_proj.weight", r"self_attn\.q_proj\.weight, of a Linear, .*target_modules"),
        ("mixtral", "gate.weight", r"0\.mlp\.gate\.weight, of a MixtralTopKRouter"),
        ("gpt-oss", "experts.down_proj_bias", r"experts\.down_proj_bias, and the matrices of Gpt"),
    ],
)
def test_other_parameters(kind, parameter, message):
    base = base_of(kind)
    before = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(TypeError, match=message):
        ml.get_particle_model(base, config_of(parameter), K)
    assert not any(isinstance(m, LoraExperts) for m in base.modules())
    assert before == {n: p.requires_grad for n, p in base.named_parameters()}


def test_other_modules():
    base = nn.Sequential(OtherBank(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"0\.gate_up_proj, of a OtherBank, whose forward"):
        ml.get_particle_model(base, config_of("0.gate_up_proj", target_modules=["1"]), K)
    hooked = base_of("mixtral")
    hooked.get_submodule("model.layers.1.mlp.experts").register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.experts.* with hooks"):
        ml.get_particle_model(hooked, config_of(), K)
    replaced = base_of("mixtral")
    bank = replaced.get_submodule("model.layers.1.mlp.experts")
    bank.forward = bank.forward
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.experts.* forward was replaced"):
        ml.get_particle_model(replaced, config_of(), K)
    sharded = base_of("mixtral")
    sharded.get_submodule("model.layers.0.mlp.experts")._is_expert_parallel = True
    with pytest.raises(TypeError, match="shared out to processes"):
        ml.get_particle_model(sharded, config_of(), K)


def test_dropout():
    with pytest.raises(ValueError, match=r"lora_dropout = 0\.1 beside target_parameters"):
        ml.get_particle_model(base_of("mixtral"), config_of(lora_dropout=0.1), K)


def test_a_bank_that_is_to_be_trained():
    model = particles_of(base_of("mixtral"), config_of(DOWN), 2)
    expert_layers(model)[0].plain_layer.gate_up_proj.requires_grad_()
    with pytest.raises(ValueError, match=r"gate_up_proj .* is frozen"):
        model(tokens())
