"""DVERGE: particles that learn from one another's non-robust features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.losses import Loss
from multilora.methods.ensemble import Ensemble
from multilora.model import ParticleModel
from multilora.robustness import Channels, dverge, particles


class DVERGE(Ensemble):
    """min Σ_j Σ_{i≠j} ℓ_j(z_i, y_s): particle j learns the label of what another was fooled by.

        method = ml.DVERGE(model, tap="blocks.3", mean=mean, std=std)
        inputs, targets = method.batch(x, y)
        method.backward(lambda: (model(inputs, per_particle=True), targets))

    z_i looks like an image with the label y_s and has particle i's features of another image
    (`robustness.dverge`). A particle that reads z_i by its looks does not share the weaknesses of
    i, so attacks on i transfer to it less. The images of a batch cost steps + 1 forwards and as
    many backwards as steps, beside the forward and the backward of Ensemble.

    The paper sums over all pairs of particles. Here every batch draws a shift s from 1 … K − 1, and
    particle j learns from j − s (mod K): one pass instead of K − 1, and in expectation the mean
    over the pairs. PyTorch's CPU generator draws the shift and the module.

    Source: Yang et al. 2020.

    Args:
        model, particle_chunk, nonfinite: see `Method`. It needs a ParticleModel of two particles or
            more.
        loss: see `Ensemble`.
        tap: the name of the module of the base whose output is distilled, or several names, of
            which each batch draws one. None: all adapted layers.
        epsilon, steps, step_size, mean, std: see `robustness.dverge`.

    Raises:
        TypeError, ValueError, RuntimeError: see `Method`; and for a model that is no ParticleModel,
            or has one particle.
    """

    def __init__(
        self,
        model: ParticleModel,
        *,
        tap: str | Sequence[str] | None = None,
        epsilon: float = 0.07,
        steps: int = 10,
        step_size: float | None = None,
        mean: Channels = 0.0,
        std: Channels = 1.0,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.epsilon, self.steps, self.step_size = epsilon, steps, step_size
        self.mean, self.std = mean, std
        super().__init__(model, loss=loss, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if particles(self.model) == 1:
            raise ValueError(
                "DVERGE needs two particles or more: each learns from another's images"
            )
        taps = [name for name, _ in self.model.lora_layers()] if tap is None else tap
        self.taps = [taps] if isinstance(taps, str) else list(taps)
        if not self.taps:
            raise ValueError("DVERGE needs adapted layers, or the names of modules to tap: tap")

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the particles learn from a batch: images of other particles, and their labels.

        Image b of the batch is distilled from the one before it, which lends its looks and its
        label: the order of the batch should be random.

        Args:
            x: images (B, C, ...), normalised, B >= 2.
            y: labels (B,).

        Returns:
            Images (K, B, C, ...) and targets (K, B), of this process's particles.

        Raises:
            TypeError, ValueError: see `robustness.dverge`; and for a batch of one image.
        """
        if len(x) < 2:
            raise ValueError(f"DVERGE pairs the images of a batch: it needs two; got {len(x)}")
        processes = self.passes.processes
        draws = [torch.randint(1, self.passes.total, ()), torch.randint(len(self.taps), ())]
        # Processes that hold other particles for the same data use the first one's draws.
        shift, tap = processes.gather(torch.stack(draws).to(x.device)[None])[0].tolist()
        z = dverge(
            self.model,
            x,
            x.roll(1, 0),
            self.taps[tap],
            epsilon=self.epsilon,
            steps=self.steps,
            step_size=self.step_size,
            mean=self.mean,
            std=self.std,
            particle_chunk=self.passes.chunk,
        )
        z = processes.own(processes.gather(z).roll(shift, 0))
        return z, y.roll(1, 0).expand(len(z), *y.shape)
