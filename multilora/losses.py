"""Losses of K particles: (logits (K, ..., C), targets) -> (K,), a mean for every particle.

Any callable of that form is a loss. The losses here also know the shapes of their targets, so that
a method can cut them into chunks, and the number of terms in their means, so that a method can
combine the means of many processes into the mean over all their data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora import checks
from multilora.ops.common import IGNORE_INDEX, accumulator

Loss = Callable[[Tensor, Any], Tensor]


class RowLoss:
    """A loss whose targets have an entry for every row of the logits (K, *rows, C).

    Targets are (*rows, *entry), shared by the particles, or (K, *rows, *entry), with a mini-batch
    for each. The result is float32 or better. Without a valid target it is zero, with zero
    gradient.
    """

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        own = self.own_targets(logits, targets, len(logits))
        logits = logits.to(accumulator(logits.dtype))
        count = self._count(logits, targets, own).to(logits.dtype)
        return self._sum(logits, targets, own) / torch.where(count == 0, 1, count)

    def count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The number of terms in the mean: () where the particles share the targets, else (K,)."""
        return self._count(logits, targets, self.own_targets(logits, targets, len(logits)))

    def own_targets(self, logits: Tensor, targets: Tensor, particles: int) -> bool:
        """Whether targets hold a mini-batch for each of `particles` particles, or of those of
        `logits`.

        Raises:
            ValueError: they fit the logits neither so nor shared.
        """
        shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
        if logits.ndim < 3:
            raise ValueError(f"the closure must return logits (K, ..., C); got {shapes}")
        rows, entries = logits.shape[1:-1], self._entries(logits, targets)
        if any(targets.shape == (*rows, *entry) for entry in entries):
            return False
        for k in (particles, len(logits)):
            if any(targets.shape == (k, *rows, *entry) for entry in entries):
                return True
        forms = " or ".join(str((*rows, *entry)) for entry in entries)
        raise ValueError(
            f"the closure must return targets {forms} for the loss {type(self).__name__}, with "
            f"the particle axis before that or without it; got {shapes}"
        )

    def _entries(self, logits: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
        """The shapes that one row's targets may have."""
        return [(self._outputs(logits),)]

    def _outputs(self, logits: Tensor) -> int:
        """How many numbers a row predicts."""
        return logits.shape[-1]

    def _count(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        size = logits.shape[1:-1].numel() * self._outputs(logits)
        return logits.new_full(logits.shape[:1] if own else (), size)

    def _sum(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class CrossEntropy(RowLoss):
    """−Σ_c t_c w_c log p_c, a mean over valid targets; in nats.

    Targets are classes, int64 (*rows), where −100 is left out, or probabilities, floating
    (*rows, C), which sum to one, as mixup and cutmix make them. The result is that of
    torch.nn.functional.cross_entropy, except where no target is valid: it is not NaN there.

    Args:
        label_smoothing: ε in [0, 1]; t becomes (1 − ε) t + ε/C.
        weight: w (C,) >= 0. For classes y, the mean is then Σ w_y … / Σ w_y.
    """

    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        checks.number("label_smoothing", self.label_smoothing, 0, 1)
        _check_weight("weight", self.weight)

    def _entries(self, logits: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
        return [(logits.shape[-1],)] if targets.is_floating_point() else [()]

    def _count(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        if targets.is_floating_point():
            return logits.new_full(logits.shape[:1] if own else (), logits.shape[1:-1].numel())
        valid = targets != IGNORE_INDEX
        if self.weight is not None:
            valid = _of_classes(self.weight, logits)[torch.where(valid, targets, 0)] * valid
        return valid.flatten(1).sum(-1) if own else valid.sum()

    def _sum(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        weight = None if self.weight is None else _of_classes(self.weight, logits)
        if targets.is_floating_point():
            require_probabilities(targets)
            targets = targets.to(logits.dtype)
            if self.label_smoothing > 0:
                uniform = self.label_smoothing / logits.shape[-1]
                targets = (1 - self.label_smoothing) * targets + uniform
            log_p = logits.log_softmax(-1)
            log_p = log_p if weight is None else log_p * weight
            return -(targets * log_p).flatten(1).sum(-1)
        targets = targets.expand(logits.shape[:-1])
        nll = F.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            weight,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return nll.view(targets.shape).flatten(1).sum(-1)


@dataclass(frozen=True, eq=False)
class SoftTargets(CrossEntropy):
    """`CrossEntropy` that takes only probabilities (*rows, C): classes raise TypeError."""

    def _entries(self, logits: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
        if not targets.is_floating_point():
            raise TypeError(
                f"SoftTargets needs targets that are probabilities; got {targets.dtype}"
            )
        return super()._entries(logits, targets)


@dataclass(frozen=True, eq=False)
class BCE(RowLoss):
    """−[w t log σ(z) + (1 − t) log(1 − σ(z))], a mean over rows and labels: multi-label.

    Targets are (*rows, C), of any dtype, in [0, 1]. The result is that of
    torch.nn.functional.binary_cross_entropy_with_logits.

    Args:
        pos_weight: w (C,) >= 0.
    """

    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        _check_weight("pos_weight", self.pos_weight)

    def _sum(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        _require((targets >= 0) & (targets <= 1), "targets of BCE must be in [0, 1]", targets)
        loss = F.binary_cross_entropy_with_logits(
            logits,
            targets.to(logits.dtype).expand(logits.shape),
            pos_weight=None if self.pos_weight is None else _of_classes(self.pos_weight, logits),
            reduction="none",
        )
        return loss.flatten(1).sum(-1)


@dataclass(frozen=True, eq=False)
class GaussianNLL(RowLoss):
    """½ [(t − μ)² / v + log v], a mean over rows and outputs: regression.

    The model's outputs (K, *rows, 2·D) are μ and then log v. Targets are (*rows, D), or (*rows)
    where D = 1. The result is that of torch.nn.functional.gaussian_nll_loss, without the floor
    under its variance.

    Args:
        variance: v > 0; the model's outputs (K, *rows, D) are then μ alone.
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None:
            checks.number("variance", self.variance, 0, open_low=True)

    def _outputs(self, logits: Tensor) -> int:
        if self.variance is not None:
            return logits.shape[-1]
        if logits.shape[-1] % 2:
            raise ValueError(
                "GaussianNLL needs outputs (K, ..., 2·D), the means and then the logarithms of the "
                f"variances; got {tuple(logits.shape)}"
            )
        return logits.shape[-1] // 2

    def _entries(self, logits: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
        size = self._outputs(logits)
        return [(), (1,)] if size == 1 else [(size,)]

    def _sum(self, logits: Tensor, targets: Tensor, own: bool) -> Tensor:
        size = self._outputs(logits)
        mean, log_v = logits[..., :size], logits[..., size:]
        if self.variance is not None:
            log_v = mean.new_full((), self.variance).log()
        targets = targets.to(logits.dtype).reshape(mean.shape if own else mean.shape[1:])
        nll = 0.5 * ((targets - mean).square() * torch.exp(-log_v) + log_v)
        return nll.flatten(1).sum(-1)


@overload
def named(loss: str | Loss) -> Loss: ...


@overload
def named(loss: str | Loss, *others: str) -> str | Loss: ...


def named(loss: str | Loss, *others: str) -> str | Loss:
    """The loss of that name. A callable, or a name among `others`, is returned as it is."""
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in (*NAMES, *others):
        names = ", ".join(f'"{name}"' for name in (*NAMES, *others))
        raise ValueError(f"loss must be {names} or a callable; got {loss!r}")
    return NAMES.get(loss, loss)


def own_targets(loss: Loss, logits: Tensor, targets: Any, particles: int) -> bool:
    """Whether targets hold a mini-batch for each of `particles` particles.

    The targets of any other callable are shared by the particles if their first axis is as long as
    the second axis of the logits, and each particle's own if the axis behind the particles' is.

    Raises:
        ValueError: both hold.
    """
    if isinstance(loss, RowLoss):
        return loss.own_targets(logits, targets, particles)
    if not isinstance(targets, Tensor) or targets.shape[:1] != (particles,):
        return False
    if targets.ndim == 1:
        own, shared = logits.ndim < 3, logits.shape[1:2] == targets.shape
    else:
        own, shared = targets.shape[1:2] == logits.shape[1:2], targets.shape[0] == logits.shape[1]
    if own and shared:
        raise ValueError(
            f"targets {tuple(targets.shape)} of {particles} particles with logits "
            f"{tuple(logits.shape)} may be shared or each particle's own: use another batch size, "
            "no particle_chunk, or a loss of multilora.losses, which knows its targets"
        )
    return own


def class_predictions(loss: Loss, logits: Tensor, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Logits (K, N, C) and int64 targets (N,), or (K, N) where each particle has its own.

    For probabilities, the target is the most likely class. None where the loss has no classes.
    """
    if isinstance(loss, RowLoss) and not isinstance(loss, CrossEntropy):
        return None
    if not isinstance(loss, RowLoss):
        # Only the targets of a callable themselves tell what they are.
        if not isinstance(targets, Tensor) or logits.ndim < 3:
            return None
        soft = targets.is_floating_point()
        rows = logits.shape[1:] if soft else logits.shape[1:-1]
        if targets.shape not in (rows, (len(logits), *rows)):
            return None
        if targets.dtype != torch.int64 and not (soft and bool(_sum_to_one(targets).all())):
            return None
    own = targets.ndim == logits.ndim - (not targets.is_floating_point())
    if targets.is_floating_point():
        targets = targets.argmax(-1)
    return logits.flatten(1, -2), targets.flatten(1) if own else targets.flatten()


def require_probabilities(targets: Tensor) -> None:
    """Raise ValueError for rows (..., C) that are negative or do not sum to one."""
    _require(
        _sum_to_one(targets),
        "floating targets must be probabilities, which sum to one over the classes",
        targets,
    )


def causal_targets(input_ids_or_labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """A causal language model's targets: token t + 1 at position t, `ignore_index` at the last.

    The logits are then not shifted:

        method.backward(lambda: (model(**batch).logits, ml.causal_targets(labels)))

    A model that is given labels shifts them inside, for its own loss. A method computes its loss
    from the logits, and cannot know that they are a language model's.

    Args:
        input_ids_or_labels: the tokens, int64 (..., T), with −100 at padding and usually at the
            prompt, where there is no loss.
        ignore_index: the target of the last position.

    Returns:
        int64 (..., T).

    Raises:
        ValueError: the tokens are not int64, or have no axis.
    """
    tokens = input_ids_or_labels
    if tokens.dtype != torch.int64 or tokens.ndim < 1:
        raise ValueError(
            f"causal_targets needs int64 tokens (..., T); got {tokens.dtype} {tuple(tokens.shape)}"
        )
    return F.pad(tokens[..., 1:], (0, 1), value=ignore_index)


def _sum_to_one(targets: Tensor) -> Tensor:
    """Whether each row (..., C) holds probabilities, up to the rounding of half precision."""
    off = (targets.to(accumulator(targets.dtype)).sum(-1) - 1).abs()
    return (targets >= 0).all(-1) & (off < 2e-2)


def _require(good: Tensor, what: str, targets: Tensor) -> None:
    if targets.is_cuda:
        # The error appears at the next synchronisation: waiting for the device would stall it.
        torch._assert_async(good.all(), f"multilora: {what}")
    elif not good.all():
        raise ValueError(f"{what}; got targets {tuple(targets.shape)} in which some are not")


def _check_weight(name: str, weight: Tensor | None) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor (C,); got {weight!r}")
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"{name} must be finite and >= 0; got {weight!r}")


def _of_classes(weight: Tensor, logits: Tensor) -> Tensor:
    """Weights (C,) in the dtype and on the device of the logits (K, ..., C)."""
    if weight.shape != logits.shape[-1:]:
        raise ValueError(
            f"a loss's weights must be (C,) for logits (K, ..., C); got {tuple(weight.shape)} for "
            f"{tuple(logits.shape)}"
        )
    return weight.to(logits)


#: The names that a method's `loss` may have.
NAMES: dict[str, Loss] = {
    "particle": CrossEntropy(),
    "label_smoothing": CrossEntropy(label_smoothing=0.1),
    "soft_targets": SoftTargets(),
    "bce": BCE(),
    "gaussian_nll": GaussianNLL(),
}
