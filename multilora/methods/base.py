"""The base class of methods: the step around `_backward`, and the policy for broken particles."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from multilora import checks
from multilora.losses import Loss
from multilora.methods.parameters import require_current
from multilora.methods.passes import Closure, Passes, Taps

_Seen = TypeVar("_Seen")


class Method:
    """A training method over K particles; its `backward(closure)` replaces `loss.backward()`.

    The user's loop keeps optimizer, scheduler, clipping and precision. The objective is the sum
    over particles of each one's own mean loss, so that K particles step as K separate runs would.

    Over several processes (a model made with a `mesh`, or inside DistributedDataParallel),
    gradients are the means over the data of all of them, after every call of `backward`. Each
    process's closure gives its own part of the batch; processes that hold other particles for the
    same data give the same part. Means are over the data of all processes for the losses of
    `multilora.losses` and for any loss with a `count(logits, targets)` of what it is a mean over;
    the values of any other callable count the same in every process.

    A deep copy or a pickle of a method holds a copy of its model. copy.deepcopy((model, method))
    gives a model and its method; both continue with the same sequence of noise.

    A subclass sets its settings as attributes before it calls this constructor, which compares
    them among the processes, and implements `_backward`.

    Args:
        model: a ParticleModel, also inside DistributedDataParallel, or any iterable of stacked
            tensors (K, ...) that require gradients.
        particle_chunk: c, to run c particles at a time, in the memory of c.
            Methods whose particles interact through their predictions run each chunk once more
            for it, from the same states of PyTorch's, NumPy's and Python's random numbers.
        nonfinite: what to do about a particle whose loss or gradient is not finite. "raise": a
            FloatingPointError names it, and nothing is changed. "skip": it gets no gradient, with
            a warning, and the others step as if it did not exist. If all particles are broken, the
            batch is skipped: only `step` changes, and the returned scalars are NaN. "ignore": there
            is no check, which saves one wait for the device per call. With a GradScaler, whose
            steps may overflow by design, only losses are checked.

    Raises:
        TypeError, ValueError: if the model has no stacked tensors of one K that require gradients,
            or a setting is out of its range.
        NotImplementedError: if the particles have configurations of their own, and the method needs
            equal ones.
        RuntimeError: if the processes have different settings, seeds or particles.
    """

    #: Whether the particles' predictions interact; a step then calls the closure more than once.
    interacts = False
    #: Whether the particles get gradients. Otherwise the particles are draws of a posterior, which
    #: `parameters()` is, and which begins with a mean for each of `params`, in their order.
    trains_particles = True
    #: Whether only plain SGD steps right along the gradients: no momentum, decay or clipping.
    needs_plain_sgd = False
    #: Whether particles may have ranks, scalings and targets of their own.
    takes_own_configurations = False
    #: Processes along the particles compare their batches in every so many calls, by a digest of
    #: the targets and, where predictions interact, of the model's inputs. All need the same number.
    compare_batches = 1

    def __init__(
        self,
        model: Any,
        *,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        settings = vars(self) | {"method": type(self)}
        self.passes = Passes(model, particle_chunk)
        self.passes.require_agreement({name: described(v) for name, v in settings.items()})
        self.model, self.params = self.passes.model, self.passes.params
        if not self.takes_own_configurations and hasattr(self.model, "require_uniform"):
            self.model.require_uniform(type(self).__name__)
        self.num_particles = self.passes.num_particles
        self.step = 0
        self._calls = 0
        #: The cross-entropy (or own loss) of this process's particles in the last call, (K,).
        self.particle_nll: Tensor | None = None

    def backward(self, closure: Closure, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        """Add scale · (the method's direction) to every parameter's `.grad`.

        The parameters are left as they were, also when the closure raises; in methods that draw the
        particles from a posterior (see `sample`), they are the draw of this call. Logits and
        targets must fit: a causal language model's logits at t are of the token t + 1, so its
        targets are shifted (`multilora.causal_targets`).

        Args:
            closure: () -> (logits (K, ..., C), targets). It may be called several times, with other
                parameter values and, with `particle_chunk`, for some of the particles at a time
                (the model sees to that), and must use the same batch each time. Targets of shape
                (...) are shared by the particles; targets (K, ...) give every particle its own
                mini-batch. −100 is ignored; losses are means over valid targets. Other losses have
                other targets (`multilora.losses`).
            scale: >= 0; 1/M for M accumulation steps; with a GradScaler,
                scaler.scale(torch.ones(())) on the parameters' device.

        Returns:
            Detached scalars for logging, on the parameters' device. `particle_nll` has the loss of
            each particle.

        Raises:
            TypeError, ValueError: if the closure, its logits, its targets or the scale do not fit.
            FloatingPointError: as `nonfinite` says.
            RuntimeError: if the model's trainable tensors are not those that the method was made
                with, if the loss depends on none of them, if a chunk's second run has other logits
                than its first, if processes that hold other particles for the same data have
                different batches, or if a CUDA graph is being captured and the settings would have
                the host wait for the device.
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
                stats = None
                while stats is None:
                    with contextlib.suppress(_Again):
                        stats = self._backward(closure, scale)
        except _AllBroken as error:
            self._require_finite_parameters(str(error))
            warn(f"{error}, which are all particles: the batch is skipped, nothing was changed")
            stats = self._skipped()
        self.step += 1
        return stats

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        """One step of the particles that take part; returns what to log.

        It leaves everything as it was if it raises: it then runs again without broken particles.
        """
        raise NotImplementedError

    def _separate(
        self, closure: Closure, loss: Loss, scale: float | Tensor, *, again: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean of the particles' losses, and the gradients of scale · their sum.

        Args:
            again: whether the particles have moved by a gradient of this step.
        """
        losses, grads = self.passes.separate(closure, loss, scale)
        self.particle_nll = losses
        # A GradScaler's gradient may have overflown, and have led the particles anywhere. No
        # particle is in another one's gradient, so that nothing has to run again.
        if not again or not isinstance(scale, Tensor):
            self._leave_out_broken(losses, grads, scale)
        return self.passes.particle_mean(losses), self.passes.zero_skipped(grads)

    def _with_prior(
        self, grads: list[Tensor], precision: float, scale: float | Tensor
    ) -> list[Tensor]:
        """grads (K, ...) + scale · precision · θ_i, of the particles that take part."""
        if precision == 0:
            return grads
        grads = [g + (scale * precision) * p.detach() for g, p in zip(grads, self.params)]
        return self.passes.zero_skipped(grads)

    def _together(
        self,
        closure: Closure,
        loss: Loss,
        objective: Callable[..., tuple[Tensor, Tensor, _Seen]],
        scale: float | Tensor,
        *,
        taps: Taps = tuple,
        again: bool = False,
    ) -> tuple[list[Tensor], _Seen]:
        """The gradients of scale · an objective of the predictions of all particles.

        Args:
            loss: says how the targets are cut into chunks.
            objective: (logits (total, ..., C), targets, *taps (total, ...)) -> the scalar; the
                detached loss of each particle that takes part; and what else this function returns.
            taps: what else of the particles the objective depends on, see `passes.Taps`.
            again: whether the particles have moved by a gradient of this step.
        """
        leaves, targets = self.passes.predict(closure, loss, taps)
        total, losses, seen = objective(leaves[0], targets, *leaves[1:])
        along = torch.autograd.grad(
            total * scale, leaves, allow_unused=len(leaves) > 1, materialize_grads=len(leaves) > 1
        )
        grads = self.passes.pull_back(closure, along, taps)
        losses = self.passes.data_mean(self.passes.put(losses, torch.nan))
        self.particle_nll = losses
        # A GradScaler's gradient may have overflown, and have led the particles anywhere.
        looks = not again or not isinstance(scale, Tensor)
        if looks and self._leave_out_broken(losses, grads, scale):
            raise _Again
        return self.passes.zero_skipped(grads), seen

    def _leave_out_broken(self, losses: Tensor, grads: list[Tensor], scale: float | Tensor) -> bool:
        """Raise, or take part without the particles that are not finite. -> Whether there are any.

        losses (K,) and grads (K, ...) are those of this process's particles.
        """
        if self.nonfinite == "ignore":
            return False
        looked_at = [] if isinstance(scale, Tensor) else grads
        broken = self.passes.broken(losses, looked_at, self.interacts)
        if not broken:
            return False
        values = self.passes.processes.gather(losses).tolist()
        names = ", ".join(map(str, broken[:8]))
        names += f" and {len(broken) - 8} more" if broken[8:] else ""
        message = (
            f"{type(self).__name__}, call {self.step}: non-finite loss or gradient of particle"
            f"{'s' if len(broken) > 1 else ''} {names} (losses {[values[k] for k in broken[:8]]})"
        )
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{message}; nothing was changed")
        if not self.passes.leave_out(broken):
            raise _AllBroken(message)
        warn(f"{message}; skipped, the others go on")
        return True

    def _require_finite_parameters(self, message: str) -> None:
        """Another batch helps only where some particle's parameters are finite."""
        finite = torch.stack([p.detach().flatten(1).isfinite().all(1) for p in self.params]).all(0)
        if not bool(self.passes.processes.all_true(finite).any()):
            raise FloatingPointError(
                f"{message}: the parameters of all particles are not finite; nothing was changed"
            )

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

    def sample(self) -> None:
        """Put new draws of the posterior into the model's particles, for methods that learn its
        parameters; elsewhere the particles are the posterior, and this does nothing.

        Call it before an evaluation and before saving. It does not change how training goes on.
        """

    def parameters(self) -> list[Tensor]:
        """The method's own trainable tensors, to be given to the optimizer too; mostly none.

        Give them a parameter group without weight decay. Where they are the whole posterior, the
        particles get no gradient, and the optimizer leaves those alone:

            AdamW([
                {"params": model.particle_parameters()},
                {"params": method.parameters(), "weight_decay": 0.0},
            ])
        """
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state that resuming needs."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: if the keys are not this method's.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__} state needs the keys {sorted(expected)}; "
                f"got {sorted(state)}"
            )
        self.step = int(state["step"])


class _Again(Exception):
    """The step has to start again, without the particles that were just left out."""


class _AllBroken(Exception):
    """No particle is left to go on with this batch."""


def warn(message: str) -> None:
    """Warn at the line that called into `multilora.methods`."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_captured(t: Tensor) -> bool:
    """Whether operations on this tensor become part of a CUDA graph instead of running."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _checked_scale(scale: float | Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return checks.number("scale", scale, 0)
    if scale.ndim != 0 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a number or a floating tensor without axes; "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    # On a GPU, reading the value would wait for the device.
    if scale.device.type == "cpu":
        checks.number("scale", scale.item(), 0)
    return scale.detach()


def described(value: Any) -> str:
    """A text that tells settings apart and is the same in every process."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.tolist()}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return f"{described(type(value))}({', '.join(map(described, fields))})"
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    return repr(value)
