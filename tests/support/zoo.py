"""Tiny random models of many architectures, each with inputs and the LoraConfig that users write.

`ZOO[name].build()` gives the same weights at every call, in float64 unless asked otherwise, without
dropout, so that training mode is as deterministic as evaluation mode. No parameter is left at zero
or one: an addition that a fresh model would hide (LayerScale, biases, position tables) counts.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

VOCABULARY = 64
BATCH = 2
TOKENS = 5
# What float64 agrees to. Products of other batch sizes sum in another order, some hundred
# roundings of 1e-16.
EXACT = 1e-10
# Norms, rotary angles and softmax that compute in float32 whatever the model's dtype: a difference
# of 1e-16 can flip roundings of 6e-8, which then sum up.
FLOAT32_PARTS = 1e-5


class Entry(NamedTuple):
    create: Callable[[], nn.Module]
    # Keyword arguments of the forward, or positional ones.
    make_inputs: Callable[[], dict[str, Any] | tuple]
    lora: dict[str, Any]
    # "batch", or "loop" where folding the particles into the batch is refused, and why.
    fold: str = "batch"
    why: str = ""
    tolerance: float = EXACT
    # What get_particle_model is told about this model's axes.
    axes: Mapping[str, Any] = MappingProxyType({})
    # Outputs that all particles share, by their places; they have no particle axis.
    shared: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.create().to(dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, dtype=dtype))
        return model

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any] | tuple:
        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = self.make_inputs()
        return tree_map_only(Tensor, cast, made)

    def config(self) -> peft.LoraConfig:
        # Copied: PEFT extends the lists that it is given.
        return peft.LoraConfig(r=2, lora_alpha=3, **copy.deepcopy(self.lora))


def call(model: Callable, inputs: dict[str, Any] | tuple) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(**inputs)


ZOO: dict[str, Entry] = {}


def add(name: str, create: Callable, make_inputs: Callable, lora: Any, **options: Any) -> None:
    """`lora`: LoraConfig's arguments, or the names of its target_modules in one string."""
    lora = {"target_modules": lora.split()} if isinstance(lora, str) else lora
    ZOO[name] = Entry(create, make_inputs, lora, **options)


# transformers. ------------------------------------------------------------------------------------


def _without_dropout(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def _hf(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        made = _without_dropout(getattr(transformers, config)(**fields))
        made._attn_implementation = "eager"
        if hasattr(made, "_experts_implementation"):
            # Grouped products know no float64.
            made._experts_implementation = "eager"
        return getattr(transformers, model)(made)

    return create


def _ids(*shape: int) -> Tensor:
    # Small numbers are special tokens somewhere.
    return torch.randint(8, VOCABULARY, shape)


def _tokens(**others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": _ids(BATCH, TOKENS), **others}


def _padded() -> dict[str, Any]:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": _ids(BATCH, TOKENS), "attention_mask": mask}


def _pixels(size: int = 16) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 240)}


_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_WIDTHS, **_SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
_GROUPED = {**_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
_NO_CACHE = {"use_cache": False}


def _decoder(name: str, prefix: str, targets: str, **fields: Any) -> None:
    config = fields.pop("config", f"{prefix}Config")
    add(
        name,
        _hf(f"{prefix}ForCausalLM", config, **_GROUPED, **fields),
        _tokens(**_NO_CACHE),
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
    _hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        **_SPECIAL,
    ),
    lambda: {**_padded(), **_NO_CACHE},
    "c_attn c_fc",
)
add(
    "gpt-neo",
    _hf(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        window_size=3,
        **_SPECIAL,
    ),
    _tokens(**_NO_CACHE),
    "q_proj v_proj c_fc",
    tolerance=FLOAT32_PARTS,
)
add(
    "gpt-neox",
    _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT, rotary_pct=0.5),
    _tokens(**_NO_CACHE),
    "query_key_value dense",
    tolerance=FLOAT32_PARTS,
)
add(
    "gptj",
    _hf(
        "GPTJForCausalLM",
        "GPTJConfig",
        n_embd=16,
        n_layer=2,
        n_head=2,
        rotary_dim=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        **_SPECIAL,
    ),
    _tokens(**_NO_CACHE),
    "q_proj v_proj fc_in",
    tolerance=FLOAT32_PARTS,
)
add(
    "opt",
    _hf("OPTForCausalLM", "OPTConfig", **_TEXT, ffn_dim=24, word_embed_proj_dim=12),
    lambda: {**_padded(), **_NO_CACHE},
    "q_proj v_proj fc1 project_in",
    tolerance=FLOAT32_PARTS,
)
add(
    "bloom",
    _hf(
        "BloomForCausalLM",
        "BloomConfig",
        hidden_size=16,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        **_SPECIAL,
    ),
    lambda: {**_padded(), **_NO_CACHE},
    "query_key_value dense_4h_to_h",
    tolerance=FLOAT32_PARTS,
)
add(
    "falcon",
    _hf("FalconForCausalLM", "FalconConfig", **_TEXT, alibi=False),
    _tokens(**_NO_CACHE),
    "query_key_value dense",
    tolerance=FLOAT32_PARTS,
)
add(
    "falcon-alibi",
    _hf("FalconForCausalLM", "FalconConfig", **_TEXT, alibi=True, multi_query=False),
    lambda: {**_padded(), **_NO_CACHE},
    "query_key_value dense_h_to_4h",
    tolerance=FLOAT32_PARTS,
)
add(
    "mpt",
    _hf(
        "MptForCausalLM",
        "MptConfig",
        d_model=16,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        vocab_size=VOCABULARY,
        **_SPECIAL,
    ),
    _tokens(**_NO_CACHE),
    "Wqkv up_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "mamba",
    _hf(
        "MambaForCausalLM",
        "MambaConfig",
        hidden_size=8,
        state_size=4,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        **_SPECIAL,
    ),
    _tokens(**_NO_CACHE),
    "in_proj x_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "llama-embeddings",
    _hf("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    lambda: {"inputs_embeds": torch.randn(BATCH, TOKENS, 16), **_NO_CACHE},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    tolerance=FLOAT32_PARTS,
)
# An argument named first that all rows share, and as many positions kept as there are examples.
add(
    "llama-shared-positions",
    _hf("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    lambda: {
        "position_ids": torch.arange(3, 3 + TOKENS)[None],
        "attention_mask": torch.full((TOKENS, TOKENS), -1e9).triu(1)[None, None],
        "input_ids": _ids(BATCH, TOKENS),
        "logits_to_keep": torch.tensor([1, 3]),
        **_NO_CACHE,
    },
    "q_proj v_proj",
    tolerance=FLOAT32_PARTS,
)
add(
    "mixtral-router",
    _hf("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4),
    _tokens(output_router_logits=True, **_NO_CACHE),
    "q_proj v_proj",
    tolerance=FLOAT32_PARTS,
)

# Classification with a decoder: transformers takes one example without a pad token, and no more.
_CLASSIFIER = {**_GROUPED, "pad_token_id": None, "num_labels": 3}
add(
    "llama-classifier-one-example",
    _hf("LlamaForSequenceClassification", "LlamaConfig", **_CLASSIFIER),
    lambda: {"input_ids": _ids(1, TOKENS), **_NO_CACHE},
    {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="Without a pad token the model takes one row, and particles are rows.",
)
add(
    "gpt2-classifier",
    _hf(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        num_labels=3,
        **_SPECIAL,
    ),
    lambda: {**_padded(), **_NO_CACHE},
    {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
)

# Encoders.
_SEQ_CLS = {"task_type": "SEQ_CLS"}


def _encoder(name: str, prefix: str, targets: str, task: str, fields: dict, **options: Any) -> None:
    kind = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task]
    add(
        name,
        _hf(f"{prefix}For{kind}", f"{prefix}Config", num_labels=3, **fields),
        options.pop("make_inputs", _padded),
        {"target_modules": targets.split(), "task_type": task},
        **options,
    )


_encoder("bert", "Bert", "query value dense", "SEQ_CLS", _TEXT)
_encoder("bert-tokens", "Bert", "query key", "TOKEN_CLS", _TEXT)
_encoder("roberta", "Roberta", "query value", "SEQ_CLS", _TEXT)
_encoder("xlm-roberta", "XLMRoberta", "query value", "TOKEN_CLS", _TEXT)
_encoder(
    "distilbert",
    "DistilBert",
    "q_lin v_lin lin1",
    "SEQ_CLS",
    {
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    },
)
# One block for all layers: each adapter is called twice.
_encoder("albert", "Albert", "query value ffn", "SEQ_CLS", {**_TEXT, "embedding_size": 8})
_encoder("electra", "Electra", "query value", "SEQ_CLS", {**_TEXT, "embedding_size": 8})
_RELATIVE = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_encoder("deberta", "Deberta", "in_proj pos_proj", "SEQ_CLS", _RELATIVE)
# The projections also see the relative positions, (1, span, d), that all rows share.
add(
    "deberta-v3",
    _hf(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **_RELATIVE,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
        num_labels=3,
    ),
    _padded,
    _SEQ_CLS,
)
add(
    "deberta-v2",
    _hf(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **_RELATIVE,
        share_att_key=False,
        num_labels=3,
    ),
    _padded,
    {"target_modules": ["query_proj", "pos_key_proj", "pos_query_proj"], **_SEQ_CLS},
)
_encoder(
    "modernbert",
    "ModernBert",
    "Wqkv Wo Wi",
    "SEQ_CLS",
    {**_TEXT, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    tolerance=FLOAT32_PARTS,
)
_encoder("mpnet", "MPNet", "q v o", "SEQ_CLS", _TEXT)
_encoder(
    "funnel",
    "Funnel",
    "q_head k_head post_proj",
    "SEQ_CLS",
    {
        "vocab_size": VOCABULARY,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 24,
    },
)
_encoder(
    "convbert",
    "ConvBert",
    "query value",
    "SEQ_CLS",
    {**_TEXT, "num_attention_heads": 4, "embedding_size": 16, "conv_kernel_size": 3},
)
_encoder(
    "longformer",
    "Longformer",
    "query value",
    "SEQ_CLS",
    {**_TEXT, "attention_window": [4, 4]},
    fold="loop",
    why="Its layers see (time, batch, width).",
)
# Works with the time axis first inside: its hidden states are (T, B, d).
_encoder(
    "xlnet",
    "XLNet",
    "layer_1 layer_2",
    "SEQ_CLS",
    {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    fold="loop",
    why="Its layers see (time, batch, width).",
)
add(
    "fnet",
    _hf("FNetForSequenceClassification", "FNetConfig", **_TEXT, num_labels=3),
    _tokens(),
    {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
)
_encoder("esm", "Esm", "query value", "SEQ_CLS", {**_TEXT, "mask_token_id": 3})
_encoder("roformer", "RoFormer", "query value", "SEQ_CLS", {**_TEXT, "embedding_size": 8})

# Encoders with decoders.
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _translation() -> dict[str, Any]:
    return {**_padded(), "decoder_input_ids": _ids(BATCH, 4), **_NO_CACHE}


def _sparse() -> dict[str, Any]:
    # Layers without experts have a number in place of the logits, before transformers 5.
    return {**_translation(), "output_router_logits": False}


for _name, _prefix in (("bart", "Bart"), ("pegasus", "Pegasus"), ("mbart", "MBart")):
    add(
        _name,
        _hf(f"{_prefix}ForConditionalGeneration", f"{_prefix}Config", **_SEQ2SEQ),
        _translation,
        "q_proj v_proj fc1",
    )
add("marian", _hf("MarianMTModel", "MarianConfig", **_SEQ2SEQ), _translation, "q_proj v_proj fc2")
add(
    "t5",
    _hf("T5ForConditionalGeneration", "T5Config", **_T5),
    _translation,
    "q v wi",
    tolerance=FLOAT32_PARTS,
)
# Its experts see the tokens that the router sends to them: how many is a matter of the tokens.
add(
    "switch-transformers",
    _hf(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        **_T5,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    _sparse,
    "q v",
    tolerance=FLOAT32_PARTS,
)
add(
    "switch-transformers-experts",
    _hf(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        **_T5,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    _sparse,
    "q wi wo",
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="Experts see the tokens that are sent to them, another number for each particle.",
)
add(
    "whisper",
    _hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=16,
    ),
    lambda: {
        "input_features": torch.randn(BATCH, 4, 20),
        "decoder_input_ids": _ids(BATCH, 3),
        **_NO_CACHE,
    },
    "q_proj v_proj fc1",
)

# transformers 4 says query and value, 5 says q_proj and v_proj.
_QUERIES = ["query", "value", "q_proj", "v_proj"]

# Speech.
_SPEECH = {
    **_WIDTHS,
    "vocab_size": 12,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
add("wav2vec2", _hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH), _waves, "q_proj v_proj")
add(
    "wav2vec2-conformer",
    _hf(
        "Wav2Vec2ConformerForCTC",
        "Wav2Vec2ConformerConfig",
        **_SPEECH,
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=3,
    ),
    _waves,
    "linear_q linear_v linear_pos",
    fold="loop",
    why="The projected positions are viewed as one row's.",
)
add("hubert", _hf("HubertForCTC", "HubertConfig", **_SPEECH), _waves, "q_proj v_proj")
add("wavlm", _hf("WavLMForCTC", "WavLMConfig", **_SPEECH), _waves, "intermediate_dense")
add(
    "audio-spectrogram-transformer",
    _hf(
        "ASTForAudioClassification",
        "ASTConfig",
        **_WIDTHS,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=8,
        num_mel_bins=8,
        num_labels=3,
    ),
    lambda: {"input_values": torch.randn(BATCH, 8, 8)},
    {"target_modules": [*_QUERIES, "dense"], "modules_to_save": ["classifier"]},
)

# Vision.
_IMAGE = {**_WIDTHS, "image_size": 16, "patch_size": 8, "num_labels": 3}
_IMAGE_LORA = {"target_modules": _QUERIES, "modules_to_save": ["classifier"]}
for _name, _prefix in (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")):
    add(
        f"{_name}-transformers",
        _hf(f"{_prefix}ForImageClassification", f"{_prefix}Config", **_IMAGE),
        _pixels(),
        _IMAGE_LORA,
    )
add(
    "beit-transformers",
    _hf(
        "BeitForImageClassification", "BeitConfig", **_IMAGE, use_shared_relative_position_bias=True
    ),
    _pixels(),
    _IMAGE_LORA,
)
_WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 3,
}
# Attention folds the windows of all images into the batch.
add(
    "swin-transformers",
    _hf("SwinForImageClassification", "SwinConfig", **_WINDOWS),
    _pixels(),
    _IMAGE_LORA,
)
add(
    "swinv2-transformers",
    _hf("Swinv2ForImageClassification", "Swinv2Config", **_WINDOWS),
    _pixels(),
    _IMAGE_LORA,
    tolerance=FLOAT32_PARTS,
)
add(
    "convnext-transformers",
    _hf(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        num_labels=3,
    ),
    _pixels(),
    {"target_modules": ["pwconv1", "pwconv2"], "modules_to_save": ["classifier"]},
)
add(
    "resnet-transformers",
    _hf(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=4,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    ),
    _pixels(),
    {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]},
)
add(
    "segformer",
    _hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    ),
    _pixels(),
    {"target_modules": [*_QUERIES, "sr"], "modules_to_save": ["decode_head.classifier"]},
)
add(
    "videomae",
    _hf("VideoMAEForVideoClassification", "VideoMAEConfig", **_IMAGE, num_frames=4, tubelet_size=2),
    lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 16, 16)},
    {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
)

# Text and images.
_TOWER = {**_WIDTHS, "num_attention_heads": 2}
_CLIP = {
    "text_config": {**_TEXT, "max_position_embeddings": 16},
    "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}


def _contrast(texts: int, images: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "input_ids": torch.cat([_ids(texts, TOKENS), torch.full((texts, 1), 2)], 1),
        "pixel_values": torch.randn(images, 3, 16, 16),
    }


# Every image is compared with every text, (images, texts): all rows of the batch meet.
add(
    "clip",
    _hf("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(2, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-loss",
    _hf("CLIPModel", "CLIPConfig", **_CLIP),
    lambda: {**_contrast(2, 2)(), "return_loss": True},
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
# As many prompts as K = 3 particles have rows.
add(
    "clip-zero-shot",
    _hf("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(6, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-images-of-one-text",
    _hf("CLIPModel", "CLIPConfig", **_CLIP),
    _contrast(2, 6),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "siglip",
    _hf(
        "SiglipModel",
        "SiglipConfig",
        text_config={**_TEXT, "max_position_embeddings": 16, "projection_size": 16},
        vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
    ),
    _contrast(2, 2),
    "q_proj v_proj",
    fold="loop",
    why="Every image is compared with every text.",
)
add(
    "clip-vision",
    _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **_CLIP["vision_config"]),
    _pixels(),
    {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["visual_projection"]},
)
add(
    "siglip-vision",
    _hf(
        "SiglipForImageClassification",
        "SiglipConfig",
        num_labels=3,
        **{
            "text_config": {**_TEXT, "projection_size": 16},
            "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
        },
    ),
    _pixels(),
    {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
)
_IMAGE_TOKEN = 7


def _two_images() -> dict[str, Any]:
    """Two examples of two images each: pixel_values has four rows, and four patches an image."""
    image = torch.full((BATCH, 4), _IMAGE_TOKEN)
    parts = [_ids(BATCH, 2), image, _ids(BATCH, 1), image, _ids(BATCH, 2)]
    return {
        "input_ids": torch.cat(parts, 1),
        "pixel_values": torch.randn(2 * BATCH, 3, 16, 16),
        **_NO_CACHE,
    }


add(
    "llava-two-images",
    lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_CLIP["vision_config"]),
            text_config=transformers.LlamaConfig(**_GROUPED),
            image_token_index=_IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    ),
    _two_images,
    {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="Images are twice as many as rows.",
)
add(
    "llava-one-image",
    ZOO["llava-two-images"].create,
    lambda: {
        "input_ids": torch.cat([torch.full((BATCH, 4), _IMAGE_TOKEN), _ids(BATCH, 3)], 1),
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        **_NO_CACHE,
    },
    "q_proj v_proj linear_1",
    tolerance=FLOAT32_PARTS,
    # Before transformers 5 they are one tensor, and the fold is right.
    fold="loop" if transformers.__version__ >= "5" else "batch",
    why="The image features are a list with an entry for every row.",
)


def _patches() -> dict[str, Any]:
    """One image an example, of 4 × 4 and 4 × 8 patches, in one list; 2 × 2 patches make a token."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    ids = _ids(BATCH, 12)
    kinds = torch.zeros_like(ids)
    mask = torch.ones_like(ids)
    for row, start, count in ((0, 2, 4), (1, 3, 8)):
        ids[row, start - 1] = 5
        ids[row, start : start + count] = _IMAGE_TOKEN
        kinds[row, start : start + count] = 1
    mask[0, 9:] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(16 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        **_NO_CACHE,
    }
    # From transformers 5 on, what kind each token is comes with the ids.
    if transformers.__version__ >= "5":
        inputs["mm_token_type_ids"] = kinds
    return inputs


_ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
add(
    "qwen2-vl",
    _hf(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text_config={
            **_TEXT,
            "num_key_value_heads": 1,
            "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling": _ROPE,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=_IMAGE_TOKEN,
        vision_start_token_id=5,
        vision_end_token_id=6,
    ),
    _patches,
    "q_proj v_proj qkv",
    tolerance=FLOAT32_PARTS,
    fold="loop",
    why="The patches of all images are one list.",
)
add(
    "blip-2",
    lambda: transformers.Blip2ForConditionalGeneration(
        _without_dropout(
            transformers.Blip2Config(
                vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
                qformer_config={**_TEXT, "encoder_hidden_size": 16},
                text_config={
                    "model_type": "opt",
                    **_TEXT,
                    "ffn_dim": 24,
                    "word_embed_proj_dim": 16,
                },
                num_query_tokens=3,
                image_token_index=_IMAGE_TOKEN,
            )
        )
    ),
    lambda: {
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "input_ids": torch.cat([torch.full((BATCH, 3), _IMAGE_TOKEN), _ids(BATCH, 3)], 1),
        "attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
        **_NO_CACHE,
    },
    "q_proj v_proj query",
    tolerance=FLOAT32_PARTS,
)
add(
    "vilt",
    _hf(
        "ViltForQuestionAnswering",
        "ViltConfig",
        **_TEXT,
        image_size=16,
        patch_size=8,
        num_labels=3,
    ),
    lambda: {
        **_padded(),
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "pixel_mask": torch.ones(BATCH, 16, 16, dtype=torch.long),
    },
    "query value",
)


# timm. --------------------------------------------------------------------------------------------


def _timm(module: str, name: str, **fields: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(
            num_classes=5, **fields
        )

    return create


def _images(size: int = 16) -> Callable[[], tuple]:
    return lambda: (torch.randn(BATCH, 3, size, size),)


def _timm_lora(targets: str, *saved: str) -> dict[str, Any]:
    return {"target_modules": targets.split(), "modules_to_save": list(saved) or ["head"]}


_PLAIN = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
add(
    "vit",
    _timm("vision_transformer", "VisionTransformer", **_PLAIN),
    _images(),
    _timm_lora("qkv attn.proj patch_embed.proj"),
)
# In training mode its outputs are a pair.
add(
    "deit-distilled",
    _timm("deit", "VisionTransformerDistilled", **_PLAIN),
    _images(),
    _timm_lora("qkv fc1", "head", "head_dist"),
)
_STAGES = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
add(
    "swin",
    _timm("swin_transformer", "SwinTransformer", **_STAGES),
    _images(),
    _timm_lora("qkv fc1 reduction", "head.fc"),
)
# Its attention reads qkv.weight: an adapter there would not run.
add(
    "swinv2",
    _timm("swin_transformer_v2", "SwinTransformerV2", **_STAGES),
    _images(),
    _timm_lora("attn.proj fc1 fc2", "head.fc"),
)
add(
    "beit",
    _timm("beit", "Beit", **_PLAIN, use_rel_pos_bias=True),
    _images(),
    _timm_lora("attn.proj fc1"),
)
add(
    "eva",
    _timm("eva", "Eva", **_PLAIN, qkv_fused=False, use_rot_pos_emb=True, swiglu_mlp=True),
    _images(),
    _timm_lora("q_proj v_proj attn.proj"),
    tolerance=FLOAT32_PARTS,
)
add(
    "convnext",
    _timm("convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2),
    _images(32),
    _timm_lora("fc1 fc2 stem.0", "head.fc"),
)
add(
    "mixer",
    _timm("mlp_mixer", "MlpMixer", img_size=16, patch_size=8, num_blocks=2, embed_dim=16),
    _images(),
    _timm_lora("fc1 fc2"),
)


def _resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(4, 4, 8, 8), stem_width=4)


add("resnet", _resnet, _images(32), _timm_lora("conv1 conv2", "fc"))


def _efficientnet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c8_se0.25"]]
    return EfficientNet(decode_arch_def(stages), num_classes=5, num_features=16, stem_size=8)


add(
    "efficientnet",
    _efficientnet,
    _images(),
    _timm_lora("conv_stem conv_pw conv_pwl conv_head", "classifier"),
)
add("cait", _timm("cait", "Cait", **_PLAIN), _images(), _timm_lora("qkv proj_l attn.q fc1"))
# Its patches have a batch norm.
add("xcit", _timm("xcit", "Xcit", **_PLAIN), _images(), _timm_lora("qkv fc1"))
add(
    "pit",
    _timm(
        "pit",
        "PoolingVisionTransformer",
        img_size=16,
        patch_size=4,
        stride=4,
        base_dims=(8, 8),
        depth=(1, 1),
        heads=(2, 2),
    ),
    _images(),
    _timm_lora("qkv fc2"),
)
# In training mode its outputs are a pair with a list of boxes' numbers.
add(
    "volo",
    _timm(
        "volo",
        "VOLO",
        layers=[1, 1, 1, 1],
        img_size=32,
        stem_hidden_dim=4,
        embed_dims=[8, 16, 16, 16],
        num_heads=[2, 2, 2, 2],
    ),
    _images(32),
    _timm_lora("qkv fc1 attn.v", "head"),
)
add(
    "levit",
    _timm(
        "levit",
        "Levit",
        img_size=32,
        embed_dim=(8, 8),
        depth=(1, 1),
        num_heads=(1, 1),
        key_dim=8,
    ),
    _images(32),
    _timm_lora("qkv.linear ln1.linear", "head.linear"),
)

# Modules of one's own. ----------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    """Nodes x (N, d) and edges (2, E) -> (N, 3). The edges number the nodes from zero."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2):
            h = layer(x)
            x = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return self.head(x)


_GRAPH_LORA = _timm_lora("fc1 fc2")
add(
    "graph-network",
    GraphNetwork,
    lambda: (torch.randn(7, 5), torch.randint(0, 7, (2, 20))),
    _GRAPH_LORA,
    fold="loop",
    why="The edges number the nodes of one graph.",
)
# As many edges' rows as nodes, and told that the edges are the same for all particles.
add(
    "graph-network-named",
    GraphNetwork,
    lambda: (torch.randn(2, 5), torch.tensor([[0, 1, 1], [1, 0, 1]])),
    _GRAPH_LORA,
    axes={"batch_axes": {"x": 0, "edges": None}},
    fold="loop",
    why="The edges number the nodes of one graph.",
)


class TimeFirst(nn.Module):
    """x (T, B, d) -> (T, B, 3), through PyTorch's own encoder."""

    def __init__(self, batch_first: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


add(
    "time-first",
    TimeFirst,
    lambda: (torch.randn(TOKENS, BATCH, 8),),
    _timm_lora("linear1 linear2"),
    fold="loop",
    why="Its layers see (time, batch, width).",
)


class TimeFirstOutside(TimeFirst):
    """x (T, B, d) -> (T, B, 3), with the batch first for the layers inside."""

    def __init__(self):
        super().__init__(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


add(
    "time-first-outside",
    TimeFirstOutside,
    lambda: (torch.randn(TOKENS, BATCH, 8),),
    _timm_lora("linear1 linear2"),
    axes={"batch_axes": {"x": 1}, "output_axes": 1},
)
# In evaluation mode the layer has a fast path that reads the weights of its linears.
add(
    "encoder-fast-path",
    functools.partial(TimeFirst, batch_first=True),
    lambda: (torch.randn(BATCH, TOKENS, 8),),
    _timm_lora("linear1 linear2"),
)


class TextTable(nn.Module):
    """Images x (B, d) against a table of text features that is projected with them -> (B, rows)."""

    def __init__(self, rows: int):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.register_buffer("table", torch.randn(rows, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.table).T


# As many texts as examples, as rows of K = 3 particles, as neither.
for _rows in (BATCH, 3 * BATCH, 7):
    add(
        f"text-table-{_rows}",
        functools.partial(TextTable, _rows),
        lambda: (torch.randn(BATCH, 6),),
        "image text",
        fold="loop",
        why="The table is no batch: its rows are the same for all, and its features are not.",
    )


class Prototypes(nn.Module):
    """x (B, d) -> the logits (B, 6) and the six prototypes themselves, (6, 8)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.prototypes = nn.Parameter(torch.randn(3 * BATCH, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x) @ self.prototypes.T, "prototypes": self.prototypes}


for _name, _axes in (
    ("prototypes", {}),
    ("prototypes-named", {"output_axes": {"logits": 0, "prototypes": None}}),
):
    add(
        _name,
        Prototypes,
        lambda: (torch.randn(BATCH, 6),),
        "body",
        axes=_axes,
        shared=frozenset({"['prototypes']"}),
    )


class RoutedExperts(nn.Module):
    """x (B, T, d) -> (B, T, d): every token goes to the expert that its router likes best."""

    def __init__(self):
        super().__init__()
        self.body, self.router = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x.flatten(0, 1))
        weight, choice = self.router(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            y[chosen] = weight[chosen, None] * expert(tokens[chosen])
        return y.view_as(x)


add(
    "routed-experts",
    RoutedExperts,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    {"target_modules": r"body|experts\.\d"},
    fold="loop",
    why="Experts see the tokens that are sent to them, another number for each particle.",
)
add(
    "routed-experts-router",
    RoutedExperts,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    "body router",
)


class SharedPositions(nn.Module):
    """Positions (1, T, d), projected and added to all rows: x (B, T, d) -> (B, T, d)."""

    def __init__(self):
        super().__init__()
        self.content, self.position = nn.Linear(6, 8), nn.Linear(4, 8)
        self.register_buffer("table", torch.randn(1, TOKENS, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.content(x) + self.position(self.table))


add(
    "shared-positions",
    SharedPositions,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    "content position",
)


class DictInput(nn.Module):
    """One argument that holds two tensors: {"image" (B, d), "text" (B, T, d)} -> {"score" (B,)}."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        text = self.text(batch["text"]).mean(1)
        return {"score": (self.image(batch["image"]) * text).sum(1)}


add(
    "dict-input",
    DictInput,
    lambda: ({"image": torch.randn(BATCH, 6), "text": torch.randn(BATCH, TOKENS, 5)},),
    "image text",
)


class Recurrent(nn.Module):
    """x (B, T, d) -> the classes (B, 3) and the last state (1, B, d), whose batch is axis 1."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Linear(5, 6), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(self.embed(x))
        return self.head(y[:, -1]), state


add(
    "recurrent-with-state",
    Recurrent,
    lambda: (torch.randn(BATCH, TOKENS, 5),),
    _timm_lora("embed"),
)


# The document. ------------------------------------------------------------------------------------

#: What one check cannot see, and why.
CANNOT_SEE = {
    "other inputs": "Rows that meet only for inputs unlike those of the first forward of a form: "
    "a branch that was not taken then, or groups of rows that another batch size cuts.",
    "equal particles": "Rows that meet only where they are equal, as all particles' are before the "
    "first step: the check moves the adapters apart to see anything then.",
    "less than rounding": "Rows that change each other by less than the rounding of the model's "
    "dtype, which the tolerance must let pass.",
    "half precision": "In bfloat16 and float16 a difference below 10 % in most rows counts as "
    "rounding, unless a particle's rows also change when only the others' adapters do.",
    "gradients": "Outputs are compared, not gradients: a term whose value is zero and whose "
    "gradient is not (`m - m.detach()`).",
}

_HEAD = """# Models

Every architecture below runs in the tests with tiny random weights, in evaluation and in training
mode. For each particle all tensors of the output, and the gradients of all adapters and heads, are
those of PEFT with that particle's adapter: to 1e-10 in float64, or to 1e-5 where the model itself
computes norms, rotary angles or softmax in float32. "batch" means that `fold="batch"`, the default,
is right; "loop" that it is refused, and `fold="loop"` is right. Batch norms keep the base's
statistics.

This file is written by `python tests/support/zoo.py`.

| model | adapted | fold | |
|---|---|---|---|
"""


def table() -> str:
    """docs/models.md."""
    rows = []
    for name, entry in ZOO.items():
        targets = entry.lora.get("target_modules", "PEFT's default")
        names = targets if isinstance(targets, str) else ", ".join(targets)
        notes = [entry.why] if entry.why else []
        notes += [f"`{key}={value!r}`" for key, value in entry.axes.items()]
        rows.append(
            f"| {name} | {names.replace('|', chr(92) + '|')} | {entry.fold} | {' '.join(notes)} |"
        )
    limits = "".join(f"- {text}\n" for text in CANNOT_SEE.values())
    return f"{_HEAD}{chr(10).join(rows)}\n\n## What the isolation check cannot see\n\n{limits}"


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "models.md").write_text(table())
