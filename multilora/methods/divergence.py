"""The objective of particles whose predictions interact: ℓ_i + α ℓ_div."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora import losses
from multilora.losses import Loss
from multilora.methods.base import described, warn
from multilora.methods.passes import Passes
from multilora.ops import gram_volume, particle_loss
from multilora.ops.common import IGNORE_INDEX, accumulator

ClassesOf = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
_warned_own_batches = False


class Seen(NamedTuple):
    """The results of a pass, for the particles that take part.

    Class predictions (K, N, C) and their targets (N,) or (K, N), both None where they are not
    needed or the loss has no classes, and scalars to log.
    """

    predicted: Tensor | None
    targets: Tensor | None
    stats: dict[str, Tensor]


class Objective:
    """Σ_i ℓ_i + α ℓ_div of the predictions of all particles.

    Args:
        passes: those of the method.
        loss: ℓ_i, or "ensemble", the cross-entropy of the mean logits.
        cross: whether ℓ_div is Σ_i ℓ_div(θ'_i, θ_{−i}), see `IBDR`.
        kind, eps: see `ops.gram_volume`.
        classes_of: (logits, targets) -> the class predictions and targets that ℓ_div is of; None
            where those of the loss are taken.
        keeps_predictions: whether `Seen.predicted` is needed.

    Raises:
        ValueError: classes are needed, and the loss has none.
    """

    def __init__(
        self,
        passes: Passes,
        loss: str | Loss,
        cross: bool = False,
        kind: str = "logdet",
        eps: float = 1e-4,
        classes_of: ClassesOf | None = None,
        keeps_predictions: bool = False,
    ):
        self.passes, self.cross = passes, cross
        self.kind, self.eps, self.classes_of = kind, eps, classes_of
        self.of_mean = isinstance(loss, str)
        #: The loss of each particle.
        self.each = losses.NAMES["particle"] if isinstance(loss, str) else loss
        self.keeps_predictions = keeps_predictions

    def check_loss(self, alpha: float) -> None:
        """Raise ValueError if classes are needed, and the loss is known to have none."""
        needed = alpha != 0 or self.keeps_predictions
        if needed and isinstance(self.each, (losses.BCE, losses.GaussianNLL)):
            self._require_classes(None)

    def __call__(
        self, logits: Tensor, targets: Any, alpha: float, at_theta: Seen | None
    ) -> tuple[Tensor, Tensor, Seen]:
        """The objective, the ℓ_i of the particles that take part, and what is kept.

        Args:
            alpha: α. No volume is computed where it is zero.
            at_theta: what the pass at θ saw, in the pass at θ'.
        """
        needed = alpha != 0 or self.keeps_predictions
        classes = self._classes(logits, targets) if needed else None
        compared = classes if alpha != 0 else None
        nll, divergence, volumes = self._terms(logits, targets, compared, at_theta)
        each, particles = nll.detach(), len(nll)
        if self.of_mean:
            if targets.ndim == logits.ndim - 1 + targets.is_floating_point():
                raise ValueError('loss="ensemble" needs targets (N,) shared by all particles')
            mean = self.passes.take(logits).mean(0, keepdim=True)
            nll = self.passes.losses(self.each, mean, targets, 1) * particles
        mean_nll = nll.detach().sum() / particles
        stats = {"loss": mean_nll, "nll": mean_nll}
        if alpha != 0:
            mean_divergence = divergence.detach() / volumes
            stats["loss"] = mean_nll + alpha * mean_divergence
            stats["divergence"] = mean_divergence
        predicted, of = (None, None) if classes is None else (classes[0].detach(), classes[1])
        return nll.sum() + alpha * divergence, each, Seen(predicted, of, stats)

    def _terms(
        self,
        logits: Tensor,
        targets: Any,
        classes: tuple[Tensor, Tensor] | None,
        at_theta: Seen | None,
    ) -> tuple[Tensor, Tensor, int]:
        """ℓ_i of the particles that take part (K,), ℓ_div, and how many volumes it is a sum of."""
        divergence, volumes = logits.new_zeros((), dtype=accumulator(logits.dtype)), 1
        nll = None
        if classes is not None and classes[1].ndim == 2:
            _warn_own_batches(*classes)
        elif classes is not None:
            predicted, of = classes
            self._require_volume(predicted)
            share = self.passes.share_of_mean((of != IGNORE_INDEX).sum())
            if self._is_cross_entropy(targets):
                nll, divergence = particle_loss(predicted, of, self.eps, self.kind)
                nll = nll * share
            if self.cross and at_theta is not None:
                divergence = self._cross_divergence(predicted, of, at_theta)
                volumes = len(predicted)
            elif nll is None:
                volume = gram_volume(predicted, of, self.eps, self.kind)
                divergence = _mean_over_valid(volume, of)
            divergence = divergence * share
        if nll is None:
            nll = self.passes.losses(self.each, logits, targets, self.passes.total)
            nll = self.passes.take(nll)
        return nll, divergence, volumes

    def _require_volume(self, predicted: Tensor) -> None:
        particles, _, classes = predicted.shape
        if self.kind == "det" and particles > classes - 1:
            raise ValueError(
                f'kind="det" of {particles} particles and {classes} classes is zero for any '
                "predictions, as they span at most C − 1 dimensions without the true class: use "
                'kind="logdet", or at most C − 1 particles'
            )

    def _is_cross_entropy(self, targets: Any) -> bool:
        """Whether ℓ_i is the plain one that `particle_loss` computes beside the divergence."""
        return (
            type(self.each) is losses.CrossEntropy
            and self.each.label_smoothing == 0
            and self.each.weight is None
            and self.classes_of is None
            and not targets.is_floating_point()
        )

    def _cross_divergence(self, predicted: Tensor, targets: Tensor, at_theta: Seen) -> Tensor:
        """Σ_i ℓ_div(θ'_i, θ_{−i}): problem i has particle i at θ' and the others at θ."""
        assert at_theta.predicted is not None
        particles = len(predicted)
        own = torch.eye(particles, dtype=torch.bool, device=predicted.device)[:, :, None, None]
        # (particle, problem, N, C)
        mixed = torch.where(own, predicted.unsqueeze(1), at_theta.predicted.unsqueeze(1))
        everyone = targets.repeat(particles)
        volume = gram_volume(mixed.flatten(1, 2), everyone, self.eps, self.kind)
        return _mean_over_valid(volume, targets)

    def _classes(self, logits: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Class predictions (K, N, C) of the particles that take part, and their targets.

        Targets are (N,) or, each particle's own, (K, N).
        """
        if self.classes_of is None:
            classes = losses.class_predictions(self.each, logits, targets)
            if classes is None:
                self._require_classes(targets)
            assert classes is not None
            predicted, of = classes
        else:
            predicted, of = self.classes_of(logits, targets)
            fits = predicted.ndim == 3 and of.shape in (predicted.shape[1:2], predicted.shape[:2])
            if not fits or len(predicted) != len(logits):
                raise ValueError(
                    "divergence_of must return class logits (K, N, C) and class targets (N,) with "
                    f"K = {len(logits)}; got {tuple(predicted.shape)} and {tuple(of.shape)}"
                )
        return self.passes.take(predicted), self.passes.take(of) if of.ndim == 2 else of

    def _require_classes(self, targets: Any) -> None:
        """Raise ValueError: the loss's targets do not say which the classes are."""
        if self.classes_of is not None:
            return
        got = f" of {targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else ""
        raise ValueError(
            'IBDR\'s divergence, and cost="output", are of class predictions, and the targets'
            f"{got} of the loss {described(self.each)} are neither classes nor probabilities: "
            "give divergence_of=, a callable (logits, targets) -> (class logits (K, N, C), class "
            'targets (N,)); or alpha=0 and cost="parameter"'
        )


def output_distance(before: Seen, after: Seen, passes: Passes) -> Tensor:
    """mean_n ‖p'_i − p_i‖₂ (K,) of the predicted probabilities at valid targets."""
    assert before.predicted is not None and after.predicted is not None
    targets = before.targets
    assert targets is not None
    dtype = accumulator(before.predicted.dtype)
    change = after.predicted.to(dtype).softmax(-1) - before.predicted.to(dtype).softmax(-1)
    valid = targets.ne(IGNORE_INDEX)
    distance = (torch.linalg.vector_norm(change, dim=-1) * valid).sum(-1)
    share = passes.share_of_mean(valid.sum(-1))
    return passes.data_mean(distance / valid.sum(-1).clamp_min(1) * share)


def _mean_over_valid(volume: Tensor, targets: Tensor) -> Tensor:
    return volume.sum() / (targets != IGNORE_INDEX).sum().clamp_min(1)


def _warn_own_batches(logits: Tensor, targets: Tensor) -> None:
    global _warned_own_batches
    if not _warned_own_batches:
        _warned_own_batches = True
        warn(
            "IBDR: every particle has its own mini-batch, so their predictions cannot be compared "
            f"and the divergence contributes zero (logits {tuple(logits.shape)}, "
            f"targets {tuple(targets.shape)})"
        )
