"""Tiny random models for the tests, each with inputs and the LoraConfig that its users write.

`FAMILIES[name].build()` has the same weights at every call and no dropout, so that training mode
is as deterministic as evaluation mode.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import multilora as ml

VOCABULARY = 37
TOKENS = 5
#: Of the small models of transformers, as configurations name them.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


class Family(NamedTuple):
    create: Callable[[], nn.Module]
    make_inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    lora: dict[str, Any]
    # The agreement in double precision. GEMMs of other batch sizes sum in another order, some
    # hundred roundings of 1e-16; Llama's norms and rotary angles compute in float32 whatever the
    # model's dtype: a difference of 1e-16 can flip roundings of 6e-8, which then sum up.
    tolerance: float = 1e-11

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.create().to(dtype).eval()

    def inputs(
        self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        made = self.make_inputs(batch, torch.Generator().manual_seed(seed))
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in made.items()}

    def particle_inputs(self, particles: int, **kwargs: Any) -> dict[str, Tensor]:
        """A separate mini-batch for each particle: (K, B, ...)."""
        each = [self.inputs(seed=100 + k, **kwargs) for k in range(particles)]
        return {key: torch.stack([inputs[key] for inputs in each]) for key in each[0]}

    def config(self, **changes: Any) -> peft.LoraConfig:
        # Copied: PEFT extends the lists that it is given.
        return peft.LoraConfig(**copy.deepcopy({"r": 2, "lora_alpha": 3, **self.lora, **changes}))


def _vit() -> nn.Module:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 4))


class SmallCnn(nn.Module):
    """Convolutions of every kind that particles support, with BatchNorm between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 5, (1, 3), padding="same")
        self.point = nn.Conv2d(5, 8, 1)
        self.head = nn.Linear(8, 4)
        # Statistics that differ from the initial ones: a BatchNorm that is skipped shows.
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.point(self.wide(x).relu()).mean((2, 3)))


class SequenceFirst(nn.Module):
    """x (B, T, d), whose layer sees (T, B, d): the rows of a particle are apart there."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def _images(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, 8, 8, generator=generator)}


def _rows(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input": torch.randn(batch, 6, generator=generator)}


def _tokens(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids whose rows differ in length, so that the mask matters."""
    ids = torch.randint(1, VOCABULARY, (batch, TOKENS), generator=generator)
    lengths = torch.randint(2, TOKENS + 1, (batch, 1), generator=generator)
    lengths[0] = 3
    mask = (torch.arange(TOKENS) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


FAMILIES = {
    # "proj" also names the patch embedding, a convolution.
    "vit": Family(_vit, _images, {"target_modules": ["qkv", "proj"], "modules_to_save": ["head"]}),
    "llama": Family(_llama, _tokens, {"target_modules": ["q_proj", "v_proj"]}, 1e-6),
    "gpt2": Family(_gpt2, _tokens, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "bert": Family(
        _bert, _tokens, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    ),
    "mlp": Family(_mlp, _rows, {"target_modules": ["0", "2"], "modules_to_save": ["4"]}),
    "cnn": Family(
        SmallCnn,
        _images,
        {"target_modules": ["stem", "wide", "point"], "modules_to_save": ["head"]},
    ),
}


def logits_of(output: Any) -> Tensor:
    """The logits of a model of any family."""
    return getattr(output, "logits", output)


def particles_of(
    base: nn.Module, config: peft.LoraConfig, num_particles: int = 3, **kwargs: Any
) -> ml.ParticleModel:
    """Particles on a copy of `base`, in evaluation mode, all trainable tensors off their starts."""
    model = ml.get_particle_model(copy.deepcopy(base), config, num_particles, **kwargs).eval()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: ml.ParticleModel, seed: int = 1, particle: int | None = None) -> None:
    """Noise on all trainable tensors, B among them, of one particle or of all."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.particle_parameters():
        changed = parameter if particle is None else parameter[particle]
        noise = torch.randn(changed.shape, generator=generator)
        changed.add_(noise.to(changed.dtype), alpha=0.3)


def load_peft(base: nn.Module, folder: Any) -> peft.PeftModel:
    """The adapter in `folder` on a copy of `base`, as PEFT itself loads it for training."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
    return model.eval()


def peft_tensors(model: peft.PeftModel) -> dict[str, Tensor]:
    """PEFT's trainable parameters, by the names that `particle_tensors` gives them."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def particle_tensors(model: ml.ParticleModel) -> dict[str, Tensor]:
    """The stacked trainable tensors by their names in a PEFT adapter."""
    tensors = {}
    for adapter in model.adapters():
        tensors[f"{adapter.name}.lora_A.weight"] = adapter.lora_A
        tensors[f"{adapter.name}.lora_B.weight"] = adapter.lora_B
    for name, head in model.heads():
        tensors |= {f"{name}.{inner}": parameter for inner, parameter in head.items()}
    return tensors


def values(model: ml.ParticleModel) -> list[Tensor]:
    """Copies of the stacked trainable tensors."""
    return [t.detach().clone() for t in particle_tensors(model).values()]
