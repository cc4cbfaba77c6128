"""Whole training steps: multilora, K PEFT models in a loop, and vmap over them."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import multilora as ml
from bench import peers
from bench.case import OURS, Case, Repetition
from bench.operators import by_default
from bench.repetitions import Tensors, drawing, leaf, on_backend

#: The network of `multilora train`'s task "digits", and its batch size.
DIGITS_MODEL = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 6,
    "num_heads": 3,
}
DIGITS_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
DIGITS_BATCH = 16


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

    def own_particles(self) -> ml.ParticleModel:
        """The particles anew, for one peer: a kernel that is wrong spoils those it trains."""
        base = copy.deepcopy(self.frozen, _by_id(self.frozen))
        return ml.load_particle_model(base, self.folder.name).train()

    def models(self, autocast: bool = True) -> list[nn.Module]:
        """The PEFT models. autocast: PEFT's default, float32 adapters in a half-precision model."""
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
    """A memo for copy.deepcopy that excepts the frozen weights, which then exist once."""
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
        # Particles with nearly equal predictions have a nearly singular Gram matrix, and a check of
        # its inverse would compare rounding errors. So each particle prefers another class.
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
) -> Repetition:
    """The method's backward, AdamW, zero_grad; at rate zero, so that all repetitions are equal.

    reported: the tensors whose gradients are checked; a tuple holds one per particle.
    """
    # With `capturable` the step's count is on the GPU, and a CUDA graph can hold the step.
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


def step_ours(method: type, i: Training, compile_it: bool = False) -> Repetition:
    particles, call = i.own_particles(), i.network.call
    algorithm, params = method(particles), particles.particle_parameters()
    model = torch.compile(particles, dynamic=False) if compile_it else particles
    return _step(params, params, lambda: algorithm.backward(lambda: (call(model, i.x), i.y)))


def step_plain(
    models: type,
    i: Training,
    method: type,
    autocast: bool = True,
    distances: Callable[..., Tensor] | None = None,
    compile_it: bool = False,
) -> Repetition:
    """A plain peer. distances: how SVGD's are computed, if not from materialised ΔW. compile_it:
    whether torch.compile has the models."""

    def logits(model: nn.Module, x: Tensor) -> Tensor:
        return i.network.call(model, x).flatten(0, -2)

    if models is peers.FoldedModels:
        stack = peers.FoldedModels(i.models(autocast), compile_it)
        reported = stack.flat()
    elif models is peers.VmappedModels:
        stack = peers.VmappedModels(i.models(autocast))
        # The fused attention has no batching rule; vmap would run it particle by particle.
        for module in stack.template.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        reported = stack.flat()
    else:
        each = i.models(autocast)
        if compile_it:
            each = [torch.compile(model, dynamic=False) for model in each]
        stack = peers.LoopedModels(each, logits)
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


def frozen_model(passes: int, i: Training) -> Repetition:
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


# --- the cases -----------------------------------------------------------------------------------


def cpu_steps() -> list[Case]:
    sizes = [(method, DIGITS_BATCH) for method in (ml.Ensemble, ml.SVGD)]
    sizes += [(ml.IBDR, batch) for batch in (8, 16, 32, 128)]
    return [
        Case(
            f"{method.__name__} step",
            f"{DIGITS.name} K4 B{batch}",
            partial(training, DIGITS, 4, batch),
            {
                "PEFT loop": partial(step_plain, peers.LoopedModels, method=method),
                "vmap": partial(step_plain, peers.VmappedModels, method=method),
                "folded": partial(step_plain, peers.FoldedModels, method=method),
                **by_default(partial(step_ours, method)),
            },
            ("frozen model", partial(frozen_model, 2 if method is ml.IBDR else 1)),
            goals={"PEFT loop": 2.0} if (method, batch) == (ml.IBDR, DIGITS_BATCH) else {},
        )
        for method, batch in sizes
    ]


def _vit(tiny: bool, rank: int, depth: int = 12) -> Network:
    def build() -> nn.Module:
        import timm

        name = "vit_tiny_patch16_224" if tiny else "vit_base_patch16_224"
        small = {"img_size": 32, "depth": 1} if tiny else {"depth": depth}
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


def _llama(tiny: bool, length: int, layers: int) -> Network:

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
        f"Llama 7B, {layers} layers",
        build,
        {"r": 16, "lora_alpha": 16, "target_modules": targets},
        classes=classes,
        **_tokens(length, classes),
        # The particles share the head and differ by their adapters only.
        spread=0.5,
        call=call,
        embed=lambda model, x: model.get_input_embeddings()(x),
    )


def gpu_steps(backends: Sequence[str], tiny: bool) -> list[Case]:
    images = 2 if tiny else 64
    vit4 = _vit(tiny, 16)
    vit8 = replace(vit4, lora={**vit4.lora, "r": 8, "lora_alpha": 8})
    llama = _llama(tiny, length=8 if tiny else 2048, layers=1 if tiny else 4)
    short = replace(llama, **_tokens(8 if tiny else 32, llama.classes))
    problems = [
        (ml.IBDR, vit4, vit4, 4, images),
        (ml.SVGD, vit4, vit4, 4, images),
        (ml.IBDR, llama, short, 4, 1),
        (ml.SVGD, llama, short, 4, 1),
        (ml.IBDR, vit8, vit8, 8, images),
        (ml.SVGD, vit8, vit8, 8, images),
    ]
    return [_eager_steps(*problem, backends) for problem in problems]


def _eager_steps(
    method: type,
    network: Network,
    small: Network,
    particles: int,
    batch: int,
    backends: Sequence[str],
) -> Case:
    of_vit = network.name.startswith("ViT")
    plain = partial(step_plain, method=method, distances=peers.frobenius_by_factors)
    makers: dict[str, Callable[[Any], Repetition]] = {
        "PEFT loop": partial(plain, peers.LoopedModels),
        "PEFT loop, autocast_adapter_dtype=False": partial(
            plain, peers.LoopedModels, autocast=False
        ),
    }
    if of_vit and particles == 4:
        makers["vmap"] = partial(plain, peers.VmappedModels)
    if of_vit:
        makers["folded"] = partial(plain, peers.FoldedModels, autocast=False)
    makers |= _unchecked(method, backends)
    for backend in backends if of_vit else ():
        if backend != "cuda":
            checked = partial(step_ours, method)
            makers[f"{OURS} ({backend})"] = partial(on_backend, backend, checked)
    return _step_case(method, network, small, particles, batch, makers, 45.0 if of_vit else 60.0)


def _unchecked(
    method: type, backends: Sequence[str], compile_it: bool = False
) -> dict[str, Callable[[Any], Repetition]]:
    """Ours with nonfinite="ignore": the test for such values waits for the device, so that no graph
    can hold the step."""
    ours = partial(step_ours, partial(method, nonfinite="ignore"), compile_it=compile_it)
    how = "ignore, compiled" if compile_it else "ignore"
    return {
        f"{OURS} ({backend}, {how})": partial(on_backend, backend, ours) for backend in backends
    }


def compiled_steps(backends: Sequence[str], tiny: bool) -> list[Case]:
    """IBDR on a ViT-B where torch.compile has the models. Compiling takes minutes, so the gradients
    are checked on one block."""
    vit, block = _vit(tiny, 16), _vit(tiny, 16, depth=1)
    plain = partial(step_plain, method=ml.IBDR, autocast=False)
    makers: dict[str, Callable[[Any], Repetition]] = {
        "PEFT loop": partial(plain, peers.LoopedModels),
        "PEFT loop, compiled": partial(plain, peers.LoopedModels, compile_it=True),
        "folded, compiled": partial(plain, peers.FoldedModels, compile_it=True),
    }
    makers |= _unchecked(ml.IBDR, backends)
    makers |= _unchecked(ml.IBDR, backends[1:], compile_it=True)
    case = _step_case(ml.IBDR, vit, block, 4, 2 if tiny else 64, makers, 200.0)
    return [replace(case, name=f"{case.name}, torch.compile")]


def _step_case(
    method: type,
    network: Network,
    small: Network,
    particles: int,
    batch: int,
    makers: dict[str, Callable[[Any], Repetition]],
    cost: float,
) -> Case:
    """small: the network that is checked, in float32 and with two examples."""
    case = Case(
        f"{method.__name__} step",
        f"{network.name} K{particles} B{batch}",
        partial(training, network, particles, batch),
        makers,
        ("frozen model", partial(frozen_model, 2 if method is ml.IBDR else 1)),
        half_precision=True,
        cost=cost,
        memory=particles * batch * (0.15e9 if network.name.startswith("ViT") else 8e9),
    )
    stand_in = replace(case, inputs=partial(training, small, particles, 2), half_precision=False)
    return replace(case, stand_in=stand_in)
