"""What every backend and caller agrees on."""

import torch

#: The target that is left out, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and geometry are computed and returned in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)
