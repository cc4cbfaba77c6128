"""FGSM and PGD against closed forms, finite differences and particles attacked alone."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import multilora as ml
from models import FAMILIES, particles_of
from multilora.robustness import dverge, fgsm, robust_accuracy, transfer_matrix
from processes import run_in_processes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NORMALISED = {"mean": MEAN, "std": STD}


def channels(values):
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def images(batch=6, size=8, seed=0):
    """Normalised images whose pixels fill [0, 1], and labels of five classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 3, size, size, dtype=torch.float64, generator=generator)
    pixels.view(batch, -1)[:, :2] = torch.tensor([0.0, 1.0])
    x = (pixels - channels(MEAN)) / channels(STD)
    return x, torch.randint(5, (batch,), generator=generator)


def pixels_of(x):
    return x * channels(STD) + channels(MEAN)


def vit(K=3, **options):
    family = FAMILIES["vit"]
    return particles_of(family.build(), family.config(), K, **options)


class Linear(nn.Module):
    """Logits that are linear in the image."""

    def __init__(self, classes=2, size=4):
        super().__init__()
        self.linear = nn.Linear(3 * size * size, classes).double()

    def forward(self, x):
        return self.linear(x.flatten(1))


def linear(K=1, classes=2, size=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["linear"])
        return particles_of(Linear(classes, size), config, K)


def weight(model, particle=0):
    """The linear map of one particle, (classes, 3, size, size)."""
    [(_, layer)] = model.lora_layers()
    delta = layer.scaling * layer.lora_B[particle] @ layer.lora_A[particle]
    flat = layer.base_layer.weight + delta
    return flat.detach().view(len(flat), 3, 4, 4)


def nll(model, x, y):
    """−log p̄ of the labels, (B,)."""
    return -ml.predict(model, x).mean(0).log()[torch.arange(len(y)), y]


def attack(model, x, y, epsilon=0.03, **options):
    return fgsm(model, x, y, epsilon, **NORMALISED, **options)


class TestFgsm:
    def test_is_the_closed_form_of_a_linear_model(self):
        model, (x, y) = linear(), images(size=4)
        y = y % 2
        W = weight(model)
        # With two classes, the loss rises with the other class's logit less the label's own.
        sign = (W[1 - y] - W[y]).sign()
        expected = (pixels_of(x) + 0.03 * sign).clamp(0, 1)
        moved = attack(model, x, y)
        torch.testing.assert_close(pixels_of(moved), expected, rtol=0, atol=1e-12)
        assert (pixels_of(moved) - pixels_of(x)).abs().max() > 0.0299

    def test_weighs_particles_by_their_share_of_the_mean(self):
        """Against the gradient of −log (1/K) Σ_k p_k in plain autograd."""
        model, (x, y) = vit(), images()
        z = x.clone().requires_grad_()
        p = torch.stack([model.particle(k)(z).softmax(-1) for k in range(3)]).mean(0)
        F.nll_loss(p.log(), y).backward()
        expected = (pixels_of(x) + 0.03 * z.grad.sign()).clamp(0, 1)
        for chunk in (None, 1, 2):
            moved = attack(model, x, y, particle_chunk=chunk)
            torch.testing.assert_close(pixels_of(moved), expected, rtol=0, atol=1e-12)

    def test_a_confident_mistake_still_has_a_gradient(self):
        model, (x, _) = linear(), images(size=4)
        with torch.no_grad():
            for _, layer in model.lora_layers():
                layer.base_layer.weight.mul_(1e5)
        model, x = model.float(), x.float()
        p = model(x)[0].softmax(-1)
        y = p.argmin(-1)
        # In float32, p of the label is zero, and so would be its gradient.
        assert (p.amin(-1) == 0).all()
        assert (attack(model, x, y) != x).flatten(1).double().mean(1).min() > 0.9

    def test_nothing_moves_for_epsilon_zero(self):
        model, (x, y) = vit(), images()
        assert torch.equal(attack(model, x, y, 0.0, steps=3), x)
        for side in (-1, 1):
            edge = torch.nextafter(x, x + side)  # as rounding may leave it, outside the pixels
            assert torch.equal(attack(model, edge, y, 0.0), edge)

    def test_pixels_stay_in_their_range(self):
        model, (x, y) = vit(), images()
        moved = pixels_of(attack(model, x, y, 0.2))
        assert moved.min() > -1e-12 and moved.max() < 1 + 1e-12
        assert ((moved < 1e-12) | (moved > 1 - 1e-12)).double().mean() > 0.1

    def test_mean_and_std_are_those_of_each_channel(self):
        """Images that are not normalised, with the model's own normalisation: the same pixels."""
        model, (x, y) = vit(), images()

        class Normalising(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, pixels):
                return self.inner((pixels - channels(MEAN)) / channels(STD))

        expected = pixels_of(attack(model, x, y, steps=2))
        model.base = Normalising(model.base)
        model._runner = type(model._runner)()
        moved = fgsm(model, pixels_of(x).clamp(0, 1), y, 0.03, steps=2)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


class TestPgd:
    def test_stays_in_the_ball_of_the_first_images(self):
        model, (x, y) = vit(), images()
        moved = attack(model, x, y, steps=5, step_size=0.02)
        distance = (pixels_of(moved) - pixels_of(x)).abs()
        assert 0.0299 < distance.max() < 0.03 + 1e-12
        assert pixels_of(moved).min() > -1e-12 and pixels_of(moved).max() < 1 + 1e-12

    def test_hurts_a_linear_model_as_fgsm_does_at_least(self):
        (x, y), two = images(size=4), linear(1, 2)
        # With two classes and one particle the direction never changes.
        once, often = (attack(two, x, y % 2, steps=s) for s in (1, 7))
        torch.testing.assert_close(often, once, rtol=0, atol=1e-12)
        many = linear(3, 5)
        once, often = (attack(many, x, y, 0.1, steps=s) for s in (1, 7))
        assert (nll(many, often, y) >= nll(many, once, y) - 1e-12).all()
        assert (nll(many, once, y) > nll(many, x, y)).all()

    def test_follows_the_gradient_of_every_step(self):
        model, (x, y) = vit(), images()
        z, lower, upper = x, x - 0.03 / channels(STD), x + 0.03 / channels(STD)
        low, high = -channels(MEAN) / channels(STD), (1 - channels(MEAN)) / channels(STD)
        for _ in range(3):
            z = z.detach().requires_grad_()
            log_p = model(z).log_softmax(-1).logsumexp(0)
            (grad,) = torch.autograd.grad(F.nll_loss(log_p, y), z)
            z = z + 0.02 / channels(STD) * grad.sign()
            z = torch.minimum(torch.maximum(z, lower), upper).clamp(low, high)
        moved = attack(model, x, y, steps=3, step_size=0.02)
        torch.testing.assert_close(moved, z.detach(), rtol=0, atol=1e-12)


class TestParticles:
    @pytest.mark.parametrize("chunk", [None, 2])
    @pytest.mark.parametrize("fold", ["batch", "loop"])
    def test_per_particle_attacks_each_alone(self, chunk, fold):
        model, (x, y) = vit(fold=fold), images()
        together = attack(model, x, y, steps=2, per_particle=True, particle_chunk=chunk)
        for k in range(3):
            z, lower = x, torch.maximum(x - 0.03 / channels(STD), -channels(MEAN) / channels(STD))
            upper = torch.minimum(x + 0.03 / channels(STD), (1 - channels(MEAN)) / channels(STD))
            for _ in range(2):
                z = z.detach().requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model.particle(k)(z), y), z)
                z = torch.clamp(z + 0.03 / channels(STD) * grad.sign(), lower, upper)
            torch.testing.assert_close(together[k], z.detach(), rtol=0, atol=1e-12)
        assert not torch.equal(together[0], together[1])

    def test_one_particle_is_its_own_mean(self):
        model, (x, y) = vit(1), images()
        own = attack(model, x, y, per_particle=True)
        assert own.shape == (1, *x.shape) and torch.equal(own[0], attack(model, x, y))

    @pytest.mark.parametrize("cut", [True, "blocks.1"])
    def test_the_gradient_goes_through_a_shared_trunk(self, cut):
        """Against finite differences of the model without one."""
        family = FAMILIES["vit"]
        config = family.config(target_modules=r"blocks\.1\..*qkv")
        shared = particles_of(family.build(), config, 3, share_trunk=cut)
        plain, (x, y) = particles_of(family.build(), config, 3), images(3)
        assert shared.has_cut
        moved = attack(shared, x, y)
        torch.testing.assert_close(moved, attack(plain, x, y), rtol=0, atol=1e-12)
        generator = torch.Generator().manual_seed(5)
        for i in torch.randint(x[0].numel(), (12,), generator=generator).tolist():
            step = torch.zeros_like(x)
            step.view(3, -1)[:, i] = 1e-5
            slope = nll(plain, x + step, y) - nll(plain, x - step, y)
            change = (moved - x).view(3, -1)[:, i]
            inside = change.abs() > 1e-9  # pixels at 0 or 1 may have no room
            assert (slope.abs() > 1e-9).all()
            assert torch.equal(slope.sign()[inside], change.sign()[inside])
            assert inside.any()

    def test_rows_of_a_trunk_are_refused(self):
        family = FAMILIES["vit"]
        config = family.config(target_modules=r"blocks\.1\..*qkv")
        model, (x, y) = particles_of(family.build(), config, 3, share_trunk=True), images()
        with pytest.raises(TypeError, match=r"floating images .* got TrunkOutput"):
            fgsm(model, model.trunk(x), y, 0.1)

    def test_transfer_hurts_the_attacked_particle_most(self):
        # 2-class linear particles are attacked exactly, so that the diagonal is the lowest.
        model, (x, y) = linear(3), images(64, size=4)
        y = ml.predict(model, x).mean(0).argmax(-1)
        loader = [(x[:40], y[:40]), (x[40:], y[40:])]
        matrix = transfer_matrix(model, loader, 0.2, **NORMALISED)
        own = matrix.diagonal()
        assert matrix.shape == (3, 3) and (own <= matrix.amin(0)).all()
        assert (matrix.sum() - own.sum()) / 6 > own.mean() + 0.02
        i, j = 0, 2
        against_i = attack(model, x, y, 0.2, per_particle=True)[i]
        read = model.particle(j)(against_i).argmax(-1) == y
        assert matrix[i, j].item() == pytest.approx(read.double().mean().item())
        chunked = transfer_matrix(model, loader, 0.2, **NORMALISED, particle_chunk=2)
        assert torch.equal(chunked, matrix)

    def test_accuracy_falls_with_the_budget(self):
        model, (x, y) = linear(1, 2), images(64, size=4)
        y = ml.predict(model, x).mean(0).argmax(-1)
        loader = [(x[:40], y[:40]), (x[40:], y[40:])]
        W = weight(model)
        margin = (model(x)[0] * F.one_hot(y, 2)).sum(-1) - (model(x)[0] * F.one_hot(1 - y, 2)).sum(
            -1
        )
        budgets = (0.0, 0.001, 0.01, 0.05, 0.2)
        found = robust_accuracy(model, loader, budgets, **NORMALISED)
        assert list(found) == list(budgets) and found[0.0] == 1.0
        values = list(found.values())
        assert values == sorted(values, reverse=True) and values[-1] < values[1]
        moved = attack(model, x, y, 0.05)
        fall = ((moved - x) * (W[y] - W[1 - y])).flatten(1).sum(1)
        assert found[0.05] == pytest.approx((margin + fall > 0).double().mean().item())

    def test_accuracy_is_that_of_the_mean_prediction(self):
        model, (x, y) = linear(4, 5), images(64, size=4)
        p = ml.predict(model, attack(model, x, y, 0.01))
        found = robust_accuracy(model, [(x[:40], y[:40]), (x[40:], y[40:])], (0.01,), **NORMALISED)
        assert found[0.01] == pytest.approx((p.mean(0).argmax(-1) == y).double().mean().item())
        assert found[0.01] not in (p.argmax(-1) == y).double().mean(1).tolist()


def in_processes(rank, folder):
    """Two processes with two particles each."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("particle",))
    model, x, y = spread(mesh), *images()
    torch.manual_seed(rank)  # the processes' generators need not agree
    method = ml.DVERGE(model, tap="blocks.1", steps=2, **NORMALISED)
    return (
        attack(model, x, y, steps=2),
        attack(model, x, y, per_particle=True, particle_chunk=1),
        transfer_matrix(model, [(x, y)], 0.03, **NORMALISED),
        robust_accuracy(model, [(x, y)], (0.03,), **NORMALISED),
        method.batch(x, y),
    )


def spread(mesh=None):
    """Four particles that do not depend on the processes that hold them."""
    family = FAMILIES["vit"]
    config = family.config(target_modules=["qkv"])
    model = ml.get_particle_model(family.build(), config, 4, mesh=mesh, seed=0, head_init="reset")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in model.adapters():
            noise = torch.randn(4, *adapter.lora_B.shape[1:], generator=generator).double()
            adapter.lora_B.copy_(model.processes.own(noise))
    return model.eval()


@pytest.mark.processes
def test_processes_attack_together(tmp_path):
    whole, (x, y) = spread(), images()
    mean = attack(whole, x, y, steps=2)
    each = attack(whole, x, y, per_particle=True)
    z = dverge(whole, x, x.roll(1, 0), "blocks.1", steps=2, **NORMALISED)
    found = run_in_processes(2, in_processes, tmp_path)
    batches = torch.cat([batch[0] for *_, batch in found])
    shifts = [s for s in range(4) if torch.allclose(batches, z.roll(s, 0), rtol=0, atol=1e-9)]
    assert len(shifts) == 1 and shifts != [0]
    for rank, (of_mean, of_each, matrix, accuracy, (_, targets)) in enumerate(found):
        torch.testing.assert_close(of_mean, mean, rtol=0, atol=1e-9)
        own = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(of_each, each[own], rtol=0, atol=1e-9)
        assert torch.equal(matrix, transfer_matrix(whole, [(x, y)], 0.03, **NORMALISED))
        assert accuracy == robust_accuracy(whole, [(x, y)], (0.03,), **NORMALISED)
        assert torch.equal(targets, y.roll(1, 0).expand(2, -1))


class TestItLeavesTheModelAlone:
    @pytest.mark.parametrize("broken", [False, True])
    def test_gradients_and_modes(self, broken):
        model, (x, y) = vit(), images()
        model.train()
        model.base.blocks[0].eval()
        modes = {name: m.training for name, m in model.named_modules()}
        for p in model.particle_parameters():
            p.grad = torch.full_like(p, 2.0)
        before = [p.detach().clone() for p in model.parameters()]
        if broken:
            hook = model.base.blocks[1].register_forward_hook(_raise)
            with pytest.raises(ArithmeticError):
                attack(model, x, y, steps=2, per_particle=True)
            hook.remove()
        else:
            with torch.no_grad():
                moved = attack(model, x, y, steps=2, particle_chunk=2)
            assert not moved.requires_grad and x.grad is None
        assert {name: m.training for name, m in model.named_modules()} == modes
        assert all((p.grad == 2.0).all() for p in model.particle_parameters())
        assert all(map(torch.equal, model.parameters(), before))

    def test_dropout_is_off(self):
        model, (x, y) = vit(), images()
        model.base.head_drop = nn.Dropout(0.5)
        expected = attack(model, x, y)
        torch.manual_seed(3)
        assert torch.equal(attack(model.train(), x, y), expected)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(3), (torch.manual_seed(3), torch.rand(3))[1])


def _raise(*_):
    raise ArithmeticError


class TestRefusals:
    def test_images_that_are_not_normalised_so(self):
        model, (x, y) = vit(), images()
        with pytest.raises(ValueError, match=r"x has values in \[-2.*pixels in \[0, 1\] are in"):
            fgsm(model, x, y, 0.1)
        broken = x.clone()
        broken[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="x has values"):
            attack(model, broken, y)

    def test_settings(self):
        model, (x, y) = vit(), images()
        for options, text in (
            ({"steps": 0}, "steps must be an integer >= 1; got 0"),
            ({"step_size": -1.0}, "step_size must be a finite number >= 0"),
            ({"particle_chunk": 0}, "particle_chunk must be an integer >= 1"),
        ):
            with pytest.raises(ValueError, match=text):
                attack(model, x, y, **options)
        with pytest.raises(ValueError, match=r"epsilon must be a finite number >= 0; got -0\.1"):
            attack(model, x, y, -0.1)
        with pytest.raises(ValueError, match=r"6 images need 6 labels; got torch.int64 \(5,\)"):
            attack(model, x, y[:5])
        with pytest.raises(ValueError, match=r"mean must be a number or \(3,\); got \(2,\)"):
            fgsm(model, x, y, 0.1, mean=(0.5, 0.5))
        with pytest.raises(ValueError, match="std must be positive; got 0"):
            fgsm(model, x, y, 0.1, std=0)

    def test_what_is_no_image_or_no_model(self):
        model, (x, y) = vit(), images()
        with pytest.raises(TypeError, match=r"floating images .* got torch.int64 \(6, 4\)"):
            fgsm(model, torch.ones(6, 4, dtype=torch.long), y, 0.1)
        with pytest.raises(TypeError, match="a ParticleModel; got VisionTransformer"):
            fgsm(model.base, x, y, 0.1)
        for measure in (
            lambda: robust_accuracy(model, []),
            lambda: transfer_matrix(model, [], 0.1),
        ):
            with pytest.raises(ValueError, match="at least one batch"):
                measure()
