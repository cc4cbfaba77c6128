"""How operators are registered in torch's dispatcher, and how they are called."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from multilora.ops import dispatch

# The operators die with this object, so the module keeps it.
_lib = torch.library.Library("multilora", "DEF")

#: Types of arguments that cannot intercept an operator, as subclasses of Tensor may.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_OTHERS = frozenset({float, int, bool, str, list, type(None)})


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on this kind of device now, or None."""
    # meta tensors have no autocast, and asking about it raises.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


class Operator:
    """`multilora::name`, to be called with all of its arguments, by position.

    In plain eager mode the backend's function is called directly, with an autograd.Function around
    it where somebody asks for gradients: torch's dispatcher takes longer over an operator that is
    defined in Python than a small one takes to compute. The compiler, tracers, dispatch modes,
    functorch, tensor subclasses and meta tensors get `overload`, the operator itself.
    """

    def __init__(self, overload: Any, function: Callable[..., Any]):
        self.overload = overload
        self._function = function
        self._with_gradient: Callable[..., Any] | None = None
        self._has_lists = any(str(a.type) == "List[Tensor]" for a in overload._schema.arguments)

    def __call__(self, *args):
        # Few calls: a small layer takes little more time than they do.
        if torch.compiler.is_compiling() or (
            # A dispatch mode, functorch or a tracer has to see every operator.
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
        ):
            return self.overload(*args)
        flat = _flat(args) if self._has_lists else args
        wanted = False
        for arg in flat:
            kind = type(arg)
            if kind in _TENSORS:
                wanted = wanted or arg.requires_grad
            elif kind not in _OTHERS:
                return self.overload(*args)
        if flat[0].is_meta:
            return self.overload(*args)
        if wanted and torch.is_grad_enabled():
            # An operator without a gradient has an overload that refuses to be differentiated.
            return (self._with_gradient or self.overload)(*args)
        return self._function(*args)

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Give the operator its gradient; `backward` calls operators only, so that it compiles."""

        def save(ctx, inputs, output):
            ctx.request = dispatch.requested()
            setup_context(ctx, inputs, output)

        run = on_kept_backend(backward)
        torch.library.register_autograd(self.overload, run, setup_context=save, lib=_lib)
        differentiable = _differentiable_by_lists if self._has_lists else _differentiable
        self._with_gradient = differentiable(self._function, run, save)

    def refuse_gradient(self) -> None:
        """Make differentiating through it (a backward) an error instead of a silent zero."""

        def refuse(ctx, *_):
            raise NotImplementedError(f"second derivatives of {self.overload} are not implemented")

        torch.library.register_autograd(self.overload, refuse, lib=_lib)


def define(
    schema: str,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
    compute: Callable[..., Any] | None = None,
    function: Callable[..., Any] | None = None,
) -> Operator:
    """Register the operator `multilora::<schema>`.

    One CompositeExplicitAutograd kernel serves every device: it asks `dispatch` for a backend.

    Args:
        fake: gives shapes, dtypes and strides to the compiler.
        compute: makes the operator of a backend's functions, `compute(backend, *args)`; by default
            it is the backend's function of the operator's name.
        function: replaces all of this where the operator is made of other operators.
    """
    name = schema.split("(", 1)[0]
    if function is None:
        compute = _computations[name] = compute or _by_name(name)
        dispatch.OPERATORS.append(name)

        def function(*args):
            backend = dispatch.module_of(name, args)
            if not torch._C._is_any_autocast_enabled():
                return compute(backend, *args)
            # The public function has chosen the dtypes; autocast must not touch the inside.
            with torch.autocast(dispatch.first_tensor(args).device.type, enabled=False):
                return compute(backend, *args)

    _lib.define(schema, tags=tags)
    torch.library.impl(f"multilora::{name}", "CompositeExplicitAutograd", function, lib=_lib)
    torch.library.register_fake(f"multilora::{name}", fake, lib=_lib)
    return Operator(getattr(torch.ops.multilora, name).default, function)


#: How each operator is made of a backend's functions.
_computations: dict[str, Callable[..., Any]] = {}


def _by_name(name: str) -> Callable[..., Any]:
    return lambda backend, *args: getattr(backend, name)(*args)


def compute_on(backend: Any, name: str, *args: Any) -> Any:
    """The operator `name` of these arguments, by the functions of this backend's module."""
    return _computations[name](backend, *args)


def _differentiable(
    function: Callable[..., Any], run: Callable[..., Any], save: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` with the gradient `run` of register_autograd, as an autograd.Function."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = function(*args)
            save(ctx, args, output)
            return output

        backward = staticmethod(run)

    return Direct.apply


def _differentiable_by_lists(
    function: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., Any]
) -> Callable[..., Any]:
    """The same where arguments, and their gradients, are lists of tensors, which are passed to
    autograd one by one: it only sees tensors that are arguments themselves."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lengths, *flat):
            rest = iter(flat)
            args = [next(rest) if n is None else list(itertools.islice(rest, n)) for n in lengths]
            output = function(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *_flat(backward(ctx, *grads))

    def call(*args):
        lengths = [len(arg) if _is_tensors(arg) else None for arg in args]
        return Direct.apply(lengths, *_flat(args))

    return call


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments, with lists of tensors replaced by their tensors."""
    return [one for arg in args for one in (arg if _is_tensors(arg) else [arg])]


def _is_tensors(arg: Any) -> bool:
    return type(arg) is list and bool(arg) and isinstance(arg[0], Tensor)


def on_kept_backend(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` under ctx.request, the request of its forward: it may run on autograd's own
    thread, and later."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        if dispatch.is_requested(ctx.request):
            return backward(ctx, *grads)
        with dispatch.as_requested(ctx.request):
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
