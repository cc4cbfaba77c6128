"""What is compared with what, and at which sizes.

Inputs are drawn in bfloat16's values, so that float32, bfloat16 and the float64 oracle all
compute on the same numbers. There is no dropout anywhere.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multilora as ml
from bench import peers
from bench.measure import OURS, Case, Run
from multilora.app.settings import Settings
from multilora.app.tasks.digits import DIGITS_MODEL, DIGITS_TARGETS
from multilora.ops import lora_add

Tensors = dict[str, Tensor | list[Tensor]]

#: A forward, the leaves it is differentiated in, and the gradients of its outputs.
Problem = tuple[Callable[[], Tensors], Tensors, Tensors]


def drawing(seed: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        return values.bfloat16().to(dtype)

    return draw


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(torch.is_grad_enabled())


def _leaves(t: Tensor) -> list[Tensor]:
    """One leaf a particle: separate tensors, as separate models have them."""
    return [leaf(one) for one in t]


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


def _backward(make: Callable[[Any], Problem]) -> Callable[[Any], Run]:
    """The gradients of all leaves alone, of one forward that went before."""

    def maker(inputs: Any) -> Run:
        forward, leaves, upstream = make(inputs)
        outputs = _flat(forward())

        def run() -> Tensors:
            grads = torch.autograd.grad(outputs, _flat(leaves), _flat(upstream), retain_graph=True)
            return _by_leaf(leaves, grads)

        return run

    return maker


PASSES = {"forward": _forward, "backward": _backward, "fwd + bwd": _forward_backward}


def on_backend(backend: str, make: Callable[[Any], Run], inputs: Any) -> Run:
    """Forward and backward on one backend: the choice is made when an operator is called."""
    with ml.use_backend(backend):
        run = make(inputs)

    def chosen() -> Tensors:
        with ml.use_backend(backend):
            return run()

    return chosen


def _ours(make: Callable[[Any], Run]) -> dict[str, Callable[[Any], Run]]:
    """multilora as it is by default, beside its reference backend, which is plain PyTorch."""
    return {"reference backend": partial(on_backend, "reference", make), OURS: make}


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

    def flops(self, backward: bool) -> float:
        """Base product (and dX), three low-rank products for each of their two factors."""
        base_rows = self.rows * (1 if self.shared else self.particles)
        base = 2 * base_rows * self.d_in * self.d_out
        lora = 2 * self.particles * self.rows * self.rank * (self.d_in + self.d_out)
        return 2 * base + 3 * lora if backward else base + lora


def linear_stacked(function: Callable[..., Tensor], i: Linear) -> Problem:
    x, A, B = leaf(i.x), leaf(i.lora_A), leaf(i.lora_B)

    def forward() -> Tensors:
        factors = (A, B) if function is linear_ours else (A.to(x.dtype), B.to(x.dtype))
        return {"y": function(x, i.weight, *factors, i.bias, i.scaling)}

    return forward, {"x": x, "lora_A": A, "lora_B": B}, {"y": i.dy}


def linear_loop(i: Linear) -> Problem:
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
    """As over a layer with a forward of its own, for which a plain one stands in."""
    return lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, scaling)


def base_gemm(passes: str, i: Linear) -> Run:
    """The frozen layer alone on the same rows, the product that gives dX, or both."""
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


def _linear_cases() -> list[Case]:
    # One 224×224 image a particle at ViT-B's widths; a batch of 16 at the digits ViT's.
    sizes = [
        LinearSize(*shape, 197) for shape in ((768, 768), (768, 2304), (768, 3072), (3072, 768))
    ]
    sizes += [LinearSize(48, 144, 16 * 5), LinearSize(48, 192, 16 * 5)]
    sizes += [LinearSize(*shape, 197, shared=True) for shape in ((768, 768), (768, 2304))]
    makers = {
        "loop": linear_loop,
        "baddbmm": partial(linear_stacked, peers.lora_baddbmm),
        "vmap": partial(linear_stacked, peers.lora_vmap),
        OURS: partial(linear_stacked, linear_ours),
    }
    added = {**makers, OURS: partial(linear_stacked, linear_added)}
    groups = [("lora_linear", makers, sizes), ("lora_add", added, sizes[:4])]
    return [
        Case(
            f"{operator} {name}",
            str(size),
            size.inputs,
            {peer: wrap(make) for peer, make in makers.items()},
            ("base GEMM", partial(base_gemm, name)),
            flops=size.flops(name != "forward"),
            half_precision=True,
        )
        for operator, makers, sizes in groups
        for name, wrap in PASSES.items()
        if name != "backward"
        for size in sizes
    ]


# --- geometry ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    lora_A: list[Tensor]  # L of (K, r, d_in)
    lora_B: list[Tensor]  # L of (K, d_out, r)
    upstream: Tensor  # (L, K, K), dL/dD
    scaling: float = 2.0


def _geometry_inputs(
    widths: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Geometry:
    draw = drawing(1, dtype, device)
    return Geometry(
        [draw(8, 8, d_in, std=0.02) for d_in, _ in widths],
        [draw(8, d_out, 8, std=0.02) for _, d_out in widths],
        draw(len(widths), 8, 8),
    )


def distances_ours(i: Geometry) -> Problem:
    A, B = [leaf(t) for t in i.lora_A], [leaf(t) for t in i.lora_B]

    def forward() -> Tensors:
        return {"D": ml.pairwise_frobenius(A, B, i.scaling)}

    return forward, {"lora_A": A, "lora_B": B}, {"D": i.upstream}


def distances_by_layer(function: Callable[..., Tensor], backward: bool, i: Geometry) -> Run:
    """Layer after layer, each with its backward at once: only one layer's ΔW live at a time."""
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


def copy_factors(i: Geometry) -> Run:
    return lambda: {"copies": [t.clone() for t in (*i.lora_A, *i.lora_B)]}


def _geometry_cases() -> list[Case]:
    # The definition takes seconds for 12 layers, and the K² differences of its backward tens of GB.
    # In the blocks' linears of a ViT-B, the reference is plain enough.
    few = ((768, 3072),) * 12
    many = ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 12
    found = []
    for passes, backward in (("forward", False), ("fwd + bwd", True)):
        ours = _ours(PASSES[passes](distances_ours))
        materialised = {
            "ΔW Gram GEMM": partial(distances_by_layer, peers.frobenius_by_gram, backward),
            "ΔW differences": partial(distances_by_layer, peers.frobenius_by_differences, backward),
        }
        goals = {}
        if not backward:
            broadcast = partial(distances_by_layer, peers.frobenius_by_broadcast, False)
            materialised["ΔW broadcast"] = broadcast
            goals = dict.fromkeys(("ΔW broadcast", "ΔW differences"), 100.0)
        found.append(_geometry_case(passes, "768→3072", few, {**materialised, **ours}, goals))
        goals = {"reference backend": 2.0} if backward else {}
        found.append(_geometry_case(passes, "of a ViT-B", many, ours, goals))
    return found


def _geometry_case(
    passes: str,
    name: str,
    widths: Sequence[tuple[int, int]],
    makers: dict[str, Callable[[Any], Run]],
    goals: dict[str, float],
) -> Case:
    factors = 8 * 8 * sum(d_in + d_out for d_in, d_out in widths)
    return Case(
        f"pairwise_frobenius {passes}",
        f"{len(widths)} layers {name} K8 r8",
        partial(_geometry_inputs, widths),
        makers,
        ("copy of the factors", copy_factors),
        # Backward: the factors once more, and their gradients.
        traffic=factors * (1.0 if passes == "forward" else 3.0),
        goals=goals,
    )


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


def loss_problem(function: Callable[..., tuple[Tensor, Tensor]], i: Logits) -> Problem:
    """The gradients are those of IBDR's objective, Σ_k nll_k + α · divergence."""
    logits = leaf(i.logits)

    def forward() -> Tensors:
        nll, divergence = function(logits, i.targets)
        return {"nll": nll, "divergence": divergence}

    accumulator = torch.promote_types(logits.dtype, torch.float32)
    upstream = logits.new_ones(len(logits), dtype=accumulator)
    return forward, {"logits": logits}, {"nll": upstream, "divergence": upstream[0] * 0.02}


def copy_logits(i: Logits) -> Run:
    return lambda: {"copy": i.logits.clone()}


def _loss_cases() -> list[Case]:
    return [
        Case(
            "particle_loss fwd + bwd",
            f"K{k} N{rows} C{classes}",
            partial(logits_inputs, k, rows, classes),
            {
                "softmax, logdet": _forward_backward(partial(loss_problem, peers.particle_loss)),
                "mask, Cholesky": _forward_backward(
                    partial(loss_problem, peers.particle_loss_masked)
                ),
                **_ours(_forward_backward(partial(loss_problem, ml.particle_loss))),
            },
            ("copy of the logits", copy_logits),
            # The logits once in each pass, and their gradient.
            traffic=3.0 * k * rows * classes,
            half_precision=True,
            goals={"reference backend": goal},
        )
        for k, rows, classes, goal in (
            (4, 1024, 100, 5.0),
            (4, 64, 32000, 2.0),
            (8, 256, 10, 1.0),
        )
    ]


# --- whole steps ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A base model, its adapters and its data.

    targets: the shape of the targets of a batch.
    spread: the standard deviation of lora_B.
    call: (model, x) -> logits; x may be what `embed` makes of it.
    """

    name: str
    build: Callable[[], nn.Module]
    lora: dict[str, Any]
    classes: int
    draw: Callable[[Callable[..., Tensor], int], Tensor]
    targets: Callable[[int], tuple[int, ...]] = lambda batch: (batch,)
    spread: float = 0.02
    call: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)
    embed: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: x

    @property
    def scaling(self) -> float:
        return self.lora["lora_alpha"] / self.lora["r"]


@dataclass(frozen=True)
class Training:
    """K particles and, with the same weights, K PEFT models over one set of frozen weights."""

    network: Network
    frozen: nn.Module
    particles: ml.ParticleModel
    folder: tempfile.TemporaryDirectory
    x: Tensor  # (B, ...)
    y: Tensor  # (B,), or (B, L) of a language model

    def models(self, autocast: bool = True) -> list[nn.Module]:
        """autocast: PEFT's default, which keeps half-precision adapters in float32."""
        import peft

        device, dtype = self.x.device, next(self.frozen.parameters()).dtype
        models = [
            peft.PeftModel.from_pretrained(
                copy.deepcopy(self.frozen, _by_id(self.frozen)),
                f"{self.folder.name}/particle_{k}",
                is_trainable=True,
                autocast_adapter_dtype=autocast,
            )
            for k in range(self.particles.num_particles)
        ]
        if dtype.itemsize < 4:
            return [model.to(device).train() for model in models]
        return [model.to(device, dtype).train() for model in models]


def _digits_vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, **DIGITS_MODEL, num_classes=5
    )


DIGITS = Network(
    "digits ViT",
    _digits_vit,
    {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": DIGITS_TARGETS,
        "modules_to_save": ["head"],
    },
    classes=5,
    draw=lambda draw, batch: draw(batch, 1, 8, 8),
)


@functools.lru_cache(maxsize=1)
def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """The base at its random weights; kept for the next case of the same network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _by_id(model: nn.Module) -> dict[int, nn.Parameter]:
    """A memo for copy.deepcopy: what is in it is not copied, so the frozen weights exist once."""
    return {id(p): p for p in model.parameters()}


def training(
    network: Network, num_particles: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Training:
    import peft

    base = _built(network.build)
    draw = drawing(3, torch.float32, torch.device("cpu"))
    particles = ml.get_particle_model(
        copy.deepcopy(base, _by_id(base)), peft.LoraConfig(**network.lora), num_particles
    )
    with torch.no_grad():
        for adapter in particles.adapters():
            adapter.lora_B.copy_(draw(*adapter.lora_B.shape, std=network.spread))
        # Particles that predict nearly the same have a nearly singular Gram matrix, in whose
        # inverse the check would compare nothing but rounding. Each leans to a class of its own.
        for _, head in particles.heads():
            head["bias"].copy_(3 * torch.eye(*head["bias"].shape))
    folder = tempfile.TemporaryDirectory()
    particles.save_pretrained(folder.name)
    frozen = copy.deepcopy(base).to(device, dtype).requires_grad_(False)
    particles = ml.load_particle_model(copy.deepcopy(frozen, _by_id(frozen)), folder.name)
    x = network.draw(draw, batch)
    generator = torch.Generator().manual_seed(4)
    y = torch.randint(network.classes, network.targets(batch), generator=generator)
    return Training(
        network,
        frozen,
        particles.train(),
        folder,
        x.to(device, dtype if x.is_floating_point() else None),
        y.to(device),
    )


def _step(
    params: list[Tensor],
    reported: list[Tensor | tuple[Tensor, ...]],
    backward: Callable[[], dict[str, Tensor]],
) -> Run:
    """The method's backward, AdamW, zero_grad. The rate is zero: every repetition does the same.

    reported: the tensors whose gradients are checked; a tuple holds one a particle.
    """
    # capturable: the step's count lives on the GPU, so that a CUDA graph can hold it.
    on_gpu = params[0].is_cuda
    optimizer = torch.optim.AdamW(params, lr=0.0, fused=True, capturable=on_gpu)

    def run() -> Tensors:
        outputs: Tensors = {"loss": backward()["loss"]}
        optimizer.step()
        for i, t in enumerate(reported):
            outputs[f"gradient {i}"] = [p.grad for p in t] if isinstance(t, tuple) else t.grad
        optimizer.zero_grad()
        return outputs

    return run


def step_ours(method: type, i: Training) -> Run:
    model, algorithm = i.particles, method(i.particles)
    params = model.particle_parameters()
    call = i.network.call
    return _step(params, params, lambda: algorithm.backward(lambda: (call(model, i.x), i.y)))


def step_plain(
    models: type,
    method: type,
    i: Training,
    autocast: bool = True,
    distances: Callable[..., Tensor] | None = None,
) -> Run:
    """distances: how SVGD's are computed, where not on materialised ΔW."""

    def logits(model: nn.Module, x: Tensor) -> Tensor:
        return i.network.call(model, x).flatten(0, -2)

    if models is peers.VmappedModels:
        stack = peers.VmappedModels(i.models(autocast))
        # The fused attention has no batching rule; vmap would run it particle by particle.
        for module in stack.template.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        reported = stack.flat()
    else:
        stack = peers.LoopedModels(i.models(autocast), logits)
        reported = list(zip(*stack.trainable))
    backward = {
        ml.Ensemble: peers.ensemble_backward,
        ml.SVGD: partial(
            peers.svgd_backward,
            scaling=i.network.scaling,
            adapted=len(i.particles.adapters()),
            distances=distances,
        ),
        ml.IBDR: peers.IBDR(stack.flat()[0]).backward,
    }[method]
    y = i.y.flatten()
    return _step(stack.flat(), reported, lambda: backward(stack, i.x, y))


def frozen_model(passes: int, i: Training) -> Run:
    """The model without adapters on K·B rows: forward and the gradient of its input, as often as
    the method needs them. A step over these rows can hardly do less."""
    model = i.frozen
    x = i.x.repeat(i.particles.num_particles, *[1] * (i.x.ndim - 1))
    x = leaf(i.network.embed(model, x))

    def run() -> Tensors:
        for _ in range(passes):
            (dx,) = torch.autograd.grad(i.network.call(model, x).sum(), x)
        return {"dx": dx}

    return run


def _step_cases() -> list[Case]:
    default = Settings().batch_size
    sizes = [(method, default) for method in (ml.Ensemble, ml.SVGD)]
    sizes += [(ml.IBDR, batch) for batch in (8, 16, 32, 128)]
    return [
        Case(
            f"{method.__name__} step",
            f"{DIGITS.name} K4 B{batch}",
            partial(training, DIGITS, 4, batch),
            {
                "PEFT loop": partial(step_plain, peers.LoopedModels, method),
                "vmap": partial(step_plain, peers.VmappedModels, method),
                **_ours(partial(step_ours, method)),
            },
            ("frozen model", partial(frozen_model, 2 if method is ml.IBDR else 1)),
            goals={"PEFT loop": 2.0} if (method, batch) == (ml.IBDR, default) else {},
        )
        for method, batch in sizes
    ]


CASES = [*_linear_cases(), *_geometry_cases(), *_loss_cases(), *_step_cases()]
