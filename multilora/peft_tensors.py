"""Stacked tensors of K particles <-> the tensors of K PEFT adapters, under PEFT's names, or of K
whole models, under the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from multilora.copies import stacked_modules
from multilora.experts import LoraExperts, bank_name
from multilora.layers import LoraConv2d, LoraLayer, lora_layers
from multilora.parallel import Processes
from multilora.peft_format import PREFIX, Expected, computing_dtype


def of_all_processes(base: nn.Module, processes: Processes) -> dict[Tensor, Tensor]:
    """Every stacked tensor of `base`, with the particles of all processes."""
    stacked = _stacked(base)
    return dict(zip(stacked, processes.gather_all(stacked)))


def of_particle(
    base: nn.Module, particle: int, whole: Mapping[Tensor, Tensor]
) -> dict[str, Tensor]:
    """One particle's tensors under PEFT's names and in PEFT's shapes.

    whole: the stacked tensor to read in place of each of `base`.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(base):
        A = layer.part("lora_A", whole[layer.lora_A], particle)
        B = layer.part("lora_B", whole[layer.lora_B], particle)
        if A is not None and B is not None:
            tensors |= of_adapter(name, layer, A, B)
    for name, stacked in stacked_modules(base):
        if not stacked.is_trained(particle):
            continue
        for inner, parameter in stacked.module.named_parameters():
            own = stacked.part(inner, whole[parameter], particle)
            assert own is not None
            tensors[_key(name, inner)] = own
        tensors |= of_buffers(name, stacked.module)
    return tensors


def of_adapter(name: str, layer: LoraLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The factors A (r, d_in) and B (d_out, r) of one adapter; (E, ...) of a bank of experts."""
    if isinstance(layer, LoraExperts):
        # PEFT's are (E·r, d_in), expert first, and (d_out, r·E), expert last.
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    if isinstance(layer, LoraConv2d):
        A = A.view(A.shape[0], *layer.base_layer.weight.shape[1:])
        B = B[..., None, None]
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def pattern_name(name: str, layer: LoraLayer) -> str:
    """What PEFT matches with the names in rank_pattern and alpha_pattern."""
    return f"{bank_name(name)}.{layer.parameter}" if isinstance(layer, LoraExperts) else name


def of_buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a module to save, which the particles share."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        _key(name, inner): value
        for inner, value in module.state_dict().items()
        if inner not in parameters
    }


def expected(base: nn.Module, particle: int = 0) -> dict[str, Expected]:
    """The names, shapes and dtypes that the file of one particle of `base` must hold."""
    tensors = of_particle(base, particle, {p: p.detach() for p in _stacked(base)})
    found = {key: Expected(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    for name, stacked in stacked_modules(base):
        for key in of_buffers(name, stacked.module).keys() & found.keys():
            found[key] = found[key]._replace(is_shared=True)
    for name, layer in lora_layers(base):
        for factor in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{factor}.weight"
            if key in found:
                found[key] = found[key]._replace(dtype=computing_dtype(layer.plain_layer))
    return found


def expected_copies(base: nn.Module) -> dict[str, Expected]:
    """What the file of a full copy of the plain model `base` must hold."""
    parameters = {
        name: Expected(tuple(p.shape), torch.promote_types(p.dtype, torch.float32))
        for name, p in base.named_parameters()
    }
    buffers = of_buffers("", base).items()
    return parameters | {name: Expected(tuple(t.shape), t.dtype, True) for name, t in buffers}


def fill(base: nn.Module, particles: Sequence[Mapping[str, Tensor]]) -> None:
    """Copy the tensors of each particle of this process, which must fit, into `base`."""
    stacked = {p: p.detach() for p in _stacked(base)}
    banks = {
        f"{PREFIX}{name}.{factor}.weight": (layer, factor)
        for name, layer in lora_layers(base)
        if isinstance(layer, LoraExperts)
        for factor in ("lora_A", "lora_B")
    }
    with torch.no_grad():
        for particle, tensors in enumerate(particles):
            # Views of the stacked tensors, and buffers that the particles share.
            slots = of_particle(base, particle, stacked)
            for key, tensor in tensors.items():
                slot = slots[key]
                if key in banks:  # whose file is in another order, so that it is no view
                    layer, factor = banks[key]
                    own = layer.part(factor, stacked[getattr(layer, factor)], particle)
                    assert own is not None
                    slot = own if factor == "lora_A" else own.permute(1, 2, 0)
                slot.copy_(tensor.reshape(slot.shape))


def _key(name: str, inner: str) -> str:
    """The key of a module to save's tensor; a whole base has no name, and its keys are its own."""
    return f"{PREFIX}{name}.{inner}" if name else inner


def _stacked(base: nn.Module) -> list[Tensor]:
    layers = [layer for _, layer in (*lora_layers(base), *stacked_modules(base))]
    return [parameter for layer in layers for _, _, parameter in layer.stacked()]
