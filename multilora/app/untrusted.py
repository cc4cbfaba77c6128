"""The models and arguments that a run's folder may ask for.

A run's folder may come from anybody, and the model that it names is loaded when it is evaluated or
exported. So its run.json may have only the models and arguments listed here, in these ranges. What
the user gives on the command line is the user's own decision and is not checked here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora import checks

#: Arguments that are integers, or lists of them (one per stage), grouped by the largest allowed
#: value: arguments of timm's models, and fields of transformers' configurations.
_SIZES = {
    name: largest
    for largest, names in {
        3: "in_chans",
        256: """
            patch_size patch_sizes window_size window_sizes kernel_size kernel_sizes output_stride
            sr_ratios num_reg_tokens reg_tokens
        """,
        512: """
            depth depths layers num_blocks block_config serial_depths transformer_depths
            num_hidden_layers n_layer
        """,
        1024: """
            num_heads heads num_kv_heads cardinality growth_rate
            num_attention_heads num_key_value_heads n_head
        """,
        2048: "img_size image_size",
        2**16: """
            embed_dim embed_dims dim dims width widths channels num_features head_dim key_dim
            head_hidden_size hidden_sizes base_width stem_width stem_size stem_chs
            hidden_size n_embd
        """,
        2**18: "intermediate_size n_inner",
        2**21: "vocab_size",
        2**24: "max_position_embeddings n_positions",
    }.items()
    for name in names.split()
}
#: Arguments that are numbers, or lists of them, in [0, 64].
_NUMBERS = """
    mlp_ratio mlp_ratios attn_ratio expand_ratio expansion_ratio bottle_ratio se_ratio
    init_values layer_scale_init_value ls_init_value head_init_scale norm_eps
    drop dropout drop_rate drop_block_rate pos_drop_rate patch_drop_rate proj_drop_rate
    attn_drop_rate drop_path_rate
    attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop initializer_range
""".split()
_FLAGS = """
    qkv_bias proj_bias mlp_bias qk_norm class_token no_embed_class pre_norm final_norm fc_norm
    patch_norm head_norm_first dynamic_img_size dynamic_img_pad strict_img_size use_abs_pos_emb
    use_rel_pos_bias use_shared_rel_pos_bias use_fc_norm use_conv use_grn conv_mlp avg_down
    zero_init_last distilled scriptable exportable
    tie_word_embeddings local_files_only low_cpu_mem_usage
""".split()
_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
#: Implementations of attention that download no code. Other names refer to kernels on the Hub.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_WORDS = {
    "global_pool": ("", "avg", "avgmax", "catavgmax", "max", "token", "map"),
    "weight_init": ("", "skip", "jax", "jax_nlhb", "moco"),
    "act_layer": tuple("relu relu6 gelu gelu_tanh quick_gelu silu swish hard_swish".split()),
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "attn_implementation": _ATTENTION,
}


def check_arguments(where: str, arguments: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError for a model argument that the file `where` may not give."""
    for name, value in arguments:
        called = f"{where}: the model argument {name}"
        if name in _SIZES:
            for number in _each(value):
                checks.integer(called, number, 0, _SIZES[name])
        elif name in _NUMBERS:
            for number in _each(value):
                checks.number(called, number, 0, 64)
        elif name in _FLAGS:
            checks.flag(called, value)
        elif name in _WORDS:
            checks.choice(called, value, _WORDS[name])
        else:
            code = name == "trust_remote_code"
            option = "--trust-remote-code" if code else f"--model-args {name}=..."
            raise ValueError(
                f"{called} is not taken from a file, which may be anybody's; if you mean it, give "
                f"it yourself, with {option}"
            )


def check_timm_name(where: str, name: str) -> None:
    """Raise ValueError for anything but the name of one of timm's own models."""
    import timm

    if not (re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name) and timm.is_model(name)):
        raise ValueError(
            f"{where}: the model {name!r} is none of timm's own, and is not loaded because a file "
            "says so; if you mean it, give it yourself, with --model"
        )


def check_transformers_name(where: str, name: str, run: Path) -> None:
    """Raise ValueError for a folder that came with the run.

    Other folders, and names on the Hub, are allowed: `language.create_base` loads only data from
    them.
    """
    path = Path(name).resolve()
    if path.exists() and run.resolve() in (path, *path.parents):
        raise ValueError(
            f"{where}: the model {name!r} lies in the run's own folder, and is not loaded because "
            "a file says so; if you mean it, give it yourself, with --model"
        )


def check_configuration(name: str, configuration: Mapping[str, Any]) -> None:
    """Raise ValueError if the config.json of a model asks for kernels or has a huge size."""
    for key, value in configuration.items():
        called = f"the configuration of {name!r}: {key}"
        if isinstance(value, Mapping):
            check_configuration(name, value)
        elif key.endswith("implementation") and value is not None:
            checks.choice(called, value, _ATTENTION)
        elif key in _SIZES and isinstance(value, int):
            checks.integer(called, value, 0, _SIZES[key])


def check_memory(name: str, create: Callable[[], nn.Module]) -> None:
    """Raise ValueError if the model would not fit into this machine's memory.

    The model is made without storage. A few of timm's older models cannot be made so; only the
    ranges of their arguments limit them.
    """
    try:
        with torch.device("meta"):
            model = create()
    except Exception:
        return
    needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"the model {name!r}, as the run's folder asks for it, needs {needed / 2**30:.0f} GiB; "
            f"this machine has {memory / 2**30:.0f}"
        )


def _each(value: Any) -> list[Any]:
    """The numbers of a list, or the number itself."""
    return value if isinstance(value, list) and 0 < len(value) <= 64 else [value]
