"""What is in a module, faster than `modules()`, which opens a generator for every module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """The modules of `root.modules()`, in its order."""
    seen: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen[module] = None
            waiting += reversed(module._modules.values())
    return list(seen)


def trainable(root: nn.Module) -> list[nn.Parameter]:
    """What `root.parameters()` has that requires gradients, in its order."""
    found = {}
    for module in modules_of(root):
        for p in module._parameters.values():
            if p is not None and p.requires_grad:
                found[id(p)] = p
    return list(found.values())


@contextlib.contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode."""
    modules, mode = modules_of(root), root.training
    training = [m for m in modules if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        before = set(modules)
        for module in modules_of(root):
            if module not in before:  # made inside, as BigBird exchanges its attention
                module.training = mode
