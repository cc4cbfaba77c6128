"""K adapters on the banks of experts of transformers 5: LoraConfig.target_parameters.

A bank holds the matrices of its E experts in two parameters, (E, d_out, d_in) or (E, d_in, d_out),
and transformers' `use_experts_implementation` says in attributes what its forward does with them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multilora.layers import Adapted, LoraLayer
from multilora.ops import grouped_linear
from multilora.ops._library import FrozenTensorError
from multilora.particle_layer import row_ends

_PROTOCOL = "transformers.integrations.moe"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Factors(NamedTuple):
    """The adapters of one parameter of a bank, of k particles."""

    lora_A: Tensor  # (k, E, r, d_in)
    lora_B: Tensor  # (k, E, d_out, r)
    scaling: float


class LoraExperts(LoraLayer):
    """K adapters on each of the E matrices in one parameter of a bank of experts.

    lora_A (K, E, r, d_in), lora_B (K, E, d_out, r). As in PEFT, a layer adapts one parameter, and
    that of the second parameter holds that of the first as its base layer. Each hands its factors
    down, and the innermost computes the bank: all rows are sorted once by expert and particle, so
    that a frozen product has E groups and a low-rank product E·K.
    """

    def __init__(
        self,
        base_layer: Any,
        num_particles: int,
        rank: int,
        scaling: float,
        dropout: float,
        parameter: str,
        each: Sequence[Adapted] | None = None,
    ):
        self.parameter = parameter
        self.groups = (getattr(base_layer, parameter).shape[0],)
        super().__init__(base_layer, num_particles, rank, scaling, dropout, each)

    def weight_shape(self, base_layer: Any) -> tuple[int, int]:  # type: ignore[override]
        d_out, d_in = matrices(base_layer, self.parameter).shape[1:]
        return d_out, d_in

    def masters(self, base_layer: Any) -> dict[str, Any]:  # type: ignore[override]
        weight = getattr(base_layer, self.parameter)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {"dtype": dtype, "device": weight.device}

    @property
    def plain_layer(self) -> Any:
        """The bank, below the layers of both parameters."""
        inner = self._modules["base_layer"]
        return inner.plain_layer if isinstance(inner, LoraExperts) else inner

    def matrices_of(self, name: str) -> Iterator[tuple[str, int | None]]:
        bank = bank_name(name)
        return ((f"{bank}.{self.parameter}[{e}]", e) for e in range(self.groups[0]))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        factors: dict[str, Factors] | None = None,
    ) -> Tensor:
        """(N, d) -> (N, d): each row's mean of its experts top_k_index (N, k), with these weights.

        The leading rows are those of the particles, as in other layers; each particle's own router
        may have chosen the experts. factors: those of the layers around this one.
        """
        state = self.enter()
        args = hidden_states, top_k_index, top_k_weights
        if state is not None and state.frozen:
            return self.base_layer(*args)
        ours = Factors(*self.factors(state), self.scaling)
        factors = {**(factors or {}), self.parameter: ours}
        if isinstance(self.base_layer, LoraExperts):
            return self.base_layer(*args, factors)
        particles = len(ours.lora_A)
        self.require_rows(hidden_states, state, particles)
        ends = row_ends(len(hidden_states), state, particles)
        return run_bank(self.base_layer, *args, factors, ends)

    def extra_repr(self) -> str:
        return f"parameter={self.parameter}, {super().extra_repr()}"


def run_bank(
    bank: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    factors: dict[str, Factors],
    ends: list[int],
) -> Tensor:
    """The bank with the adapters of k particles, whose rows end at `ends`: what transformers'
    grouped_mm_experts_forward computes of W_e + s·B_ke·A_ke."""
    rows, top = top_k_index.shape
    routed = _Routed(top_k_index, ends, bank.num_experts)
    up, down = parameters_of(bank)
    y = _adapted(bank, up, hidden_states[routed.order // top], routed, factors.get(up))
    y = bank._apply_gate(y) if says(bank, "has_gate") else bank.act_fn(y)
    y = _adapted(bank, down, y, routed, factors.get(down))
    if says(bank, "has_post_expert_norm"):
        y = bank.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[routed.order].unsqueeze(-1)
    # Back in the order of the rows, and summed without atomic additions.
    y = y[routed.order.argsort()].view(rows, top, -1).sum(1)
    return y.to(hidden_states.dtype)


class _Routed:
    """The rows of every pair of an expert and a particle side by side, expert first.

    order: for each place, which of the (row, choice) pairs stands there. experts: its expert.
    expert_ends (E,), pair_ends (E·k,): where the rows of an expert end, and those of an
    expert and a particle.
    """

    def __init__(self, top_k_index: Tensor, ends: list[int], experts: int):
        particles, device = len(ends), top_k_index.device
        groups = (top_k_index * particles + _particles(ends, device)[:, None]).flatten()
        groups, self.order = groups.sort(stable=True)
        self.experts = groups // particles
        # Counting would wait for a GPU.
        all_groups = torch.arange(1, experts * particles + 1, device=device)
        self.pair_ends = torch.searchsorted(groups, all_groups, out_int32=True)
        self.expert_ends = self.pair_ends[particles - 1 :: particles].contiguous()


def _particles(ends: list[int], device: torch.device) -> Tensor:
    """The particle of each row (N,)."""
    counts = [end - start for start, end in zip([0, *ends], ends)]
    numbers = torch.arange(len(ends), device=device)
    if all(count == counts[0] for count in counts):
        return numbers[:, None].expand(-1, counts[0]).flatten()
    repeats = torch.tensor(counts, device=device)
    return numbers.repeat_interleave(repeats, output_size=ends[-1])


def _adapted(
    bank: Any, parameter: str, x: Tensor, routed: _Routed, factors: Factors | None
) -> Tensor:
    """The products of the sorted rows x (S, d_in) with their experts' matrices, adapted."""
    weight = matrices(bank, parameter)
    if weight.requires_grad and torch.is_grad_enabled():
        raise FrozenTensorError(
            f"the bank's {parameter} {tuple(weight.shape)} is frozen below particles, and it "
            "requires a gradient: call requires_grad_(False) on it"
        )
    if not torch._C._is_any_autocast_enabled():
        x = x.to(weight.dtype)
    y = grouped_linear(x, weight, routed.expert_ends)
    if bank.has_bias:
        y = y + getattr(bank, f"{parameter}_bias")[routed.experts].to(y.dtype)
    if factors is None:
        return y
    # The groups are expert first.
    lora_A, lora_B = (f.transpose(0, 1).flatten(0, 1) for f in (factors.lora_A, factors.lora_B))
    shrunk = grouped_linear(x, lora_A, routed.pair_ends) * factors.scaling
    return y + grouped_linear(shrunk.to(y.dtype), lora_B, routed.pair_ends)


def matrices(bank: Any, parameter: str) -> Tensor:
    """The parameter of a bank as (E, d_out, d_in)."""
    weight: Tensor = getattr(bank, parameter)
    return weight.mT if bank.is_transposed else weight


def parameters_of(bank: Any) -> tuple[str, str]:
    """The names of a bank's two parameters of matrices."""
    return "gate_up_proj" if says(bank, "has_gate") else "up_proj", "down_proj"


def says(bank: Any, name: str) -> bool:
    """What transformers noted of a bank in this attribute. Its older versions knew fewer choices:
    there all banks have a gate, and nothing else."""
    return getattr(bank, name, name == "has_gate")


def bank_name(name: str) -> str:
    """The name of the bank in the base, for that of one of the layers around it."""
    return re.sub(r"(\.base_layer)+$", "", name)


def check_parameter(name: str, module: nn.Module, parameter: str) -> None:
    """Raise TypeError unless target_parameters may name this parameter of a module."""
    what = f"target_parameters name {name}.{parameter}"
    only = (
        "particles support the matrices (E, ·, ·) in a bank of E experts of transformers 5, such "
        "as mlp.experts.gate_up_proj and mlp.experts.down_proj"
    )
    forward = type(module).forward
    follows = getattr(forward, "__globals__", {}).get("__name__") == _PROTOCOL
    if follows and "forward" in vars(module):
        raise TypeError(
            f"{what}, of a {type(module).__name__} whose forward was replaced, as accelerate does "
            f"for a model on several devices: {only}"
        )
    if not follows:
        hint = '. To PEFT, "all-linear" is routers too: name the layers in target_modules'
        if isinstance(module, nn.Linear):
            hint = "; linears belong into target_modules"
        raise TypeError(
            f"{what}, of a {type(module).__name__}, whose forward is not that of transformers' "
            f"use_experts_implementation: {only}{hint}"
        )
    if parameter not in parameters_of(module):
        raise TypeError(
            f"{what}, and the matrices of {type(module).__name__} are {parameters_of(module)}: "
            f"{only}"
        )
    for own_name in parameters_of(module):
        weight: Any = getattr(module, own_name, None)
        plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _FLOATS
        # PEFT adapts a bank of one expert as if it were a linear.
        if (
            not plain
            or weight.ndim != 3
            or weight.shape[0] != module.num_experts
            or len(weight) < 2
        ):
            got = f"{type(weight).__name__} {tuple(getattr(weight, 'shape', ()))}"
            raise TypeError(
                f"{what}, and {own_name} of this {type(module).__name__} is a {got}, which is not "
                f"a plain tensor of {module.num_experts} matrices, two or more: {only}"
            )
    if says(module, "_is_expert_parallel"):
        raise TypeError(f"{what}, whose experts are shared out to processes: {only}")
    if any(vars(module)[hooks] for hooks in ("_forward_pre_hooks", "_forward_hooks")):
        raise TypeError(f"{what}, of a {type(module).__name__} with hooks, which would not run")
