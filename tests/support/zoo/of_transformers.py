"""How the models of transformers are made: tiny configurations, and inputs."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zoo.entry import BATCH, TOKENS, VOCABULARY

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**WIDTHS, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
NO_CACHE = {"use_cache": False}

# transformers 4 says query and value, 5 says q_proj and v_proj.
QUERIES = ["query", "value", "q_proj", "v_proj"]


def without_dropout(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def from_config(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        made = without_dropout(getattr(transformers, config)(**fields))
        made._attn_implementation = "eager"
        if hasattr(made, "_experts_implementation"):
            # Grouped products know no float64.
            made._experts_implementation = "eager"
        return getattr(transformers, model)(made)

    return create


def random_ids(*shape: int) -> Tensor:
    # Small numbers are special tokens somewhere.
    return torch.randint(8, VOCABULARY, shape)


def tokens(**others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": random_ids(BATCH, TOKENS), **others}


def padded() -> dict[str, Any]:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": random_ids(BATCH, TOKENS), "attention_mask": mask}


def pixels(size: int = 16) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}
