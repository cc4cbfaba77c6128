"""M soups in one pass: `ParticleModel.mixtures` against PEFT's files and dense interpolation."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import multilora as ml
from models import FAMILIES, load_peft, logits_of, particles_of, values
from processes import run_in_processes

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:modules_to_save"),
]

K = 3
#: A mean, one particle, an extrapolation with a negative weight, half the way from the base.
WEIGHTS = torch.tensor(
    [[1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [1.5, -0.75, 0.25], [0.5, 0, 0]], dtype=torch.float64
)


def made(name, particles=K, **options):
    family = FAMILIES[name]
    return particles_of(family.build(), family.config(), particles, **options), family.inputs()


@torch.no_grad()
def soups_of(model, weights, inputs, **how):
    with model.mixtures(weights):
        return logits_of(model(**inputs, **how))


@torch.no_grad()
def dense(model, base, weights):
    """`base` with Σ_k w_k ΔW_k in its weights, and the heads' weighted mean."""
    model, base = model, copy.deepcopy(base)
    for name, layer in model.lora_layers():
        update = layer.scaling * torch.einsum("k,kor,kri->oi", weights, layer.lora_B, layer.lora_A)
        weight = base.get_submodule(name).weight
        is_transposed = type(base.get_submodule(name)).__name__ == "Conv1D"
        weight += update.T if is_transposed else update.view(weight.shape)
    of_heads = weights / weights.sum() if weights.sum() else torch.full_like(weights, 1 / K)
    for name, head in model.heads():
        for inner, stacked in head.items():
            mean = torch.einsum("k,k...->...", of_heads, stacked)
            base.get_submodule(name).get_parameter(inner).copy_(mean)
    return base


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_soups_are_pefts_reading_of_their_files_and_dense_interpolation(name, tmp_path):
    family = FAMILIES[name]
    base, tolerance = family.build(), family.tolerance
    model, inputs = made(name)
    found = soups_of(model, WEIGHTS, inputs)
    assert len(found) == 4
    for i, weights in enumerate(WEIGHTS):
        model.soup(tmp_path, weights=weights)
        of_file = logits_of(load_peft(base, tmp_path)(**inputs))
        torch.testing.assert_close(found[i], of_file, rtol=tolerance, atol=tolerance)
        interpolated = logits_of(dense(model, base, weights)(**inputs))
        torch.testing.assert_close(found[i], interpolated, rtol=tolerance, atol=tolerance)
    model.soup(tmp_path)
    uniform = logits_of(load_peft(base, tmp_path)(**inputs))
    torch.testing.assert_close(found[0], uniform, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weight_of_one_is_that_particle(name):
    model, inputs = made(name)
    with torch.no_grad():
        each = logits_of(model(**inputs))
    tolerance = FAMILIES[name].tolerance
    identity = torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(
        soups_of(model, identity, inputs), each, rtol=tolerance, atol=tolerance
    )
    turned = soups_of(model, identity.flip(0), inputs)
    torch.testing.assert_close(turned, each.flip(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.1, 0.2, -0.3]])
def test_weights_that_sum_to_zero_have_the_mean_head(weights):
    # In floating numbers 0.1 + 0.2 − 0.3 is 5.6e-17.
    base = FAMILIES["vit"].build()
    model, inputs = made("vit")
    weights = torch.tensor([weights], dtype=torch.float64)
    expected = dense(model, base, torch.zeros(K, dtype=torch.float64))
    with torch.no_grad():
        for name, layer in model.lora_layers():
            update = torch.einsum("k,kor,kri->oi", weights[0], layer.lora_B, layer.lora_A)
            weight = expected.get_submodule(name).weight
            weight += layer.scaling * update.view(weight.shape)
        torch.testing.assert_close(
            soups_of(model, weights, inputs)[0], expected(**inputs), rtol=1e-11, atol=1e-11
        )


def test_the_rank_is_that_of_the_largest_soup():
    model, _ = made("vit")
    for weights, rank in ((torch.eye(K), 2), (WEIGHTS[3:], 2), (WEIGHTS, 6), (WEIGHTS * 0, 2)):
        with model.mixtures(weights):
            layer = dict(model.lora_layers())["blocks.0.attn.qkv"]
            assert layer.lora_A.shape == (len(weights), rank, 16)
            assert layer.lora_B.shape == (len(weights), 48, rank)


def test_a_particle_of_weight_zero_may_be_broken(tmp_path):
    model, inputs = made("vit")
    weights = torch.tensor([[0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    expected = soups_of(model, weights, inputs)
    with torch.no_grad():
        for p in model.particle_parameters():
            p[0] = math.nan
    torch.testing.assert_close(soups_of(model, weights, inputs), expected)
    model.soup(tmp_path, weights=weights[0])
    of_file = load_peft(FAMILIES["vit"].build(), tmp_path)(**inputs)
    torch.testing.assert_close(of_file, expected[0], rtol=1e-11, atol=1e-11)


def test_everything_is_restored_after_an_exception():
    model, inputs = made("vit")
    before, parameters = values(model), model.particle_parameters()
    with torch.no_grad():
        outputs = model(**inputs)

    def state():
        fields = "num_particles every window processes thread".split()
        return {name: getattr(model, name) for name in fields}

    outside = state()
    with pytest.raises(KeyError), model.mixtures(WEIGHTS):
        assert model.num_particles == 4 and not model.particle_parameters()
        raise KeyError
    assert state() == outside
    assert all(a is b for a, b in zip(parameters, model.particle_parameters(), strict=True))
    assert all(p.requires_grad for p in parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
    with torch.no_grad():
        assert torch.equal(model(**inputs), outputs)


def test_no_soup_has_a_gradient():
    model, inputs = made("vit")
    with model.mixtures(WEIGHTS):
        assert not model(**inputs).requires_grad
    assert all(p.grad is None for p in model.particle_parameters())


def test_particles_within_mixtures_and_mixtures_within_particles():
    model, inputs = made("vit")
    whole = soups_of(model, WEIGHTS, inputs)
    with torch.no_grad(), model.mixtures(WEIGHTS):
        with model.particles(1, 3):
            torch.testing.assert_close(model(**inputs), whole[1:3])
            assert not any(p.requires_grad for _, _, p in model._slots())
        for chunk in (1, 3, 4):
            parts = model.in_chunks(chunk, lambda: model(**inputs))
            torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(model.particle(2)(**inputs), whole[2])
    weights = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    with torch.no_grad(), model.particles(1, 3), model.mixtures(weights):
        inner = model(**inputs)
    all_of_them = torch.tensor([[0, 0.5, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(inner, soups_of(model, all_of_them, inputs))


def test_soups_of_soups():
    model, inputs = made("llama")
    outer = torch.tensor([[0.5, 0, 0, 2], [0, 1, 1, 0]], dtype=torch.float64)
    with model.mixtures(WEIGHTS):
        found = soups_of(model, outer, inputs)
    torch.testing.assert_close(
        found, soups_of(model, outer @ WEIGHTS, inputs), rtol=1e-6, atol=1e-6
    )


def test_every_soup_has_its_inputs():
    model, _ = made("vit")
    inputs = FAMILIES["vit"].particle_inputs(4)
    found = soups_of(model, WEIGHTS, inputs, per_particle=True)
    for m in range(4):
        own = soups_of(model, WEIGHTS[m : m + 1], {key: x[m] for key, x in inputs.items()})
        torch.testing.assert_close(found[m], own[0], rtol=1e-11, atol=1e-11)
    with model.mixtures(WEIGHTS), model.particles(1, 3), torch.no_grad():
        torch.testing.assert_close(model(**inputs, per_particle=True), found[1:3])


@pytest.mark.parametrize("options", [{"fold": "loop"}, {"share_trunk": True}], ids=str)
def test_other_ways_to_run(options):
    family = FAMILIES["vit"]
    inputs = family.inputs()
    config = family.config(target_modules=r"blocks\.1\.attn\.(qkv|proj)")
    plain, other = (particles_of(family.build(), config, K, **o) for o in ({}, options))
    torch.testing.assert_close(
        soups_of(other, WEIGHTS, inputs), soups_of(plain, WEIGHTS, inputs), rtol=1e-11, atol=1e-11
    )


def test_one_particle_and_many():
    # Sixty ranks are more than the layers have, and the sum is of twenty terms.
    for particles in (1, 20):
        model, inputs = made("mlp", particles)
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(2, particles, generator=generator, dtype=torch.float64)
        found = soups_of(model, weights, inputs)
        layers = dict(model.lora_layers())
        x = inputs["input"]
        for m in range(2):
            h = x
            for name in ("0", "2"):
                layer, w = layers[name], weights[m]
                update = torch.einsum("k,kor,kri->oi", w, layer.lora_B, layer.lora_A)
                h = layer.base_layer(h) + layer.scaling * h @ update.T
                h = nn.functional.gelu(h)
            [(_, head)] = model.heads()
            share = weights[m] / weights[m].sum()
            h = h @ torch.einsum("k,koi->oi", share, head["weight"]).T + share @ head["bias"]
            torch.testing.assert_close(found[m], h, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 4), r"weights \(M, 3\), M >= 1; got torch.float32 \(2, 4\)"),
        (torch.ones(3), r"got torch.float32 \(3,\)"),
        (torch.ones(0, 3), r"got torch.float32 \(0, 3\)"),
        (torch.ones(2, 3).long(), r"got torch.int64 \(2, 3\)"),
        ([[1.0, 0, 0]], "got list"),
        (torch.tensor([[1, math.nan, 0]]), "finite weights; got"),
    ],
)
def test_wrong_weights(weights, message):
    model, _ = made("mlp")
    with pytest.raises(ValueError, match=message), model.mixtures(weights):
        pass
    assert model.thread is None and model.num_particles == K


@pytest.mark.parametrize("inside", ["mixtures", "particles"])
def test_nothing_is_saved_or_trained_inside(inside, tmp_path):
    model, inputs = made("mlp")
    method = ml.Ensemble(model)
    model.save_pretrained(tmp_path / "saved")
    files = {f.name: f.read_bytes() for f in (tmp_path / "saved").rglob("*") if f.is_file()}
    before = values(model)
    block = model.mixtures(WEIGHTS) if inside == "mixtures" else model.particles(0, 2)
    with block:
        for call, what in (
            (lambda: model.save_pretrained(tmp_path / "saved"), "save_pretrained"),
            (lambda: model.soup(tmp_path / "soup"), "soup"),
            (lambda: ml.checkpoint.load_particles(model, tmp_path / "saved"), "load_particles"),
        ):
            with pytest.raises(RuntimeError, match=f"{what} needs all particles as they are"):
                call()
        with pytest.raises(RuntimeError, match=r"inside model\.particles\(\.\.\.\) or mixtures"):
            method.backward(lambda: (model(**inputs), torch.zeros(2, dtype=torch.int64)))
        if inside == "mixtures":
            with pytest.raises(ValueError, match="at least one of them"):
                ml.Ensemble(model)
    assert not (tmp_path / "soup").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
    now = {f.name: f.read_bytes() for f in (tmp_path / "saved").rglob("*") if f.is_file()}
    assert now == files


def _every_process(rank, folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("particle",))
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(), 4, mesh=mesh)
    torch.manual_seed(0)
    whole = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        # `particles_of` moves both processes' particles alike.
        for p in model.particle_parameters():
            p.mul_(1 + rank)
    inputs = family.inputs()
    found = soups_of(model, whole.T.contiguous(), inputs)
    with pytest.raises(ValueError, match=r"weights \(M, 4\)"), model.mixtures(whole[:2].T):
        pass
    model.soup(folder / "soup", weights=whole[:, 0].contiguous())
    with model.mixtures(whole.T):
        predicted = ml.predict(model, inputs, log=True)
    return found, predicted, [p.detach() for p in model.particle_parameters()]


@pytest.mark.processes
def test_every_process_has_all_soups_of_all_particles(tmp_path):
    results = run_in_processes(2, _every_process, tmp_path)
    (found, predicted, first), (again, _, second) = results
    assert found.shape == (3, 2, 5) and torch.equal(found, again)
    family = FAMILIES["vit"]
    model = particles_of(family.build(), family.config(), 4)
    with torch.no_grad():
        for p, *parts in zip(model.particle_parameters(), first, second, strict=True):
            p.copy_(torch.cat(parts))
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    expected = soups_of(model, weights, family.inputs())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(predicted, expected.log_softmax(-1), rtol=1e-11, atol=1e-11)
    of_file = load_peft(family.build(), tmp_path / "soup")(**family.inputs())
    torch.testing.assert_close(of_file, expected[0], rtol=1e-11, atol=1e-11)
