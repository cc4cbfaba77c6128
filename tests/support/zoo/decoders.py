"""transformers' language models, and classifiers over them."""

from typing import Any

import torch

from zoo.entry import BATCH, FLOAT32_PARTS, TOKENS, VOCABULARY, Models
from zoo.of_transformers import (
    GROUPED,
    NO_CACHE,
    SPECIAL,
    TEXT,
    from_config,
    padded,
    random_ids,
    tokens,
)

MODELS = Models()
add = MODELS.add


def _decoder(name: str, prefix: str, targets: str, **fields: Any) -> None:
    config = fields.pop("config", f"{prefix}Config")
    add(
        name,
        from_config(f"{prefix}ForCausalLM", config, **GROUPED, **fields),
        tokens(**NO_CACHE),
        targets,
        tolerance=FLOAT32_PARTS,
    )


_decoder("llama", "Llama", "q_proj v_proj down_proj")
_decoder("mistral", "Mistral", "q_proj k_proj gate_proj", sliding_window=3)
_decoder("qwen2", "Qwen2", "q_proj v_proj up_proj")
_decoder("qwen3", "Qwen3", "q_proj o_proj down_proj", head_dim=4)
_decoder("gemma", "Gemma", "q_proj v_proj", head_dim=4)
_decoder("gemma2", "Gemma2", "q_proj v_proj o_proj", head_dim=4, sliding_window=3)
_decoder(
    "gemma3",
    "Gemma3",
    "q_proj k_proj up_proj",
    config="Gemma3TextConfig",
    head_dim=4,
    sliding_window=3,
)
_decoder("phi", "Phi", "q_proj dense fc1")
_decoder("phi3", "Phi3", "qkv_proj gate_up_proj")
_decoder("olmo2", "Olmo2", "q_proj k_proj v_proj")
_decoder("starcoder2", "Starcoder2", "q_proj c_fc c_proj")
_decoder("stablelm", "StableLm", "q_proj v_proj gate_proj")
_decoder("cohere", "Cohere", "q_proj o_proj")
_decoder("granite", "Granite", "q_proj v_proj")
_decoder("glm", "Glm", "q_proj gate_up_proj", head_dim=4)
_decoder("mixtral", "Mixtral", "q_proj v_proj", num_local_experts=4)
_decoder(
    "qwen2-moe",
    "Qwen2Moe",
    "q_proj shared_expert.gate_proj",
    num_experts=4,
    moe_intermediate_size=8,
)
# The heads of attention at B = 2 rows are as many as the particles' rows.
add(
    "gpt2",
    from_config(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        **SPECIAL,
    ),
    lambda: {**padded(), **NO_CACHE},
    "c_attn c_fc",
)
add(
    "gpt-neo",
    from_config(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        window_size=3,
        **SPECIAL,
    ),
    tokens(**NO_CACHE),
    "q_proj v_proj c_fc",
    tolerance=FLOAT32_PARTS,
)
add(
    "gpt-neox",
    from_config("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, rotary_pct=0.5),
    tokens(**NO_CACHE),
    "query_key_value dense",
    tolerance=FLOAT32_PARTS,
)
add(
    "gptj",
    from_config(
        "GPTJForCausalLM",
        "GPTJConfig",
        n_embd=16,
        n_layer=2,
        n_head=2,
        rotary_dim=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        **SPECIAL,
    ),
    tokens(**NO_CACHE),
    "q_proj v_proj fc_in",
    tolerance=FLOAT32_PARTS,
)
add(
    "opt",
    from_config("OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=24, word_embed_proj_dim=12),
    lambda: {**padded(), **NO_CACHE},
    "q_proj v_proj fc1 project_in",
    tolerance=FLOAT32_PARTS,
)
add(
    "bloom",
    from_config(
        "BloomForCausalLM",
        "BloomConfig",
        hidden_size=16,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        **SPECIAL,
    ),
    lambda: {**padded(), **NO_CACHE},
    "query_key_value dense_4h_to_h",
    tolerance=FLOAT32_PARTS,
)
add(
    "falcon",
    from_config("FalconForCausalLM", "FalconConfig", **TEXT, alibi=False),
    tokens(**NO_CACHE),
    "query_key_value dense",
    tolerance=FLOAT32_PARTS,
)
add(
    "falcon-alibi",
    from_config("FalconForCausalLM", "FalconConfig", **TEXT, alibi=True, multi_query=False),
    lambda: {**padded(), **NO_CACHE},
    "query_key_value dense_h_to_4h",
    tolerance=FLOAT32_PARTS,
)
add(
    "mpt",
    from_config(
        "MptForCausalLM",
        "MptConfig",
        d_model=16,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        vocab_size=VOCABULARY,
        **SPECIAL,
    ),
    tokens(**NO_CACHE),
    "Wqkv up_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "mamba",
    from_config(
        "MambaForCausalLM",
        "MambaConfig",
        hidden_size=8,
        state_size=4,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        **SPECIAL,
    ),
    tokens(**NO_CACHE),
    "in_proj x_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "llama-embeddings",
    from_config("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    lambda: {"inputs_embeds": torch.randn(BATCH, TOKENS, 16), **NO_CACHE},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    tolerance=FLOAT32_PARTS,
)
# An argument named first that all rows share, and as many positions kept as there are examples.
add(
    "llama-shared-positions",
    from_config("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    lambda: {
        "position_ids": torch.arange(3, 3 + TOKENS)[None],
        "attention_mask": torch.full((TOKENS, TOKENS), -1e9).triu(1)[None, None],
        "input_ids": random_ids(BATCH, TOKENS),
        "logits_to_keep": torch.tensor([1, 3]),
        **NO_CACHE,
    },
    "q_proj v_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "mixtral-router",
    from_config("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    tokens(output_router_logits=True, **NO_CACHE),
    "q_proj v_proj",
    tolerance=FLOAT32_PARTS,
)

# Classification with a decoder: transformers takes one example without a pad token, and no more.
_CLASSIFIER = {**GROUPED, "pad_token_id": None, "num_labels": 3}
add(
    "llama-classifier-one-example",
    from_config("LlamaForSequenceClassification", "LlamaConfig", **_CLASSIFIER),
    lambda: {"input_ids": random_ids(1, TOKENS), **NO_CACHE},
    {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="Without a pad token the model takes one row, and particles are rows.",
)
add(
    "gpt2-classifier",
    from_config(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        num_labels=3,
        **SPECIAL,
    ),
    lambda: {**padded(), **NO_CACHE},
    {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
)
