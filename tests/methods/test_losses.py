"""Losses other than cross-entropy: each particle's is torch's own, in every method."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import multilora as ml
from multilora import losses

K, N, C = 3, 6, 5
# float64 and a few operations.
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
WEIGHT = torch.tensor([0.1, 0.7, 0.05, 2.0, 0.4], dtype=torch.float64)


def classes(*shape):
    y = torch.randint(C, shape)
    y.view(-1)[1] = -100
    return y


def probabilities(*shape):
    return torch.randn(*shape, C, dtype=torch.float64).softmax(-1)


def gaussian(z, t):
    half = z.shape[-1] // 2
    mean, variance = z[..., :half], z[..., half:].exp()
    return F.gaussian_nll_loss(mean, t.view(mean.shape), variance)


# name: (loss, outputs, targets, torch's own for one particle)
LOSSES = {
    "particle": (losses.NAMES["particle"], C, classes, F.cross_entropy),
    "smoothing": (
        losses.CrossEntropy(label_smoothing=0.3),
        C,
        classes,
        lambda z, t: F.cross_entropy(z, t, label_smoothing=0.3),
    ),
    "weights": (
        losses.CrossEntropy(weight=WEIGHT),
        C,
        classes,
        lambda z, t: F.cross_entropy(z, t, WEIGHT),
    ),
    "both": (
        losses.CrossEntropy(0.2, WEIGHT),
        C,
        classes,
        lambda z, t: F.cross_entropy(z, t, WEIGHT, label_smoothing=0.2),
    ),
    "soft": (losses.NAMES["soft_targets"], C, probabilities, F.cross_entropy),
    "soft, both": (
        losses.SoftTargets(0.2, WEIGHT),
        C,
        probabilities,
        lambda z, t: F.cross_entropy(z, t, WEIGHT, label_smoothing=0.2),
    ),
    "bce": (
        losses.NAMES["bce"],
        C,
        lambda *shape: torch.randint(2, (*shape, C)),
        lambda z, t: F.binary_cross_entropy_with_logits(z, t.double()),
    ),
    "bce, weights": (
        losses.BCE(pos_weight=WEIGHT),
        C,
        lambda *shape: torch.rand(*shape, C, dtype=torch.float64),
        lambda z, t: F.binary_cross_entropy_with_logits(z, t, pos_weight=WEIGHT),
    ),
    "gaussian": (
        losses.NAMES["gaussian_nll"],
        6,
        lambda *shape: torch.randn(*shape, 3, dtype=torch.float64),
        gaussian,
    ),
    "gaussian of one": (
        losses.GaussianNLL(),
        2,
        lambda *shape: torch.randn(*shape, dtype=torch.float64),
        gaussian,
    ),
    "squares": (
        losses.GaussianNLL(variance=0.5),
        3,
        lambda *shape: torch.randn(*shape, 3, dtype=torch.float64),
        lambda z, t: F.gaussian_nll_loss(z, t, torch.full_like(z, 0.5)),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
METHODS = {
    "ensemble": ml.Ensemble,
    "svgd": lambda m, **o: ml.SVGD(m, gamma=0.0, bandwidth=1e9, **o),
    "ibdr": lambda m, **o: ml.IBDR(m, alpha=0.0, clip=0.0, rho=0.0, cost="parameter", **o),
}


def particle_model(particles=K, outputs=C):
    base = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, outputs)).double()
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = ml.get_particle_model(base, config, particles, head_init="reset")
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_()
    return model


@every_loss
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("rows", [(N,), (2, 3)], ids=str)
def test_each_particles_loss_is_torchs(name, own, rows):
    loss, outputs, targets, torchs = LOSSES[name]
    logits = torch.randn(K, *rows, outputs, dtype=torch.float64, requires_grad=True)
    t = targets(K, *rows) if own else targets(*rows)
    got = loss(logits, t)
    flat = [t[k] if own else t for k in range(K)]
    flat = [x.flatten(0, len(rows) - 1) for x in flat]
    expected = torch.stack([torchs(logits[k].flatten(0, -2), flat[k]) for k in range(K)])
    torch.testing.assert_close(got, expected, **TIGHT)
    upstream = torch.randn(K, dtype=torch.float64)
    (g,) = torch.autograd.grad(got, logits, upstream, retain_graph=True)
    (e,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(g, e, **TIGHT)


@every_loss
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_in_every_method(name, method, chunk):
    loss, outputs, targets, torchs = LOSSES[name]
    model, x, t = particle_model(outputs=outputs), torch.randn(N, 4).double(), targets(N)
    made = METHODS[method](model, loss=loss, particle_chunk=chunk)
    stats = made.backward(lambda: (model(x), t))
    expected = torch.stack([torchs(z, t) for z in model(x)])
    torch.testing.assert_close(made.particle_nll, expected.detach(), **TIGHT)
    torch.testing.assert_close(stats["loss"], expected.detach().mean(), **TIGHT)
    grads = torch.autograd.grad(expected.sum(), model.particle_parameters())
    for p, g in zip(model.particle_parameters(), grads):
        torch.testing.assert_close(p.grad, g, **TIGHT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_callable_of_ones_own_in_every_method(method, chunk):
    model, x, y = particle_model(), torch.randn(N, 4).double(), torch.randint(C, (N,))
    made = METHODS[method](model, particle_chunk=chunk, loss=lambda z, y: z.square().mean((1, 2)))
    made.backward(lambda: (model(x), y))
    grads = torch.autograd.grad(model(x).square().mean((1, 2)).sum(), model.particle_parameters())
    for p, g in zip(model.particle_parameters(), grads):
        torch.testing.assert_close(p.grad, g, **TIGHT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("own", [False, True])
def test_soft_targets_of_as_many_rows_as_particles_and_classes(method, chunk, own):
    # (N, C) looks like (K, N) where all are equal.
    model, x = particle_model(C), torch.randn(C, 4).double()
    t = probabilities(C, C) if own else probabilities(C)
    made = METHODS[method](model, particle_chunk=chunk)
    made.backward(lambda: (model(x), t))
    expected = [F.cross_entropy(z, t[k] if own else t) for k, z in enumerate(model(x))]
    torch.testing.assert_close(made.particle_nll, torch.stack(expected).detach(), **TIGHT)


def test_targets_that_could_be_shared_or_own():
    model, x = particle_model(C), torch.randn(C, 4).double()

    def squares(z, t):
        return (z - t).square().mean((1, 2))

    made = ml.Ensemble(model, loss=squares, particle_chunk=2)
    with pytest.raises(ValueError, match=r"\(5, 5\) of 5 particles .* shared or each particle's"):
        made.backward(lambda: (model(x), torch.randn(C, C).double()))
    made.backward(lambda: (model(x[:4]), torch.randn(4, C).double()))
    assert all(p.grad is not None for p in model.particle_parameters())


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", ["particle", "soft_targets", "callable"])
def test_the_divergence_of_soft_targets_leaves_out_the_most_likely_class(name, chunk):
    model, x, t = particle_model(), torch.randn(N, 4).double(), probabilities(N)

    def one(z, t):
        return torch.stack([F.cross_entropy(member, t) for member in z])

    loss = one if name == "callable" else name
    stats = ml.IBDR(model, alpha=0.7, clip=0.0, loss=loss, particle_chunk=chunk).backward(
        lambda: (model(x), t)
    )
    z = model(x)
    divergence = ml.gram_volume(z, t.argmax(-1)).mean()
    torch.testing.assert_close(stats["divergence"], divergence.detach(), **TIGHT)
    total = one(z, t).sum() + 0.7 * divergence
    for p, g in zip(
        model.particle_parameters(), torch.autograd.grad(total, model.particle_parameters())
    ):
        torch.testing.assert_close(p.grad, g, **TIGHT)


@pytest.mark.parametrize("divergence", ["joint", "cross"])
@pytest.mark.parametrize("cost", ["parameter", "output"])
def test_the_divergence_of_something_else(divergence, cost):
    # The loss is a regression of two outputs; the other five are logits of classes.
    model, x = particle_model(outputs=C + 2), torch.randn(N, 4).double()
    t, y = torch.randn(N).double(), classes(N)
    method = ml.IBDR(
        model,
        alpha=0.7,
        clip=0.0,
        divergence=divergence,
        cost=cost,
        loss=lambda z, t: losses.GaussianNLL()(z[..., C:], t),
        divergence_of=lambda z, _: (z[..., :C], y),
    )
    stats = method.backward(lambda: (model(x), t))
    z = model(x)
    volume = ml.gram_volume(z[..., :C], y).sum() / (y != -100).sum()
    torch.testing.assert_close(stats["divergence"], volume.detach(), **TIGHT)
    if divergence == "joint":
        total = losses.GaussianNLL()(z[..., C:], t).sum() + 0.7 * volume
        for p, g in zip(
            model.particle_parameters(), torch.autograd.grad(total, model.particle_parameters())
        ):
            torch.testing.assert_close(p.grad, g, **TIGHT)


def test_a_divergence_of_no_classes_is_refused():
    for name in ("bce", "gaussian_nll"):
        with pytest.raises(ValueError, match="divergence_of="):
            ml.IBDR(particle_model(), loss=name)
        with pytest.raises(ValueError, match="divergence_of="):
            ml.IBDR(particle_model(), loss=name, alpha=0.0)
        ml.IBDR(particle_model(), loss=name, alpha=0.0, cost="parameter", rho=1e-3)
    # Only the step shows which targets a callable takes.
    model, x = particle_model(), torch.randn(N, 4).double()
    method = ml.IBDR(model, loss=lambda z, t: (z - t).square().mean((1, 2)))
    with pytest.raises(ValueError, match=r"float64 \(6, 5\).*divergence_of="):
        method.backward(lambda: (model(x), torch.randn(N, C).double()))
    method = ml.IBDR(model, divergence_of=lambda z, t: (z[0], t))
    with pytest.raises(ValueError, match=r"divergence_of must return .* K = 3; got \(6, 5\)"):
        method.backward(lambda: (model(x), classes(N)))


def test_label_smoothing_beside_a_divergence():
    model, x, y = particle_model(), torch.randn(N, 4).double(), classes(N)
    stats = ml.IBDR(model, alpha=0.7, clip=0.0, loss="label_smoothing").backward(
        lambda: (model(x), y)
    )
    z = model(x)
    nll = torch.stack([F.cross_entropy(member, y, label_smoothing=0.1) for member in z])
    divergence = ml.particle_loss(z, y)[1]
    torch.testing.assert_close(stats["divergence"], divergence.detach(), **TIGHT)
    torch.testing.assert_close(stats["loss"], (nll.mean() + 0.7 * divergence).detach(), **TIGHT)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(), losses.CrossEntropy(0.1, WEIGHT)])
def test_without_a_valid_target_the_loss_is_zero(loss):
    z = torch.randn(K, N, C, dtype=torch.float64, requires_grad=True)
    value = loss(z, torch.full((N,), -100))
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value)) and not z.grad.any()


def test_half_precision_logits_are_taken_in_float32():
    z = (8 * torch.randn(K, 50, C)).bfloat16()
    for name in ("label_smoothing", "soft_targets", "bce"):
        t = torch.randint(C, (50,)) if name == "label_smoothing" else torch.rand(50, C)
        t = t.softmax(-1) if name == "soft_targets" else t
        got = losses.NAMES[name](z, t)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, losses.NAMES[name](z.float(), t))


@pytest.mark.parametrize(
    "loss, targets, message",
    [
        ("particle", torch.zeros(4, dtype=torch.int64), r"targets \(6,\) .* \(3, 6, 5\).*\(4,\)"),
        ("particle", torch.rand(N, C).double() + 1, "must be probabilities"),
        ("particle", torch.randint(2, (N, C)).float(), "must be probabilities"),
        ("soft_targets", torch.zeros(N, C - 1), r"\(6, 5\) .* SoftTargets"),
        ("bce", torch.full((N, C), -100), r"in \[0, 1\]"),
        ("bce", torch.zeros(N), r"\(6, 5\) .* BCE"),
        ("gaussian_nll", torch.zeros(N), r"outputs \(K, \.\.\., 2·D\)"),
    ],
)
def test_targets_of_another_kind(loss, targets, message):
    model, x = particle_model(), torch.randn(N, 4).double()
    with pytest.raises(ValueError, match=message):
        ml.Ensemble(model, loss=loss).backward(lambda: (model(x), targets))


def test_arguments_of_losses():
    for wrong in (-0.1, 1.1, float("nan"), True, "much"):
        with pytest.raises(ValueError, match="label_smoothing"):
            losses.CrossEntropy(label_smoothing=wrong)
    for wrong in (-WEIGHT, WEIGHT * float("nan"), [1.0, 2.0], WEIGHT[None]):
        with pytest.raises(ValueError, match="weight"):
            losses.CrossEntropy(weight=wrong)
        with pytest.raises(ValueError, match="pos_weight"):
            losses.BCE(pos_weight=wrong)
    for wrong in (0, -1.0, float("inf"), "one"):
        with pytest.raises(ValueError, match="variance"):
            losses.GaussianNLL(variance=wrong)
    with pytest.raises(TypeError, match="SoftTargets needs"):
        losses.SoftTargets()(torch.randn(K, N, C), torch.zeros(N).long())
    with pytest.raises(ValueError, match=r"weights must be \(C,\).*\(5,\) for \(3, 6, 4\)"):
        losses.CrossEntropy(weight=WEIGHT)(torch.randn(K, N, 4), torch.zeros(N).long())


def test_causal_targets_are_those_of_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.randint(11, (4, 9))
    labels[:, :3] = -100
    logits = torch.randn(K, 4, 9, 11)
    targets = losses.causal_targets(labels)
    assert targets.shape == labels.shape and (targets[:, -1] == -100).all()
    got = losses.NAMES["particle"](logits, targets)
    expected = torch.stack([ForCausalLMLoss(z, labels, vocab_size=11) for z in logits])
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"int64 tokens \(\.\.\., T\); got torch.float32"):
        losses.causal_targets(labels.float())
