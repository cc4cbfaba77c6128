"""Features of the particles: what two modules of the base give in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora import forward_state
from multilora.fold import tensors
from multilora.layers import lora_layers
from multilora.trunk import is_shared


class Features:
    """Features of two modules, fused by attention without parameters: z = mean over tokens of
    softmax(H_deep H_shallowᵀ/√D) H_shallow.

    Hooks read the modules' outputs inside `watched()`, and are there only inside it.

    Args:
        model: a ParticleModel.
        names: the shallow and the deep module, by their names in the base; or "auto", the middle
            and the last of the blocks that hold adapted layers, in the nn.ModuleList or
            nn.Sequential that has most of them.

    Raises:
        ValueError: the model has no such modules, or runs its particles in a loop.
    """

    def __init__(self, model: Any, names: str | tuple[str, str]):
        if not hasattr(model, "base") or model.fold != "batch":
            raise ValueError(
                'features need a ParticleModel with fold="batch", whose modules see all particles; '
                "or take beta=0"
            )
        self.model = model
        self.names = _middle_and_last(model.base) if isinstance(names, str) else names
        known = dict(model.base.named_modules())
        for name in self.names:
            if name not in known:
                last = name.rpartition(".")[2]
                near = [n for n in known if n.rpartition(".")[2] == last] or [*known][1:]
                raise ValueError(
                    f"features: the base has no module {name!r}; it has {', '.join(near[:5])}"
                )
        self._seen: dict[str, tuple[Tensor, bool]] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, forwards of the model leave their features for the next call of this object."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._seen.clear)
            for name in self.names:
                module = self.model.base.get_submodule(name)
                stack.callback(module.register_forward_hook(partial(self._see, name)).remove)
            yield

    def _see(self, name: str, module: nn.Module, _inputs: tuple, output: Any) -> None:
        t, fits = next(tensors(output)), True
        if not torch.compiler.is_compiling():
            # The isolation check, the frozen base and one particle's view do not count.
            state = forward_state.current()
            particles = self.model.num_particles
            if state is None or state.owner is not self.model or state.particles != particles:
                return
            fits = state.rows is None or t.shape[:1] == (state.rows,)
            fits = fits and not (state.shared_batch is not None and is_shared(module))
        self._seen[name] = t, fits

    def __call__(self) -> list[Tensor]:
        """[z (k, B, D)] of the particles that ran in the model's last forward.

        Raises:
            ValueError: a module did not run, its output has no tokens for every particle's rows, or
                the modules have other widths.
        """
        shallow, deep = (self._tokens(name) for name in self.names)
        if shallow.shape[-1] != deep.shape[-1]:
            raise ValueError(
                "features need two modules of one width; got "
                + " and ".join(
                    f"{name!r} with {t.shape[-1]}" for name, t in zip(self.names, (shallow, deep))
                )
            )
        z = F.scaled_dot_product_attention(deep, shallow, shallow).mean(1)
        return [z.unflatten(0, (self.model.num_particles, -1))]

    def _tokens(self, name: str) -> Tensor:
        """(k·B, T, D) of a module's output: tokens (k·B, T, D) or a map (k·B, D, height, width)."""
        if name not in self._seen:
            raise ValueError(
                f"features: the module {name!r} did not run in the closure's forward; if the model "
                "is compiled, make the method before its first forward"
            )
        t, fits = self._seen[name]
        particles, shape = self.model.num_particles, tuple(t.shape)
        if t.ndim < 3:
            raise ValueError(
                f"features: {name!r} must give tokens (rows, T, D) or a map (rows, D, height, "
                f"width); got {shape}"
            )
        if not fits:
            raise ValueError(
                f"features: {name!r} gives {shape}, which has not a row for each example of the "
                f"{particles} particles, particle first; below the cut of a shared trunk they have "
                "the same rows: choose modules above it"
            )
        return t if t.ndim == 3 else t.flatten(2).mT


def checked_names(features: Any, beta: float) -> str | tuple[str, str] | None:
    """Return "auto", None or two names. Raises ValueError for anything else."""
    if beta > 0 and features is None:
        raise ValueError(f"features=None needs beta=0; got beta={beta!r}")
    if features is None or (isinstance(features, str) and features == "auto"):
        return features
    pair = isinstance(features, (tuple, list)) and len(features) == 2
    if not pair or not all(isinstance(name, str) and name for name in features):
        raise ValueError(f'features must be "auto", None or two modules\' names; got {features!r}')
    return (features[0], features[1])


def _middle_and_last(base: nn.Module) -> tuple[str, str]:
    adapted = [name for name, _ in lora_layers(base)]
    most: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            prefix = f"{name}." if name else ""
            blocks = [prefix + child for child, _ in module.named_children()]
            blocks = [b for b in blocks if any(f"{a}.".startswith(f"{b}.") for a in adapted)]
            most = max(most, blocks, key=len)
    if len(most) < 2:
        raise ValueError(
            'features="auto" needs an nn.ModuleList or nn.Sequential with at least two blocks that '
            f"hold adapted layers, and {type(base).__name__} has none: give two modules' names"
        )
    return most[(len(most) - 1) // 2], most[-1]
