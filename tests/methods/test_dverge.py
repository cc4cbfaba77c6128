"""DVERGE's images against a naive loop over particles, and the batches of its training."""

import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES, particles_of, values
from multilora.robustness import dverge, dverge_batch

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
        [({}, None), ({}, 1), ({}, 3), ({"fold": "loop"}, None), ({"share_trunk": True}, 2)],
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


class TestBatch:
    def test_no_particle_gets_its_own_and_all_others_come(self):
        model, x, y = vit(), images(), torch.tensor([3, 0, 4, 1, 2])
        own = dverge(model, x, x.roll(1, 0), "blocks.1", steps=2, **NORMALISED)
        seen = set()
        torch.manual_seed(0)
        for _ in range(24):
            inputs, targets = dverge_batch(model, x, y, "blocks.1", steps=2, **NORMALISED)
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

    def test_one_of_several_taps_is_drawn(self):
        model, x, y = vit(2), images(), torch.arange(5)
        taps = ("blocks.0", "blocks.1")
        made = {
            tap: dverge(model, x, x.roll(1, 0), tap, steps=2, **NORMALISED).roll(1, 0)
            for tap in taps
        }
        torch.manual_seed(0)
        drawn = []
        for _ in range(12):
            inputs, _ = dverge_batch(model, x, y, taps, steps=2, **NORMALISED)
            drawn += [tap for tap in taps if torch.equal(inputs, made[tap])]
        assert len(drawn) == 12 and set(drawn) == set(taps)

    def test_the_draws_are_those_of_the_generator(self):
        model, x, y = vit(), images(), torch.arange(5)
        state = torch.get_rng_state()

        def draw():
            batch = dverge_batch(model, x, y, ("blocks.0", "blocks.1"), steps=1, **NORMALISED)
            return batch[0]

        first = [draw() for _ in range(3)]
        torch.set_rng_state(state)
        assert all(map(torch.equal, first, [draw() for _ in range(3)]))

    def test_an_ensemble_learns_from_it(self):
        model, x, y = vit().train(), images(), torch.arange(5)
        method = ml.Ensemble(model)
        optimizer = torch.optim.AdamW(model.particle_parameters(), 1e-2)
        losses = []
        for _ in range(12):
            inputs, targets = dverge_batch(model, x, y, "blocks.1", steps=2, **NORMALISED)
            stats = method.backward(lambda z=inputs, t=targets: (model(z, per_particle=True), t))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(stats["loss"].item())
        assert losses[-1] < 0.5 * losses[0]

    def test_refusals(self):
        model, x = vit(), images()
        with pytest.raises(ValueError, match="needs two images and a tap; got 1 and"):
            dverge_batch(model, x[:1], torch.arange(1), "blocks.1", **NORMALISED)
        with pytest.raises(ValueError, match="needs two images and a tap; got 5 and"):
            dverge_batch(model, x, torch.arange(5), [], **NORMALISED)
        with pytest.raises(ValueError, match="two particles or more"):
            dverge_batch(vit(1), x, torch.arange(5), "blocks.1", **NORMALISED)
