"""Layers that hold K particles: stacked adapters over one frozen layer, and stacked heads.

Inside a particle model the particles ride on the batch axis, particle first: a layer sees
(K·B, ...) and reads it as (K, B, ...).
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from multilora import forward_state
from multilora.forward_state import ForwardState
from multilora.gradients import note_without, without_gradient
from multilora.ops import grouped_linear, lora_add, lora_linear


class ParticleLayer(nn.Module):
    """A layer that holds tensors of K particles."""

    @property
    def num_particles(self) -> int:
        """K; inside `ParticleModel.particles`, the number of those particles."""
        raise NotImplementedError

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name in it, tensor) for everything with a particle axis."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield self, name, parameter

    def part(self, name: str, stacked: Tensor, particle: int) -> Tensor | None:
        """One particle's numbers in a tensor (K, ...) of `stacked()`, without padding.

        None where the particle has no adapter on this layer, or does not train this module.
        """
        return stacked[particle]

    @contextlib.contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        """Inside, what the layer knows of each particle is of start … stop − 1 alone."""
        yield

    def enter(self) -> ForwardState | None:
        """Record that this layer runs, and return the state of the forward that it runs in.

        Returns:
            The state; None under torch.compile, in a backward, and for one particle alone.

        Raises:
            RuntimeError: several particles run outside of a forward, where each row would go to one
                of them.
        """
        if torch.compiler.is_compiling():
            return None
        state = forward_state.current()
        if state is not None:
            state.ran.add(self)
        elif self.num_particles > 1 and not forward_state.in_backward():
            raise RuntimeError(
                "a layer of several particles runs outside of model(...), where every row would go "
                "to one of them: use model.call(name, ...) for another method of the base, "
                "model.particle(k) for one particle, or `with model.base_only():` for none"
            )
        return state

    def require_rows(self, x: Tensor, state: ForwardState | None, particles: int) -> None:
        """Raise ValueError where the leading axis of x cannot be particles × batch.

        A length can fit by accident; the isolation check finds that.
        """
        unit = particles if state is None or state.rows is None else state.rows
        if state is not None and particles != state.particles:
            raise RuntimeError("another thread chose other particles in the middle of a forward")
        if x.shape[0] % max(unit, 1):
            raise ValueError(
                f"a particle layer needs an input whose leading axis is particles × batch, "
                f"a multiple of {unit} (K = {particles}); got {tuple(x.shape)}. Where layers put "
                'another axis first, use fold="loop".'
            )


def row_ends(n: int, state: ForwardState | None, particles: int) -> list[int]:
    """Where each particle's part of n leading rows ends (k,): equal parts, or those of the state.

    The n rows are m for each row of the batch, m >= 1, such as the windows of an image.
    """
    if state is None or state.counts is None:
        return [n // particles * (k + 1) for k in range(particles)]
    each = n // max(state.rows or 0, 1)
    return [end * each for end in itertools.accumulate(state.counts)]


def is_same_for_all(x: Tensor, state: ForwardState | None) -> bool:
    """Whether x is (1, ...), such as relative positions: one row for all particles' examples."""
    return state is not None and state.rows is not None and x.shape[0] == 1 != state.rows


class _ForEveryExample(Tensor):
    """Rows for all particles' examples, which a layer made from one row that all share.

    A model that knows of the one row repeats it for its batch, as DeBERTa does with relative
    positions. The rows are repeated already, so `repeat` leaves this axis alone. Reshaping and
    swapping axes keep the leading axis, and with it this type; any other result is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            rows, name = args[0] if args else None, getattr(function, "__name__", "")
            if name == "repeat" and isinstance(rows, cls):
                counts = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
                state = forward_state.current()
                if state is not None and counts[0] == state.rows:
                    return rows.as_subclass(Tensor).repeat(1, *counts[1:])
            result = function(*args, **(kwargs or {}))
            if name in _KEEP_ROWS and isinstance(result, Tensor):
                return result.as_subclass(cls)
            return _plain(result)


_KEEP_ROWS = {"view", "reshape", "permute", "transpose", "contiguous", "to"}


def _plain(result: Any) -> Any:
    return result.as_subclass(Tensor) if isinstance(result, _ForEveryExample) else result


def own(parameter: Tensor, state: ForwardState | None) -> Tensor:
    """The tensor (k, ...) of the particles that run."""
    return parameter if state is None or state.part is None else state.part(parameter)


#: Dropout before the adapters, see `dropped`.
Rates = Tensor | float | None


class Adapted(NamedTuple):
    """What one particle has on a layer; rank 0 where it has no adapter there."""

    rank: int
    scaling: float
    dropout: float


class LoraLayer(ParticleLayer):
    """K adapters on one frozen layer; the factors are stored flat, whatever the layer is.

    lora_A (K, r, d_in), lora_B (K, d_out, r); for a convolution d_in = channels · kernel area.

    Where the particles differ, r is the largest rank. The rest of a smaller factor is padding: it
    is zero, has no gradient, and no effect even if an optimizer moves it.

    Args:
        rank: r.
        scaling, dropout: those of all particles.
        each: K of them where the particles differ, with ranks up to r.
    """

    # Any module with the attributes that a kind of layer needs: weight, bias, sizes.
    base_layer: Any
    #: Whether dropout is on in eval mode too, as `mc_dropout` has it.
    sampling = False
    #: Axes between the particles' and the factors' own: (E,) where the layer has E matrices.
    groups: tuple[int, ...] = ()

    # What every particle is multiplied with, (K, 1, r) with zeros for padding, and its dropout,
    # (K, 1, 1); None where all particles are alike.
    scales: Tensor | None
    rates: Tensor | None

    def __init__(
        self,
        base_layer: Any,
        num_particles: int,
        rank: int,
        scaling: float,
        dropout: float,
        each: Sequence[Adapted] | None = None,
    ):
        super().__init__()
        d_out, d_in = self.weight_shape(base_layer)
        factory = self.masters(base_layer)
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.empty(num_particles, *self.groups, rank, d_in, **factory))
        self.lora_B = nn.Parameter(torch.zeros(num_particles, *self.groups, d_out, rank, **factory))
        self.set_each(each or (Adapted(rank, scaling, dropout),) * num_particles)

    def set_each(self, each: Sequence[Adapted]) -> None:
        """Say what every particle has here; the factors stay as they are."""
        self.rank, first = self.lora_A.shape[-2], each[0]
        self.register_buffer("scales", None, persistent=False)
        self.register_buffer("rates", None, persistent=False)
        self._clean = -1
        if first.rank == self.rank and all(a == first for a in each):
            #: What each particle has; None where all have the same.
            self.each: tuple[Adapted, ...] | None = None
            self.scaling, self.dropout = first.scaling, first.dropout
            return
        # The scales are in B when it is used.
        self.each, self.scaling = tuple(each), 1.0
        self.dropout = max(a.dropout for a in each)
        ones = [1] * (self.lora_B.ndim - 2)
        self.scales = self.lora_A.new_zeros(len(each), *ones, self.rank).detach()
        for k, a in enumerate(each):
            self.scales[k, ..., : a.rank] = a.scaling
        rates = [a.dropout for a in each]
        self.rates = self.lora_A.new_tensor(rates).view(-1, 1, 1)

    def adapted_by(self, particle: int) -> Adapted:
        """What one particle has on this layer."""
        if self.each is not None:
            return self.each[particle]
        return Adapted(self.rank, self.scaling, self.dropout)

    @property
    def num_particles(self) -> int:
        return self.lora_A.shape[0]

    @property
    def drops(self) -> bool:
        """Whether dropout before the adapters is on."""
        return (self.training or self.sampling) and self.dropout > 0

    def part(self, name: str, stacked: Tensor, particle: int) -> Tensor | None:
        rank = self.adapted_by(particle).rank
        if not rank:
            return None
        if self.each is None:
            return stacked[particle]
        if name == "lora_A":
            return stacked[particle, ..., :rank, :]
        return stacked[particle, ..., :rank]

    @contextlib.contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        if self.each is None:
            yield
            return
        assert self.scales is not None and self.rates is not None
        before = self.each, self.scales, self.rates
        self.each = self.each[start:stop]
        self.scales, self.rates = self.scales[start:stop], self.rates[start:stop]
        try:
            yield
        finally:
            self.each, self.scales, self.rates = before

    def factors(self, state: ForwardState | None) -> tuple[Tensor, Tensor]:
        """A and B of the particles that run, with ΔW = scaling · B A."""
        if self.scales is None:
            return own(self.lora_A, state), own(self.lora_B, state)
        if not torch.compiler.is_compiling():
            self.clear_padding()
        return own(self.lora_A, state), own(self.lora_B, state) * own(self.scales, state)

    def clear_padding(self) -> None:
        """Set the padding to zero, if an optimizer that adds noise, say, has moved it."""
        version = self.lora_A._version + self.lora_B._version
        if self.each is None or self._clean == version or len(self.each) != self.num_particles:
            return
        with torch.no_grad():
            for k, a in enumerate(self.each):
                self.lora_A[k, ..., a.rank :, :] = 0
                self.lora_B[k, ..., a.rank :] = 0
        self._clean = self.lora_A._version + self.lora_B._version

    @staticmethod
    def weight_shape(base_layer: Any) -> tuple[int, int]:
        """(d_out, d_in) of the layer's weight as a matrix."""
        raise NotImplementedError

    @staticmethod
    def masters(base_layer: Any) -> dict[str, Any]:
        """The factors' dtype and device: float32 for half-precision layers, as in PEFT."""
        weight = base_layer.weight
        return {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }

    def __getattr__(self, name: str) -> Any:
        """A model that reads the layer's weight or sizes gets those of the frozen layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self.plain_layer, name)

    @property
    def plain_layer(self) -> Any:
        """The frozen layer without any adapters."""
        return self._modules["base_layer"]

    def forward(self, x: Tensor) -> Tensor:
        state = self.enter()
        if state is not None and state.frozen:
            return self.base_layer(x)
        lora_A, lora_B = self.factors(state)
        rows = None if state is None else state.rows
        if state is None or rows is None or not is_same_for_all(x, state):
            self.require_rows(x, state, len(lora_A))
            rates = self._rates(state, x)
            if state is not None and state.counts is not None:
                ends = row_ends(len(x), state, len(lora_A))
                return self.adapted_rows(x, lora_A, lora_B, rates, ends)
            return self.adapted(x, lora_A, lora_B, rates)
        # Compute it once for every particle, and repeat the result for each of its examples.
        x = x.repeat_interleave(len(lora_A), 0)
        y = self.adapted(x, lora_A, lora_B, self._rates(state, x))
        counts: Any = rows // len(lora_A)
        if state.counts is not None:
            counts = torch.tensor(state.counts, device=y.device)
        return y.repeat_interleave(counts, 0).as_subclass(_ForEveryExample)

    def _rates(self, state: ForwardState | None, x: Tensor) -> Rates:
        """The dropout before the adapters, as `dropped` takes it."""
        if not self.drops:
            return None
        return self.dropout if self.rates is None else own(self.rates, state).to(x.dtype)

    def adapted(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, rates: Rates) -> Tensor:
        """The layer of x (k·B, ...) with the factors of k particles.

        rates: see `dropped`.
        """
        raise NotImplementedError

    def adapted_rows(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rates: Rates,
        ends: list[int],
    ) -> Tensor:
        """The layer of x (N, ...) where particle k has the rows up to ends[k]."""
        y = self.frozen(x)
        delta = self.delta_of_rows(x, lora_A, lora_B, rates, ends)
        return y + delta.to(y.dtype)

    def frozen(self, x: Tensor) -> Any:
        """The frozen layer of x."""
        return self.base_layer(x)

    def delta_of_rows(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rates: Rates,
        ends: list[int],
    ) -> Tensor:
        """What the adapters add in `adapted_rows`: scaling · B A x of a linear."""
        each = x.shape[1:-1].numel()
        rows, counts = x.reshape(-1, x.shape[-1]), [end * each for end in ends]
        at = torch.tensor(counts, dtype=torch.int32, device=x.device)
        if isinstance(rates, Tensor):
            sizes = torch.tensor(ends, device=x.device).diff(prepend=at.new_zeros(1)) * each
            rates = rates.view(-1).repeat_interleave(sizes)[:, None]
        rows = dropped(rows, rates)
        shrunk = grouped_linear(rows, lora_A, at)
        delta = grouped_linear(shrunk, lora_B * self.scaling, at)
        return delta.view(*x.shape[:-1], -1)

    def matrices_of(self, name: str) -> Iterator[tuple[str, int | None]]:
        """A name for each matrix that the layer adapts, made of the layer's own, and its place
        behind the particles' axis of the factors; None where it is the only one."""
        yield name, None

    def reset_particle(self, particle: int, generator: torch.Generator, init: bool | str) -> None:
        """A from Kaiming's uniform (init True) or N(0, 1/r²) ("gaussian"), B zero."""
        rank = self.adapted_by(particle).rank
        with torch.no_grad():
            self.lora_A[particle] = 0
            self.lora_B[particle] = 0
            if not rank:
                return
            # As PEFT draws it: where there are several matrices, as one of all their rows.
            place = self.lora_A[particle, ..., :rank, :]
            fresh = torch.empty(math.prod(place.shape[:-1]), place.shape[-1])
            if init == "gaussian":
                nn.init.normal_(fresh, std=1 / rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            place.copy_(fresh.view(place.shape))

    def extra_repr(self) -> str:
        if self.each is None:
            return f"particles={self.num_particles}, rank={self.rank}, scaling={self.scaling:g}"
        ranks = [a.rank for a in self.each]
        return f"particles={self.num_particles}, ranks={ranks}"


class LoraLinear(LoraLayer):
    """K adapters on nn.Linear, or on transformers' Conv1D, whose weight is (d_in, d_out)."""

    @staticmethod
    def weight_shape(base_layer: Any) -> tuple[int, int]:
        d_out, d_in = _linear_weight(base_layer).shape
        return d_out, d_in

    def adapted(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, rates: Rates) -> Tensor:
        base = self.base_layer
        weight, bias = _linear_weight(base), base.bias
        rows = flat(x, len(lora_A))
        if rates is not None:
            # The mask lies before A only, so the two products read different inputs.
            delta = _low_rank(dropped(rows, rates), lora_A, lora_B, self.scaling)
            y = F.linear(rows, weight, bias)
            y = y + delta.to(y.dtype)
        else:
            y = lora_linear(rows, weight, lora_A, lora_B, bias, self.scaling)
        return y.view(*x.shape[:-1], y.shape[-1])


class LoraOpaqueLinear(LoraLayer):
    """K adapters on a linear that only its own forward computes: see `has_own_forward`.

    The base layer is called once, with the rows of all particles. The low-rank part is added to its
    output, which keeps its dtype.
    """

    @staticmethod
    def weight_shape(base_layer: Any) -> tuple[int, int]:
        # The weight may be packed, or a shard.
        d_in, d_out = linear_sizes(base_layer)
        return d_out, d_in

    @staticmethod
    def masters(base_layer: Any) -> dict[str, Any]:
        tensors = list(_tensors_of(base_layer))
        double = any(t.dtype == torch.float64 for t in tensors)
        return {
            "dtype": torch.float64 if double else torch.float32,
            "device": tensors[0].device,
        }

    def adapted(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, rates: Rates) -> Tensor:
        y = self.frozen(x)
        rows = dropped(flat(x, len(lora_A)), rates)
        if not torch.compiler.is_compiling() and self._is_held(x, y):
            y = y.clone()
        return lora_add(y, rows, lora_A, lora_B, self.scaling)

    def frozen(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        self._check_output(x, y)
        return y

    def _check_output(self, x: Tensor, y: Any) -> None:
        name, expected = type(self.base_layer).__name__, (*x.shape[:-1], self.lora_B.shape[1])
        if not isinstance(y, Tensor) or is_traceable_wrapper_subclass(y):
            raise TypeError(f"the base layer {name} must return a plain tensor; got {type(y)}")
        if y.shape != expected:
            raise ValueError(
                f"the base layer {name} must return {expected} for its input {tuple(x.shape)}; got "
                f"{tuple(y.shape)}. A layer that computes a shard of its features must gather them."
            )
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"the base layer {name} gives no gradient to its input, which the layers before it "
                "need: it cannot be differentiated"
            )

    def _is_held(self, x: Tensor, y: Tensor) -> bool:
        """Whether something else may read y's memory: x, a tensor of the layer, or a hook."""
        base = self.base_layer
        memory = y.untyped_storage().data_ptr()
        return bool(base._forward_hooks) or any(
            type(t) in (Tensor, nn.Parameter) and t.untyped_storage().data_ptr() == memory
            for t in (x, *_tensors_of(base), *vars(base).values())
        )


class LoraConv2d(LoraLayer):
    """K adapters on nn.Conv2d as in PEFT: A is a convolution to r channels, B a 1×1 convolution.

    The adapters of all particles run as one grouped convolution.
    """

    @staticmethod
    def weight_shape(base_layer: Any) -> tuple[int, int]:
        return base_layer.weight.shape[0], base_layer.weight[0].numel()

    def adapted(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, rates: Rates) -> Tensor:
        y = self.base_layer(x)
        rows = split(x, len(lora_A))  # (k, B, C, H, W)
        delta = self._delta(dropped(rows, _beside(rates, rows)), lora_A, lora_B)
        return y + delta.to(y.dtype)

    def delta_of_rows(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rates: Rates,
        ends: list[int],
    ) -> Tensor:
        parts, starts = [], [0, *ends[:-1]]
        for k, (start, end) in enumerate(zip(starts, ends)):
            own_rate = rates[k] if isinstance(rates, Tensor) else rates
            rows = x[start:end][None]
            rows = dropped(rows, _beside(own_rate, rows))
            parts.append(self._delta(rows, lora_A[k : k + 1], lora_B[k : k + 1]))
        return torch.cat(parts)

    def _delta(self, rows: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """What the adapters add for rows (k, B, C, H, W) -> (k·B, d_out, H', W')."""
        base, particles = self.base_layer, len(lora_A)
        rows = rows.transpose(0, 1).flatten(1, 2)  # (B, k·C, H, W)
        lora_A = lora_A.reshape(-1, *base.weight.shape[1:])  # (k·r, C, kh, kw)
        lora_B = lora_B.flatten(0, 1)[..., None, None]  # (k·d_out, r, 1, 1)
        shrunk = F.conv2d(
            rows, lora_A.to(rows.dtype), None, base.stride, base.padding, groups=particles
        )
        delta = F.conv2d(shrunk, lora_B.to(shrunk.dtype), groups=particles)
        return self.scaling * delta.unflatten(1, (particles, -1)).transpose(0, 1).flatten(0, 1)


class StackedModule(ParticleLayer):
    """K copies of a module, a head or a whole model, with stacked parameters (K, ...).

    nn.Linear runs as one batched product and nn.Embedding as one look-up. Any other module runs
    under torch.func.vmap, or as it is for one particle. The particles share the buffers.

    Args:
        module: what the particles start from.
        num_particles: K.
        trained: which particles have a copy, (K,); the others run the module itself. None: all.
        widths: out_features of every particle, of an nn.Linear. The output has those of the widest;
            the rest of a narrower one is zero.
    """

    # 1 for a particle that has a copy, (K,); None where all have one.
    copied: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        num_particles: int,
        trained: Sequence[bool] | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        original, module = module, module if widths is None else widened(module, max(widths))
        # The structure without storage, to be run with other tensors. It is not registered as a
        # module, so state_dict leaves it out. Tied parameters stay one, which `to` would part.
        parameters = dict(module.named_parameters())
        empty: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta")) for p in parameters.values()
        }
        self.__dict__["template"] = copy.deepcopy(module, empty).to("meta")
        stacks: dict[int, Any] = {}
        for i, (parameter, before) in enumerate(zip(parameters.values(), original.parameters())):
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            stacked = parameter.detach().to(dtype).expand(num_particles, *parameter.shape)
            stacks[id(parameter)] = nn.Parameter(stacked.clone())
            # Kept beside the float32 masters for the frozen base, and for its dtype.
            self.register_buffer(f"original_{i}", before.detach(), persistent=False)
        self.module = copy.deepcopy(module, stacks)
        self.register_buffer("copied", None, persistent=False)
        self.set_each(trained, widths)

    def set_each(self, trained: Sequence[bool] | None, widths: Sequence[int] | None) -> None:
        """Say which particles have a copy, and of which width; the copies stay as they are."""
        trained = None if trained is None or all(trained) else trained
        self.trained = None if trained is None else tuple(trained)
        self.widths = None if widths is None else tuple(widths)
        copied = None if trained is None else self.original_0.new_tensor(trained, dtype=torch.uint8)
        self.copied = copied

    def is_trained(self, particle: int) -> bool:
        """Whether this particle has a copy."""
        return self.trained is None or self.trained[particle]

    def part(self, name: str, stacked: Tensor, particle: int) -> Tensor | None:
        if not self.is_trained(particle):
            return None
        one = stacked[particle]
        return one if self.widths is None else one[: self.widths[particle]]

    @contextlib.contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        before = self.trained, self.widths, self.copied
        cut = slice(start, stop)
        self.trained = None if self.trained is None else self.trained[cut]
        self.widths = None if self.widths is None else self.widths[cut]
        self.copied = None if self.copied is None else self.copied[cut]
        try:
            yield
        finally:
            self.trained, self.widths, self.copied = before

    def _parameters_of(self, state: ForwardState | None) -> dict[str, Tensor]:
        """The parameters (k, ...) of the particles that run."""
        found = {n: own(p, state) for n, p in self.module.named_parameters()}
        if self.copied is None:
            return found
        copied, originals = own(self.copied, state), self.originals_by_name()
        for name, p in found.items():
            has_copy = copied.view(-1, *[1] * (p.ndim - 1)) > 0
            found[name] = torch.where(has_copy, p, _padded(originals[name], p[0]).to(p))
        return found

    @property
    def num_particles(self) -> int:
        return next(self.module.parameters()).shape[0]

    def __getattr__(self, name: str) -> Any:
        """A model that reads the module gets the original's sizes and the particle's parameters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "module" not in self._modules:
                raise
            value = getattr(self.__dict__["template"], name)
        if not isinstance(value, Tensor):
            return value
        state = forward_state.current()
        stacked = getattr(self.module, name)
        if state is None or not isinstance(stacked, nn.Parameter):
            raise AttributeError(f"{name!r} of a module to save: every particle has its own")
        if state.frozen:
            return self.originals_by_name()[name]
        if state.particles > 1:
            raise NotImplementedError(
                f"the model reads {name!r} of a module to save instead of calling it, and each of "
                f'the {state.particles} particles that run has its own: use fold="loop"'
            )
        state.ran.add(self)
        return own(stacked, state)[0]

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter

    def reset_particle(
        self, particle: int, generator: torch.Generator, within: str | None = None
    ) -> None:
        """Redraw this particle's matrices, keeping the standard deviation of each.

        within: the submodule whose matrices are redrawn, in place of all.
        """
        with torch.no_grad():
            for name, stacked in self.module.named_parameters():
                if stacked.ndim < 3 or not (within is None or name.startswith(f"{within}.")):
                    continue
                one = self.part(name, stacked, particle)
                if one is None:
                    continue
                std = one.std().item()
                if not std > 0:
                    std = 1 / math.sqrt(3 * one[0].numel())
                fresh = torch.empty(one.shape)
                one.copy_(nn.init.normal_(fresh, std=std, generator=generator))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.enter()
        self.template.train(self.training)
        if state is not None and state.frozen:
            return self._run(self.originals_by_name(), args, kwargs)
        parameters = self._parameters_of(state)
        if state is not None and state.counts is not None:
            return self._rows(args, kwargs, state, parameters)
        if len(args) == 1 and not kwargs and not is_same_for_all(args[0], state):
            if type(self.template) is nn.Linear:
                return self._linear(args[0], state, **parameters)
            if type(self.template) is nn.Embedding:
                return self._embedding(args[0], state, **parameters)
        floating = [t.dtype for t in _tensors_in((args, kwargs)) if t.is_floating_point()]
        dtype = floating[0] if floating else self.original_0.dtype
        parameters = {name: p.to(dtype) for name, p in parameters.items()}
        if len(next(iter(parameters.values()))) == 1:
            return self._run({name: p[0] for name, p in parameters.items()}, args, kwargs)
        return self._run_mapped(parameters, args, kwargs, state)

    def _rows(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        state: ForwardState,
        parameters: dict[str, Tensor],
    ) -> Any:
        """The module where the particles have unequal numbers of rows: one after another."""
        leaves, structure = tree_flatten((args, kwargs))
        dtype = next((t.dtype for t in _tensors_in(leaves) if t.is_floating_point()), None)
        dtype = self.original_0.dtype if dtype is None else dtype
        assert state.rows is not None and state.counts is not None
        outputs = []
        for k in range(len(state.counts)):
            mine = []
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.ndim and not is_same_for_all(leaf, state):
                    self.require_rows(leaf, state, len(state.counts))
                    ends = [0, *row_ends(len(leaf), state, len(state.counts))]
                    leaf = leaf[ends[k] : ends[k + 1]]
                mine.append(leaf)
            one = {name: p[k].to(dtype) for name, p in parameters.items()}
            outputs.append(self._run(one, *tree_unflatten(mine, structure)))
        columns = zip(*(tree_flatten(output)[0] for output in outputs))
        joined = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return tree_unflatten(joined, tree_flatten(outputs[0])[1])

    def _run_mapped(
        self,
        parameters: dict[str, Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        state: ForwardState | None,
    ) -> Any:
        """The module for each of several particles, under vmap."""
        particles = len(next(iter(parameters.values())))
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.ndim > 0]
        shared = len(tensors) > 0 and all(is_same_for_all(t, state) for t in tensors)
        unit = particles if state is None or state.rows is None else state.rows
        mapped = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] % unit == 0 for t in leaves]
        rows = [t for t, is_mapped in zip(leaves, mapped) if is_mapped]
        for t in rows:
            self.require_rows(t, state, particles)
        if not rows and not shared:
            shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
            raise ValueError(f"a stacked module needs an input of particles × batch; got {shapes}")

        def one_particle(parameters: dict[str, Tensor], *rows: Tensor) -> Any:
            remaining = iter(rows)
            inputs = [next(remaining) if m else leaf for leaf, m in zip(leaves, mapped)]
            args, kwargs = tree_unflatten(inputs, structure)
            return self._run(parameters, args, kwargs)

        parts = [split(t, particles) for t in rows]
        outputs = torch.func.vmap(one_particle, randomness="different")(parameters, *parts)
        outputs = tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, outputs)
        if not shared:
            return outputs
        return tree_map(lambda t: t.repeat_interleave(unit // particles, 0), outputs)

    def _run(self, parameters: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module for one particle."""
        tensors = (parameters, dict(self.module.named_buffers()))
        return torch.func.functional_call(self.template, tensors, args, kwargs)

    def originals(self) -> dict[Tensor, Tensor]:
        """The tensor that each stacked parameter (K, ...) began as a copy of."""
        return {p: getattr(self, f"original_{i}") for i, p in enumerate(self.module.parameters())}

    def originals_by_name(self) -> dict[str, Tensor]:
        """The same, by the names of the module's parameters."""
        names = (name for name, _ in self.module.named_parameters())
        return {name: getattr(self, f"original_{i}") for i, name in enumerate(names)}

    def as_it_was(self) -> nn.Module:
        """The module before it was copied, over the same frozen tensors."""
        originals = self.originals_by_name()
        module: Any = copy.deepcopy(self.template)
        first: dict[int, nn.Parameter] = {}
        for name, p in list(module.named_parameters(remove_duplicate=False)):
            if id(p) not in first:
                first[id(p)] = nn.Parameter(originals[name], requires_grad=False)
            parent, _, own_name = name.rpartition(".")
            module.get_submodule(parent)._parameters[own_name] = first[id(p)]
        for name, t in self.module.named_buffers():
            parent, _, own_name = name.rpartition(".")
            module.get_submodule(parent)._buffers[own_name] = t
        if self.widths is not None:
            module.out_features = len(originals["weight"])
        return module.train(self.training)

    def widen(self, width: int) -> None:
        """Give an nn.Linear as many outputs, at least; those that come are zero."""
        if width <= self.template.out_features:
            return
        self.__dict__["template"] = widened(self.template, width)
        module: Any = self.module
        for name, p in list(module.named_parameters()):
            module._parameters[name] = grown(p, 1, width)
        module.out_features = width

    def _linear(
        self, x: Tensor, state: ForwardState | None, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        self.require_rows(x, state, len(weight))
        rows = flat(x, len(weight))
        weight = weight.to(x.dtype)
        if bias is None:
            y = torch.bmm(rows, weight.mT)
        else:
            y = torch.baddbmm(bias.to(x.dtype).unsqueeze(1), rows, weight.mT)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _embedding(self, ids: Tensor, state: ForwardState | None, weight: Tensor) -> Tensor:
        self.require_rows(ids, state, len(weight))
        rows = split(ids, len(weight))  # (k, B, *)
        weight = weight.to(self.original_0.dtype)  # (k, V, d)
        first = torch.arange(len(weight), device=ids.device) * weight.shape[1]
        first = first.view(-1, *[1] * (rows.ndim - 1))
        y = F.embedding(rows + first, weight.flatten(0, 1)).flatten(0, 1)
        if self.template.padding_idx is not None:
            # The padding row of each particle has no gradient.
            y = torch.where((ids == self.template.padding_idx).unsqueeze(-1), y.detach(), y)
        return y


def lora_layers(base: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers in module order, by their names in `base`."""
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def stacked_modules(base: nn.Module) -> Iterator[tuple[str, StackedModule]]:
    """The modules to save in module order, by their names in `base`."""
    for name, module in base.named_modules():
        if isinstance(module, StackedModule):
            yield name, module


def is_uniform(base: nn.Module) -> bool:
    """Whether all particles have adapters and copies of the same sizes, scalings and dropout."""
    return all(layer.each is None for _, layer in lora_layers(base)) and all(
        stacked.trained is None and stacked.widths is None for _, stacked in stacked_modules(base)
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module` is a linear that only its own forward computes.

    That is an nn.Linear with another forward, with hooks, or with a weight of a special tensor
    class (bitsandbytes, torchao, DTensor), or any module without children that has the sizes of a
    linear, in_features and out_features (GPTQ, AWQ).
    """
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if any(module.children()) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if isinstance(module, nn.Linear):
        # nn.MultiheadAttention reads the weight of this class and never calls the module.
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        return not (
            type(module).forward is nn.Linear.forward
            and "forward" not in vars(module)
            and type(getattr(module, "weight", None)) in (nn.Parameter, Tensor)
            and not any(vars(module)[hooks] for hooks in _HOOKS)
        )
    return True


def linear_sizes(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of any kind of linear."""
    return module.in_features, module.out_features


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def split(x: Tensor, particles: int) -> Tensor:
    """(k·B, ...) -> (k, B, ...)."""
    return x.view(particles, x.shape[0] // particles, *x.shape[1:])


def flat(x: Tensor, particles: int) -> Tensor:
    """(k·B, *, d) -> (k, T, d), with T the product of B and *, in one view to spare autograd."""
    length, *axes, d = x.shape
    return x.reshape(particles, length // particles * math.prod(axes), d)


def grown(p: nn.Parameter, axis: int, size: int) -> nn.Parameter:
    """A parameter with zeros behind the numbers of an axis; its gradient grows along."""

    def grow(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[axis] = size - shape[axis]
        return torch.cat([t, t.new_zeros(shape)], axis)

    larger = nn.Parameter(grow(p.detach()), p.requires_grad)
    if p.grad is not None:
        without = without_gradient(p.grad)
        larger.grad = grow(p.grad)
        note_without(larger.grad, without)
    return larger


def widened(linear: Any, width: int) -> nn.Linear:
    """An nn.Linear with more outputs, which are zero."""
    wide = nn.Linear(
        linear.in_features,
        width,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    with torch.no_grad():
        wide.weight.copy_(_padded(linear.weight, wide.weight))
        if linear.bias is not None:
            wide.bias.copy_(_padded(linear.bias, wide.bias))
    return wide.train(linear.training)


def _padded(t: Tensor, like: Tensor) -> Tensor:
    """t with zeros behind its leading axis, or cut there, to the length of `like`."""
    if len(t) >= len(like):
        return t[: len(like)]
    return torch.cat([t, t.new_zeros(len(like) - len(t), *t.shape[1:])])


def dropped(rows: Tensor, rates: Rates) -> Tensor:
    """Dropout at one rate, or at rates that fit rows; None is no dropout."""
    if rates is None:
        return rows
    if not isinstance(rates, Tensor):
        return F.dropout(rows, rates)
    kept = torch.rand_like(rows, dtype=torch.float32) >= rates
    return torch.where(kept, rows / (1 - rates).clamp_min(1e-9), 0)


def _beside(rates: Rates, rows: Tensor) -> Rates:
    """Rates of particles as (k, 1, ...), to fit rows (k, ...)."""
    return rates.view(-1, *[1] * (rows.ndim - 1)) if isinstance(rates, Tensor) else rates


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _linear_weight(base_layer: Any) -> Tensor:
    """The weight as (d_out, d_in)."""
    weight: Tensor = base_layer.weight
    return weight if isinstance(base_layer, nn.Linear) else weight.T


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """scaling · (x_k A_kᵀ) B_kᵀ for x (K, T, d_in) -> (K, T, d_out)."""
    return torch.bmm(torch.bmm(x, lora_A.to(x.dtype).mT), lora_B.to(x.dtype).mT * scaling)


# The names of version 0.1, for one more release.
LoraForeignLinear = LoraOpaqueLinear
is_foreign_linear = has_own_forward
