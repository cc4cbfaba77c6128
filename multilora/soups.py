"""Soups: the mean of K particles as one PEFT adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multilora import embeddings, peft_tensors
from multilora.layers import lora_layers, stacked_modules
from multilora.parallel import Processes
from multilora.particle_folders import replace, write_adapter
from multilora.peft_format import PREFIX

if TYPE_CHECKING:
    import peft


def save_soup(
    base: nn.Module,
    config: peft.LoraConfig,
    processes: Processes,
    path: str | Path,
    kind: str,
) -> None:
    """Write the mean of ΔW over the particles as one adapter; see `ParticleModel.soup`."""
    if kind not in ("exact", "svd"):
        raise ValueError(f'kind must be "exact" or "svd"; got {kind!r}')
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = peft_tensors.of_all_processes(base, processes)
    for name, layer in lora_layers(base):
        A, B = _mean_factors(whole[layer.lora_A], whole[layer.lora_B] * layer.scaling)
        for factor, what in ((A, "lora_A"), (B, "lora_B times its scaling")):
            _require_finite(f"{name}: {what}", factor)
        if kind == "svd":
            A, B = _truncate(A, B, layer.rank)
        ranks[name] = A.shape[0]
        tensors |= peft_tensors.of_adapter(name, layer, A, B)
    for name, stacked in stacked_modules(base):
        for inner, parameter in stacked.module.named_parameters():
            mean = whole[parameter].mean(0)
            _require_finite(f"{name}.{inner}", mean)
            tensors[f"{PREFIX}{name}.{inner}"] = mean
        tensors |= peft_tensors.of_buffers(name, stacked.module)
    tensors |= embeddings.to_save(base, "auto")
    config = copy.deepcopy(config)
    # The scaling is inside B now: alpha = rank everywhere.
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    replace(base, processes, path, lambda folder: write_adapter(folder, tensors, config))


def _require_finite(name: str, tensor: Tensor) -> None:
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ValueError(
            f"the mean of the particles is not finite: {wrong} of {tensor.numel()} numbers of "
            f"{name}"
        )


def _mean_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """(K, r, d_in), (K, d_out, r) -> A (K·r, d_in), B (d_out, K·r) with B A the mean product."""
    particles = lora_A.shape[0]
    return lora_A.flatten(0, 1), lora_B.transpose(0, 1).flatten(1, 2) / particles


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of B A, through the QR of both: no d_out × d_in matrix."""
    dtype = A.dtype
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:rank].sqrt()
    A = root[:, None] * (vh[:rank] @ q_a.mT)
    B = (q_b @ u[:, :rank]) * root
    # A rank that the matrix does not have is filled with zeros.
    A = nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))
    B = nn.functional.pad(B, (0, rank - B.shape[1]))
    return A.to(dtype), B.to(dtype)
