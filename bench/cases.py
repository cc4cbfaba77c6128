"""What is compared with what, and at which sizes.

Inputs are drawn in bfloat16's values, so that float32, bfloat16 and the float64 oracle all
compute on the same numbers. There is no dropout anywhere.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multilora as ml
from bench import peers
from bench.measure import OURS, Case, Run
from multilora.tasks import DIGITS_MODEL, DIGITS_TARGETS
from multilora.training import Settings

Tensors = dict[str, Tensor | list[Tensor]]

#: A forward, the leaves it is differentiated in, and the gradients of its outputs.
Problem = tuple[Callable[[], Tensors], Tensors, Tensors]


def _draw(seed: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * std
        return values.bfloat16().to(device, dtype)

    return draw


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(torch.is_grad_enabled())


def _leaves(t: Tensor) -> list[Tensor]:
    """One leaf a particle: separate tensors, as separate models have them."""
    return [_leaf(one) for one in t]


def _flat(tensors: Tensors) -> list[Tensor]:
    return [one for t in tensors.values() for one in (t if isinstance(t, list) else [t])]


def _forward(make: Callable[[Any], Problem]) -> Callable[[Any], Run]:
    """The forward as evaluation runs it, without a graph."""

    def maker(inputs: Any) -> Run:
        with torch.no_grad():
            forward, _, _ = make(inputs)
        return torch.no_grad()(forward)

    return maker


def _forward_backward(make: Callable[[Any], Problem]) -> Callable[[Any], Run]:
    """The forward with its graph and the gradients of all leaves, by torch.autograd.grad."""

    def maker(inputs: Any) -> Run:
        forward, leaves, upstream = make(inputs)

        def run() -> Tensors:
            outputs = forward()
            grads = torch.autograd.grad(_flat(outputs), _flat(leaves), _flat(upstream))
            remaining = iter(grads)
            return outputs | {
                f"d{name}": [next(remaining) for _ in t] if isinstance(t, list) else next(remaining)
                for name, t in leaves.items()
            }

        return run

    return maker


_PASSES = {"forward": _forward, "fwd + bwd": _forward_backward}


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

    def __str__(self) -> str:
        sizes = f"{self.d_in}→{self.d_out} K{self.particles} T{self.rows} r{self.rank}"
        return sizes + (" shared x" if self.shared else "")

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Linear:
        draw = _draw(0, dtype, device)
        d_in, d_out, k = self.d_in, self.d_out, self.particles
        return Linear(
            draw(self.rows, d_in) if self.shared else draw(k, self.rows, d_in),
            draw(d_out, d_in, std=d_in**-0.5),
            draw(k, self.rank, d_in, std=d_in**-0.5),
            draw(k, d_out, self.rank, std=0.1),
            draw(d_out, std=0.1),
            draw(k, self.rows, d_out),
        )

    def flops(self, backward: bool) -> float:
        """Base product (and dX), three low-rank products for each of their two factors."""
        base_rows = self.rows * (1 if self.shared else self.particles)
        base = 2 * base_rows * self.d_in * self.d_out
        lora = 2 * self.particles * self.rows * self.rank * (self.d_in + self.d_out)
        return 2 * base + 3 * lora if backward else base + lora


def _linear_stacked(function: Callable[..., Tensor], i: Linear) -> Problem:
    x, A, B = _leaf(i.x), _leaf(i.lora_A), _leaf(i.lora_B)

    def forward() -> Tensors:
        return {"y": function(x, i.weight, A, B, i.bias, i.scaling)}

    return forward, {"x": x, "lora_A": A, "lora_B": B}, {"y": i.dy}


def _linear_loop(i: Linear) -> Problem:
    As, Bs = _leaves(i.lora_A), _leaves(i.lora_B)
    shared = i.x.ndim == 2
    x = _leaf(i.x) if shared else _leaves(i.x)
    xs = [x] * len(As) if shared else x

    def forward() -> Tensors:
        return {"y": peers.lora_loop(xs, i.weight, As, Bs, i.bias, i.scaling)}

    return forward, {"x": x, "lora_A": As, "lora_B": Bs}, {"y": list(i.dy)}


def _linear_ours(x: Tensor, weight: Tensor, lora_A: Tensor, *rest: Any) -> Tensor:
    if x.ndim == 2:
        x = x.expand(lora_A.shape[0], -1, -1)
    return ml.lora_linear(x, weight, lora_A, *rest)


def _base_gemm(backward: bool, i: Linear) -> Run:
    """The frozen layer alone on the same rows, and the product that gives dX."""
    x = i.x if i.x.ndim == 2 else i.x.flatten(0, 1)
    dy = i.dy[0] if i.x.ndim == 2 else i.dy.flatten(0, 1)

    def run() -> Tensors:
        y = F.linear(x, i.weight, i.bias)
        return {"y": y, "dx": dy @ i.weight} if backward else {"y": y}

    return run


def _linear_cases() -> list[Case]:
    # One 224×224 image a particle at ViT-B's widths; a batch of 16 at the digits ViT's.
    sizes = [
        LinearSize(*shape, 197) for shape in ((768, 768), (768, 2304), (768, 3072), (3072, 768))
    ]
    sizes += [LinearSize(48, 144, 16 * 5), LinearSize(48, 192, 16 * 5)]
    sizes += [LinearSize(*shape, 197, shared=True) for shape in ((768, 768), (768, 2304))]
    makers = {
        "loop": _linear_loop,
        "baddbmm": partial(_linear_stacked, peers.lora_baddbmm),
        "vmap": partial(_linear_stacked, peers.lora_vmap),
        OURS: partial(_linear_stacked, _linear_ours),
    }
    return [
        Case(
            f"lora_linear {name}",
            str(size),
            size.inputs,
            {peer: wrap(make) for peer, make in makers.items()},
            ("base GEMM", partial(_base_gemm, name != "forward")),
            flops=size.flops(name != "forward"),
            half_precision=True,
        )
        for name, wrap in _PASSES.items()
        for size in sizes
    ]


# --- geometry ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    lora_A: list[Tensor]  # L of (K, r, d_in)
    lora_B: list[Tensor]  # L of (K, d_out, r)
    upstream: Tensor  # (L, K, K), dL/dD
    scaling: float = 2.0


def _geometry_inputs(layers: int, dtype: torch.dtype, device: torch.device) -> Geometry:
    draw = _draw(1, dtype, device)
    return Geometry(
        [draw(8, 8, 768, std=0.02) for _ in range(layers)],
        [draw(8, 3072, 8, std=0.02) for _ in range(layers)],
        draw(layers, 8, 8),
    )


def _distances_ours(i: Geometry) -> Problem:
    A, B = [_leaf(t) for t in i.lora_A], [_leaf(t) for t in i.lora_B]

    def forward() -> Tensors:
        return {"D": ml.pairwise_frobenius(A, B, i.scaling)}

    return forward, {"lora_A": A, "lora_B": B}, {"D": i.upstream}


def _distances_by_layer(function: Callable[..., Tensor], backward: bool, i: Geometry) -> Run:
    """Layer after layer, each with its backward at once: only one layer's ΔW live at a time."""
    layers = [(_leaf(A), _leaf(B)) for A, B in zip(i.lora_A, i.lora_B)]

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


def _copy_factors(i: Geometry) -> Run:
    return lambda: {"copies": [t.clone() for t in (*i.lora_A, *i.lora_B)]}


def _geometry_cases() -> list[Case]:
    layers = 12
    factors = layers * 8 * 8 * (768 + 3072)
    # The K² differences of a backward would fill tens of GB.
    definition = {"ΔW broadcast": partial(_distances_by_layer, peers.frobenius_by_broadcast, False)}
    return [
        Case(
            f"pairwise_frobenius {name}",
            f"{layers} layers 768→3072 K8 r8",
            partial(_geometry_inputs, layers),
            {
                **({} if backward else definition),
                "ΔW Gram GEMM": partial(_distances_by_layer, peers.frobenius_by_gram, backward),
                "ΔW differences": partial(
                    _distances_by_layer, peers.frobenius_by_differences, backward
                ),
                OURS: _PASSES[name](_distances_ours),
            },
            ("copy of the factors", _copy_factors),
            # Backward: the factors once more, and their gradients.
            traffic=factors * (3.0 if backward else 1.0),
            goals={} if backward else dict.fromkeys(("ΔW broadcast", "ΔW differences"), 100.0),
        )
        for name, backward in (("forward", False), ("fwd + bwd", True))
    ]


# --- particle loss -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logits:
    logits: Tensor  # (K, N, C)
    targets: Tensor  # (N,)


def _logits(
    particles: int, rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Logits:
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    return Logits(_draw(2, dtype, device)(particles, rows, classes), targets.to(device))


def _loss(function: Callable[..., tuple[Tensor, Tensor]], i: Logits) -> Problem:
    """The gradients are those of IBDR's objective, Σ_k nll_k + α · divergence."""
    logits = _leaf(i.logits)

    def forward() -> Tensors:
        nll, divergence = function(logits, i.targets)
        return {"nll": nll, "divergence": divergence}

    accumulator = torch.promote_types(logits.dtype, torch.float32)
    upstream = logits.new_ones(len(logits), dtype=accumulator)
    return forward, {"logits": logits}, {"nll": upstream, "divergence": upstream[0] * 0.02}


def _copy_logits(i: Logits) -> Run:
    return lambda: {"copy": i.logits.clone()}


def _loss_cases() -> list[Case]:
    return [
        Case(
            "particle_loss fwd + bwd",
            f"K{k} N{rows} C{classes}",
            partial(_logits, k, rows, classes),
            {
                "softmax, logdet": _forward_backward(partial(_loss, peers.particle_loss)),
                "mask, Cholesky": _forward_backward(partial(_loss, peers.particle_loss_masked)),
                OURS: _forward_backward(partial(_loss, ml.particle_loss)),
            },
            ("copy of the logits", _copy_logits),
            # The logits once in each pass, and their gradient.
            traffic=3.0 * k * rows * classes,
            half_precision=True,
        )
        for k, rows, classes in ((4, 1024, 100), (4, 64, 32000), (8, 256, 10))
    ]


# --- whole steps ---------------------------------------------------------------------------------

_VIT = {**DIGITS_MODEL, "num_classes": 5}
_LORA = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": DIGITS_TARGETS,
    "modules_to_save": ["head"],
}
_BATCH = Settings().batch_size
_SCALING = 1.0  # lora_alpha / r


@dataclass(frozen=True)
class Training:
    """K particles and, with the same weights, K PEFT models over one set of frozen weights."""

    particles: ml.ParticleModel
    models: list[nn.Module]
    x: Tensor  # (B, 1, 8, 8)
    y: Tensor  # (B,)


def _training(batch: int, dtype: torch.dtype, device: torch.device, num_particles=4) -> Training:
    import peft
    import timm

    def base() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model("vit_tiny_patch16_224", pretrained=False, **_VIT)

    draw = _draw(3, torch.float32, torch.device("cpu"))
    particles = ml.get_particle_model(base(), peft.LoraConfig(**_LORA), num_particles)
    with torch.no_grad():
        for adapter in particles.adapters():
            adapter.lora_B.copy_(draw(*adapter.lora_B.shape, std=0.02))
        # Particles that predict nearly the same have a nearly singular Gram matrix, in whose
        # inverse the check would compare nothing but rounding. Each leans to a class of its own.
        for _, head in particles.heads():
            head["bias"].copy_(3 * torch.eye(*head["bias"].shape))
    frozen = base().to(device, dtype)
    # What is in the memo is not copied: the frozen weights exist once.
    shared = {id(p): p for p in frozen.parameters()}
    with tempfile.TemporaryDirectory() as folder:
        particles.save_pretrained(folder)
        particles = ml.load_particle_model(base().to(device, dtype), folder)
        models = [
            peft.PeftModel.from_pretrained(
                copy.deepcopy(frozen, dict(shared)), f"{folder}/particle_{k}", is_trainable=True
            ).to(device, dtype)
            for k in range(num_particles)
        ]
    targets = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(4))
    return Training(
        particles.train(),
        [model.train() for model in models],
        draw(batch, 1, 8, 8).to(device, dtype),
        targets.to(device),
    )


def _step(
    params: list[Tensor],
    reported: list[Tensor | tuple[Tensor, ...]],
    backward: Callable[[], dict[str, Tensor]],
) -> Run:
    """The method's backward, AdamW, zero_grad. The rate is zero: every repetition does the same.

    reported: the tensors whose gradients are checked; a tuple holds one a particle.
    """
    optimizer = torch.optim.AdamW(params, lr=0.0, fused=True)

    def run() -> Tensors:
        outputs: Tensors = {"loss": backward()["loss"]}
        optimizer.step()
        for i, t in enumerate(reported):
            outputs[f"gradient {i}"] = [p.grad for p in t] if isinstance(t, tuple) else t.grad
        optimizer.zero_grad()
        return outputs

    return run


def _step_ours(method: type, i: Training) -> Run:
    model, algorithm = i.particles, method(i.particles)
    params = model.particle_parameters()
    return _step(params, params, lambda: algorithm.backward(lambda: (model(i.x), i.y)))


def _step_plain(models: type, method: type, i: Training) -> Run:
    if models is peers.VmappedModels:
        stack = peers.VmappedModels(i.models)
        # The fused attention has no batching rule; vmap would run it particle by particle.
        for module in stack.template.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        reported = stack.flat()
    else:
        stack = peers.LoopedModels(i.models)
        reported = list(zip(*stack.trainable))
    backward = {
        ml.Ensemble: peers.ensemble_backward,
        ml.SVGD: partial(peers.svgd_backward, scaling=_SCALING),
        ml.IBDR: peers.IBDR(i.x).backward,
    }[method]
    return _step(stack.flat(), reported, lambda: backward(stack, i.x, i.y))


def _frozen_model(passes: int, i: Training) -> Run:
    """The model without adapters on K·B rows: forward and the gradient of its input, as often as
    the method needs them. A step over these rows can hardly do less."""
    model = copy.deepcopy(i.models[0]).unload()
    for module in model.modules():
        module.requires_grad_(False)
    x = _leaf(i.x.repeat(len(i.models), 1, 1, 1))

    def run() -> Tensors:
        for _ in range(passes):
            (dx,) = torch.autograd.grad(model(x).sum(), x)
        return {"dx": dx}

    return run


def _step_cases() -> list[Case]:
    sizes = [(method, _BATCH) for method in (ml.Ensemble, ml.SVGD)]
    sizes += [(ml.IBDR, batch) for batch in (8, 16, 32, 128)]
    return [
        Case(
            f"{method.__name__} step",
            f"digits ViT K4 B{batch}",
            partial(_training, batch),
            {
                "PEFT loop": partial(_step_plain, peers.LoopedModels, method),
                "vmap": partial(_step_plain, peers.VmappedModels, method),
                OURS: partial(_step_ours, method),
            },
            ("frozen model", partial(_frozen_model, 2 if method is ml.IBDR else 1)),
            goals={"PEFT loop": 2.0} if (method, batch) == (ml.IBDR, _BATCH) else {},
        )
        for method, batch in sizes
    ]


CASES = [*_linear_cases(), *_geometry_cases(), *_loss_cases(), *_step_cases()]
