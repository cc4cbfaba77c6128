"""DVERGE's images against a naive loop over particles, and the batches of its training."""

import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, particles_of, values
from multilora.robustness import dverge

K = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NORMALISED = {"mean": MEAN, "std": STD}
SHIFT, STEP = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (MEAN, STD))


def images(batch=5, seed=0):
    """Images of random pixels, normalised."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 3, 8, 8, dtype=torch.float64, generator=generator)
    return (pixels - SHIFT) / STEP


def vit(particles=K, **options):
    family = FAMILIES["vit"]
    return particles_of(family.build(), family.config(), particles, **options)


def features(model, particle, z, tap):
    """f of one particle, read from its own model."""
    seen = []
    hook = model.base.get_submodule(tap).register_forward_hook(lambda *a: seen.append(a[2]))
    model.particle(particle)(z)
    hook.remove()
    return seen[0]


def naive(model, x, source, tap, epsilon=0.07, steps=10):
    """One particle after another, one step after another."""
    low = (0 - SHIFT) / STEP
    high = (1 - SHIFT) / STEP
    found = []
    for k in range(model.num_particles):
        wanted, z = features(model, k, x, tap).detach(), source
        for _ in range(steps):
            z = z.detach().requires_grad_()
            distance = (features(model, k, z, tap) - wanted).square().sum()
            (grad,) = torch.autograd.grad(distance, z)
            z = z - epsilon / steps / STEP * grad.sign()
            z = torch.maximum(torch.minimum(z, source + epsilon / STEP), source - epsilon / STEP)
            z = torch.maximum(torch.minimum(z, high), low)
        found.append(z.detach())
    return torch.stack(found)


class TestImages:
    @pytest.mark.parametrize(
        ("options", "chunk"),
        [({}, None), ({}, 1), ({}, 3), ({"fold": "loop"}, None), ({"share_trunk": "blocks.1"}, 2)],
        ids=str,
    )
    def test_equal_a_naive_loop_over_particles(self, options, chunk):
        model, x, source = vit(**options), images(), images(seed=1)
        expected = naive(model, x, source, "blocks.0.mlp.fc1")
        z = dverge(model, x, source, "blocks.0.mlp.fc1", particle_chunk=chunk, **NORMALISED)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
        assert not torch.equal(z[0], z[1])

    def test_look_like_the_source_and_have_the_features_of_x(self):
        model, x, source = vit(), images(), images(seed=1)
        z = dverge(model, x, source, "blocks.1", steps=8, **NORMALISED)
        assert ((z - source).abs() / (0.07 / STEP)).max() < 1 + 1e-12
        pixels = z * STEP + SHIFT
        assert pixels.min() > -1e-12 and pixels.max() < 1 + 1e-12
        for k in range(K):
            wanted = features(model, k, x, "blocks.1")
            before, after, of_another = (
                (features(model, k, image, "blocks.1") - wanted).square().flatten(1).sum(1)
                for image in (source, z[k], z[(k + 1) % K])
            )
            assert (after < 0.9 * before).all()
            # They are this particle's, not those of all.
            assert after.sum() < of_another.sum()

    def test_distance_falls_with_the_budget(self):
        model, x, source = vit(), images(), images(seed=1)
        distances = []
        for epsilon in (0.0, 0.02, 0.07):
            z = dverge(model, x, source, "blocks.1", epsilon=epsilon, **NORMALISED)
            distances.append(
                sum(
                    (features(model, k, z[k], "blocks.1") - features(model, k, x, "blocks.1"))
                    .square()
                    .sum()
                    .item()
                    for k in range(K)
                )
            )
        assert distances == sorted(distances, reverse=True)
        assert torch.equal(
            dverge(model, x, source, "blocks.1", epsilon=0.0, **NORMALISED),
            source.expand(K, *source.shape),
        )

    def test_the_model_is_left_alone(self):
        model, x, source = vit().train(), images(), images(seed=1)
        before, generator = values(model), torch.get_rng_state()
        for p in model.particle_parameters():
            p.grad = torch.full_like(p, 2.0)
        dverge(model, x, source, "blocks.1", steps=2, **NORMALISED)
        with pytest.raises(ValueError, match="does not call its module 'unused'"):
            model.base.unused = nn.Identity()
            dverge(model, x, source, "unused", **NORMALISED)
        assert all(m.training for m in model.base.modules())
        assert not any(m._forward_hooks for m in model.base.modules())
        assert all((p.grad == 2.0).all() for p in model.particle_parameters())
        assert all(map(torch.equal, values(model), before))
        assert torch.equal(torch.get_rng_state(), generator)

    def test_refusals(self):
        model, x = vit(), images()
        with pytest.raises(ValueError, match="two particles or more"):
            dverge(vit(1), x, x, "blocks.1", **NORMALISED)
        with pytest.raises(ValueError, match=r"VisionTransformer has no module 'blocks\.9'"):
            dverge(model, x, x, "blocks.9", **NORMALISED)
        with pytest.raises(ValueError, match=r"x .*\(4, 3, 8, 8\) and source .*\(5, 3, 8, 8\)"):
            dverge(model, x[:4], x, "blocks.1", **NORMALISED)
        with pytest.raises(ValueError, match="give those of the normalisation"):
            dverge(model, x, x, "blocks.1")
        with pytest.raises(TypeError, match="a ParticleModel; got VisionTransformer"):
            dverge(model.base, x, x, "blocks.1", **NORMALISED)


def method_of(model, tap="blocks.1", steps=2, **options):
    return ml.DVERGE(model, tap=tap, steps=steps, **NORMALISED, **options)


class TestTraining:
    def test_targets_may_be_probabilities(self):
        model, x, y = vit(), images(), torch.arange(5) % 4
        method = method_of(model)
        soft = torch.nn.functional.one_hot(y, 4).double()
        torch.manual_seed(3)
        _, hard = method.batch(x, y)
        torch.manual_seed(3)
        _, targets = method.batch(x, soft)
        assert targets.shape == (*hard.shape, 4) and torch.equal(targets.argmax(-1), hard)

    def test_no_particle_gets_its_own_and_all_others_come(self):
        model, x, y = vit(), images(), torch.tensor([3, 0, 4, 1, 2])
        own = dverge(model, x, x.roll(1, 0), "blocks.1", steps=2, **NORMALISED)
        method, seen = method_of(model), set()
        torch.manual_seed(0)
        for _ in range(24):
            inputs, targets = method.batch(x, y)
            givers = [[i for i in range(K) if torch.equal(inputs[j], own[i])] for j in range(K)]
            assert all(len(found) == 1 and found[0] != j for j, found in enumerate(givers))
            assert len({(j - i) % K for j, [i] in enumerate(givers)}) == 1
            seen.add((1 - givers[1][0]) % K)
            # The labels are those of the images that the inputs look like.
            assert targets.shape == (K, 5)
            nearest = (inputs[:, :, None] - x).flatten(3).norm(dim=3).argmin(2)
            assert torch.equal(targets, y[nearest])
            assert (targets != y).all()
        assert seen == {1, 2, 3}

    def test_settings_reach_the_images(self):
        model, x, y = vit(2), images(), torch.arange(5)
        options = {"epsilon": 0.02, "steps": 3, "step_size": 0.015}
        expected = dverge(model, x, x.roll(1, 0), "blocks.0", **options, **NORMALISED).roll(1, 0)
        method = method_of(model, "blocks.0", particle_chunk=1, **options)
        inputs, _ = method.batch(x, y)
        torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-12)
        other = dverge(model, x, x.roll(1, 0), "blocks.0", **NORMALISED).roll(1, 0)
        assert (other - expected).abs().max() > 0.01

    @pytest.mark.parametrize("tap", [("blocks.0", "blocks.1"), None], ids=str)
    def test_one_of_several_taps_is_drawn(self, tap):
        model, x, y = vit(2), images(), torch.arange(5)
        taps = tap or [name for name, _ in model.lora_layers()]
        made = {
            tap: dverge(model, x, x.roll(1, 0), tap, steps=1, **NORMALISED).roll(1, 0)
            for tap in taps
        }
        method, drawn = method_of(model, tap, steps=1), []
        torch.manual_seed(0)
        for _ in range(8 * len(taps)):
            inputs, _ = method.batch(x, y)
            drawn.append([tap for tap in taps if torch.equal(inputs, made[tap])])
        assert all(drawn) and {tap for found in drawn for tap in found} == set(taps)

    def test_the_draws_are_those_of_the_generator(self):
        model, x, y = vit(), images(), torch.arange(5)
        method, state = method_of(model, ("blocks.0", "blocks.1"), steps=1), torch.get_rng_state()
        first = [method.batch(x, y)[0] for _ in range(4)]
        assert not all(torch.equal(first[0], z) for z in first)
        torch.set_rng_state(state)
        assert all(torch.equal(z, method.batch(x, y)[0]) for z in first)

    def test_the_step_is_that_of_an_ensemble(self):
        model, x, y = vit(), images(), torch.arange(5)
        method = method_of(model)
        inputs, targets = method.batch(x, y)
        gradients = []
        for each in (method, ml.Ensemble(model)):
            model.zero_grad()
            each.backward(lambda: (model(inputs, per_particle=True), targets))
            gradients.append([p.grad.clone() for p in model.particle_parameters()])
        assert all(map(torch.equal, *gradients))

    def test_particles_learn_the_labels_of_the_looks(self):
        model, x, y = vit().train(), images(), torch.arange(5)
        method = method_of(model)
        optimizer = torch.optim.AdamW(model.particle_parameters(), 1e-2)
        for _ in range(25):
            inputs, targets = method.batch(x, y)
            method.backward(lambda z=inputs, t=targets: (model(z, per_particle=True), t))
            optimizer.step()
            optimizer.zero_grad()
        inputs, targets = method.batch(x, y)
        right = model(inputs, per_particle=True).argmax(-1) == targets
        assert right.double().mean() > 0.8

    def test_refusals(self):
        model, x = vit(), images()
        with pytest.raises(ValueError, match="pairs the images of a batch: it needs two; got 1"):
            method_of(model).batch(x[:1], torch.arange(1))
        with pytest.raises(ValueError, match="DVERGE needs two particles or more"):
            method_of(vit(1))
        with pytest.warns(UserWarning, match="copies of .* start equal"):
            copies = ml.get_particle_model(FAMILIES["vit"].build(), None, 2)
        with pytest.raises(ValueError, match=r"DVERGE needs adapted layers, or .*: tap"):
            ml.DVERGE(copies)
        with pytest.raises(TypeError, match="a ParticleModel; got list"):
            method_of([torch.ones(3, 2, requires_grad=True)])
        with pytest.raises(ValueError, match="has no module 'nowhere'"):
            method_of(model, "nowhere").batch(x, torch.arange(5))
