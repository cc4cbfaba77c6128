"""What is compared on a GPU: bfloat16 rows, float32 factors, shapes of ViT-B and 7B decoders.

`bench.plan` says in which order they run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multilora as ml
from bench import cases, floors, peers
from bench.cases import PASSES, Geometry, Linear, LinearSize, Network, Tensors
from bench.measure import OURS, Case, Run, Unavailable, default_device
from multilora.ops.dispatch import available_backends, missing_reason


def gpu_cases(backends: Sequence[str] | None = None, tiny: bool = False) -> list[Case]:
    """backends: of multilora, each a peer of its own; by default all that run here.

    tiny: the same cases at sizes for a smoke test on a CPU.
    """
    if backends is None:
        backends = available_backends(default_device().type)
    return [case for cases in families(backends, tiny).values() for case in cases]


def families(backends: Sequence[str], tiny: bool = False) -> dict[str, list[Case]]:
    """The cases by what they belong to, in the order of bench.plan."""
    vit, llm = linear_sizes(4, 16, tiny), llm_sizes(tiny)
    eight = linear_sizes(8, 8, tiny)
    shared = [replace(size, shared=True) for size in [*vit, *llm][:2]]
    both, forward, backward = "fwd + bwd", "forward", "backward"
    steps = _step_cases(backends, tiny)
    return {
        "ViT-B linears": [
            linear_case(size, p, backends) for p in (both, forward, backward) for size in vit
        ],
        "LLM linears": [
            linear_case(size, p, backends) for p in (both, forward, backward) for size in llm
        ],
        "geometry": _geometry_cases(backends, tiny),
        "particle loss": [
            loss_case(size, p, backends) for p in (both, forward) for size in _loss_sizes(tiny)
        ],
        "more linears": [
            *(linear_case(size, p, backends) for size in eight for p in (both, forward)),
            *(linear_case(size, p, backends) for size in shared for p in (both, forward)),
            *(linear_case(size, backward, backends) for size in eight),
        ],
        "ViT-B steps": [case for case in steps if case.name.startswith("ViT")],
        "Llama steps": [case for case in steps if not case.name.startswith("ViT")],
        "torch.compile": _compiled_cases([*vit, *llm], backends, tiny),
        "other libraries": _third_party_cases([*vit, *llm], backends),
    }


def _ours(backends: Sequence[str], make: Callable[[Any], Run]) -> dict[str, Callable[[Any], Run]]:
    return {f"{OURS} ({backend})": partial(on_backend, backend, make) for backend in backends}


def on_backend(backend: str, make: Callable[[Any], Run], inputs: Any) -> Run:
    """As bench.cases.on_backend; Unavailable where the backend cannot run here."""
    reason = missing_reason(backend)
    if reason is not None:
        raise Unavailable(reason)
    return cases.on_backend(backend, make, inputs)


# --- lora_linear ---------------------------------------------------------------------------------

#: At most this many times the base GEMM on the same rows: forward, forward and backward.
_GOALS = {
    (768, 768): (1.11, 1.37),
    (768, 2304): (1.11, 1.26),
    (768, 3072): (1.11, 1.24),
    (3072, 768): (1.09, 1.24),
    (4096, 4096): (1.05, 1.08),
    (4096, 11008): (1.04, 1.07),
    (11008, 4096): (1.05, 1.08),
}


def linear_sizes(particles: int, rank: int, tiny: bool) -> list[LinearSize]:
    """64 images of 224×224 a particle at the widths of ViT-B."""
    if tiny:
        return [LinearSize(64, 96, 33, particles, rank, masters=True)]
    widths = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
    return [LinearSize(*w, 64 * 197, particles, rank, masters=True) for w in widths]


def llm_sizes(tiny: bool) -> list[LinearSize]:
    if tiny:
        return [LinearSize(128, 64, 32, 4, 16, masters=True)]
    widths = ((4096, 4096), (4096, 11008), (11008, 4096))
    return [LinearSize(*w, 4096, 4, 16, masters=True) for w in widths]


def linear_case(size: LinearSize, passes: str, backends: Sequence[str]) -> Case:
    wrap = PASSES[passes]
    stacked = {"baddbmm": peers.lora_baddbmm, "vmap": peers.lora_vmap}
    if not size.shared:
        stacked["addmm"] = peers.lora_addmm
    makers = {"naive loop": wrap(cases.linear_loop)}
    makers |= {
        name: wrap(partial(cases.linear_stacked, function)) for name, function in stacked.items()
    }
    if passes != "backward":
        # Its active adapter is the only one that can be differentiated: no backward of a forward
        # of all adapters.
        for autocast in (True, False):
            name = f"PEFT autocast_adapter_dtype={autocast}"
            makers[name] = partial(_linear_peft, passes, autocast)
    if passes == "forward":
        makers["merged"] = _linear_merged
    makers |= _ours(backends, wrap(partial(cases.linear_stacked, cases.linear_ours)))
    shape = (size.d_in, size.d_out, size.rows, size.particles, size.rank, size.shared)
    forward, both = _GOALS.get((size.d_in, size.d_out), (0.0, 0.0))
    return Case(
        f"lora_linear {passes}",
        str(size),
        size.inputs,
        makers,
        ("base GEMM", partial(cases.base_gemm, passes)),
        half_precision=True,
        work=floors.lora_linear(*shape, passes),
        goal=0.0 if size.shared else {"forward": forward, "fwd + bwd": both}.get(passes, 0.0),
        # It is inference only: bfloat16 rounds a small ΔW away.
        asides=frozenset({"merged"}),
        cost=8.0 if size.d_in * size.d_out >= 4096**2 else 4.0,
        # In float64 the inputs, the outputs and what is between, and all peers' outputs in turn.
        memory=48.0 * size.particles * size.rows * (size.d_in + size.d_out),
    )


def _linear_peft(passes: str, autocast: bool, i: Linear) -> Run:
    """Adapter after adapter, each with its backward at once."""
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


def _linear_merged(i: Linear) -> Run:
    weights = peers.merge(i.weight, i.lora_A, i.lora_B, i.scaling)  # (K, d_out, d_in)

    @torch.no_grad()
    def run() -> Tensors:
        if i.x.ndim == 2:
            y = F.linear(i.x, weights.flatten(0, 1), i.bias.repeat(len(weights)))
            return {"y": y.unflatten(1, weights.shape[:2]).transpose(0, 1)}
        return {"y": torch.baddbmm(i.bias.expand(len(weights), 1, -1), i.x, weights.mT)}

    return run


def _compiled_cases(sizes: Sequence[LinearSize], backends: Sequence[str], tiny: bool) -> list[Case]:
    """The best plain forms under torch.compile; apart, because compiling them takes long."""
    wrap = PASSES["fwd + bwd"]
    linear = partial(cases.linear_stacked, _compiled(peers.lora_baddbmm))
    loss = partial(cases.loss_problem, _compiled(peers.particle_loss_masked))
    chosen = [(linear_case(size, "fwd + bwd", backends), linear) for size in sizes[1::3]]
    sizes = _loss_sizes(tiny)[:4:3]
    chosen += [(loss_case(size, "fwd + bwd", backends), loss) for size in sizes]
    return [
        replace(
            case,
            name=f"{case.name}, torch.compile",
            peers={**case.peers, "compiled": wrap(make)},
            cost=40.0,
        )
        for case, make in chosen
    ]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called: already asking for it imports the compiler."""
    compiled = functools.cache(partial(torch.compile, function, dynamic=False))
    return lambda *args: compiled()(*args)


def _third_party_cases(sizes: Sequence[LinearSize], backends: Sequence[str]) -> list[Case]:
    """Libraries that change PyTorch or transformers when they are imported: after all others."""
    others = {"unsloth matmul_lora": _linear_unsloth, "quack gemm_add": _linear_quack}
    found = []
    for size in sizes[1::3]:
        case = linear_case(size, "forward", backends)
        name = f"{case.name}, other libraries"
        found.append(replace(case, name=name, peers={**case.peers, **others}))
    return found


def _import(package: str, module: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    return importlib.import_module(module)


def _linear_unsloth(i: Linear) -> Run:
    matmul_lora = _import("unsloth", "unsloth.kernels.utils").matmul_lora

    @torch.no_grad()
    def run() -> Tensors:
        factors = zip(i.x, i.lora_A, i.lora_B)
        return {
            "y": [matmul_lora(x, i.weight, None, A, B, i.scaling) + i.bias for x, A, B in factors]
        }

    return run


def _linear_quack(i: Linear) -> Run:
    gemm_add = _import("quack", "quack.gemm_interface").gemm_add

    @torch.no_grad()
    def run() -> Tensors:
        A, B = i.lora_A.to(i.x.dtype), i.lora_B.to(i.x.dtype)
        shrunk = torch.bmm(i.x, A.mT)
        y = torch.baddbmm(i.bias.expand(len(A), 1, -1), shrunk, B.mT, alpha=i.scaling)
        y = gemm_add(i.x.flatten(0, 1), i.weight.mT, y.flatten(0, 1))
        return {"y": y.unflatten(0, i.x.shape[:2])}

    return run


# --- particle loss -------------------------------------------------------------------------------


#: K, N, C
LossSize = tuple[int, int, int]


def _loss_sizes(tiny: bool) -> list[LossSize]:
    if tiny:
        return [(4, 16, 10), (4, 4, 100)]
    return [(4, 1024, 100), (8, 256, 10), (4, 64, 32000), (4, 1024, 32000), (4, 64, 152000)]


def loss_case(size: LossSize, passes: str, backends: Sequence[str]) -> Case:
    wrap = PASSES[passes]
    k, rows, classes = size
    functions = {"softmax, logdet": peers.particle_loss, "mask, Cholesky": _masked}
    makers = {name: wrap(partial(cases.loss_problem, f)) for name, f in functions.items()}
    makers |= _ours(backends, wrap(partial(cases.loss_problem, ml.particle_loss)))
    return Case(
        f"particle_loss {passes}",
        f"K{k} N{rows} C{classes}",
        partial(cases.logits_inputs, k, rows, classes),
        makers,
        ("copy of the logits", cases.copy_logits),
        half_precision=True,
        work=floors.particle_loss(k, rows, classes, passes),
        memory=64.0 * k * rows * classes,
    )


_masked = peers.particle_loss_masked


# --- geometry and SVGD's update ------------------------------------------------------------------


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
        draw = cases.drawing(1, dtype, device)
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


def _models(tiny: bool) -> list[Layers]:
    if tiny:
        return [Layers("tiny", ((16, 24), (24, 16), (16, 24)), 4, 4)]
    vit = 4 * ((768, 768),) + ((768, 3072), (3072, 768))
    decoder = 4 * ((4096, 4096),) + 2 * ((4096, 11008),) + ((11008, 4096),)
    return [
        Layers("ViT-B", 12 * vit, 8, 8),
        Layers("7B decoder", 32 * decoder, 8, 16),
        Layers("a block of a 7B decoder", decoder, 8, 16),
    ]


def _geometry_cases(backends: Sequence[str], tiny: bool) -> list[Case]:
    found = []
    for layers in _models(tiny):
        found += [geometry_case(layers, passes, backends) for passes in ("forward", "fwd + bwd")]
        found.append(update_case(layers, backends))
    return found


def geometry_case(layers: Layers, passes: str, backends: Sequence[str]) -> Case:
    plain = {"factor products": peers.frobenius_by_factors}
    # The ΔW of a whole 7B decoder take seconds a call.
    if len(layers.widths) < 100:
        plain = {"ΔW Gram GEMM": peers.frobenius_by_gram, **plain}
    makers = {
        name: partial(cases.distances_by_layer, function, passes != "forward")
        for name, function in plain.items()
    }
    makers |= _ours(backends, PASSES[passes](cases.distances_ours))
    return Case(
        f"pairwise_frobenius {passes}",
        str(layers),
        layers.inputs,
        makers,
        ("copy of the factors", cases.copy_factors),
        work=floors.pairwise_frobenius(layers.widths, layers.particles, layers.rank, passes),
        cost=6.0,
        memory=layers.memory,
    )


def update_case(layers: Layers, backends: Sequence[str]) -> Case:
    return Case(
        "SVGD update",
        str(layers),
        partial(_update_inputs, layers),
        {"factor products": _update_plain, **_ours(backends, _update_ours)},
        ("copy of the factors", lambda i: cases.copy_factors(i.geometry)),
        work=floors.svgd_update(layers.widths, layers.particles, layers.rank),
        cost=6.0,
        memory=layers.memory,
    )


@dataclass(frozen=True)
class Update:
    geometry: Geometry
    grads: list[Tensor]  # of lora_A and lora_B, layer by layer

    def stacked(self) -> list[Tensor]:
        pairs = zip(self.geometry.lora_A, self.geometry.lora_B)
        return [t for pair in pairs for t in pair]


def _update_inputs(layers: Layers, dtype: torch.dtype, device: torch.device) -> Update:
    geometry = layers.inputs(dtype, device)
    draw = cases.drawing(5, dtype, device)
    pairs = zip(geometry.lora_A, geometry.lora_B)
    return Update(geometry, [draw(*t.shape, std=1e-3) for pair in pairs for t in pair])


class _Given(torch.autograd.Function):
    """A loss (K,) with given gradients: what is timed is the method, not a model."""

    @staticmethod
    def forward(ctx, grads, *params):
        ctx.grads = grads
        return params[0].new_zeros(params[0].shape[0])

    @staticmethod
    def backward(ctx, _):
        return (None, *ctx.grads)


def _update_ours(i: Update) -> Run:
    params = [t.detach().requires_grad_() for t in i.stacked()]
    adapters = [
        SimpleNamespace(lora_A=A, lora_B=B, scaling=i.geometry.scaling)
        for A, B in zip(params[::2], params[1::2])
    ]
    model = SimpleNamespace(
        particle_parameters=lambda: params, adapters=lambda: adapters, heads=lambda: []
    )
    method = ml.SVGD(model, loss=lambda *_: _Given.apply(i.grads, *params))

    def run() -> Tensors:
        for p in params:
            p.grad = None
        method.backward(lambda: (None, None))
        return {"direction": [p.grad for p in params]}

    return run


def _update_plain(i: Update) -> Run:
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


# --- whole steps ---------------------------------------------------------------------------------


def _vit(tiny: bool, rank: int) -> Network:
    def build() -> nn.Module:
        import timm

        name = "vit_tiny_patch16_224" if tiny else "vit_base_patch16_224"
        small = {"img_size": 32, "depth": 1} if tiny else {}
        return timm.create_model(name, pretrained=False, num_classes=10, **small)

    pixels = 32 if tiny else 224
    targets = ["qkv", "attn.proj", "fc1", "fc2"]
    return Network(
        "ViT-B/16",
        build,
        {"r": rank, "lora_alpha": rank, "target_modules": targets, "modules_to_save": ["head"]},
        classes=10,
        draw=lambda draw, batch: draw(batch, 3, pixels, pixels),
    )


def _tokens(length: int, classes: int) -> dict[str, Callable[..., Any]]:
    """Sequences of `length` tokens."""
    return {
        "draw": lambda draw, batch: (draw(batch, length).abs() * classes / 8).long() % classes,
        "targets": lambda batch: (batch, length),
    }


def _llama(tiny: bool, length: int, layers: int = 1) -> Network:

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        width = 32 if tiny else 4096
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=64 if tiny else 11008,
            num_attention_heads=4 if tiny else 32,
            num_hidden_layers=layers,
            vocab_size=classes,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def call(model: Any, x: Tensor) -> Tensor:
        name = "inputs_embeds" if x.is_floating_point() else "input_ids"
        return model(**{name: x}).logits

    classes = 64 if tiny else 32000
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    return Network(
        f"Llama 7B, {layers} layer",
        build,
        {"r": 16, "lora_alpha": 16, "target_modules": targets},
        classes=classes,
        **_tokens(length, classes),
        # Without heads of their own, the particles differ by their adapters only.
        spread=0.5,
        call=call,
        embed=lambda model, x: model.get_input_embeddings()(x),
    )


def _step_cases(backends: Sequence[str], tiny: bool) -> list[Case]:
    images = 2 if tiny else 64
    vit4 = _vit(tiny, 16)
    vit8 = replace(vit4, lora={**vit4.lora, "r": 8, "lora_alpha": 8})
    llama = _llama(tiny, length=8 if tiny else 2048)
    short = replace(llama, **_tokens(8 if tiny else 32, llama.classes))
    problems = [
        (ml.IBDR, vit4, vit4, 4, images),
        (ml.SVGD, vit4, vit4, 4, images),
        (ml.IBDR, llama, short, 4, 2),
        (ml.SVGD, llama, short, 4, 2),
        (ml.IBDR, vit8, vit8, 8, images),
        (ml.SVGD, vit8, vit8, 8, images),
    ]
    return [_step_case(*problem, backends) for problem in problems]


def _step_case(
    method: type,
    network: Network,
    small: Network,
    particles: int,
    batch: int,
    backends: Sequence[str],
) -> Case:
    plain = partial(cases.step_plain, peers.LoopedModels, method)
    distances = peers.frobenius_by_factors
    makers: dict[str, Callable[[Any], Run]] = {
        "PEFT loop": partial(plain, distances=distances),
        "PEFT loop, autocast_adapter_dtype=False": partial(
            plain, autocast=False, distances=distances
        ),
    }
    if network.name.startswith("ViT") and particles == 4:
        makers["vmap"] = partial(cases.step_plain, peers.VmappedModels, method, distances=distances)
    # Also without the look for non-finite values: it waits for the device, so no graph holds it.
    for backend in backends:
        unchecked = partial(cases.step_ours, partial(method, nonfinite="ignore"))
        makers[f"{OURS} ({backend}, ignore)"] = partial(on_backend, backend, unchecked)
        if backend != "cuda":
            looks = partial(cases.step_ours, method)
            makers[f"{OURS} ({backend})"] = partial(on_backend, backend, looks)
    case = Case(
        f"{method.__name__} step",
        f"{network.name} K{particles} B{batch}",
        partial(cases.training, network, particles, batch),
        makers,
        ("frozen model", partial(cases.frozen_model, 2 if method is ml.IBDR else 1)),
        half_precision=True,
        cost=45.0,
        memory=particles * batch * (0.15e9 if network.name.startswith("ViT") else 2.5e9),
    )
    stand_in = replace(
        case, inputs=partial(cases.training, small, particles, 2), half_precision=False
    )
    return replace(case, stand_in=stand_in)
