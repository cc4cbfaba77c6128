"""The operators' home in torch's dispatcher: one library, one way to register."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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

    def save(ctx, inputs, output):
        keep_backend(ctx)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(op, on_kept_backend(backward), setup_context=save, lib=_lib)


def keep_backend(ctx: Any) -> None:
    """Note what backend the forward was asked to run on."""
    ctx.backend = dispatch.requested()


def on_kept_backend(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` on the backend of its forward: it may run on autograd's own thread, and later."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        with dispatch.as_requested(ctx.backend):
            return backward(ctx, *grads)

    return run


class FrozenTensorError(ValueError):
    """A tensor that gets no gradient requires one."""


def refuse_forward_mode(name: str, *tensors: Any) -> None:
    """Raise NotImplementedError where a tensor carries a tangent, which operators would drop."""
    # torch.func.jvp and linearize open a level too; outside of all of them this is the only cost.
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, "
                f"torch.autograd.forward_ad): use reverse mode (backward, torch.autograd.grad); "
                f"got a tangent for a tensor {tuple(t.shape)}"
            )


def refuse_gradient(op: Any):
    """Make differentiating through `op` (a backward) an error instead of a silent zero."""

    def refuse(ctx, *_):
        raise NotImplementedError(f"second derivatives of {op} are not implemented")

    torch.library.register_autograd(op, refuse, lib=_lib)
