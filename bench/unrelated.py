"""K unrelated runs over one base, for multilora and for PEFT: networks, data, configurations."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multilora as ml
from bench.steps import DIGITS_MODEL, DIGITS_TARGETS

#: What run k has: entry k of each list, over and over.
RANKS, ALPHAS, RATES = (4, 8, 16), (8, 16, 16, 32), (1e-3, 3e-4, 2e-3, 5e-4, 1e-4)
#: Batches of a run, which it goes through over and over.
BATCHES = 4


@dataclass(frozen=True)
class Network:
    """A base model, what runs adapt in it, and their data.

    configs: settings of peft.LoraConfig; run k has entry k, over and over.
    batch: (generator, run, rows) -> a batch: (inputs, labels), or a mapping with labels.
    prompts: the same for `rows` prompts of unequal lengths; None where the network answers none.
    """

    name: str
    build: Callable[[], nn.Module]
    configs: Sequence[dict[str, Any]]
    batch: Callable[[torch.Generator, int, int], Any]
    prompts: Callable[[torch.Generator, int], dict[str, Tensor]] | None = None

    def config(self, run: int) -> Any:
        import peft

        numbers = {"r": RANKS[run % len(RANKS)], "lora_alpha": ALPHAS[run % len(ALPHAS)]}
        return peft.LoraConfig(**numbers, **self.configs[run % len(self.configs)])


def name_of(run: int) -> str:
    """Of the run's adapter in PEFT, which takes it out of names of tensors: no module's name."""
    return f"run_{run}"


def rate(run: int) -> float:
    return RATES[run % len(RATES)]


def _images(
    channels: int, pixels: int, classes: int, generator: torch.Generator, run: int, rows: int
) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, channels, pixels, pixels, generator=generator)
    return x, torch.randint(classes, (rows,), generator=generator)


def _texts(
    vocabulary: int, longest: int, generator: torch.Generator, run: int, rows: int
) -> dict[str, Tensor]:
    """Sequences of 1/2 to 1 of the run's own length, padded on the right to the batch's longest."""
    longest -= longest // 8 * (run % 3)
    lengths = torch.randint(longest // 2, longest + 1, (rows,), generator=generator)
    ids = torch.randint(1, vocabulary, (rows, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _prompts(
    vocabulary: int, longest: int, generator: torch.Generator, rows: int
) -> dict[str, Tensor]:
    """Prompts, padded on the left."""
    batch = _texts(vocabulary, longest, generator, 0, rows)
    return {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}


def _digits() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, **DIGITS_MODEL, num_classes=5
    )


def _vit(tiny: bool) -> nn.Module:
    import timm

    sizes = {"img_size": 32, "depth": 1} if tiny else {}
    name = "vit_tiny_patch16_224" if tiny else "vit_base_patch16_224"
    return timm.create_model(name, pretrained=False, num_classes=10, **sizes)


def _llama(vocabulary: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=vocabulary))


def _mixtral(vocabulary: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, vocab_size=vocabulary))


_HEAD = {"modules_to_save": ["head"]}
_IMAGE_TARGETS = [
    {"target_modules": DIGITS_TARGETS, **_HEAD},
    {"target_modules": ["attn.qkv", "attn.proj"], **_HEAD},
]
_TEXT_TARGETS = [
    {"target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()},
    {"target_modules": ["q_proj", "v_proj"]},
]
# PEFT holds several adapters of experts on one model only where they name the same parameters.
_EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
_EXPERT_TARGETS = [
    {"target_modules": ["q_proj", "v_proj"], **_EXPERTS},
    {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **_EXPERTS},
]


def networks(tiny: bool = False) -> dict[str, Network]:
    """By name. tiny: ViT-B/16 and the decoder at sizes for a smoke test."""
    pixels = 32 if tiny else 224
    layers, length = (1, 16) if tiny else (3, 48)
    return {
        "digits": Network("embedded ViT", _digits, _IMAGE_TARGETS, partial(_images, 1, 8, 5)),
        "decoder": Network(
            "Llama, 3 layers, d = 256",
            partial(_llama, 500, layers),
            _TEXT_TARGETS,
            partial(_texts, 500, length),
            partial(_prompts, 500, length),
        ),
        "experts": Network(
            "Mixtral, 2 layers, d = 64, 4 experts",
            partial(_mixtral, 200),
            _EXPERT_TARGETS,
            partial(_texts, 200, length),
        ),
        "vit": Network(
            "ViT-B/16", partial(_vit, tiny), _IMAGE_TARGETS, partial(_images, 3, pixels, 10)
        ),
    }


@dataclass
class Runs:
    """K runs over one base, of which every library gets adapters with the same numbers.

    rows: the batch of each run.
    frozen: the base's weights, which all models of this object share.
    folder: the adapters at their start, in PEFT's format.
    data: BATCHES batches of each run.
    """

    network: Network
    rows: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    frozen: nn.Module = field(init=False)
    folder: tempfile.TemporaryDirectory = field(init=False)
    data: list[list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.frozen = self.network.build()
        model = ml.get_particle_model(
            self.shared_base(),
            [self.network.config(k) for k in range(len(self.rows))],
            seed=0,
            head_init="reset",
        )
        with torch.no_grad():  # so that adapters matter from the start
            for p in model.particle_parameters(separate=True):
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(self.folder.name)
        self.frozen.to(self.device, self.dtype).requires_grad_(False)
        self.data = [
            [self.on_device(self.network.batch(generator, k, rows)) for _ in range(BATCHES)]
            for k, rows in enumerate(self.rows)
        ]

    @property
    def count(self) -> int:
        return len(self.rows)

    def shared_base(self) -> nn.Module:
        """The base, whose weights exist once for all models."""
        return copy.deepcopy(self.frozen, {id(p): p for p in self.frozen.parameters()})

    def on_device(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: t.to(self.device) for name, t in batch.items()}
        x, y = batch
        return x.to(self.device, self.dtype), y.to(self.device)

    def place(self, run: int) -> str:
        return str(Path(self.folder.name) / f"particle_{run}")

    def particles(self) -> ml.ParticleModel:
        model = ml.load_particle_model(
            self.shared_base(), self.folder.name, own_configurations=True
        )
        return model.to(self.device)

    def peft_model(self, runs: Sequence[int]) -> Any:
        """One PEFT model with the adapters of these runs."""
        import peft

        first, *others = runs
        model = peft.PeftModel.from_pretrained(
            self.shared_base(), self.place(first), adapter_name=name_of(first), is_trainable=True
        )
        for k in others:
            model.load_adapter(self.place(k), name_of(k), is_trainable=True)
        return model.to(self.device)


#: step(i): one step of every run on its batch i, modulo their number -> the K losses.
Step = Callable[[int], Tensor]


class Ours:
    """All runs in one pass, with ml.Independent and ml.optim.ParticleAdamW."""

    def __init__(self, runs: Runs):
        self.runs, self.model = runs, runs.particles().train()
        self.method = ml.Independent(self.model)
        self.optimizer = ml.optim.ParticleAdamW(
            [{"params": self.method.parameters_of(k), "lr": rate(k)} for k in range(runs.count)]
        )

    def step(self, i: int) -> Tensor:
        self.method.backward([batches[i % BATCHES] for batches in self.runs.data])
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.method.particle_nll is not None
        return self.method.particle_nll

    def steps(self, start: int, count: int) -> list[Tensor]:
        return [self.step(i) for i in range(start, start + count)]

    def adapters(self) -> list[dict[str, Tensor]]:
        """Every run's tensors, by PEFT's names, on the CPU."""
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            files = [Path(folder) / f"particle_{k}" for k in range(self.runs.count)]
            return [load_file(file / "adapter_model.safetensors") for file in files]


def peft_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return model(**batch, use_cache=False).loss
    x, y = batch
    return F.cross_entropy(model(x), y)


class InTurn:
    """PEFT's way for many adapters: one model, whose active adapter is switched every step."""

    def __init__(self, runs: Runs):
        self.runs = runs
        every = range(runs.count)
        self.models = self.make_models()
        self.optimizers = []
        for k in every:
            self.activate(k)
            own = [p for p in self.models[k].parameters() if p.requires_grad]
            self.optimizers.append(torch.optim.AdamW(own, lr=rate(k), fused=True))

    def make_models(self) -> list[Any]:
        """The model of every run."""
        return [self.runs.peft_model(range(self.runs.count)).train()] * self.runs.count

    def activate(self, run: int) -> None:
        self.models[run].set_adapter(name_of(run))

    def one(self, run: int, i: int) -> Tensor:
        self.activate(run)
        loss = peft_loss(self.models[run], self.runs.data[run][i % BATCHES])
        loss.backward()
        self.optimizers[run].step()
        self.optimizers[run].zero_grad()
        return loss.detach()

    def steps(self, start: int, count: int) -> list[Tensor]:
        """`count` steps of every run -> the losses (K,) of each."""
        return [
            torch.stack([self.one(k, i) for k in range(self.runs.count)])
            for i in range(start, start + count)
        ]

    def adapters(self) -> list[dict[str, Tensor]]:
        """Every run's tensors, by PEFT's names, on the CPU."""
        from peft import get_peft_model_state_dict

        found = [
            get_peft_model_state_dict(model, adapter_name=name_of(k), save_embedding_layers=False)
            for k, model in enumerate(self.models)
        ]
        return [{name: t.to("cpu", copy=True) for name, t in one.items()} for one in found]


class OneByOne(InTurn):
    """K runs one after another: each has a model of its own and takes its steps in a row."""

    def make_models(self) -> list[Any]:
        return [self.runs.peft_model([k]).train() for k in range(self.runs.count)]

    def activate(self, run: int) -> None:
        """The only adapter is the active one."""

    def steps(self, start: int, count: int) -> list[Tensor]:
        each = [
            torch.stack([self.one(k, i) for i in range(start, start + count)])
            for k in range(self.runs.count)
        ]
        return list(torch.stack(each, 1))
