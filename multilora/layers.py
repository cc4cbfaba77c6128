"""Layers that hold K particles' adapters over one frozen layer."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from multilora.forward_state import ForwardState
from multilora.ops import grouped_linear, lora_add, lora_linear, ragged
from multilora.ops.common import Part, Parts
from multilora.particle_layer import (
    ParticleLayer,
    as_every_example,
    ends_on,
    flat,
    is_same_for_all,
    own,
    row_ends,
    split,
)

#: Dropout before the adapters, see `dropped`.
Rates = Tensor | float | None

#: So many numbers in each particle's rows make padded ranks dearer than more calls.
MANY_NUMBERS = 2**14


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
        self._clean: tuple[int, ...] = ()
        if first.rank == self.rank and all(a == first for a in each):
            #: What each particle has; None where all have the same.
            self.each: tuple[Adapted, ...] | None = None
            self.scaling, self.dropout = first.scaling, first.dropout
            return
        # The scales are in a factor when it is used.
        self.each, self.scaling = tuple(each), 1.0
        self.dropout = max(a.dropout for a in each)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        exact = self.lora_A.detach()[:0].to(dtype)
        self.scales = exact.new_zeros(len(each), *[1] * (self.lora_B.ndim - 2), self.rank)
        for k, a in enumerate(each):
            self.scales[k, ..., : a.rank] = a.scaling
        self.rates = exact.new_tensor([a.dropout for a in each]).view(-1, 1, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> "LoraLayer":
        super()._apply(fn, recurse)
        if self.each is not None:  # scales that another dtype has rounded would stay so
            self.set_each(self.each)
        return self

    def repeat_each(self) -> None:
        self.set_each([self.adapted_by(0)] * len(self.lora_A))

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
            self.clear_padding(self.lora_A, self.lora_B)
        lora_A, lora_B = own(self.lora_A, state), own(self.lora_B, state)
        scales = own(self.scales, state)
        # The smaller one is scaled, since autograd keeps the result.
        if lora_A.shape[-1] < lora_B.shape[-2]:
            return (lora_A * scales.mT).to(lora_A.dtype), lora_B
        return lora_A, (lora_B * scales).to(lora_B.dtype)

    def clear_padding(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Set the padding of the layer's factors to zero, if an optimizer that adds noise, say, has
        moved it."""
        # An optimizer does not move inference tensors.
        if self.each is None or lora_A.is_inference() or len(self.each) != len(lora_A):
            return
        state = id(lora_A), id(lora_B), lora_A._version, lora_B._version
        if self._clean == state:
            return
        with torch.no_grad():
            for k, a in enumerate(self.each):
                lora_A[k, ..., a.rank :, :] = 0
                lora_B[k, ..., a.rank :] = 0
        self._clean = id(lora_A), id(lora_B), lora_A._version, lora_B._version

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
        if state is not None and state.which and (y := self.in_parts(x, state)) is not None:
            return y
        lora_A, lora_B = self.factors(state)
        rates = self._rates(state)
        if state is None or not is_same_for_all(x, state):
            self.require_rows(x, state, len(lora_A))
            if state is not None and state.counts is not None:
                return self.adapted_rows(x, lora_A, lora_B, rates, state)
            return self.adapted(x, lora_A, lora_B, rates)
        # Compute it once for every particle, and repeat the result for each of its examples.
        x = x.repeat_interleave(len(lora_A), 0)
        y = self.adapted(x, lora_A, lora_B, rates)
        assert state.rows is not None
        counts: Any = state.rows // len(lora_A)
        if state.counts is not None:
            counts = torch.tensor(state.counts, device=y.device)
        return as_every_example(y.repeat_interleave(counts, 0))

    def _rates(self, state: ForwardState | None) -> Rates:
        """The dropout before the adapters, as `dropped` takes it."""
        if not self.drops:
            return None
        return self.dropout if self.rates is None else own(self.rates, state)

    def in_parts(self, x: Tensor, state: ForwardState) -> Tensor | None:
        """The layer of x (N, ...), where the rows of each particle are best computed apart."""
        return None

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
        state: ForwardState,
    ) -> Tensor:
        """The layer of x (N, ...) where the particles have the state's counts of rows."""
        y = self.frozen(x)
        delta = self.delta_of_rows(x, lora_A, lora_B, rates, state)
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
        state: ForwardState,
    ) -> Tensor:
        """What the adapters add in `adapted_rows`: scaling · B A x of a linear."""
        rows = self._dropped_rows(x.reshape(-1, x.shape[-1]), rates, state)
        at = ends_on(len(rows), state, x.device)
        shrunk = grouped_linear(rows, lora_A, at)
        delta = grouped_linear(shrunk, lora_B * self.scaling, at)
        return delta.view(*x.shape[:-1], -1)

    def _dropped_rows(self, rows: Tensor, rates: Rates, state: ForwardState) -> Tensor:
        """Dropout of rows (T, d_in) where the particles have the state's counts of rows."""
        if isinstance(rates, Tensor):
            at = ends_on(len(rows), state, rows.device)
            sizes = at.diff(prepend=at.new_zeros(1))
            rates = rates.view(-1).repeat_interleave(sizes, output_size=len(rows))[:, None]
        return dropped(rows, rates)

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

    def in_parts(self, x: Tensor, state: ForwardState) -> Tensor | None:
        # Few steps: a small layer takes little more time than they do.
        if not ragged.is_plain() or is_same_for_all(x, state):
            return None
        kept, device = state.kept, x.device
        runs = kept.get(device)
        if runs is None:
            runs = kept[device] = ragged.runs_on(x)
        if not runs or (state.counts is None and not self._is_worth_parts(x, state)):
            return None
        own = kept.get(self)
        if own is None:
            own = kept[self] = self._own_tensors()
        if not own or not ragged.is_plain_tensor(x, own[0].dtype):
            return None
        weight, bias, lora_A, lora_B = own
        # The same in many layers.
        lead = x.shape[:-1]
        key = lead, self.each or (self.rank, self.scaling)
        parts = kept.get(key)
        if parts is None:
            parts = kept[key] = self._find_parts(x, state)
        rows = x.reshape(-1, x.shape[-1])
        if self.drops:
            # The mask lies before A only.
            y = F.linear(rows, weight, bias)
            masked = self._dropped_rows(rows, self._rates(state), state)
            y = ragged.ragged_add(y, masked, lora_A, lora_B, parts)
        else:
            y = ragged.ragged_linear(rows, weight, bias, lora_A, lora_B, parts)
        return y.view(*lead, y.shape[-1])

    def _own_tensors(self) -> tuple[Any, ...]:
        """W, b, A and B; nothing where `ragged` does not take them."""
        base, lora_A, lora_B = self.plain_layer, self.lora_A, self.lora_B
        self.clear_padding(lora_A, lora_B)
        own = _linear_weight(base), base.bias, lora_A, lora_B
        return own if ragged.takes(*own) else ()

    def _is_worth_parts(self, x: Tensor, state: ForwardState) -> bool:
        """Whether particles that have as many rows as each other run apart."""
        if not torch.is_grad_enabled() and ragged.has_kernel():
            return True
        return self.each is not None and x.numel() >= MANY_NUMBERS * state.particles

    def _find_parts(self, x: Tensor, state: ForwardState) -> Parts:
        self.require_rows(x, state, len(state.which))
        each = x.shape[:-1].numel() // max(x.shape[0], 1)
        found, start = [], 0
        for k, end in zip(state.which, row_ends(len(x), state, len(state.which))):
            here = self.adapted_by(k)
            if here.rank and end > start:
                rows = start * each, end * each
                found.append(Part(k, *rows, here.rank, here.scaling))
            start = end
        return Parts(found)


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
        state: ForwardState,
    ) -> Tensor:
        parts, ends = [], row_ends(len(x), state, len(lora_A))
        for k, (start, end) in enumerate(zip([0, *ends], ends)):
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


def lora_layers(base: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers in module order, by their names in `base`."""
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


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


def dropped(rows: Tensor, rates: Rates) -> Tensor:
    """Dropout at one rate, or at rates that fit rows; None is no dropout."""
    if rates is None:
        return rows
    if not isinstance(rates, Tensor):
        return F.dropout(rows, rates)
    kept = torch.rand_like(rows, dtype=torch.float32) >= rates
    return torch.where(kept, rows / (1 - rates).clamp_min(1e-9).to(rows.dtype), 0)


def _beside(rates: Rates, rows: Tensor) -> Rates:
    """Rates of particles as (k, 1, ...), to fit rows (k, ...)."""
    return rates.view(-1, *[1] * (rows.ndim - 1)) if isinstance(rates, Tensor) else rates


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
