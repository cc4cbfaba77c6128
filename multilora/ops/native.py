"""How tensors are described to csrc, which knows nothing of torch."""

import torch

#: DType in csrc/common.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#: VolumeKind in csrc/volume.h.
_VOLUME_KINDS = {"zero": 0, "logdet": 1, "det": 2}


def volume_kind(logits: torch.Tensor, kind: str) -> int:
    """The kind as csrc has it: "zero" where the value cannot move."""
    particles, _, classes = logits.shape
    constant = classes == 2 or (kind == "det" and particles > classes - 1)
    return _VOLUME_KINDS["zero" if constant else kind]


def dense_classes(logits: torch.Tensor) -> torch.Tensor:
    """One copy costs less than going to another line of memory for every single class."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def stream(t: torch.Tensor) -> tuple[int, int]:
    """The device and the current stream that a kernel on `t` runs on; in the tests, zeros."""
    if not t.is_cuda:
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def adapter_sizes(lora_A: list[torch.Tensor], lora_B: list[torch.Tensor]) -> list[int]:
    """rank, d_in and d_out of every layer."""
    sizes = []
    for A, B in zip(lora_A, lora_B):
        _, rank, d_in = A.shape
        sizes += (rank, d_in, B.shape[1])
    return sizes


def pointers(tensors: list[torch.Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
