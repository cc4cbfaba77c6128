"""The noise of methods whose particles are draws θ = μ + σε."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from multilora import checks
from multilora.methods.base import is_captured
from multilora.methods.passes import Passes
from multilora.methods.tensors import flatten


class Noise:
    """ε ~ N(0, 1) for the trainable tensors of all particles, or for lora_A only.

    Args:
        passes: those of the method, which know the tensors and the processes.
        which: "all" or "A".
        seed: of the generator.

    Raises:
        ValueError: "A" without adapters whose lora_A is trained.
    """

    def __init__(self, passes: Passes, which: str, seed: int):
        checks.choice("noise", which, ("all", "A"))
        checks.integer("seed", seed, 0, 2**63 - 1)
        self.passes, params = passes, passes.params
        self.device = params[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        noisy = set(params)
        if which == "A":
            if not hasattr(passes.model, "adapters"):
                raise ValueError('noise="A" needs a ParticleModel, whose tensors have names')
            noisy &= {adapter.lora_A for adapter in passes.model.adapters()}
            if not noisy:
                raise ValueError('noise="A" needs a lora_A that is trained, and all are frozen')
        # Indices into the parameters, not tensors: a copy of the method has different tensors.
        self.noisy = [i for i, p in enumerate(params) if p in noisy]
        #: d, how many numbers of a particle are noisy.
        self.size = sum(p[0].numel() for p in noisy)

    def draw(self) -> Tensor:
        """ε (K, P) of this process's particles, zero where a tensor has no noise."""
        return flatten(
            [
                self.passes.normal(p, self.generator) if i in self.noisy else torch.zeros_like(p)
                for i, p in enumerate(self.passes.params)
            ]
        ).detach()

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """After an error inside, the generator is back where it was."""
        if self.device != self.passes.params[0].device:
            raise RuntimeError(
                f"the method was made for parameters on {self.device}, and they are on "
                f"{self.passes.params[0].device} now; make it after moving the model"
            )
        # A CUDA graph keeps the generator's state itself, and it cannot be read during the capture.
        state = None if is_captured(self.passes.params[0]) else self.generator.get_state()
        try:
            yield
        except BaseException:
            if state is not None:
                self.generator.set_state(state)
            raise

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
