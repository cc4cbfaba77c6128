"""One model of the zoo, and how a module of the zoo lists its models."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

VOCABULARY = 64
BATCH = 2
TOKENS = 5
# The agreement in float64. Products of other batch sizes sum in another order, some hundred
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
    # The arguments by which get_particle_model learns this model's axes.
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


class Models(dict[str, Entry]):
    """The models of one module, by name."""

    def add(
        self, name: str, create: Callable, make_inputs: Callable, lora: Any, **options: Any
    ) -> None:
        """`lora`: LoraConfig's arguments, or the names of its target_modules in one string."""
        lora = {"target_modules": lora.split()} if isinstance(lora, str) else lora
        self[name] = Entry(create, make_inputs, lora, **options)


def targets_and_heads(targets: str, *heads: str) -> dict[str, Any]:
    """LoraConfig's arguments; without heads, the one named "head"."""
    return {"target_modules": targets.split(), "modules_to_save": list(heads) or ["head"]}
