"""Layers that hold K particles: stacked adapters over one frozen layer, and stacked heads.

Inside a particle model the particles ride on the batch axis, particle first: a layer sees
(K·B, ...) and reads it as (K, B, ...).
"""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from multilora.ops import lora_add, lora_linear


class ParticleRows:
    """What the layers know of the forward that is under way.

    count: its number of rows, K·B; None outside of a forward.
    shared: B while the rows of every particle are still the same, before the first particle layer;
        else None.
    """

    count: int | None = None
    shared: int | None = None

    def still_shared(self) -> bool:
        return self.shared is not None

    @property
    def recomputing(self) -> bool:
        """Whether a checkpoint runs its part of an earlier forward again, inside a backward."""
        return self.count is None and torch._C._current_graph_task_id() != -1


class ParticleLayer(nn.Module):
    """A layer of K particles."""

    def __init__(self, rows: ParticleRows):
        super().__init__()
        self.rows = rows
        self._was_first = False
        # By mode: whether the rows of all particles were the same when they had to be.
        self._known_first: dict[bool, bool] = {}

    @property
    def num_particles(self) -> int:
        """K, or how many of them run now (`ParticleModel.particles`)."""
        raise NotImplementedError

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name in it, tensor) of everything with a particle axis."""
        for name, parameter in self._parameters.items():
            yield self, name, parameter

    def is_first(self, x: Tensor | None = None) -> bool:
        """Whether all particles give this layer the same rows x; behind it they differ.

        To be asked once a forward. A checkpoint's recomputation has the answer of its forward.
        """
        if torch.compiler.is_compiling() or not self.rows.recomputing:
            first = self.rows.still_shared() and x is not None and self.num_particles > 1
            self.rows.shared = None
            if first and (x.device.type == "cpu" or self.training not in self._known_first):
                # What is random need not draw from PyTorch's generators. (On a GPU to look is to
                # wait: once.)
                rows = self.split(x)
                self._known_first[self.training] = bool((rows[1:] == rows[:1]).all())
            self._was_first = first and self._known_first[self.training]
        return self._was_first

    def check_rows(self, x: Tensor) -> None:
        """Raise ValueError where the leading axis of x cannot be particles times batch.

        A layer that is fed (tokens, batch, d), say, would mix particles. What cannot be told
        apart is an input whose first two axes are both K·B long.
        """
        count = self.rows.count
        batch_is_second = x.ndim > 2 and x.shape[0] != count and x.shape[1] == count
        if batch_is_second or not self.has_rows(x):
            raise ValueError(
                f"a particle layer needs an input whose leading axis is particles × batch, "
                f"a multiple of {self._unit()} (K = {self.num_particles}); got {tuple(x.shape)}. "
                "Layers that put another axis first cannot be targets."
            )

    def has_rows(self, x: Tensor) -> bool:
        return x.shape[0] % max(self._unit(), 1) == 0

    def _unit(self) -> int:
        return self.num_particles if self.rows.count is None else self.rows.count

    def split(self, x: Tensor) -> Tensor:
        """(K·B, ...) -> (K, B, ...)."""
        self.check_rows(x)
        return x.view(self.num_particles, x.shape[0] // self.num_particles, *x.shape[1:])

    def split_rows(self, x: Tensor) -> Tensor:
        """(K·B, *, d) -> (K, T, d) in one view, with T the product of B and *."""
        self.check_rows(x)
        rows = math.prod(x.shape[:-1]) // self.num_particles
        return x.reshape(self.num_particles, rows, x.shape[-1])


class LoraLayer(ParticleLayer):
    """K adapters on one frozen layer; the factors are stored flat, whatever the layer is.

    lora_A (K, r, d_in), lora_B (K, d_out, r); for a convolution d_in = channels · kernel area.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_particles: int,
        rows: ParticleRows,
        rank: int,
        scaling: float,
        dropout: float,
    ):
        super().__init__(rows)
        d_out, d_in = self.weight_shape(base_layer)
        factory = self.masters(base_layer)
        self.base_layer = base_layer
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        self.lora_A = nn.Parameter(torch.empty(num_particles, rank, d_in, **factory))
        self.lora_B = nn.Parameter(torch.zeros(num_particles, d_out, rank, **factory))

    @property
    def num_particles(self) -> int:
        return self.lora_A.shape[0]

    @staticmethod
    def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(d_out, d_in) of the layer's weight as a matrix."""
        raise NotImplementedError

    @staticmethod
    def masters(base_layer: nn.Module) -> dict[str, Any]:
        """The factors' dtype and device: float32 for half-precision layers, as PEFT does it."""
        weight = base_layer.weight
        return {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }

    @property
    def weight(self) -> Tensor:
        """The frozen weight: models read its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def reset_particle(self, particle: int, generator: torch.Generator, init: bool | str) -> None:
        """A from Kaiming's uniform (init True) or N(0, 1/r²) ("gaussian"), B zero."""
        fresh = torch.empty(self.lora_A.shape[1:])
        if init == "gaussian":
            nn.init.normal_(fresh, std=1 / self.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A[particle] = fresh
            self.lora_B[particle] = 0

    def extra_repr(self) -> str:
        return f"particles={self.num_particles}, rank={self.rank}, scaling={self.scaling:g}"


class LoraLinear(LoraLayer):
    """K adapters on nn.Linear, or on transformers' Conv1D, whose weight is (d_in, d_out)."""

    @staticmethod
    def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
        return tuple(_linear_weight(base_layer).shape)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _linear_weight(self.base_layer), self.base_layer.bias
        rows = self.split_rows(x)  # (K, T, d_in)
        # Rows that are the same for all particles need one base product.
        base_rows = rows[:1] if self.is_first(x) else rows
        if self.training and self.dropout > 0:
            # The mask lies before A only, so the two products read different inputs.
            dropped = F.dropout(rows, self.dropout)
            delta = _low_rank(dropped, self.lora_A, self.lora_B, self.scaling)
            y = F.linear(base_rows, weight, bias)
            y = y + delta.to(y.dtype)
        else:
            y = lora_linear(base_rows, weight, self.lora_A, self.lora_B, bias, self.scaling)
        return y.view(*x.shape[:-1], y.shape[-1])


class LoraForeignLinear(LoraLayer):
    """K adapters on a linear whose product is its own: see `is_foreign_linear`.

    The base layer is called once, with the rows of all particles; the low-rank part is added to
    its output, whose dtype stays.
    """

    @staticmethod
    def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
        # The weight may be packed, or a shard.
        return base_layer.out_features, base_layer.in_features

    @staticmethod
    def masters(base_layer: nn.Module) -> dict[str, Any]:
        tensors = list(_tensors_of(base_layer))
        double = any(t.dtype == torch.float64 for t in tensors)
        return {
            "dtype": torch.float64 if double else torch.float32,
            "device": tensors[0].device,
        }

    def forward(self, x: Tensor) -> Tensor:
        rows = self.split_rows(x)  # (K, T, d_in)
        particles, is_first = rows.shape[0], self.is_first(x)
        if is_first:
            # The same rows for all particles: one product, repeated.
            x = x[: x.shape[0] // particles]
        y = self.base_layer(x)
        self._check_output(x, y)
        if is_first:
            y, x = y.repeat(particles, *[1] * (y.ndim - 1)), rows
        if self.training and self.dropout > 0:
            rows = F.dropout(rows, self.dropout)
        elif is_first:
            rows = rows[:1]
        if not torch.compiler.is_compiling() and self._is_held(x, y):
            y = y.clone()
        return lora_add(y, rows, self.lora_A, self.lora_B, self.scaling)

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
        """Whether y's memory may be read again: x's or the layer's own, or what a hook has seen."""
        base = self.base_layer
        memory = y.untyped_storage().data_ptr()
        return bool(base._forward_hooks) or any(
            type(t) in (Tensor, nn.Parameter) and t.untyped_storage().data_ptr() == memory
            for t in (x, *_tensors_of(base), *vars(base).values())
        )


class LoraConv2d(LoraLayer):
    """K adapters on nn.Conv2d as PEFT has it: A a convolution to r channels, B a 1×1 one.

    The adapters of all particles are one grouped convolution.
    """

    @staticmethod
    def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.weight.shape[0], base_layer.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        base, particles = self.base_layer, self.num_particles
        self.is_first()
        rows = self.split(x)  # (K, B, C, H, W)
        if self.training and self.dropout > 0:
            rows = F.dropout(rows, self.dropout)
        rows = rows.transpose(0, 1).flatten(1, 2)  # (B, K·C, H, W)
        lora_A = self.lora_A.view(-1, *base.weight.shape[1:])  # (K·r, C, kh, kw)
        lora_B = self.lora_B.flatten(0, 1)[..., None, None]  # (K·d_out, r, 1, 1)
        shrunk = F.conv2d(
            rows, lora_A.to(rows.dtype), None, base.stride, base.padding, groups=particles
        )
        delta = F.conv2d(shrunk, lora_B.to(shrunk.dtype), groups=particles)
        delta = delta.unflatten(1, (particles, -1)).transpose(0, 1).flatten(0, 1)
        y = base(x)
        return y + self.scaling * delta.to(y.dtype)


class StackedModule(ParticleLayer):
    """K copies of a module (`modules_to_save`: the head) with stacked parameters (K, ...).

    nn.Linear runs as one batched product and nn.Embedding as one look-up; any other module runs
    under torch.func.vmap. Buffers are shared by the particles.
    """

    def __init__(self, module: nn.Module, num_particles: int, rows: ParticleRows):
        super().__init__(rows)
        # The structure without storage, for vmap; not registered, so its tensors are no state.
        self.__dict__["template"] = copy.deepcopy(module).to("meta")
        self.module = copy.deepcopy(module)
        for name, parameter in list(self.module.named_parameters()):
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            stacked = parameter.detach().to(dtype).expand(num_particles, *parameter.shape)
            _set_parameter(self.module, name, nn.Parameter(stacked.clone()))
        # Empty: it remembers the module's dtype, through model.to(dtype) too, beside the float32
        # masters.
        like = next(module.parameters())
        self.register_buffer("dtype_of", like.new_empty(0), persistent=False)

    @property
    def num_particles(self) -> int:
        return next(self.module.parameters()).shape[0]

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter

    def reset_particle(self, particle: int, generator: torch.Generator) -> None:
        """Redraw this particle's matrices at the standard deviation that they have."""
        with torch.no_grad():
            for stacked in self.module.parameters():
                if stacked.ndim < 3:
                    continue
                std = stacked[particle].std().item()
                if not std > 0:
                    std = 1 / math.sqrt(3 * stacked[particle, 0].numel())
                fresh = torch.empty(stacked.shape[1:])
                stacked[particle] = nn.init.normal_(fresh, std=std, generator=generator)

    def forward(self, *args, **kwargs):
        self.is_first()
        if len(args) == 1 and not kwargs:
            if type(self.template) is nn.Linear:
                return self._linear(args[0])
            if type(self.template) is nn.Embedding:
                return self._embedding(args[0])
        leaves, structure = tree_flatten((args, kwargs))
        mapped = [isinstance(t, Tensor) and t.ndim > 0 and self.has_rows(t) for t in leaves]
        tensors = [self.split(t) for t, is_mapped in zip(leaves, mapped) if is_mapped]
        if not tensors:
            shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
            raise ValueError(f"a stacked module needs an input of particles × batch; got {shapes}")
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        dtype = floating[0] if floating else self.dtype_of.dtype
        parameters = {name: p.to(dtype) for name, p in self.module.named_parameters()}
        buffers = dict(self.module.named_buffers())
        self.template.train(self.training)

        def one_particle(parameters, *rows):
            rows = iter(rows)
            inputs = [next(rows) if m else leaf for leaf, m in zip(leaves, mapped)]
            args, kwargs = tree_unflatten(inputs, structure)
            return torch.func.functional_call(self.template, (parameters, buffers), args, kwargs)

        outputs = torch.func.vmap(one_particle, randomness="different")(parameters, *tensors)
        return tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, outputs)

    def _linear(self, x: Tensor) -> Tensor:
        rows = self.split_rows(x)
        weight, bias = self.module.weight.to(x.dtype), self.module.bias
        if bias is None:
            y = torch.bmm(rows, weight.mT)
        else:
            y = torch.baddbmm(bias.to(x.dtype).unsqueeze(1), rows, weight.mT)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _embedding(self, ids: Tensor) -> Tensor:
        rows = self.split(ids)  # (K, B, *)
        weight = self.module.weight.to(self.dtype_of.dtype)  # (K, V, d)
        first = torch.arange(self.num_particles, device=ids.device) * weight.shape[1]
        first = first.view(-1, *[1] * (rows.ndim - 1))
        y = F.embedding(rows + first, weight.flatten(0, 1)).flatten(0, 1)
        if self.template.padding_idx is not None:
            # The padding row has no gradient, in every particle.
            y = torch.where((ids == self.template.padding_idx).unsqueeze(-1), y.detach(), y)
        return y


def is_foreign_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear that only its own forward computes.

    That is an nn.Linear with another forward, with hooks, or with a weight of a tensor class of its
    own (bitsandbytes, torchao, DTensor), or any module without children that has the sizes of one,
    in_features and out_features (GPTQ, AWQ).
    """
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if any(module.children()) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if isinstance(module, nn.Linear):
        # Its users read the weight and call nothing.
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        return not (
            type(module).forward is nn.Linear.forward
            and "forward" not in vars(module)
            and type(getattr(module, "weight", None)) in (nn.Parameter, Tensor)
            and not any(vars(module)[hooks] for hooks in _HOOKS)
        )
    return True


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _linear_weight(base_layer: nn.Module) -> Tensor:
    """The weight as (d_out, d_in)."""
    if isinstance(base_layer, nn.Linear):
        return base_layer.weight
    return base_layer.weight.T


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """scaling · (x_k A_kᵀ) B_kᵀ for x (K, T, d_in) -> (K, T, d_out)."""
    return torch.bmm(torch.bmm(x, lora_A.to(x.dtype).mT), lora_B.to(x.dtype).mT * scaling)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)
