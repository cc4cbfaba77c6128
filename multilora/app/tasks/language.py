"""Models, tokenizers and records of the tasks that read text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora.app import untrusted


def create_base(
    name: str,
    pretrained: bool = True,
    seed: int = 0,
    from_file: bool = False,
    kind: str = "AutoModelForCausalLM",
    **model_args: Any,
) -> tuple[Any, set[str]]:
    """A model of transformers, from a local folder or by its name.

    Args:
        pretrained: Load its weights. The seed draws those that are not loaded.
        from_file: A run's folder gave the name, not the user. Then only safetensors are loaded, no
            adapters, no kernels from the Hub, and nothing that does not fit into memory.
        kind: The class of transformers that chooses the model's class.
        model_args: Arguments of from_pretrained. Code that comes with a model runs only with
            trust_remote_code=True.

    Returns:
        The model in eval mode, and the names of its parameters that are random.

    Raises:
        RuntimeError: transformers cannot load the model.
        ValueError: A file asks for what it must not.
    """
    import transformers
    from transformers import AutoConfig, PretrainedConfig
    from transformers.utils import find_adapter_config_file

    auto = getattr(transformers, kind)
    # If it were unset, transformers would ask on the terminal.
    trust = bool(model_args.pop("trust_remote_code", False))
    if from_file:
        with _loading(name, "", trust):
            stored, _ = PretrainedConfig.get_config_dict(name)
        untrusted.check_configuration(name, stored)
    with _loading(name, "", trust):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **model_args)

    def random() -> nn.Module:
        return auto.from_config(config, trust_remote_code=trust)

    if from_file:
        if find_adapter_config_file(name) is not None:
            raise ValueError(
                f"{name!r} holds adapters, which may be of any base; if you mean it, give it "
                "yourself, with --model"
            )
        untrusted.check_memory(name, random)
        if pretrained:
            model_args["use_safetensors"] = True
    with _loading(name, "", trust), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not pretrained:
            model = random()
            return model.eval(), {name for name, _ in model.named_parameters()}
        model, info = auto.from_pretrained(
            name, trust_remote_code=trust, output_loading_info=True, **model_args
        )
    # A tensor of another shape stands here with its shapes, or by its name alone.
    reshaped = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    drawn = {*info["missing_keys"], *reshaped}
    return model.eval(), {name for name, _ in model.named_parameters() if name in drawn}


def create_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises RuntimeError where transformers cannot load it."""
    from transformers import AutoTokenizer

    with _loading(name, "'s tokenizer", trust_remote_code):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _loading(name: str, what: str, trusted: bool) -> Iterator[None]:
    """Turn any error of transformers into a RuntimeError that names the model."""
    try:
        yield
    except Exception as error:
        message = f"transformers could not load {name!r}{what}: {error}"
        if not trusted and "trust_remote_code" in str(error):
            message += "; on the command line that is --trust-remote-code"
        raise RuntimeError(message) from error


def json_lines(file: Path) -> Iterable[tuple[int, Any]]:
    """(number, value) of each line, counted from 1. Raises ValueError, which names the line."""
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.encode()
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: no JSON: {error}") from error
