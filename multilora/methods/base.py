"""What all methods share."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from multilora import checks
from multilora.methods.parameters import require_current
from multilora.methods.passes import Closure, Passes
from multilora.parallel import Processes

# How many tensors are looked at together for what is not finite.
_TOGETHER = 64


class Method:
    """A training method over K particles; its `backward(closure)` replaces `loss.backward()`.

    model: a ParticleModel, also inside DistributedDataParallel, or any iterable of stacked tensors
        (K, ...) that require gradients.
    particle_chunk: c, to run c particles at a time: the memory of c, the gradients of all. Methods
        whose particles interact through their predictions run each chunk once more for it, from
        the same states of PyTorch's, NumPy's and Python's random numbers; where it then has other
        logits, RuntimeError.
    nonfinite: what to do where a particle's loss or gradient is not finite: "raise", a
        FloatingPointError that names the particle, with nothing changed; "skip", no gradient for
        that particle, the step of the others being what it is without it, and a warning; where
        that is so of all particles at once, the batch is skipped: nothing is changed but `step`,
        and the scalars of the step are NaN; or "ignore", which does not look (the other two wait
        for the device once a call). With a GradScaler, whose steps may overflow by design, only
        losses are looked at.

    The user's loop keeps optimizer, scheduler, clipping and precision. The objective is the sum
    over particles of each one's own mean loss, so that K particles step as K separate runs would.

    Over several processes (a model made with a `mesh`, or inside DistributedDataParallel),
    gradients are the means over the data of all of them, after every call of `backward`. Each
    process's closure gives its own part of the batch; processes that hold other particles for the
    same data give the same part. Means are over the data of all processes for the losses of
    `multilora.losses` and for any with a `count(logits, targets)` of what they are means over; any
    other callable's values count the same in every process. Processes whose settings differ raise
    RuntimeError when the method is made; where those that hold other particles for the same data
    have other batches, in the call of `backward` (see `compare_batches`).

    A deep copy or a pickle of a method holds a copy of its model. copy.deepcopy((model, method))
    gives a model and its method; both go on with the noise that the original would draw.

    settings, for a subclass: its other arguments, which become attributes.
    """

    #: Whether the particles' predictions interact; a step then calls the closure more than once.
    interacts = False
    #: In every how many calls processes along the particles compare their batches, by a digest of
    #: the targets and, where predictions interact, of the model's inputs. The same in all of them.
    compare_batches = 1

    def __init__(
        self,
        model: Any,
        *,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
        settings: dict[str, Any] | None = None,
    ):
        settings = (settings or {}) | {
            "nonfinite": checks.choice("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        }
        self.passes = Passes(model, particle_chunk)
        words = {name: described(value) for name, value in settings.items()}
        self.passes.require_agreement(words | {"method": described(type(self))})
        vars(self).update(settings)
        self.model, self.params = self.passes.model, self.passes.params
        self.num_particles = self.passes.num_particles
        self.step = 0
        self._calls = 0
        #: The cross-entropy (or own loss) of this process's particles in the last call, (K,).
        self.particle_nll: Tensor | None = None

    def backward(self, closure: Closure, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        """Add scale · (the method's direction) to every parameter's `.grad`.

        closure() -> (logits (K, ..., C), targets); it may be called several times, with other
        parameter values and, with `particle_chunk`, for some of the particles at a time (the model
        sees to that), and must use the same batch each time. Targets of shape (...) are shared by
        the particles; targets (K, ...) give every particle its own mini-batch. −100 is ignored;
        losses are means over valid targets. Other losses have other targets (`multilora.losses`).
        Logits and targets must fit: a causal language model's logits at t are of the token t + 1,
        so its targets are shifted (`multilora.causal_targets`).

        scale: >= 0; 1/M for M accumulation steps; with a GradScaler,
        scaler.scale(torch.ones(())) on the parameters' device.

        -> detached scalars for logging, on the parameters' device; `particle_nll` has the loss of
        each particle. The parameters are left as they were, also when the closure raises.

        Raises RuntimeError where the model's trainable tensors are other ones than when the method
        was made, where the loss does not depend on any of them, or where a CUDA graph is being
        captured and the settings would have the host wait for the device.
        """
        scale = _checked_scale(scale)
        if not callable(closure):
            raise TypeError(
                "backward needs a callable that returns (logits, targets); "
                f"got {type(closure).__name__}"
            )
        require_current(self.model, self.params)
        self._require_capturable()
        compare = self._calls % self.compare_batches == 0
        self._calls += 1
        try:
            with self.passes.running(self.interacts, compare):
                stats = self._backward(closure, scale)
        except _NothingIsFinite as error:
            self._require_finite_parameters(str(error))
            warnings.warn(
                f"{error}, which are all particles: the batch is skipped, nothing was changed",
                stacklevel=2,
            )
            stats = self._skipped()
        self.step += 1
        return stats

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _require_capturable(self) -> None:
        """Raise where a CUDA graph is captured and this step would look at values on the device."""
        if not is_captured(self.params[0]):
            return
        needed = [] if self.nonfinite == "ignore" else ['nonfinite="ignore"']
        if self.interacts and self.passes.chunk < self.num_particles:
            needed.append("particle_chunk=None")
        if self.interacts and self.passes.processes.particle_size > 1:
            needed.append("one process along the particles")
        if needed:
            raise RuntimeError(
                f"a CUDA graph cannot hold this step of {type(self).__name__}, which waits for the "
                f"device; it needs {' and '.join(needed)}"
            )

    def _skipped(self) -> dict[str, Tensor]:
        """The scalars of a batch that was skipped."""
        return dict.fromkeys(("loss", "nll"), self.params[0].new_full((), torch.nan).float())

    def parameters(self) -> list[Tensor]:
        """The method's own trainable tensors, to be given to the optimizer too; mostly none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError where the keys are not this method's."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__} state needs the keys {sorted(expected)}; "
                f"got {sorted(state)}"
            )
        self.step = int(state["step"])

    def finite_particles(
        self,
        losses: Tensor,
        grads: list[Tensor],
        scale: float | Tensor,
        among: Tensor | None = None,
    ) -> Tensor | None:
        """The indices, of all processes' K particles, of those whose step is finite; None: all.

        losses (K,) and grads (K, ...) of this process's particles; among: those that were finite
        before, which comes back where they all still are. Raises, or warns, as asked.
        """
        if self.nonfinite == "ignore":
            return among
        seen = [losses] if isinstance(scale, Tensor) else [losses, _zero_if_finite(grads)]
        # The one wait for the device: what follows is lists.
        finite = self.passes.processes.all_true(torch.stack(seen, 1).isfinite()).tolist()
        considered = range(len(finite)) if among is None else among.tolist()
        # The divergence carries one particle's broken predictions into the gradients of all: then
        # only the losses tell who it is.
        bad = [k for k in considered if not finite[k][0]] if self.interacts else []
        bad = bad or [k for k in considered if not all(finite[k])]
        if not bad:
            return among
        values = self.passes.processes.gather(losses).tolist()
        names = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if bad[8:] else "")
        message = (
            f"{type(self).__name__}, call {self.step}: non-finite loss or gradient of particle"
            f"{'s' if len(bad) > 1 else ''} {names} (losses {[values[k] for k in bad[:8]]})"
        )
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{message}; nothing was changed")
        others = [k for k in considered if k not in set(bad)]
        if not others:
            self.particle_nll = losses
            raise _NothingIsFinite(message)
        warnings.warn(f"{message}; skipped, the others go on", stacklevel=4)
        return torch.tensor(others, device=losses.device)

    def _require_finite_parameters(self, message: str) -> None:
        """Another batch helps only where some particle's parameters are finite."""
        finite = torch.stack([p.detach().flatten(1).isfinite().all(1) for p in self.params]).all(0)
        if not bool(self.passes.processes.all_true(finite).any()):
            raise FloatingPointError(
                f"{message}: the parameters of all particles are not finite; nothing was changed"
            )

    def without_others(self, grads: list[Tensor], finite: Tensor | None) -> list[Tensor]:
        """Gradients (K, ...) of this process's particles, zero for those that are not finite."""
        if finite is None:
            return grads
        skipped = torch.ones(self.passes.total, dtype=torch.bool, device=finite.device)
        skipped = self.passes.processes.own(skipped.index_fill(0, finite, False))
        return [g.masked_fill(skipped.view(-1, *[1] * (g.ndim - 1)), 0) for g in grads]

    def mean_loss(self, losses: Tensor, finite: Tensor | None) -> Tensor:
        """The mean over all processes' particles, of (K,) of this one's, which are kept."""
        self.particle_nll = losses
        losses = self.passes.processes.gather(losses)
        return losses.mean() if finite is None else losses[finite].mean()


class _NothingIsFinite(Exception):
    """No particle is left to go on with this batch."""


def _checked_scale(scale: float | Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return checks.number("scale", scale, 0)
    if scale.ndim != 0 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a number or a floating tensor without axes; "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    # On a GPU, reading it would be to wait for it.
    if scale.device.type == "cpu":
        checks.number("scale", scale.item(), 0)
    return scale.detach()


def is_captured(t: Tensor) -> bool:
    """Whether what is done with this tensor becomes part of a CUDA graph instead of running."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def described(value: Any) -> str:
    """What tells settings apart, the same in every process."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.tolist()}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return f"{described(type(value))}({', '.join(map(described, fields))})"
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    return repr(value)


def require_different_particles(model: Any, params: list[Tensor], why: str) -> None:
    """Raise where all particles are equal: their interaction then has an exactly zero gradient."""
    tensors = list(params)
    for adapter in model.adapters() if hasattr(model, "adapters") else ():
        # Frozen factors tell particles apart too.
        tensors += [adapter.lora_A, adapter.lora_B]
    same = torch.stack([(t == t[:1]).all() for t in tensors]).all()
    processes = getattr(model, "processes", None) or Processes()
    if processes.particle_size > 1:
        # Of the first of every process, a sum that tells them apart.
        first = sum(t[:1].detach().double().abs().sqrt().sum() for t in tensors).reshape(1)
        first = processes.gather(first)
        same = processes.all_true(same.expand(len(params[0]))).all() & (first == first[0]).all()
    particles = len(params[0]) * processes.particle_size
    if particles > 1 and bool(same):
        raise ValueError(
            f"all {particles} particles are identical, so {why} has zero gradient and "
            "they stay identical; start them from different seeds"
        )


def flatten(tensors: list[Tensor]) -> Tensor:
    """Stacked tensors (K, ...) -> (K, P)."""
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)


def unflatten(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """(K, P) -> tensors (K, ...) shaped as `params`, of as many particles as `flat` has."""
    parts = flat.split([p[0].numel() for p in params], 1)
    return [part.reshape(-1, *p.shape[1:]) for part, p in zip(parts, params)]


@torch.no_grad()
def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Detached, contiguous copies."""
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    torch._foreach_copy_(out, tensors)
    return out


@torch.no_grad()
def accumulate(params: list[Tensor], grads: list[Tensor]) -> None:
    """p.grad += g, as loss.backward() does it."""
    fresh = [(p, g) for p, g in zip(params, grads) if p.grad is None]
    added = [(p.grad, g) for p, g in zip(params, grads) if p.grad is not None]
    if added:
        torch._foreach_add_(*map(list, zip(*added)))
    for p, _ in fresh:
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
    if fresh:
        torch._foreach_copy_([p.grad for p, _ in fresh], [g for _, g in fresh])


def _zero_if_finite(tensors: list[Tensor]) -> Tensor:
    """(K,): 0 where all numbers of a particle are finite, else NaN; stacked tensors (K, ...).

    Some tensors at a time: one operation for each of them would be most of a small step's, and
    copies of all of them would take the memory of the gradients once more.
    """
    parts = [tensors[i : i + _TOGETHER] for i in range(0, len(tensors), _TOGETHER)]
    return torch.stack([flatten(part).mul_(0).sum(1) for part in parts]).sum(0)
