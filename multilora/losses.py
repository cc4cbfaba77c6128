"""Losses of K particles: (logits (K, ..., C), targets) -> (K,), a mean for every particle.

Any callable of that form is a loss. Those here also know what their targets look like, so that a
method can cut them into chunks, and over how much they are means, so that a method can join the
means of many processes to that over all their data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora import checks
from multilora.ops.common import IGNORE_INDEX, accumulator

Loss = Callable[[Tensor, Any], Tensor]


class RowLoss:
    """A loss whose targets have an entry for every row of the logits (K, *rows, C).

    Targets are (*rows, *entry), shared by the particles, or (K, *rows, *entry), a mini-batch for
    each. The result is in float32 or better; without a valid target it is zero, with zero gradient.
    """

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        own = self.own_targets(logits, targets, len(logits))
        logits = logits.to(accumulator(logits.dtype))
        count = self._count(logits, targets, own).to(logits.dtype)
        return self._sum(logits, targets, own) / torch.where(count == 0, 1, count)

    def count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What the mean is over: () where the particles share the targets, else (K,)."""
        return self._count(logits, targets, self.own_targets(logits, targets, len(logits)))

    def own_targets(self, logits: Tensor, targets: Tensor, particles: int) -> bool:
        """Whether targets hold a mini-batch for each of so many particles, or of those of `logits`.

        Raises ValueError where they fit the logits neither so nor shared.
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

    targets int64 (*rows): classes, −100 left out; or floating (*rows, C): probabilities, which sum
    to one, as mixup and cutmix make them.
    label_smoothing: ε in [0, 1]; t becomes (1 − ε) t + ε/C.
    weight: w (C,) >= 0; of classes y, the mean is then Σ w_y … / Σ w_y.

    As torch.nn.functional.cross_entropy, but for its NaN without a valid target.
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
    """`CrossEntropy` for probabilities (*rows, C) alone: classes raise TypeError."""

    def _entries(self, logits: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
        if not targets.is_floating_point():
            raise TypeError(
                f"SoftTargets needs targets that are probabilities; got {targets.dtype}"
            )
        return super()._entries(logits, targets)


@dataclass(frozen=True, eq=False)
class BCE(RowLoss):
    """−[w t log σ(z) + (1 − t) log(1 − σ(z))], a mean over rows and labels: multi-label.

    targets (*rows, C), of any dtype, in [0, 1]; pos_weight: w (C,) >= 0.
    As torch.nn.functional.binary_cross_entropy_with_logits.
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

    The model's outputs (K, *rows, 2·D) are μ and then log v; with a `variance` > 0, v is that and
    the outputs (K, *rows, D) are μ. targets (*rows, D), or (*rows) where D = 1.
    As torch.nn.functional.gaussian_nll_loss, but for the floor under its variance.
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


def named(loss: str | Loss, *others: str) -> str | Loss:
    """The loss of that name; a callable, or a name among `others`, is itself."""
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in (*NAMES, *others):
        names = ", ".join(f'"{name}"' for name in (*NAMES, *others))
        raise ValueError(f"loss must be {names} or a callable; got {loss!r}")
    return NAMES.get(loss, loss)


def own_targets(loss: Loss, logits: Tensor, targets: Any, particles: int) -> bool:
    """Whether targets hold a mini-batch for each of `particles` particles.

    Any callable's targets are a tensor that the particles share where its first axis is as long as
    the second of the logits, their own where that is so of the axis behind the particles'. Raises
    ValueError where both are.
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
    """Logits (K, N, C) and int64 targets (N,) or, each particle's own, (K, N).

    Of probabilities the target is the most likely class. None where the loss is of no classes.
    """
    if isinstance(loss, RowLoss) and not isinstance(loss, CrossEntropy):
        return None
    if not isinstance(loss, RowLoss):
        # What a callable's targets are is seen from themselves.
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
    """A causal language model's targets: position t has the token t + 1, the last `ignore_index`.

    (..., T) int64 -> (..., T). Logits are not shifted then:

        method.backward(lambda: (model(**batch).logits, ml.causal_targets(labels)))

    labels: the tokens, with −100 where the loss is not to look, at padding and mostly at the
    prompt. A model that is given labels itself shifts them inside, for its own loss; a method
    makes its own from the logits and does not know that they are of a language model.
    """
    tokens = input_ids_or_labels
    if tokens.dtype != torch.int64 or tokens.ndim < 1:
        raise ValueError(
            f"causal_targets needs int64 tokens (..., T); got {tokens.dtype} {tuple(tokens.shape)}"
        )
    return F.pad(tokens[..., 1:], (0, 1), value=ignore_index)


def _sum_to_one(targets: Tensor) -> Tensor:
    """Whether each row (..., C) is of probabilities, to the rounding of half precision."""
    off = (targets.to(accumulator(targets.dtype)).sum(-1) - 1).abs()
    return (targets >= 0).all(-1) & (off < 2e-2)


def _require(good: Tensor, what: str, targets: Tensor) -> None:
    if targets.is_cuda:
        # Reported at the next synchronisation: waiting for the device here would stall it.
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
    """Weights (C,) as the logits (K, ..., C) need them."""
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
