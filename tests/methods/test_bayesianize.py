"""Training-free Bayesianisation: the rewritten factors, the noise on ΔW, and the search for σ."""

import copy
import math
import warnings

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, load_peft, logits_of, values
from oracles import delta_weights, relative_error


def trained(name="mlp", dtype=torch.float64, seed=3, **config):
    """A model of one particle, all of whose tensors are off their starts."""
    family = FAMILIES[name]
    model = ml.get_particle_model(
        family.build(dtype), family.config(**config), 1, seed=seed, head_init="copy"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.particle_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.3)
    return model


def deltas(model):
    return [delta_weights(a.lora_A, a.lora_B, a.scaling) for a in model.adapters()]


def noise(model, before):
    """ΔW of every particle minus that of the trained one: (K, d_out, d_in) for each layer."""
    return [(now - then).detach() for now, then in zip(deltas(model), before)]


def accept_below(limit):
    """A score that falls from 0 to -1 where the spread of ΔW between particles passes `limit`."""

    def score(model):
        spread = max(d.std(0).max().item() for d in deltas(model)) if model.num_particles > 1 else 0
        return -1.0 if spread > limit else 0.0

    return score


def always(model):
    return 1.0


def never(model):
    return 0.0 if model.num_particles > 1 else 1.0


@pytest.mark.parametrize(
    "name, changes",
    [("mlp", {}), ("cnn", {}), ("gpt2", {}), ("mlp", {"r": 8, "use_rslora": True})],
    ids=["linear", "convolution", "Conv1D", "rank above d_out"],
)
def test_the_rewritten_factors_keep_the_weights(name, changes):
    if "r" in changes:
        changes = changes | {"target_modules": ["2"]}  # d_out = 7
    model = trained(name, torch.float32, **changes)
    before, heads = deltas(model), [p.clone() for _, h in model.heads() for p in h.values()]
    with pytest.warns(UserWarning, match="end of the search"):
        ml.posthoc.bayesianize(model, always, 0.0, 3, largest=1e-30)
    assert model.num_particles == 3
    for now, then in zip(deltas(model), before):
        assert relative_error(now, then.expand_as(now)) < 3e-7
    for now, then in zip([p for _, h in model.heads() for p in h.values()], heads):
        assert torch.equal(now, then.expand_as(now))


def test_the_columns_of_b_are_orthogonal_and_sorted_by_their_singular_values():
    model = trained()
    d = [torch.linalg.svdvals(a.lora_B[0]) for a in model.adapters()]
    ml.posthoc.bayesianize(model, never, 0.0, 2)
    for adapter, singular in zip(model.adapters(), d):
        for B in adapter.lora_B:
            assert relative_error(B.T @ B, torch.diag(singular**2)) < 1e-12


@pytest.mark.parametrize("scaling", [1.5, 0.25])
def test_the_noise_on_the_weights_has_covariance_sigma_squared_u_u(scaling):
    model = trained(lora_alpha=2 * scaling, target_modules=["0"], modules_to_save=None)
    [adapter] = model.adapters()
    assert adapter.scaling == scaling
    before = deltas(model)
    U = torch.linalg.svd(adapter.lora_B[0], full_matrices=False)[0].detach()
    K, largest = 4000, 0.2
    with pytest.warns(UserWarning, match="end of the search"):
        sigma = ml.posthoc.bayesianize(model, always, 0.0, K, largest=largest)
    [E] = noise(model, before)
    columns = E.transpose(1, 2).flatten(0, 1)  # (K · d_in, d_out)
    covariance = columns.T @ columns / len(columns)
    expected = sigma**2 * U @ U.T
    # 24000 columns: about 0.9 % of each entry's own size.
    assert relative_error(covariance, expected) < 0.03
    assert columns.mean(0).abs().max() < 5 * sigma / math.sqrt(len(columns))
    # Columns, and particles, are independent of each other.
    between = (E[:, :, 0].T @ E[:, :, 1]) / K
    assert between.abs().max() < 5 * sigma**2 / math.sqrt(K)
    assert ((E[::2] * E[1::2]).sum((1, 2)).mean() / sigma**2).abs() < 5 * 12**0.5 / (K / 2) ** 0.5


def test_the_noise_does_not_depend_on_how_the_update_is_factored():
    """Any A → RA, B → BR⁻¹ leaves ΔW, and the law of the noise, as they are."""
    covariances = []
    for mixed in (False, True):
        model = trained(target_modules=["0"], modules_to_save=None)
        [layer] = [layer for _, layer in model.lora_layers()]
        R = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
        with torch.no_grad():
            if mixed:
                layer.lora_A[0] = R @ layer.lora_A[0]
                layer.lora_B[0] = layer.lora_B[0] @ R.inverse()
        before = deltas(model)
        with pytest.warns(UserWarning):
            ml.posthoc.bayesianize(model, always, 0.0, 2000, largest=0.1)
        [E] = noise(model, before)
        columns = E.transpose(1, 2).flatten(0, 1)
        covariances.append(columns.T @ columns / len(columns))
    assert relative_error(*covariances) < 0.05


def test_directions_that_b_lacks_get_no_noise():
    model = trained(target_modules=["0"], modules_to_save=None, r=4)
    [layer] = [layer for _, layer in model.lora_layers()]
    with torch.no_grad():
        layer.lora_B[0, :, 3] = layer.lora_B[0, :, :3] @ layer.lora_B.new_tensor([1.0, -2, 0.5])
    before = deltas(model)
    with pytest.warns(UserWarning):
        ml.posthoc.bayesianize(model, always, 0.0, 5, largest=0.1)
    [E] = noise(model, before)
    assert E.isfinite().all() and E.abs().max() < 1
    # All noise lies in the three directions, and A's fourth row is the same for all particles.
    assert [int(torch.linalg.matrix_rank(e)) for e in E] == [3] * 5
    assert torch.equal(layer.lora_A[:, 3], layer.lora_A[:1, 3].expand(5, -1))
    assert not torch.equal(layer.lora_A[0, 2], layer.lora_A[1, 2])


def test_a_layer_that_was_not_trained_stays_as_it_is():
    model = trained(modules_to_save=None)
    first, second = (layer for _, layer in model.lora_layers())
    with torch.no_grad():
        second.lora_B.zero_()
    with pytest.warns(UserWarning):
        ml.posthoc.bayesianize(model, always, 0.0, 2)
    assert not second.lora_B.any() and second.lora_A.isfinite().all()
    assert not torch.equal(first.lora_A[0], first.lora_A[1])


def test_bisection_finds_the_largest_sigma_whose_score_is_kept():
    seen = []

    def score(model):
        """Minus the largest noise on ΔW in units of the one at σ = 1: exactly −σ."""
        if model.num_particles == 1:
            return 5.0
        [E] = noise(model, before)
        seen.append(E.norm().item() / unit)
        return 5.0 - seen[-1]

    model = trained(target_modules=["0"], modules_to_save=None)
    before = deltas(model)
    probe = copy.deepcopy(model)
    with pytest.warns(UserWarning):
        one = ml.posthoc.bayesianize(probe, always, 0.0, 3, steps=1, largest=2.0, seed=4)
    assert one == 1.0
    unit = noise(probe, before)[0].norm().item()
    sigma = ml.posthoc.bayesianize(model, score, 0.3, 3, steps=12, largest=2.0, seed=4)
    assert len(seen) == 12
    assert 0.3 - 2 / 2**12 <= sigma <= 0.3
    assert sigma == max(s for s in (round(x * 2048) / 2048 for x in seen) if s <= 0.3)
    # The model holds the draws of the σ that is returned, not of the last one tried.
    assert noise(model, before)[0].norm().item() / unit == pytest.approx(sigma, rel=1e-9)


def test_a_score_that_any_noise_lowers_gives_no_noise():
    model = trained()
    before = deltas(model)
    assert ml.posthoc.bayesianize(model, never, 0.0, 2) == 0
    for now, then in zip(deltas(model), before):
        assert relative_error(now, then.expand_as(now)) < 1e-12
    assert torch.equal(*model.adapters()[0].lora_A)


def test_a_score_that_is_not_a_number_is_no_better():
    model = trained()
    assert ml.posthoc.bayesianize(model, lambda m: [1.0, math.nan][m.num_particles > 1], 9.0) == 0
    assert model.num_particles == 10


def test_the_default_end_of_the_search_is_twice_the_norm_of_the_updates():
    model = trained(r=3)
    with torch.no_grad():
        model.adapters()[1].lora_B[:, :, 2] = 0  # rank 2: that much less noise
    before = deltas(model)
    with pytest.warns(UserWarning, match="end of the search"):
        sigma = ml.posthoc.bayesianize(model, always, 0.0, 500, steps=40)
    norm = sum(d.square().sum() for d in before) ** 0.5
    spread = (sum(e.square().sum() for e in noise(model, before)) / 500) ** 0.5
    assert (spread / norm).item() == pytest.approx(2, rel=0.02)
    assert sigma == pytest.approx(2 * norm.item() / math.sqrt(3 * 6 + 2 * 9), rel=1e-9)


def test_draws_depend_on_the_seed_alone():
    def drawn(seed):
        model = trained()
        ml.posthoc.bayesianize(model, accept_below(0.1), 0.5, 3, seed=seed)
        return values(model)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_the_draws_are_a_model_of_k_particles(tmp_path):
    """It predicts each as PEFT does from its folder, trains, and is loaded."""
    family = FAMILIES["vit"]
    base, x = family.build(), family.inputs()
    model = trained("vit", seed=11)
    one = model(**x)
    sigma = ml.posthoc.bayesianize(model, accept_below(0.05), 0.5, 3)
    assert sigma > 0
    logits = model(**x)
    assert logits.shape == (3, *one.shape[1:])
    assert relative_error(logits[0], one[0]) > 1e-3
    model.save_pretrained(tmp_path)
    for k in range(3):
        expected = logits_of(load_peft(base, tmp_path / f"particle_{k}")(**x))
        assert relative_error(logits[k], expected) < 1e-11
        assert relative_error(model.particle(k)(**x), expected) < 1e-11
    loaded = ml.load_particle_model(copy.deepcopy(base), tmp_path)
    assert loaded.seeds == model.seeds == tuple((model.seeds[0] + k) for k in range(3))
    assert relative_error(loaded.eval()(**x), logits) < 1e-11
    ml.Ensemble(model).backward(lambda: (model(**x), torch.tensor([0, 1])))
    assert all(p.grad.flatten(1).any(1).all() for p in model.particle_parameters())


def test_nothing_changes_where_the_score_raises():
    model = trained()
    before, parameters = values(model), model.particle_parameters()

    def score(model):
        if model.num_particles > 1:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        ml.posthoc.bayesianize(model, score, 0.1)
    assert model.num_particles == 1 and len(model.seeds) == 1
    assert all(a is b for a, b in zip(model.particle_parameters(), parameters))
    assert all(map(torch.equal, values(model), before))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tolerance": -0.1}, "tolerance must be a finite number >= 0; got -0.1"),
        ({"num_particles": 0}, "num_particles must be an integer in"),
        ({"steps": 0}, "steps must be an integer in"),
        ({"largest": 0.0}, "largest must be a finite number > 0; got 0.0"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"score": lambda model: math.nan}, "the score of the trained model must be a finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_change_nothing(changes, message):
    model = trained()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        ml.posthoc.bayesianize(**{"model": model, "score": always, "tolerance": 0.1} | changes)
    assert model.num_particles == 1 and all(map(torch.equal, values(model), before))


def test_it_needs_one_trained_particle():
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"])
    fresh = ml.get_particle_model(copy.deepcopy(base), config, 1)
    with pytest.raises(ValueError, match="ΔW of its 1 adapters is zero"):
        ml.posthoc.bayesianize(fresh, always, 0.1)
    several = ml.get_particle_model(base, config, 3)
    with pytest.raises(ValueError, match="needs a model of one particle; got 3"):
        ml.posthoc.bayesianize(several, always, 0.1)


class TestRepeat:
    def test_the_particles_are_copies_of_the_only_one(self):
        family = FAMILIES["vit"]
        model, x = trained("vit"), family.inputs()
        one, seed = model(**x), model.seeds[0]
        model.repeat(4)
        assert model.num_particles == 4
        assert model.seeds == (seed, seed + 1, seed + 2, seed + 3)
        assert list(model.seeds) == ml.attach.particle_seeds(3, 4)
        assert relative_error(model(**x), one.expand(4, *one.shape[1:])) < 1e-12
        with torch.no_grad():
            model.adapters()[0].lora_A[2].zero_()
        assert model.adapters()[0].lora_A[1].any()

    def test_once_is_the_same_model(self):
        model = trained()
        before = values(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.repeat(1)
        assert model.num_particles == 1 and all(map(torch.equal, values(model), before))

    def test_frozen_tensors_stay_frozen(self):
        model = trained()
        model.adapters()[0].lora_A.requires_grad_(False)
        model.repeat(2)
        assert not model.adapters()[0].lora_A.requires_grad
        assert model.adapters()[0].lora_B.requires_grad

    def test_refusals(self):
        with pytest.raises(ValueError, match="num_particles must be an integer >= 1; got 0"):
            trained().repeat(0)
        model = trained()
        model.repeat(2)
        with pytest.raises(ValueError, match="repeat needs a model of one particle; got 2"):
            model.repeat(3)
