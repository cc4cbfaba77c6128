"""Attacks on the inputs: FGSM and PGD, their transfer between particles, and DVERGE's images.

Images are normalised pixels, x = (pixel − mean) / std with pixels in [0, 1]; ε and step sizes are
in pixels. `mean` and `std` are numbers, or one number for each channel. The defaults are for images
that are not normalised. No `.grad` is touched, and modules run in eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora import checks, forward_state
from multilora.fold import tensors
from multilora.model import ParticleModel
from multilora.ops.common import accumulator
from multilora.prediction import check_logits, chosen, evaluating, predict

#: A number, or one for each channel.
Channels = float | Sequence[float] | Tensor
#: The values of ε that accuracies are reported at.
BUDGETS = (0.001, 0.005, 0.01, 0.03)


def fgsm(
    model: ParticleModel,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    mean: Channels = 0.0,
    std: Channels = 1.0,
    steps: int = 1,
    step_size: float | None = None,
    per_particle: bool = False,
    particle_chunk: int | None = None,
) -> Tensor:
    """Images within ε of x that the particles misread: FGSM, or PGD for more than one step.

        x ← clip(x + η/std · sign ∇_x[−log p̄_y]),   p̄ = (1/K) Σ_k p_k,

    where clip is the projection onto the images that are at most ε from the first x and have
    pixels in [0, 1]. Every step is one forward and one backward for all particles, also over a
    shared trunk. There is no random start.

    Source: Goodfellow et al. 2015 (FGSM); Madry et al. 2018 (PGD).

    Args:
        model: the particle model.
        x: images (B, C, ...), normalised.
        y: labels (B,) int64.
        epsilon: ε >= 0, in pixels, whose range is [0, 1].
        mean, std: of the normalisation, over axis 1.
        steps: how many steps are taken.
        step_size: η in pixels; ε for one step and 2.5·ε/steps, but at most ε, for several.
        per_particle: attack every particle by itself, on −log p_k.
        particle_chunk: run this many particles at a time, to save memory.

    Returns:
        Images of the shape of x. With per_particle, those against each of this process's particles,
        (K, B, C, ...); model(images, per_particle=True) shows each particle its own.

    Raises:
        TypeError: the model is not a ParticleModel, or x is not a tensor of floats.
        ValueError: x has values that no pixel in [0, 1] has; the labels or the model's outputs
            are not those of a classifier; or a setting is out of its range.
    """
    particles(model)
    size = _step_size(epsilon, steps, step_size, 2.5)
    ball = _Ball(x, epsilon, mean, std)
    if not isinstance(y, Tensor) or y.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} images need {len(x)} labels; got {_shown(y)}")

    def log_p(z: Tensor) -> Tensor:
        """log p_k of the labels (k, B), of the particles that run."""
        logits = chosen(model(z, per_particle=per_particle), None)
        check_logits(logits, None)
        logits = logits.to(accumulator(logits.dtype))
        losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
        return -losses.view(len(logits), -1)

    def of_each(z: Tensor) -> Tensor:
        def run() -> Tensor:
            return torch.autograd.grad(log_p(z).sum(), z)[0][model.window]

        return model.in_chunks(chunk, run)

    def of_mean(z: Tensor) -> Tensor:
        def run() -> Tensor:
            """log Σ_k p_k over the particles that run, and its gradient: (1, B, 1 + numbers)."""
            total = log_p(z).logsumexp(0)
            (grad,) = torch.autograd.grad(total.sum(), z)
            return torch.cat([total.detach()[:, None], grad.flatten(1).to(total.dtype)], 1)[None]

        parts = model.processes.gather(model.in_chunks(chunk, run))
        # ∇ log p̄ weighs the gradient of each part by the part's share of p̄.
        return (parts[..., :1].softmax(0) * parts[..., 1:]).sum(0).view_as(z)

    chunk = model.num_particles if particle_chunk is None else particle_chunk
    first = x.expand(model.num_particles, *x.shape) if per_particle else x
    with evaluating(model):
        return ball.descend(first, of_each if per_particle else of_mean, size, steps)


def transfer_matrix(
    model: ParticleModel, loader: Iterable[tuple[Tensor, Tensor]], epsilon: float, **attack: Any
) -> Tensor:
    """How well each particle reads the images that were made against another.

    Args:
        model: the particle model.
        loader: batches of images and labels.
        epsilon: as in `fgsm`.
        attack: mean, std, steps, step_size and particle_chunk, as in `fgsm`.

    Returns:
        (K, K) float64 on the CPU. Entry i, j is the accuracy of particle j on the images that were
        made against particle i. K counts the particles of all processes.

    Raises:
        TypeError, ValueError: as `fgsm`, and if there is no batch.
    """
    chunk, rights = attack.get("particle_chunk"), []
    for x, y in _on_device(model, loader):
        images = fgsm(model, x, y, epsilon, per_particle=True, **attack)
        images = model.processes.gather(images)
        read = torch.stack([predict(model, z, chunk, log=True).argmax(-1) for z in images])
        rights.append((read == y).cpu())
    return _joined(rights).double().mean(-1)


def robust_accuracy(
    model: ParticleModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    budgets: Sequence[float] = BUDGETS,
    **attack: Any,
) -> dict[float, float]:
    """The accuracy of the mean prediction on images that were made against it.

    Args:
        model: the particle model.
        loader: batches of images and labels.
        budgets: the values of ε, in pixels.
        attack: mean, std, steps, step_size and particle_chunk, as in `fgsm`.

    Returns:
        {ε: accuracy}.

    Raises:
        TypeError, ValueError: as `fgsm`, and if there is no batch.
    """
    chunk, rights = attack.get("particle_chunk"), []
    for x, y in _on_device(model, loader):
        images = [fgsm(model, x, y, epsilon, **attack) for epsilon in budgets]
        read = torch.stack([predict(model, z, chunk).mean(0).argmax(-1) for z in images])
        rights.append((read == y).cpu())
    return dict(zip(budgets, _joined(rights).double().mean(-1).tolist()))


def dverge(
    model: ParticleModel,
    x: Tensor,
    source: Tensor,
    tap: str,
    *,
    epsilon: float = 0.07,
    steps: int = 10,
    step_size: float | None = None,
    mean: Channels = 0.0,
    std: Channels = 1.0,
    particle_chunk: int | None = None,
) -> Tensor:
    """Images that look like `source` and that particle i takes for x: its non-robust features.

        z_i = argmin_z ‖f_i(z) − f_i(x)‖²  over the images z within ε of the source,

    by steps z ← clip(z − η/std · sign ∇_z ‖f_i(z) − f_i(x)‖²) from the source on, where f_i is what
    a module of particle i gives. Each step is one forward and one backward for all particles.

    Source: DVERGE (Yang et al. 2020), eq. 2.

    Args:
        model: the particle model, of K >= 2 particles.
        x: images (B, C, ...), normalised, whose features are distilled.
        source: the images (B, C, ...) to start from and stay near.
        tap: the name of a module of the base, whose output (or its first tensor) is f.
        epsilon: ε >= 0, in pixels, whose range is [0, 1].
        steps: how many steps are taken.
        step_size: η in pixels; ε/steps if None.
        mean, std, particle_chunk: as in `fgsm`.

    Returns:
        (K, B, C, ...): the images of each of this process's particles.

    Raises:
        TypeError: as `fgsm`.
        ValueError: there is one particle; x and the source differ in shape; the base has no module
            `tap`, or does not call it; or as `fgsm`.
    """
    if particles(model) == 1:
        raise ValueError("dverge needs two particles or more: each learns from another's images")
    size = _step_size(epsilon, steps, step_size, 1.0)
    ball = _Ball(source, epsilon, mean, std)
    if x.shape != source.shape:
        raise ValueError(f"x {_shown(x)} and source {_shown(source)} must have one shape")
    every = model.num_particles

    def run() -> Tensor:
        with torch.no_grad():
            wanted = features(x.expand(every, *x.shape))

        def of_distance(z: Tensor) -> Tensor:
            return torch.autograd.grad((features(z) - wanted).square().sum(), z)[0]

        start = source.expand(every, *source.shape)
        return ball.descend(start, of_distance, size, steps)[model.window]

    with evaluating(model), _tapped(model, tap) as features:
        return model.in_chunks(every if particle_chunk is None else particle_chunk, run)


class _Ball:
    """The images within ε of x, in L∞, and the steps among them."""

    def __init__(self, x: Tensor, epsilon: float, mean: Channels, std: Channels):
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2):
            raise TypeError(f"attacks need floating images (B, C, ...); got {_shown(x)}")
        m, s = (_channels(name, v, x) for name, v in (("mean", mean), ("std", std)))
        low, high, self.unit = -m / s, (1 - m) / s, 1 / s
        slack = 8 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
        if not bool(((low - slack <= x) & (x <= high + slack)).all()):
            raise ValueError(
                f"x has values in [{x.min():.4g}, {x.max():.4g}]; with mean {mean} and std {std}, "
                f"pixels in [0, 1] are in [{low.min():.4g}, {high.max():.4g}]: give those of the "
                "normalisation"
            )
        # A value that rounding put outside the pixels' range stays where it is for ε = 0.
        self.lower = torch.maximum(x - epsilon / s, low).minimum(x)
        self.upper = torch.minimum(x + epsilon / s, high).maximum(x)

    def descend(
        self, z: Tensor, gradient: Callable[[Tensor], Tensor], size: float, steps: int
    ) -> Tensor:
        """Sign steps of `size` pixels against gradient(z), each projected onto the ball."""
        for _ in range(steps):
            with torch.enable_grad():
                direction = gradient(z.detach().requires_grad_()).sign()
            z = (z - size * self.unit * direction).clamp(self.lower, self.upper)
        return z.detach()


def _channels(name: str, value: Channels, x: Tensor) -> Tensor:
    """`value` as a tensor that fits axis 1 of x (B, C, ...)."""
    t = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, x.shape[1])):
        raise ValueError(f"{name} must be a number or ({x.shape[1]},); got {tuple(t.shape)}")
    if name == "std" and not bool((t > 0).all()):
        raise ValueError(f"std must be positive; got {value}")
    return t if t.ndim == 0 else t.view(-1, *[1] * (x.ndim - 2))


def _step_size(epsilon: float, steps: int, step_size: float | None, share: float) -> float:
    """η in pixels, after a check of all three; share·ε/steps, at most ε, where it is None."""
    epsilon = checks.number("epsilon", epsilon, 0)
    steps = checks.integer("steps", steps, 1)
    if step_size is None:
        return min(epsilon, share * epsilon / steps)
    return checks.number("step_size", step_size, 0)


@contextlib.contextmanager
def _tapped(model: ParticleModel, tap: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, features(z) is what the module `tap` gives for z (K, B, ...), as one long vector."""
    try:
        module = model.base.get_submodule(tap)
    except AttributeError:
        raise ValueError(f"{type(model.base).__name__} has no module {tap!r}") from None
    seen: list[Tensor] = []

    def see(_module: Any, _args: Any, output: Any) -> None:
        state = forward_state.current()
        # The check of the particles' isolation runs the base too.
        if state is not None and state.owner is model:
            seen.append(next(tensors(output)))

    def features(z: Tensor) -> Tensor:
        seen.clear()
        model(z, per_particle=True)
        if not seen:
            raise ValueError(f"{type(model.base).__name__} does not call its module {tap!r}")
        return torch.cat([t.flatten() for t in seen])

    handle = module.register_forward_hook(see)
    try:
        yield features
    finally:
        handle.remove()


def particles(model: ParticleModel) -> int:
    """K, over all processes, after a check of the model's type."""
    if not isinstance(model, ParticleModel):
        raise TypeError(f"attacks need a ParticleModel; got {type(model).__name__}")
    return model.num_particles * model.processes.particle_size


def _on_device(
    model: ParticleModel, loader: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    device = model.devices()[0]
    for x, y in loader:
        yield x.to(device), y.to(device)


def _joined(batches: list[Tensor]) -> Tensor:
    if not batches:
        raise ValueError("an attack needs at least one batch; the loader gave none")
    return torch.cat(batches, -1)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
