"""K unrelated fine-tunings over one frozen base, each with its own data and pace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multilora import checks
from multilora.gradients import add_gradients
from multilora.losses import NAMES, Loss, RowLoss, named
from multilora.methods.base import Method, is_captured, warn
from multilora.methods.packing import Batch, Pack, Reader, first_few, on, packed
from multilora.methods.parameters import stacked_parameters
from multilora.methods.probes import check_own_loss, hides_padding
from multilora.methods.tensors import sums, used_gradients, zero_if_finite
from multilora.separate import SeparateParameter, separate_parameters

#: A batch of a particle, or its closure.
Entry = Any
#: So many tokens of sequences, with their padding, run in one pass on a CPU. More would not be
#: faster: products are large enough, and what lies between them leaves the caches.
MOST_TOKENS = 1024
#: What a particle minimises: a loss of `multilora.losses`, or (logits (B, ..., C), targets) -> ().
OwnLoss = Callable[[Tensor, Any], Tensor]


class Independent(Method):
    """θ_k ← θ_k − ε_k s_k w_k ∇ℓ_k(θ_k; batch_k): K runs of their own data, loss and pace in one.

    `backward` takes a batch for each particle that is due. Their rows, of which each may have
    another number, and sequences, of which each may have another length, run through the base in
    one pass. A particle's gradient is that of its own loss over its own batch, as in a run of its
    own. Particles without a batch have finished, pause, or wait: they keep their gradient, None
    included, and do not move as long as their optimizer does not step.

    An optimizer for each particle, at its own learning rate, is over `parameters_of(k)`:

        optimizers = [torch.optim.AdamW(method.parameters_of(k), lr=lr[k]) for k in range(K)]

    and `optim.ParticleAdamW` is as many in one, and faster.

    Args:
        model: a ParticleModel, in one process.
        losses: ℓ_k of a batch (inputs, targets): a name or a loss of `multilora.losses`, or a
            function (logits (B, ..., C), targets) -> a scalar; or a list of K of them. By default
            the mean cross-entropy, to which a batch with "labels" adds the loss of the router of a
            mixture of experts, where the base does.
        weights: w_k, K numbers.
        names: of the runs, K strings, for messages.
        particle_chunk: how many particles' batches run in one pass. By default it is all, but that
            on a CPU longer sequences than MOST_TOKENS in all run in several passes, those of like
            lengths together.
        nonfinite: see `Method`. A broken particle is named, with its run; it is in no other's
            gradient.

    Raises:
        TypeError, ValueError: a list has not K entries, an entry is of another kind, or the model
            is inside DistributedDataParallel or on a mesh.
    """

    takes_own_configurations = True

    def __init__(
        self,
        model: Any,
        *,
        losses: str | OwnLoss | Sequence[str | OwnLoss | None] | None = None,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        processes = self.passes.processes
        if not hasattr(self.model, "particle"):
            raise TypeError(f"Independent needs a ParticleModel; got {type(model).__name__}")
        if processes.data_size > 1 or processes.particle_size > 1:
            raise ValueError("Independent runs in one process; give each process its own runs")
        self.names: list[str] | None = None
        if names is not None:
            self.names = list(self._of_each("names", names))
        several = isinstance(losses, Sequence) and not isinstance(losses, str)
        each: Any = losses if several else [losses] * self.num_particles
        #: ℓ_k of each particle; None for the default.
        self.losses = [
            self.named_loss(k, one) for k, one in enumerate(self._of_each("losses", each))
        ]
        weights = [1.0] * self.num_particles if weights is None else weights
        self.weights = [
            checks.number(f"weights[{k}]", w, 0)
            for k, w in enumerate(self._of_each("weights", weights))
        ]
        self._particle_chunk = particle_chunk
        #: How many rows each particle had in the last call.
        self.rows: dict[int, int] = {}
        self._reader = Reader(self.model.base)
        # Whether the base was asked for its own loss, and whether it hides padding from inputs of
        # these names, on their left or not.
        self._knows_loss = False
        self._hides: dict[Any, bool] = {}
        self._tell: Callable[[str], None] = warn
        #: The particles that the last call left out since they were not finite.
        self.skipped: list[int] = []
        #: As `particle_nll`, with the loss of the router.
        self.particle_loss: Tensor | None = None

    def parameters_of(self, particle: int) -> list[SeparateParameter]:
        """The parameters of one particle, over the memory of the stacked ones: see
        `ParticleModel.particle_parameters`."""
        self.model.particle(particle)
        return [p for p in separate_parameters(self.model) if p.particle == particle]

    # The batches of Independent are not those of one closure.
    def backward(  # type: ignore[override]
        self,
        batches: Sequence[Entry | None] | Mapping[int, Entry | None],
        scale: float | Tensor | Sequence[float] = 1.0,
        num_items: Sequence[float | None] | Mapping[int, float | None] | None = None,
    ) -> dict[str, Tensor]:
        """Add s_k w_k ∇ℓ_k to the gradients of each particle k that has a batch.

        Args:
            batches: K entries, or a mapping from particles to theirs; None, or a particle that is
                not in it, takes no part. An entry is (inputs, targets), where the inputs are a
                tensor, a tuple of arguments or a mapping; a mapping with "labels", as a model of
                transformers takes it, which are shifted where the model shifts them; or a closure,
                () -> (logits (B, ..., C), targets), which runs `model.particle(k)`. Closures run
                one after another, batches together. Sequences of unequal lengths are padded on the
                right, where a mask hides the rest.
            scale: s, a number or K of them: 1/M_k for M_k accumulation steps; or with a GradScaler
                a tensor (), scaler.scale(torch.ones(())).
            num_items: for some particles, the number of labels over which the loss of a step is
                a mean, those of all its micro-batches: the loss of this one is then its sum over
                labels, divided by that number, as transformers' Trainer has it. The router's loss
                is not divided.

        Returns:
            Detached scalars: the mean of the losses of those who took part, with ("loss") and
            without ("nll") their routers' loss. `particle_nll` (K,) has each one's, NaN for others.

        Raises:
            TypeError, ValueError: an entry is of another kind, its inputs and targets do not fit,
                batches cannot run in one pass, a particle is unknown, or nobody has a batch; the
                base computes another loss from labels than the cross-entropy; or a closure runs
                another particle. The message names the particle. What the base itself raises for
                batches that do not fit it begins with the names of the particles whose they are.
            FloatingPointError: as `nonfinite` says.
            RuntimeError: a loss has no gradient, or this is inside `model.particles` or `mixtures`.
        """
        self.model.require_whole("Independent.backward")
        # Parameters may be others since a particle was replaced.
        self.params = self.passes.params = stacked_parameters(self.model)
        self._require_capturable()
        entries = self._entries(batches)
        scales = self._scales(scale)
        items = self._items(num_items, entries)
        device, self.rows = self.params[0].device, {}
        # The sum of each tensor's gradients, and the particles that use the tensor.
        total: list[Tensor | None] = [None] * len(self.params)
        using: list[set[int]] = [set() for _ in self.params]
        losses: dict[int, Tensor] = {}
        extras: dict[int, Tensor] = {}
        # Which particles the loss of each closure has a gradient for, where that can be asked.
        reached: dict[int, Tensor] = {}
        asks = self.num_particles > 1 and not is_captured(self.params[0])
        for part in self._passes(entries, device):
            outputs, routed = self._outputs(part)
            values = {k: self._value(k, *output, items) for k, output in outputs.items()}
            terms = {
                k: (values[k] + routed.get(k, 0)) * (scales[k] * self.weights[k]) for k in values
            }
            grads = self._gradients(terms)
            if asks and isinstance(part, tuple):
                reached[part[0]] = _reached(grads)
            for users, grad in zip(using, grads):
                users.update(() if grad is None else values)
            total = sums(total, grads)
            losses |= {k: v.detach() for k, v in values.items()}
            extras |= {k: v.detach() for k, v in routed.items()}
            self.rows |= {k: len(outputs[k][0]) for k in outputs}
        del grads
        self._require_own(reached)
        looked_at = [] if isinstance(scale, Tensor) else [g for g in total if g is not None]
        steps = self._finite(losses, looked_at)
        self._add(total, using, steps)
        self.step += 1
        return self._stats(losses, extras, steps)

    def _gradients(self, losses: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Of the losses' sum; None for parameters that it does not depend on."""
        for k, loss in losses.items():
            if not loss.requires_grad:
                raise RuntimeError(
                    f"{self.who(k)}: its loss has no gradient, so nothing would be trained: it "
                    "must come from the model's logits, not detached, outside of torch.no_grad"
                )
        try:
            return used_gradients(list(losses.values()), self.params)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # such as OutOfMemoryError
                raise
            raise RuntimeError(f"{first_few(map(self.who, losses))}: {error}") from error

    def _require_own(self, reached: Mapping[int, Tensor]) -> None:
        """Raise where the loss of a closure has a gradient for other particles than its own."""
        if not reached:
            return
        every = torch.stack(list(reached.values())).tolist()
        for k, moves in zip(reached, every):
            if others := [self.who(j) for j, moved in enumerate(moves) if moved and j != k]:
                raise ValueError(
                    f"{self.who(k)}: the loss of its closure has a gradient for "
                    f"{', '.join(others)}: a closure that is made in a loop needs its own k, "
                    "lambda k=k: ..."
                )

    def _add(self, grads: list[Tensor | None], using: list[set[int]], steps: Sequence[int]) -> None:
        """Add gradients for those that step, and use the tensor: None stays, as for a run alone."""
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for p, grad, users in zip(self.params, grads, using):
            if grad is not None and (particles := tuple(k for k in steps if k in users)):
                alike.setdefault(particles, []).append((p, grad))
        for particles, pairs in alike.items():
            params, own = zip(*pairs)
            add_gradients(params, own, particles)

    @torch.no_grad()
    def predict(
        self, batches: Sequence[Entry | None] | Mapping[int, Entry | None]
    ) -> dict[int, tuple[Tensor, Tensor, Any]]:
        """The loss (), the logits (B, ..., C) and the targets of each particle that has a batch.

        Batches are as in `backward`, and run in as many passes, in the mode that the model is in.
        Logits and targets of a causal language model begin where the batch has its first label.
        """
        self.model.require_whole("Independent.predict")
        found = {}
        for part in self._passes(self._entries(batches), self.params[0].device):
            outputs, routed = self._outputs(part)
            for k, (logits, targets) in outputs.items():
                loss = self._value(k, logits, targets, {}) + routed.get(k, 0)
                found[k] = (loss, logits, targets)
        return dict(sorted(found.items()))

    def _entries(self, batches: Any) -> dict[int, Entry]:
        """The entries that are there, by particle, in ascending order."""
        if isinstance(batches, Mapping):
            unknown = [k for k in batches if type(k) is not int or not 0 <= k < self.num_particles]
            if unknown:
                there = ", ".join(self.who(k) for k in range(min(self.num_particles, 4)))
                more = ", …" if self.num_particles > 4 else ""
                raise ValueError(
                    f"there are {self.num_particles} particles, {there}{more}; got {unknown}"
                )
            every = sorted(batches.items())
        else:
            every = list(enumerate(self._of_each("batches", batches)))
        entries = {k: entry for k, entry in every if entry is not None}
        if not entries:
            raise ValueError("no particle has a batch, so there is nothing to step")
        return entries

    def _passes(
        self, entries: Mapping[int, Entry], device: torch.device
    ) -> list[Mapping[int, Batch] | tuple[int, Callable[[], Any]]]:
        """What runs one after another: packs of batches, and closures."""
        closures = [(k, entry) for k, entry in entries.items() if callable(entry)]
        batches = {
            k: self._reader.read(entry, self.who(k), device)
            for k, entry in entries.items()
            if not callable(entry)
        }
        for k in batches:
            if not self._knows_loss and batches[k].labelled and self.losses[k] is None:
                self._check_own_loss(k, entries[k], device)
        pads = self._hides_padding(batches)
        if self._particle_chunk is None:
            tokens = MOST_TOKENS if device.type == "cpu" else None
            packs = packed(batches, tokens=tokens, pads=pads)
        else:
            packs = packed(batches, self._particle_chunk, pads=pads)
        return [*packs, *closures]

    def _check_own_loss(self, k: int, entry: Mapping[str, Any], device: torch.device) -> None:
        try:
            self._knows_loss = check_own_loss(self.model, self._reader, on(device, entry))
        except ValueError as error:
            raise ValueError(f"{self.who(k)}: {error}") from error

    def _hides_padding(self, batches: Mapping[int, Batch]) -> bool:
        """Whether batches of unequal lengths may share a pass, as far as is known."""
        plain = {k: b for k, b in batches.items() if not b.is_packed}
        if len({b.sizes for b in plain.values()}) < 2 or not self.model.check_isolation:
            return True
        longest = max(b.longest for b in plain.values())
        names = {str(name) for b in plain.values() for name in b.inputs}
        left = any(b.begins_masked for b in plain.values() if b.longest < longest)
        key = tuple(sorted(names)), left
        if key not in self._hides:
            self._hides[key] = hides_padding(self.model, self._reader, plain)
            if not self._hides[key]:
                warnings.warn(
                    f"{type(self.model.base).__name__} has other logits where its batch is padded, "
                    "though a mask hides it, so batches of unequal lengths run one after another, "
                    "which is slower",
                    stacklevel=2,
                )
        return self._hides[key]

    def _outputs(self, part: Any) -> tuple[dict[int, tuple[Tensor, Any]], dict[int, Tensor]]:
        """The logits and targets of the particles in one pass, and the losses of their routers."""
        if isinstance(part, tuple):
            k, closure = part
            return {k: self._of_closure(k, closure)}, {}
        pack = Pack(self._reader, part)
        output = pack.run(self.model)
        logits = pack.logits(output, self._widths())
        own_loss = [k for k in logits if self.losses[k] is None]
        return {k: (z, part[k].targets) for k, z in logits.items()}, pack.router_losses(
            output, own_loss
        )

    def _of_closure(self, k: int, closure: Callable[[], Any]) -> tuple[Tensor, Any]:
        try:
            answer = closure()
        except StopIteration as error:
            raise ValueError(f"{self.who(k)}: its data ended") from error
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise TypeError(f"{self.who(k)}: a closure returns (logits, targets); got {answer!r}")
        logits, targets = answer
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{self.who(k)}: a closure returns logits (B, ..., C); got {shape}")
        return logits, targets

    def _value(self, k: int, logits: Tensor, targets: Any, items: Mapping[int, float]) -> Tensor:
        """ℓ_k, a scalar."""
        loss = self.losses[k] or NAMES["particle"]
        shapes = f"logits {tuple(logits.shape)}, targets {getattr(targets, 'shape', targets)}"
        if not isinstance(loss, RowLoss):
            if k in items:
                raise ValueError(f"{self.who(k)}: num_items needs a loss of multilora.losses")
            value = loss(logits, targets)
            if not isinstance(value, Tensor) or value.shape != ():
                got = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"{self.who(k)}: its loss must be a scalar; got {got}")
            return value
        try:
            one = logits[None]
            value = loss(one, targets)[0]
            return value * (loss.count(one, targets) / items[k]) if k in items else value
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{self.who(k)}: {shapes}: {error}") from error

    def _widths(self) -> Sequence[int] | None:
        """The classes of each particle's head, where heads have widths of their own."""
        # A look at every module, so once in a pass.
        every = (head.widths for _, head in self.model.stacked_modules())
        return next((widths for widths in every if widths is not None), None)

    def _finite(self, losses: Mapping[int, Tensor], grads: list[Tensor]) -> list[int]:
        """The particles that step; raises or warns where some are broken."""
        every, self.skipped = list(losses), []
        if self.nonfinite == "ignore":
            return every
        seen = torch.stack([losses[k].float() for k in every])
        finite = seen.isfinite()
        if grads:
            finite = finite & zero_if_finite(grads)[every].isfinite()
        if all(whole := finite.tolist()):
            return every
        broken = {k: v for k, v, f in zip(every, seen.tolist(), whole) if not f}
        who = ", ".join(f"{self.who(k)} (loss {value})" for k, value in broken.items())
        message = f"Independent, call {self.step}: non-finite loss or gradient of {who}"
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{message}; nothing was changed")
        self.skipped = list(broken)
        self._tell(f"{message}; skipped, the others go on")
        return [k for k in every if k not in broken]

    def _stats(
        self, losses: Mapping[int, Tensor], extras: Mapping[int, Tensor], steps: Sequence[int]
    ) -> dict[str, Tensor]:
        each = self.params[0].new_full((self.num_particles,), torch.nan)
        if each.dtype.itemsize < 4:
            each = each.float()
        for k, value in losses.items():
            each[k] = value
        self.particle_nll, self.particle_loss = each, each.clone()
        for k, value in extras.items():
            self.particle_loss[k] += value
        nll = each[list(steps)].mean()  # NaN where nobody steps
        return {"loss": self.particle_loss[list(steps)].mean(), "nll": nll}

    def named_loss(self, k: int, loss: Any) -> Loss | OwnLoss | None:
        """ℓ_k of a name, a function or None, as `losses` has it."""
        try:
            return None if loss is None else named(loss)
        except ValueError as error:
            raise ValueError(f"{self.who(k)}: {error}") from error

    def who(self, k: int) -> str:
        """Particle k with the name of its run, for messages."""
        return f"particle {k}" + (f" (run {self.names[k]!r})" if self.names else "")

    def _of_each(self, what: str, values: Any) -> Sequence[Any]:
        if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
            raise TypeError(
                f"{what} must be a list with an entry for each particle; got "
                f"{type(values).__name__}"
            )
        if len(values) != self.num_particles:
            first = len(values)
            missing = f", none for {self.who(first)}" if first < self.num_particles else ""
            raise ValueError(
                f"{what} must have {self.num_particles} entries, one for each particle; got "
                f"{len(values)}{missing}"
            )
        return values

    def _scales(self, scale: Any) -> list[Any]:
        if isinstance(scale, Tensor):
            if scale.numel() != 1 or scale.requires_grad:
                raise ValueError("a tensor as scale is one number without gradient")
            return [scale.reshape(())] * self.num_particles
        if isinstance(scale, Sequence):
            each = enumerate(self._of_each("scale", scale))
            return [checks.number(f"scale[{k}]", s, 0) for k, s in each]
        return [checks.number("scale", scale, 0)] * self.num_particles

    def _items(self, num_items: Any, entries: Mapping[int, Entry]) -> dict[int, float]:
        if num_items is None:
            return {}
        if not isinstance(num_items, Mapping):
            num_items = dict(enumerate(self._of_each("num_items", num_items)))
        return {
            k: checks.number(f"num_items[{k}]", n, 0, open_low=True)
            for k, n in num_items.items()
            if n is not None and k in entries
        }


def _reached(grads: Sequence[Tensor | None]) -> Tensor:
    """(K,): the particles that have a gradient. Zero times what is not finite is none."""
    seen = [(g.abs() > 0).reshape(len(g), -1).any(1) for g in grads if g is not None]
    return torch.stack(seen).any(0)
