"""Particles that are K copies of the whole base: get_particle_model(base, None, K)."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import multilora as ml
from models import FAMILIES, logits_of
from multilora.checkpoint import load_particles
from multilora.integrations.transformers import ParticleTrainer
from oracles import relative_error


def copies(name="vit", K=3, dtype=torch.float64, spread=0.05, **options):
    """The plain base, and copies of it that differ in all tensors."""
    base = FAMILIES[name].build(dtype)
    for module in base.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # copies have none
    model = ml.get_particle_model(base, None, K, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.particle_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=spread)
    return base, model


def weights_of(model, k):
    return {name: p[k] for name, p in model.base.module.named_parameters()}


def alone(base, model, k, x):
    """The base with particle k's weights."""
    return logits_of(functional_call(base, weights_of(model, k), (), x))


def closure_of(model, x, y):
    return lambda: (logits_of(model(**x)), y)


@pytest.mark.parametrize(
    "name, fold",
    [("vit", "batch"), ("mlp", "batch"), ("llama", "batch")]
    + [(name, "loop") for name in ("vit", "bert", "llama", "gpt2")],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_each_particle_is_the_base_with_its_weights(name, fold, mode):
    family = FAMILIES[name]
    base, model = copies(name, fold=fold)
    x, x_own = family.inputs(), family.particle_inputs(3)
    if (name, fold) == ("llama", "batch"):  # it looks into a mask, which vmap cannot
        del x["attention_mask"], x_own["attention_mask"]
    getattr(model, mode)()
    together, own = logits_of(model(**x)), logits_of(model(**x_own, per_particle=True))
    for k in range(3):
        expected = alone(base, model, k, x)
        assert relative_error(together[k], expected) < family.tolerance
        assert relative_error(logits_of(model.particle(k)(**x)), expected) < family.tolerance
        mine = {n: t[k] for n, t in x_own.items()}
        assert relative_error(own[k], alone(base, model, k, mine)) < family.tolerance
    assert relative_error(together[0], together[1]) > 1e-3


def test_gradients_are_those_of_each_model_alone():
    base, model = copies()
    x, y = FAMILIES["vit"].inputs(), torch.tensor([0, 3])
    ml.Ensemble(model).backward(closure_of(model, x, y))
    for k in range(3):
        weights = {n: w.detach().requires_grad_() for n, w in weights_of(model, k).items()}
        loss = nn.functional.cross_entropy(functional_call(base, weights, (), x), y)
        for (n, p), g in zip(
            model.base.module.named_parameters(),
            torch.autograd.grad(loss, list(weights.values())),
        ):
            assert relative_error(p.grad[k], g) < 1e-10, n


def test_the_base_is_unchanged_and_stays_reachable():
    base = FAMILIES["vit"].build()
    before = copy.deepcopy(base.state_dict())
    model = ml.get_particle_model(base, None, 2)
    x, y = FAMILIES["vit"].inputs(), torch.tensor([0, 3])
    expected = base(**x)
    optimizer = torch.optim.SGD(model.particle_parameters(), 0.1)
    ml.Ensemble(model).backward(closure_of(model, x, y))
    optimizer.step()
    with model.base_only():
        assert torch.equal(model(**x), expected)
    assert relative_error(model(**x)[0], expected) > 1e-3
    assert all(torch.equal(base.state_dict()[n], t) for n, t in before.items())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert list(model.lora_layers()) == [] and model.adapters() == []


def test_copies_start_equal_but_for_the_heads():
    base = FAMILIES["vit"].build()
    with pytest.warns(UserWarning, match=r"\['head'\] start from weights drawn anew"):
        model = ml.get_particle_model(base, None, 3, seed=4, head="head")
    said = ml.get_particle_model(base, None, 3, seed=4, head="head", head_init="reset")
    more = ml.get_particle_model(base, None, 5, seed=4, head=["head"], head_init="reset")
    same = ml.get_particle_model(base, None, 3, seed=4, head="head", head_init="copy")
    original = dict(base.named_parameters())
    for name, p in said.base.module.named_parameters():
        if name == "head.weight":
            assert not torch.equal(p[0], p[1]) and not torch.equal(p[0], original[name])
            assert p[0].std().item() == pytest.approx(original[name].std().item(), rel=0.3)
            assert torch.equal(more.base.module.get_parameter(name)[:3], p)
            assert torch.equal(model.base.module.get_parameter(name), p)
        else:
            assert torch.equal(p, original[name].expand_as(p))
        copied = same.base.module.get_parameter(name)
        assert torch.equal(copied, original[name].expand_as(copied))


def test_what_the_base_froze_stays_frozen():
    base = FAMILIES["vit"].build()
    base.pos_embed.requires_grad_(False)
    model = ml.get_particle_model(base, None, 2)
    names = [n for n, p in model.base.module.named_parameters() if p.requires_grad]
    assert names == [n for n, _ in base.named_parameters() if n != "pos_embed"]
    assert len(model.particle_parameters()) == len(names)


def test_tied_weights_stay_one(tmp_path):
    """GPT-2's head is its embedding: one stacked tensor, with the gradient of both uses."""
    family = FAMILIES["gpt2"]
    base, model = copies("gpt2", fold="loop")
    assert base.lm_head.weight is base.transformer.wte.weight
    assert model.base.module.lm_head.weight is model.base.module.transformer.wte.weight
    assert len(model.particle_parameters()) == len(list(base.parameters()))
    x = family.inputs()
    ml.Ensemble(model).backward(closure_of(model, x, torch.zeros(2, 5, dtype=torch.long)))
    weights = {n: w.detach().requires_grad_() for n, w in weights_of(model, 1).items()}
    logits = functional_call(base, weights, (), x).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(10, dtype=torch.long))
    (g,) = torch.autograd.grad(loss, weights["transformer.wte.weight"])
    assert relative_error(model.base.module.transformer.wte.weight.grad[1], g) < 1e-10
    expected = logits_of(model(**x))
    model.save_pretrained(tmp_path)
    loaded = ml.load_particle_model(copy.deepcopy(base), tmp_path, fold="loop").eval()
    assert torch.equal(logits_of(loaded(**x)), expected)


def test_half_precision_has_float32_masters(tmp_path):
    base, model = copies("mlp", dtype=torch.float16)
    with torch.no_grad():
        model.particle_parameters()[0][0, 0, 0] = 1e5  # beyond float16, not beyond the masters
    model.save_pretrained(tmp_path)
    loaded = ml.load_particle_model(base, tmp_path)
    assert loaded.particle_parameters()[0][0, 0, 0] == 1e5
    base, model = copies("mlp", dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.particle_parameters())
    x = FAMILIES["mlp"].inputs(dtype=torch.bfloat16)
    assert model(**x).dtype == torch.bfloat16
    exact = copy.deepcopy(base).float()
    assert (
        relative_error(model(**x)[1], alone(exact, model, 1, {"input": x["input"].float()})) < 0.03
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda m, **chunk: ml.Ensemble(m, **chunk),
        lambda m, **chunk: ml.SVGD(m, gamma=0.5, **chunk),
        lambda m, **chunk: ml.IBDR(m, alpha=0.5, **chunk),
        lambda m, **chunk: ml.SAM(m, **chunk),
        lambda m, **chunk: ml.SGLD(m, num_data=10, lr=0.1, **chunk),
        lambda m, **chunk: ml.Variational(m, num_data=10, **chunk),
    ],
    ids=["ensemble", "svgd", "ibdr", "sam", "sgld", "variational"],
)
def test_methods_train_copies_as_any_stacked_tensors(make):
    """One step in chunks is the step over a plain list of tensors and a vmapped model."""
    base, model = copies("mlp", K=3)
    x, y = FAMILIES["mlp"].inputs(8), torch.arange(8) % 4
    names = [n for n, _ in base.named_parameters()]
    plain = [p.detach().clone().requires_grad_() for p in model.particle_parameters()]

    def forward():
        run = torch.func.vmap(lambda *w: functional_call(base, dict(zip(names, w)), (), x))
        return run(*plain), y

    method = make(model, particle_chunk=2)
    stats = method.backward(closure_of(model, x, y))
    assert stats["loss"].isfinite()
    if isinstance(method, ml.SVGD):
        return  # its groups are the modules' here; see below
    expected = make(plain)
    expected.backward(forward)
    got = [*model.particle_parameters(), *method.parameters()]
    wanted = [*plain, *expected.parameters()]
    for a, b in zip(got, wanted):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert relative_error(a.grad, b.grad) < 1e-6


def test_svgd_has_one_kernel_per_module():
    _, model = copies("mlp")
    assert [name for name, _ in model.heads()] == ["0", "2", "4"]
    assert [sorted(group) for _, group in model.heads()] == [["bias", "weight"]] * 3
    x, y = FAMILIES["mlp"].inputs(8), torch.arange(8) % 4
    ml.SVGD(model, gamma=0.5).backward(closure_of(model, x, y))
    grads = [p.grad.clone() for p in model.particle_parameters()]
    groups = [list(group.values()) for _, group in model.heads()]
    ml.Ensemble(model).backward(closure_of(model, x, y))
    own = {p: p.grad - g for p, g in zip(model.particle_parameters(), grads)}
    for group in groups:
        theta = torch.cat([p.detach().flatten(1) for p in group], 1)
        D = torch.cdist(theta, theta).square()
        pairs = D[torch.triu(torch.ones(3, 3), 1).bool()].sort().values
        width = pairs[1] / torch.tensor(4.0).log()
        k = torch.exp(-D / width)
        force = (2 / width) * (k @ theta - k.sum(1, keepdim=True) * theta)
        drive = k.sum(1, keepdim=True) / 3 * torch.cat([own[p].flatten(1) for p in group], 1)
        got = torch.cat(
            [g.flatten(1) for p, g in _of(model, grads) if any(p is q for q in group)], 1
        )
        assert relative_error(got, drive + 0.5 / 3 * force) < 1e-6


def _of(model, grads):
    return zip(model.particle_parameters(), grads)


def test_equal_copies_are_refused_where_particles_must_differ():
    model = ml.get_particle_model(FAMILIES["vit"].build(), None, 3)
    with pytest.raises(ValueError, match="all 3 particles are identical"):
        ml.SVGD(model, gamma=0.1)
    redrawn = ml.get_particle_model(
        FAMILIES["vit"].build(), None, 3, head="head", head_init="reset"
    )
    ml.SVGD(redrawn, gamma=0.1)


def test_predictions_in_chunks_are_those_of_all():
    _, model = copies()
    x = FAMILIES["vit"].inputs(4)
    assert relative_error(ml.predict(model, x, 1), ml.predict(model, x)) < 1e-12
    assert relative_error(ml.predict(model, x, 2), ml.predict(model, x)) < 1e-12


def test_one_after_another_is_all_together():
    base, model = copies()
    x = FAMILIES["vit"].inputs(4)
    loop = ml.get_particle_model(base, None, 3, fold="loop")
    for p, q in zip(loop.particle_parameters(), model.particle_parameters()):
        p.data.copy_(q.data)
    assert relative_error(loop(**x), model(**x)) < 1e-11


def test_mixtures_interpolate_between_the_base_and_the_copies():
    base, model = copies()
    x = FAMILIES["vit"].inputs(4)
    weights = torch.tensor([[1 / 3] * 3, [0.0, 1, 0], [0.0] * 3, [0.2, 0.0, 0.1]])
    plain = dict(base.named_parameters())
    with model.mixtures(weights):
        got = model(**x)
    for w, row in zip(weights.double(), got):
        mixed = {
            n: p + sum(w[k] * (weights_of(model, k)[n] - p) for k in range(3))
            for n, p in plain.items()
        }
        assert relative_error(row, functional_call(base, mixed, (), x)) < 1e-6


def test_wise_soups_begin_at_the_base():
    base, model = copies()
    x = FAMILIES["vit"].inputs(4)
    seen = []

    def score(weights):
        with model.mixtures(weights), torch.no_grad():
            seen.append(model(**x))
        return torch.tensor([0.0, 2.0, 1.0])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "wise scales the adapters")
        weights = ml.soups.wise(model, score, [0.0, 0.5, 1.0])
    assert weights.tolist() == pytest.approx([0.5 / 3] * 3)
    assert relative_error(seen[0][0], base(**x)) < 1e-6


class TestFiles:
    def test_a_folder_holds_whole_models(self, tmp_path):
        _, model = copies()
        x = FAMILIES["vit"].inputs()
        expected = model(**x)
        model.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "multilora.json").read_text())
        assert index["kind"] == "full" and index["num_particles"] == 3
        assert sorted(index["files"]) == [f"particle_{k}/model.safetensors" for k in range(3)]
        for k in range(3):
            plain = FAMILIES["vit"].build()
            plain.load_state_dict(load_file(tmp_path / f"particle_{k}" / "model.safetensors"))
            assert relative_error(plain(**x), expected[k]) < 1e-11
        loaded = ml.load_particle_model(FAMILIES["vit"].build(), tmp_path).eval()
        assert torch.equal(loaded(**x), expected)
        assert loaded.seeds == model.seeds and loaded.peft_config is None

    def test_particles_are_put_into_a_model_that_is_there(self, tmp_path):
        _, model = copies()
        model.save_pretrained(tmp_path)
        _, other = copies(spread=0.5)
        parameters = other.particle_parameters()
        load_particles(other, tmp_path)
        for p, q, r in zip(other.particle_parameters(), model.particle_parameters(), parameters):
            assert torch.equal(p, q) and p is r

    def test_buffers_are_saved_and_shared(self, tmp_path):
        class Scaled(nn.Module):
            def __init__(self, scale):
                super().__init__()
                self.linear = nn.Linear(3, 2)
                self.register_buffer("scale", torch.tensor(scale))

            def forward(self, x):
                return self.linear(x) * self.scale

        model = ml.get_particle_model(Scaled(2.0), None, 2)
        x = torch.randn(4, 3)
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(ml.load_particle_model(Scaled(1.0), tmp_path)(x), expected)
        file = tmp_path / "particle_1" / "model.safetensors"
        save_file(load_file(file) | {"scale": torch.tensor(3.0)}, file)
        _index_anew(tmp_path, file)
        with pytest.raises(ValueError, match=r"scale is not that of .*; particles share buffers"):
            ml.load_particle_model(Scaled(1.0), tmp_path)

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda t: t.pop("head.bias"), r"does not fit the base model: missing \['head.bias'\]"),
            (lambda t: t.update(more=torch.ones(1)), r"unexpected \['more'\]"),
            (lambda t: t.update({"head.bias": torch.ones(6)}), r"has shape \(6,\), the base model"),
            (lambda t: t["head.bias"].fill_(torch.nan), "1?5? of 5 numbers of head.bias are not"),
            (lambda t: t.update({"head.bias": torch.ones(5).int()}), "head.bias has torch.int32"),
        ],
        ids=["missing", "unexpected", "shape", "NaN", "dtype"],
    )
    def test_a_file_that_does_not_fit_is_named(self, tmp_path, damage, message):
        copies()[1].save_pretrained(tmp_path)
        file = tmp_path / "particle_2" / "model.safetensors"
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"{file.name} is damaged or of another save"):
            ml.load_particle_model(FAMILIES["vit"].build(), tmp_path)
        _index_anew(tmp_path, file)
        base = FAMILIES["vit"].build()
        with pytest.raises(ValueError, match=f"particle_2/model.safetensors.*{message}"):
            ml.load_particle_model(base, tmp_path)

    def test_a_missing_file_and_an_unknown_kind_are_named(self, tmp_path):
        copies()[1].save_pretrained(tmp_path)
        (tmp_path / "particle_1" / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="particle_1"):
            ml.load_particle_model(FAMILIES["vit"].build(), tmp_path)
        index = tmp_path / "multilora.json"
        index.write_text(index.read_text().replace('"full"', '"half"'))
        with pytest.raises(ValueError, match="particles of the kind 'half'; this version reads"):
            ml.load_particle_model(FAMILIES["vit"].build(), tmp_path)

    def test_adapters_are_not_copies(self, tmp_path):
        family = FAMILIES["vit"]
        adapters = ml.get_particle_model(family.build(), family.config(), 3, head_init="copy")
        adapters.save_pretrained(tmp_path / "lora")
        _, model = copies()
        model.save_pretrained(tmp_path / "full")
        with pytest.raises(ValueError, match="does not fit the model: missing"):
            load_particles(model, tmp_path / "lora")
        with pytest.raises(ValueError, match="does not fit the model: missing"):
            load_particles(adapters, tmp_path / "full")

    def test_saving_adapters_over_copies_leaves_no_mixture(self, tmp_path):
        _, model = copies()
        model.save_pretrained(tmp_path)
        family = FAMILIES["vit"]
        adapters = ml.get_particle_model(family.build(), family.config(), 2, head_init="copy")
        adapters.save_pretrained(tmp_path)
        assert ml.load_particle_model(family.build(), tmp_path).num_particles == 2


def _index_anew(folder, file):
    """List the file as it is now."""
    from multilora import atomic

    index = json.loads((folder / "multilora.json").read_text())
    name = f"{file.parent.name}/{file.name}"
    index["files"][name] = {"bytes": file.stat().st_size, "sha256": atomic.digest(file)}
    (folder / "multilora.json").write_text(json.dumps(index))


class TestRefusals:
    def test_what_vmap_cannot_run_says_what_can(self):
        family = FAMILIES["gpt2"]
        _, model = copies("gpt2")
        with pytest.raises(ml.ParticleIsolationError, match='else use fold="loop"'):
            model(**family.inputs())

    def test_batch_norm(self):
        with pytest.raises(TypeError, match="the base SmallCnn contains BatchNorm"):
            ml.get_particle_model(FAMILIES["cnn"].build(), None, 2)

    def test_a_frozen_base(self):
        base = FAMILIES["mlp"].build().requires_grad_(False)
        with pytest.raises(ValueError, match="none of the 6 parameters of Sequential does"):
            ml.get_particle_model(base, None, 2)

    def test_a_base_with_particles(self):
        family = FAMILIES["mlp"]
        base = family.build()
        ml.get_particle_model(base, family.config(), 2, head_init="copy")
        base.requires_grad_(True)
        with pytest.raises(ValueError, match="already has adapters"):
            ml.get_particle_model(base, None, 2)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"head": "tail"}, r"VisionTransformer has no modules \['tail'\]"),
            ({"head": ""}, r"has no modules \[''\]"),
            ({"head_init": "reset"}, 'head_init="reset" needs the names'),
            ({"share_trunk": True}, "share_trunk needs adapters"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ml.get_particle_model(FAMILIES["vit"].build(), None, 2, **options)

    def test_head_is_for_copies(self):
        family = FAMILIES["vit"]
        with pytest.raises(ValueError, match="head = 'head' is for config=None"):
            ml.get_particle_model(family.build(), family.config(), 2, head="head")

    def test_what_needs_adapters(self, tmp_path):
        _, model = copies()
        with pytest.raises(ValueError, match="a soup is a PEFT adapter"):
            model.soup(tmp_path / "soup")
        assert not (tmp_path / "soup").exists()
        with pytest.raises(ValueError, match="needs an adapted layer; this model has none"):
            model.cosines()
        with pytest.raises(ValueError, match="full copies need a loop of your own"):
            ParticleTrainer(model, method=ml.Ensemble)
        one = ml.get_particle_model(FAMILIES["vit"].build(), None, 1)
        with pytest.raises(ValueError, match="ΔW of its 0 adapters is zero"):
            ml.posthoc.bayesianize(one, lambda model: 0.0, 0.1)
