"""A shared trunk: what lies below a cut of the model runs once for all particles.

Below the first adapted block the rows of all particles are the same, unless something there is
random, keeps a state or depends on the particle. The user promises that nothing does
(`share_trunk`). The model is then fed the B rows of one particle, and a hook on the blocks from the
cut on repeats what still has B rows to K·B. Nothing is tried or remembered between calls.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from multilora import forward_state
from multilora.fold import map_tensors
from multilora.layers import lora_layers


class TrunkOutput:
    """The rows at the cut for the inputs args and kwargs, from which the model can go on any number
    of times."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs
        self.output: Any = None  # of the last block below the cut
        self.filled = False


class Reached(Exception):
    """The forward that computes TrunkOutput has come to the cut."""


class Cut:
    """The place in the model after which each particle has its own rows.

    Args:
        where: True, for a cut before the first block with an adapted layer, in the innermost
            nn.ModuleList or nn.Sequential that holds all of them; or the name of a module of
            `base`, for a cut before that module.
    """

    def __init__(self, base: nn.Module, where: bool | str):
        self.below, self.above = _blocks(base, where)
        self._handles = [b.register_forward_pre_hook(_repeat, with_kwargs=True) for b in self.above]
        for block in self.below:
            block.forward = _Below(block)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for block in self.below:
            override = vars(block).pop("forward").override
            if override is not None:
                block.forward = override


class _Below:
    """The forward of a block below the cut, for which a TrunkOutput can stand in."""

    def __init__(self, block: nn.Module):
        self.block, self.override = block, vars(block).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = None if torch.compiler.is_compiling() else forward_state.current()
        rows = None if state is None else state.trunk
        if rows is None or not rows.filled:
            forward = self.override or type(self.block).forward.__get__(self.block)
            output = forward(*args, **kwargs)
            if rows is None:
                return output
            rows.output = output
        # Copies: what follows may write into them.
        return map_tensors(Tensor.clone, rows.output)


def is_shared(module: nn.Module) -> bool:
    """Whether the module is a block below a cut, for which a TrunkOutput can stand in."""
    return isinstance(vars(module).get("forward"), _Below)


def _repeat(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    state = None if torch.compiler.is_compiling() else forward_state.current()
    if state is None or state.shared_batch is None:
        return None
    if state.trunk is not None and not state.trunk.filled:
        state.trunk.filled = True
        raise Reached

    def repeat(t: Tensor) -> Tensor:
        has_rows = t.ndim and t.shape[0] == state.shared_batch
        return t.repeat(state.particles, *[1] * (t.ndim - 1)) if has_rows else t

    return map_tensors(repeat, args), map_tensors(repeat, kwargs)


def _blocks(base: nn.Module, where: bool | str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks below the cut, and those from it on."""
    if isinstance(where, str):
        first, holder = (base.get_submodule(n) for n in (where, where.rpartition(".")[0]))
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            return [], [first]
        return _split_at(holder, first)
    adapted = [name.split(".") for name, _ in lora_layers(base)]
    found = None
    for name, module in base.named_modules():
        path = name.split(".") if name else []
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(
            a[: len(path)] == path for a in adapted
        ):
            inside = {a[len(path)] for a in adapted}
            found = module, next(m for n, m in module.named_children() if n in inside)
    if found is None:
        warnings.warn(
            "share_trunk=True: no nn.ModuleList or nn.Sequential holds all adapted layers, so "
            "nothing is shared; give the name of the module before which the trunk ends",
            stacklevel=4,
        )
        return [], []
    return _split_at(*found)


def _split_at(holder: nn.Module, first: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    blocks = list(holder.children())
    return blocks[: blocks.index(first)], blocks[blocks.index(first) :]


def check_cut(where: bool | str) -> None:
    """Raise ValueError unless `where` says where a trunk is cut, or that it is not."""
    if not (isinstance(where, bool) or (isinstance(where, str) and where)):
        raise ValueError(f"share_trunk must be True, False or a module's name; got {where!r}")
