"""The own terms of particles that learn from each other, and how far apart they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.noise import Spread
from multilora.methods.pairs import Weights, disagreement, distillation
from multilora.methods.passes import Passes
from multilora.ops.common import IGNORE_INDEX


class Terms:
    """Σ_i ℓ_i + 1/(K−1) Σ_{j≠i} [T² KL(p_j‖p_i) − β F_ij] of the particles that take part, with
    constant p_j and each pair's F counted once: particle i has its own term's gradient.

    Args:
        passes: those of the method.
        loss: ℓ.
        temperature: T.
    """

    def __init__(self, passes: Passes, loss: Loss, temperature: float):
        self.passes, self.loss, self.temperature = passes, loss, temperature

    def __call__(
        self, beta: float, logits: Tensor, targets: Any, *features: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum, without F where there are no features; the ℓ_i; and what to log."""
        nll = self.passes.take(self.passes.losses(self.loss, logits, targets, self.passes.total))
        mutual = self._mutual(logits, targets)
        own, each, particles = nll + mutual, nll.detach(), len(nll)
        stats = {"loss": own.mean(), "nll": each.mean(), "mutual": mutual.mean()}
        total = own.sum()
        if features:
            z = self.passes.take(features[0])
            if z.shape[1] < 3:
                raise ValueError(
                    "MutualLearning compares each example with two others at least when beta > 0: "
                    f"it needs batches of 3 or more; got features {tuple(z.shape)}"
                )
            share = self.passes.share_of_mean(z.new_full((), z.shape[1]))
            distance = disagreement(z) * share
            # Σ_{i<j} F_ij/(K − 1): particle i has its own term's gradient of it.
            total = total - beta * particles / 2 * distance
            stats["loss"] = stats["loss"] - beta * distance
            stats["feature_distance"] = distance
        return total, each, {name: value.detach() for name, value in stats.items()}

    def _mutual(self, logits: Tensor, targets: Any) -> Tensor:
        """T²/(K−1) Σ_{j≠i} KL(p_j‖p_i) (k,), a mean over valid targets, with constant p_j."""
        classes = losses.class_predictions(self.loss, logits, targets)
        if classes is None or classes[1].ndim == 2:
            shown = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                "MutualLearning compares the class predictions of all particles for one batch: it "
                f"needs class targets (N,) that they share; got logits {tuple(logits.shape)}, "
                f"targets {shown}"
            )
        share = self.passes.share_of_mean((classes[1] != IGNORE_INDEX).sum())
        return distillation(self.passes.take(classes[0]), classes[1], self.temperature) * share


def class_loss(loss: str | Loss) -> Loss:
    """The loss of that name. Raises ValueError for one that is known to have no classes."""
    found = losses.named(loss)
    if isinstance(found, (losses.BCE, losses.GaussianNLL)):
        raise ValueError(f"MutualLearning needs a loss with classes; got {loss!r}")
    return found


def push_apart(
    passes: Passes,
    weights: Weights,
    spread: Spread,
    distance: str,
    pull: float | Tensor,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of −pull/(K−1) Σ_{i<j} W_ij in the parameters and in log σ where it is
    trained, and the mean of W.

    Args:
        weights: W.
        spread: σ.
        distance: see `MutualLearning`.
    """
    tensors = list(weights.tensors)
    values = passes.gather(tensors)
    if not spread.is_zero:
        tensors.append(spread.log_sigma)
        values.append(passes.take(passes.processes.gather(spread.log_sigma)))
    theta = dict(zip(tensors, (t.detach().requires_grad_() for t in values)))
    log_sigma = theta.pop(spread.log_sigma, None)
    sigma = None if log_sigma is None else log_sigma.exp()
    mean = weights.mean([*theta.values()], sigma, distance)
    leaves = [theta[p] for p in passes.params]
    if spread.log_sigma.requires_grad and log_sigma is not None:
        leaves.append(log_sigma)
    grads = torch.autograd.grad(mean * (-len(values[0]) / 2) * pull, leaves)
    return [passes.put(g) for g in grads], mean.detach()


def first_step(start: int | float, total_steps: int | None) -> int:
    """The call from which the diversity terms act."""
    if total_steps is not None:
        checks.integer("total_steps", total_steps, 1)
    if not isinstance(start, float):
        return checks.integer("start", start, 0)
    fraction = checks.number("start (a fraction of total_steps)", start, 0, 1)
    if total_steps is None:
        raise ValueError(
            f"start={start:.3g} is a fraction of total_steps, which is not given: give it, or the "
            "number of a call"
        )
    return math.ceil(fraction * total_steps)
