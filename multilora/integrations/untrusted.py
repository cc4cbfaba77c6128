"""What a run folder may ask for.

A run folder may come from anybody, and what it names is loaded when it is evaluated or exported.
So its run.json is data: the models and arguments here and no others, in these ranges. What the
user repeats on the command line is the user's own word and is not checked here.
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

#: Integers, and lists of them (a number a stage): the largest that an argument may be.
_SIZES = {
    # timm.create_model
    "img_size": 2048,
    "patch_size": 256,
    "in_chans": 3,
    "embed_dim": 2**14,
    "embed_dims": 2**14,
    "dim": 2**14,
    "dims": 2**14,
    "width": 2**14,
    "depth": 512,
    "depths": 512,
    "layers": 512,
    "num_blocks": 512,
    "num_heads": 1024,
    "head_dim": 2**12,
    "window_size": 256,
    "reg_tokens": 1024,
    "output_stride": 64,
    "cardinality": 1024,
    "base_width": 2**12,
    "stem_width": 2**12,
    "stem_size": 2**12,
    # transformers' configurations
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "vocab_size": 2**21,
    "max_position_embeddings": 2**24,
    "n_embd": 2**16,
    "n_layer": 512,
    "n_head": 1024,
    "n_inner": 2**18,
    "n_positions": 2**24,
}
#: Numbers, and lists of them, in [0, 64].
_NUMBERS = """
    mlp_ratio mlp_ratios init_values expand_ratio
    drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate
    attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop initializer_range
""".split()
_FLAGS = """
    qkv_bias qk_norm class_token no_embed_class pre_norm final_norm fc_norm dynamic_img_size
    dynamic_img_pad strict_img_size scriptable exportable
    tie_word_embeddings local_files_only low_cpu_mem_usage
""".split()
_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
#: None of these downloads code: other names of attention are of kernels on the Hub.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_WORDS = {
    "global_pool": ("", "avg", "avgmax", "catavgmax", "max", "token", "map"),
    "act_layer": tuple("relu relu6 gelu gelu_tanh quick_gelu silu swish hard_swish".split()),
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "attn_implementation": _ATTENTION,
}


def check_arguments(where: str, arguments: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError, naming it, for a model argument that a file may not give.

    where: the file, for the message.
    """
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
            raise ValueError(
                f"{called} is not taken from a file, which may be anybody's; if you mean it, give "
                f"it yourself, with --model-args {name}=..., or --trust-remote-code for code"
            )


def check_timm_name(where: str, name: str) -> None:
    """Raise ValueError for more than the name of one of timm's own models."""
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
        raise ValueError(
            f"{where}: the model {name!r} is none of timm's own, and is not loaded because a file "
            "says so; if you mean it, give it yourself, with --model"
        )


def check_transformers_name(where: str, name: str, run: Path) -> None:
    """Raise ValueError for a folder that came with the run. Others, and names on the Hub, are data.

    See `commonsense.create_base` for what is loaded from them.
    """
    path = Path(name).resolve()
    if path.exists() and run.resolve() in (path, *path.parents):
        raise ValueError(
            f"{where}: the model {name!r} lies in the run's own folder, and is not loaded because "
            "a file says so; if you mean it, give it yourself, with --model"
        )


def check_configuration(name: str, configuration: Mapping[str, Any]) -> None:
    """Raise ValueError where the config.json of a model asks for kernels, or has a huge size."""
    for key, value in configuration.items():
        called = f"the configuration of {name!r}: {key}"
        if isinstance(value, Mapping):
            check_configuration(name, value)
        elif key.endswith("implementation") and value is not None:
            checks.choice(called, value, _ATTENTION)
        elif key in _SIZES and isinstance(value, int):
            checks.integer(called, value, 0, _SIZES[key])


def check_memory(name: str, create: Callable[[], nn.Module]) -> None:
    """Raise ValueError where the model would not fit into this machine's memory.

    It is made without storage. A few of timm's older models cannot be, and have the ranges of
    their arguments alone.
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
    """A number, or the numbers of a list of some."""
    return value if isinstance(value, list) and 0 < len(value) <= 64 else [value]
