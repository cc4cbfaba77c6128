"""The adapted matrices of a base, as the geometry and the repulsion read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from multilora.layers import lora_layers


class Adapter(NamedTuple):
    """One adapted matrix: ΔW_k = scaling · lora_B[k] @ lora_A[k], with scales[k] if there are any.

    parameters: the trainable tensors that lora_A and lora_B are, or are views of: the factors of
    all E experts of a bank are (K, E, ...), and `expert` is the place of this one.
    scales: (K, 1, r) where particles have scalings and ranks of their own, zero for padding.
    """

    name: str
    lora_A: Tensor  # (K, r, d_in)
    lora_B: Tensor  # (K, d_out, r)
    scaling: float
    parameters: tuple[Tensor, Tensor]
    expert: int | None = None
    scales: Tensor | None = None

    def scaled(self) -> Tensor:
        """B (K, d_out, r) with the scales in it, so that ΔW_k = scaling · scaled[k] @ lora_A[k]."""
        if self.scales is None:
            return self.lora_B
        return (self.lora_B * self.scales).to(self.lora_B.dtype)


def adapters_of(base: nn.Module) -> list[Adapter]:
    """The adapted matrices in module order; see `ParticleModel.adapters`."""
    found = []
    for layer_name, layer in lora_layers(base):
        factors = layer.lora_A, layer.lora_B
        scales = None if layer.scales is None else layer.scales.view(-1, 1, layer.rank)
        for name, expert in layer.matrices_of(layer_name):
            A, B = factors if expert is None else (f[:, expert] for f in factors)
            found.append(Adapter(name, A, B, layer.scaling, factors, expert, scales))
    return found
