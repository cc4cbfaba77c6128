"""How every operator is run: its inputs, multilora's form and the plain ones, in each direction.

Inputs are drawn in bfloat16's values, so that float32, bfloat16 and the float64 oracle all
compute on the same numbers. There is no dropout anywhere.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import multilora as ml
from bench import peers
from bench.case import Repetition, Unavailable
from multilora.ops import lora_add
from multilora.ops.dispatch import missing_reason

Tensors = dict[str, Tensor | list[Tensor]]
#: A forward, the leaves it is differentiated in, and the gradients of its outputs.
Differentiable = tuple[Callable[[], Tensors], Tensors, Tensors]


def drawing(seed: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        return values.bfloat16().to(dtype)

    return draw


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(torch.is_grad_enabled())


def _leaves(t: Tensor) -> list[Tensor]:
    """One leaf per particle: separate tensors, as separate models have them."""
    return [leaf(one) for one in t]


def _flat(tensors: Tensors) -> list[Tensor]:
    return [one for t in tensors.values() for one in (t if isinstance(t, list) else [t])]


def _forward(make: Callable[[Any], Differentiable]) -> Callable[[Any], Repetition]:
    """The forward as evaluation runs it, without a graph."""

    def maker(inputs: Any) -> Repetition:
        with torch.no_grad():
            forward, _, _ = make(inputs)
        return torch.no_grad()(forward)

    return maker


def _forward_backward(make: Callable[[Any], Differentiable]) -> Callable[[Any], Repetition]:
    """The forward with its graph and the gradients of all leaves, by torch.autograd.grad."""

    def maker(inputs: Any) -> Repetition:
        forward, leaves, upstream = make(inputs)

        def run() -> Tensors:
            outputs = forward()
            grads = torch.autograd.grad(_flat(outputs), _flat(leaves), _flat(upstream))
            return outputs | _by_leaf(leaves, grads)

        return run

    return maker


def _by_leaf(leaves: Tensors, grads: Sequence[Tensor]) -> Tensors:
    """Gradients in the order of _flat(leaves) -> the gradient of every leaf by its name."""
    remaining = iter(grads)
    return {
        f"d{name}": [next(remaining) for _ in t] if isinstance(t, list) else next(remaining)
        for name, t in leaves.items()
    }


def _backward(make: Callable[[Any], Differentiable]) -> Callable[[Any], Repetition]:
    """The gradients of all leaves alone, from one earlier forward."""

    def maker(inputs: Any) -> Repetition:
        forward, leaves, upstream = make(inputs)
        outputs = _flat(forward())

        def run() -> Tensors:
            grads = torch.autograd.grad(outputs, _flat(leaves), _flat(upstream), retain_graph=True)
            return _by_leaf(leaves, grads)

        return run

    return maker


PASSES = {"forward": _forward, "backward": _backward, "fwd + bwd": _forward_backward}


def on_backend(backend: str, make: Callable[[Any], Repetition], inputs: Any) -> Repetition:
    """Forward and backward on one backend: the choice is made when an operator is called."""
    missing = missing_reason(backend)
    if missing is not None:
        raise Unavailable(missing)
    with ml.use_backend(backend):
        run = make(inputs)

    def chosen() -> Tensors:
        with ml.use_backend(backend):
            return run()

    return chosen


# --- lora_linear ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    x: Tensor  # (K, T, d_in), or (T, d_in) where the particles share it
    weight: Tensor  # (d_out, d_in)
    lora_A: Tensor  # (K, r, d_in)
    lora_B: Tensor  # (K, d_out, r)
    bias: Tensor  # (d_out,)
    dy: Tensor  # (K, T, d_out)
    scaling: float = 2.0


@dataclass(frozen=True)
class LinearSize:
    d_in: int
    d_out: int
    rows: int
    particles: int = 4
    rank: int = 8
    shared: bool = False
    masters: bool = False  # float32 factors beside half-precision rows

    def __str__(self) -> str:
        sizes = f"{self.d_in}→{self.d_out} K{self.particles} T{self.rows} r{self.rank}"
        return sizes + (" shared x" if self.shared else "")

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Linear:
        draw = drawing(0, dtype, device)
        d_in, d_out, k = self.d_in, self.d_out, self.particles
        factors = torch.promote_types(dtype, torch.float32) if self.masters else dtype
        return Linear(
            draw(self.rows, d_in) if self.shared else draw(k, self.rows, d_in),
            draw(d_out, d_in, std=d_in**-0.5),
            draw(k, self.rank, d_in, std=d_in**-0.5, dtype=factors),
            draw(k, d_out, self.rank, std=0.1, dtype=factors),
            draw(d_out, std=0.1),
            draw(k, self.rows, d_out),
        )


def linear_stacked(function: Callable[..., Tensor], i: Linear) -> Differentiable:
    x, A, B = leaf(i.x), leaf(i.lora_A), leaf(i.lora_B)

    def forward() -> Tensors:
        factors = (A, B) if function is linear_ours else (A.to(x.dtype), B.to(x.dtype))
        return {"y": function(x, i.weight, *factors, i.bias, i.scaling)}

    return forward, {"x": x, "lora_A": A, "lora_B": B}, {"y": i.dy}


def linear_loop(i: Linear) -> Differentiable:
    As, Bs = _leaves(i.lora_A), _leaves(i.lora_B)
    shared = i.x.ndim == 2
    x = leaf(i.x) if shared else _leaves(i.x)
    xs = [x] * len(As) if shared else x

    def forward() -> Tensors:
        factors = ([t.to(i.x.dtype) for t in ts] for ts in (As, Bs))
        return {"y": peers.lora_loop(xs, i.weight, *factors, i.bias, i.scaling)}

    return forward, {"x": x, "lora_A": As, "lora_B": Bs}, {"y": list(i.dy)}


def linear_ours(x: Tensor, weight: Tensor, lora_A: Tensor, *rest: Any) -> Tensor:
    if x.ndim == 2:
        x = x.unsqueeze(0)
    return ml.lora_linear(x, weight, lora_A, *rest)


def linear_added(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """lora_add over the output of a layer, for which a plain linear stands in."""
    return lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, scaling)


def base_gemm(passes: str, i: Linear) -> Repetition:
    """The frozen layer alone on the same rows, the product for dX, or both."""
    x = i.x if i.x.ndim == 2 else i.x.flatten(0, 1)
    dy = i.dy[0] if i.x.ndim == 2 else i.dy.flatten(0, 1)

    def run() -> Tensors:
        outputs: Tensors = {}
        if passes != "backward":
            outputs["y"] = F.linear(x, i.weight, i.bias)
        if passes != "forward":
            outputs["dx"] = dy @ i.weight
        return outputs

    return run


def linear_peft(passes: str, autocast: bool, i: Linear) -> Repetition:
    """One adapter after the other; the backward of each follows its forward."""
    model = peers.SwitchedAdapters(i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, autocast)
    backward = passes != "forward"
    xs = [i.x] * len(i.lora_A) if i.x.ndim == 2 else list(i.x)
    xs = [x.detach().requires_grad_(backward) for x in xs]

    @torch.set_grad_enabled(backward)
    def run() -> Tensors:
        ys, grads = [], []
        for k, (x, dy) in enumerate(zip(xs, i.dy)):
            y = model.forward(k, x)
            if backward:
                grads.append(torch.autograd.grad(y, (x, *model.factors[k]), dy))
            ys.append(y.detach())
        if not backward:
            return {"y": ys}
        dx, dA, dB = (list(g) for g in zip(*grads))
        outputs: Tensors = {"y": ys, "dx": dx, "dlora_A": dA, "dlora_B": dB}
        if i.x.ndim == 2:
            outputs["dx"] = torch.stack(dx).sum(0)
        return outputs

    return run


def linear_merged(i: Linear) -> Repetition:
    weights = peers.merge(i.weight, i.lora_A, i.lora_B, i.scaling)  # (K, d_out, d_in)

    @torch.no_grad()
    def run() -> Tensors:
        if i.x.ndim == 2:
            y = F.linear(i.x, weights.flatten(0, 1), i.bias.repeat(len(weights)))
            return {"y": y.unflatten(1, weights.shape[:2]).transpose(0, 1)}
        return {"y": torch.baddbmm(i.bias.expand(len(weights), 1, -1), i.x, weights.mT)}

    return run


def linear_unsloth(i: Linear) -> Repetition:
    matmul_lora = _import("unsloth", "unsloth.kernels.utils").matmul_lora

    @torch.no_grad()
    def run() -> Tensors:
        factors = zip(i.x, i.lora_A, i.lora_B)
        return {
            "y": [matmul_lora(x, i.weight, None, A, B, i.scaling) + i.bias for x, A, B in factors]
        }

    return run


def linear_quack(i: Linear) -> Repetition:
    gemm_add = _import("quack", "quack.gemm_interface").gemm_add

    @torch.no_grad()
    def run() -> Tensors:
        A, B = i.lora_A.to(i.x.dtype), i.lora_B.to(i.x.dtype)
        shrunk = torch.bmm(i.x, A.mT)
        y = torch.baddbmm(i.bias.expand(len(A), 1, -1), shrunk, B.mT, alpha=i.scaling)
        y = gemm_add(i.x.flatten(0, 1), i.weight.mT, y.flatten(0, 1))
        return {"y": y.unflatten(0, i.x.shape[:2])}

    return run


def _import(package: str, module: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    return importlib.import_module(module)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called: torch.compile imports the compiler."""
    cached = functools.cache(functools.partial(torch.compile, function, dynamic=False))
    return lambda *args: cached()(*args)


# --- geometry and SVGD's update ------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    lora_A: list[Tensor]  # L of (K, r, d_in)
    lora_B: list[Tensor]  # L of (K, d_out, r)
    upstream: Tensor  # (L, K, K), dL/dD
    scaling: float = 2.0


def distances_ours(i: Geometry) -> Differentiable:
    A, B = [leaf(t) for t in i.lora_A], [leaf(t) for t in i.lora_B]

    def forward() -> Tensors:
        return {"D": ml.pairwise_frobenius(A, B, i.scaling)}

    return forward, {"lora_A": A, "lora_B": B}, {"D": i.upstream}


def distances_by_layer(function: Callable[..., Tensor], backward: bool, i: Geometry) -> Repetition:
    """One layer after the other with its backward, so that only one layer's ΔW live at a time."""
    layers = [(leaf(A), leaf(B)) for A, B in zip(i.lora_A, i.lora_B)]

    @torch.set_grad_enabled(backward)
    def run() -> Tensors:
        distances, grads = [], []
        for leaves, upstream in zip(layers, i.upstream):
            D = function(*leaves, i.scaling)
            if backward:
                grads.append(torch.autograd.grad(D, leaves, upstream))
            distances.append(D.detach())
        outputs: Tensors = {"D": distances}
        if backward:
            outputs |= {"dlora_A": [g[0] for g in grads], "dlora_B": [g[1] for g in grads]}
        return outputs

    return run


def copy_factors(i: Geometry) -> Repetition:
    return lambda: {"copies": [t.clone() for t in (*i.lora_A, *i.lora_B)]}


@dataclass(frozen=True)
class Layers:
    """The adapted linears of a model: (d_in, d_out) of each."""

    name: str
    widths: tuple[tuple[int, int], ...]
    particles: int
    rank: int

    def __str__(self) -> str:
        return f"{self.name}, {len(self.widths)} linears K{self.particles} r{self.rank}"

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Geometry:
        draw = drawing(1, dtype, device)
        k, r = self.particles, self.rank
        return Geometry(
            [draw(k, r, d_in, std=0.02) for d_in, _ in self.widths],
            [draw(k, d_out, r, std=0.02) for _, d_out in self.widths],
            draw(len(self.widths), k, k),
        )

    @property
    def memory(self) -> float:
        """Bytes: factors, gradients and directions in both precisions, and one layer's ΔW."""
        factors = self.particles * self.rank * sum(map(sum, self.widths))
        return 96.0 * factors + 32.0 * self.particles * max(a * b for a, b in self.widths)


@dataclass(frozen=True)
class Update:
    geometry: Geometry
    grads: list[Tensor]  # of lora_A and lora_B, layer by layer

    def stacked(self) -> list[Tensor]:
        pairs = zip(self.geometry.lora_A, self.geometry.lora_B)
        return [t for pair in pairs for t in pair]


def update_inputs(layers: Layers, dtype: torch.dtype, device: torch.device) -> Update:
    geometry = layers.inputs(dtype, device)
    draw = drawing(5, dtype, device)
    pairs = zip(geometry.lora_A, geometry.lora_B)
    return Update(geometry, [draw(*t.shape, std=1e-3) for pair in pairs for t in pair])


class _Given(torch.autograd.Function):
    """A loss (K,) with given gradients, so that the method is timed and not a model."""

    @staticmethod
    def forward(ctx, grads, *params):
        ctx.grads = grads
        return params[0].new_zeros(params[0].shape[0])

    @staticmethod
    def backward(ctx, _):
        return (None, *ctx.grads)


def update_ours(i: Update) -> Repetition:
    params = [t.detach().requires_grad_() for t in i.stacked()]
    adapters = [
        SimpleNamespace(parameters=(A, B), expert=None, scales=None, scaling=i.geometry.scaling)
        for A, B in zip(params[::2], params[1::2])
    ]
    model = SimpleNamespace(
        particle_parameters=lambda: params, adapters=lambda: adapters, heads=lambda: []
    )
    # The test for non-finite values waits for the device, so that no graph could be captured.
    method = ml.SVGD(model, loss=lambda *_: _Given.apply(i.grads, *params), nonfinite="ignore")

    def run() -> Tensors:
        for p in params:
            p.grad = None
        method.backward(lambda: (None, None))
        return {"direction": [p.grad for p in params]}

    return run


def update_plain(i: Update) -> Repetition:
    stacked, scaling = i.stacked(), i.geometry.scaling
    distances = peers.frobenius_by_factors
    adapted = len(stacked) // 2

    def run() -> Tensors:
        return {
            "direction": peers.svgd_direction(
                stacked, i.grads, scaling, adapted, distances=distances
            )
        }

    return run


# --- particle loss -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logits:
    logits: Tensor  # (K, N, C)
    targets: Tensor  # (N,)


def logits_inputs(
    particles: int, rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Logits:
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    return Logits(drawing(2, dtype, device)(particles, rows, classes), targets.to(device))


def loss_of(function: Callable[..., tuple[Tensor, Tensor]], i: Logits) -> Differentiable:
    """The gradients are those of IBDR's objective, Σ_k nll_k + α · divergence."""
    logits = leaf(i.logits)

    def forward() -> Tensors:
        nll, divergence = function(logits, i.targets)
        return {"nll": nll, "divergence": divergence}

    accumulator = torch.promote_types(logits.dtype, torch.float32)
    upstream = logits.new_ones(len(logits), dtype=accumulator)
    return forward, {"logits": logits}, {"nll": upstream, "divergence": upstream[0] * 0.02}


def copy_logits(i: Logits) -> Repetition:
    return lambda: {"copy": i.logits.clone()}
