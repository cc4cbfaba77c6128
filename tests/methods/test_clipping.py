"""clip_grad_norm_ clips every particle by its own norm, as torch would."""

import pytest
import torch
from torch import nn

import multilora as ml
from multilora.optim import clip_grad_norm_, separate_parameters
from separate_runs import CLOSE, K, start


def with_gradients(scales=(1.0, 100.0, 1e-3, 1.0)):
    model = start()
    generator = torch.Generator().manual_seed(3)
    for p in model.particle_parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad *= torch.tensor(scales, dtype=p.dtype).view(-1, *[1] * (p.ndim - 1))
    return model


def torchs_own(model, max_norm, norm_type=2.0):
    """The result of torch's clipping of each particle's gradients alone."""
    norms, grads = [], []
    for k in range(K):
        alone = [nn.Parameter(p.detach()[k].clone()) for p in model.particle_parameters()]
        for q, p in zip(alone, model.particle_parameters()):
            q.grad = p.grad[k].clone()
        norms.append(nn.utils.clip_grad_norm_(alone, max_norm, norm_type))
        grads.append([q.grad for q in alone])
    return torch.stack(norms), [torch.stack(parts) for parts in zip(*grads)]


def grads_of(model):
    return [p.grad for p in model.particle_parameters()]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
def test_every_particle_is_clipped_as_torch_would(norm_type):
    model = with_gradients()
    norms, grads = torchs_own(model, 1.0, norm_type)
    assert (norms > 1).any() and (norms < 1).any()
    torch.testing.assert_close(clip_grad_norm_(model, 1.0, norm_type), norms, **CLOSE)
    for got, expected in zip(grads_of(model), grads):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_broken_particle_leaves_the_others_alone(bad):
    model = with_gradients()
    model.particle_parameters()[1].grad[2, 0, 0] = bad
    norms, grads = torchs_own(model, 1.0)
    before = [g.clone() for g in grads_of(model)]
    with pytest.raises(RuntimeError, match=r"particles \[2\] are \[(inf|nan)\]"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, grads_of(model)))
    torch.testing.assert_close(clip_grad_norm_(model, 1.0), norms, equal_nan=True)
    for got, expected in zip(grads_of(model), grads):
        torch.testing.assert_close(got, expected, equal_nan=True, **CLOSE)
        assert got[[0, 1, 3]].isfinite().all()


def test_what_can_be_clipped():
    model = with_gradients()
    expected = torchs_own(model, torch.inf)[0]
    before = [g.clone() for g in grads_of(model)]
    forms = [
        model,
        torch.compile(model, backend="eager"),
        ml.Ensemble(model),
        model.particle_parameters(),
        model.parameters(),
    ]
    for form in forms:
        torch.testing.assert_close(clip_grad_norm_(form, torch.inf), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, grads_of(model)))
    # Some tensors may have no gradient.
    model.particle_parameters()[0].grad = None
    clip_grad_norm_(model, 0.0)
    assert not any(g.any() for g in grads_of(model)[1:])
    model.zero_grad()
    assert torch.equal(clip_grad_norm_(model, 1.0), torch.zeros(K, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: clip_grad_norm_(m, -1.0), ValueError, "max_norm >= 0"),
        (lambda m: clip_grad_norm_(m, float("nan")), ValueError, "max_norm >= 0"),
        (lambda m: clip_grad_norm_(m, 1.0, 0), ValueError, "norm_type > 0"),
        (lambda m: clip_grad_norm_(nn.Sequential(), 1.0), TypeError, "got Sequential"),
        (lambda m: clip_grad_norm_([], 1.0), ValueError, "at least one"),
        (lambda m: clip_grad_norm_(separate_parameters(m), 1.0), TypeError, "no particle axis"),
    ],
)
def test_what_cannot(call, error, message):
    with pytest.raises(error, match=message):
        call(with_gradients())


def test_stacked_tensors_of_two_numbers_of_particles():
    tensors = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 2))]
    for t in tensors:
        t.grad = torch.ones_like(t)
    with pytest.raises(ValueError, match=r"one K; got .*\(3, 2\), \(2, 2\)"):
        clip_grad_norm_(tensors, 1.0)
