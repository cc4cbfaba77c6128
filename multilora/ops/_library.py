"""The operators' home in torch's dispatcher: one library, one way to register."""

from collections.abc import Callable
from typing import Any

import torch

from multilora.ops import dispatch

# The operators die with this object, so the module keeps it.
_lib = torch.library.Library("multilora", "DEF")


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on this kind of device now, or None."""
    # meta tensors have no autocast, and asking about it raises.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def define(
    schema: str,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
    function: Callable[..., Any] | None = None,
) -> Any:
    """Register the operator `multilora::<schema>` and return its overload.

    One CompositeExplicitAutograd kernel serves every device: it asks `dispatch` for the
    backend's function of the same name, or is `function`, where the operator is made of others.
    `fake` gives shapes, dtypes and strides to the compiler.
    """
    name = schema.split("(", 1)[0]

    def route(*args):
        kernel = dispatch.kernel(name, args)
        device = dispatch.first_tensor(args).device.type
        if autocast_dtype(device) is None:
            return kernel(*args)
        # The public function has chosen the dtypes; autocast must not touch the inside.
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    _lib.define(schema, tags=tags)
    torch.library.impl(
        f"multilora::{name}", "CompositeExplicitAutograd", function or route, lib=_lib
    )
    torch.library.register_fake(f"multilora::{name}", fake, lib=_lib)
    return getattr(torch.ops.multilora, name).default


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]):
    """Give `op` its gradient; `backward` calls operators only, so that it can be compiled."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_lib)


def refuse_gradient(op: Any):
    """Make differentiating through `op` (a backward) an error instead of a silent zero."""

    def refuse(ctx, *_):
        raise NotImplementedError(f"second derivatives of {op} are not implemented")

    torch.library.register_autograd(op, refuse, lib=_lib)
