"""How a run trains: the fields of transformers.TrainingArguments that are honoured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multilora import checks

#: Fields of TrainingArguments that would change a result, and the values with which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
    "optim_args": (None, ""),
    "optim_target_modules": (None,),
    "label_smoothing_factor": (0,),
    "label_names": (None, ["labels"]),
    "neftune_noise_alpha": (None,),
    "fp16": (False,),
    "bf16": (False,),
    "fp16_full_eval": (False,),
    "bf16_full_eval": (False,),
    "tf32": (None,),
    "torch_compile": (False,),
    "use_liger_kernel": (False,),
    "gradient_checkpointing": (False,),
    "activation_checkpointing": (None, False),
    "auto_find_batch_size": (False,),
    "eval_on_start": (False,),
    "eval_delay": (None, 0),
    "group_by_length": (False,),
    "include_for_metrics": (None, []),
    "batch_eval_metrics": (False,),
    "deepspeed": (None,),
    "fsdp": (None, "", []),
    "parallelism_config": (None,),
    "full_determinism": (False,),
}
#: The same of its accelerator_config.
_REFUSED_INSIDE: dict[str, tuple[Any, ...]] = {
    # Without it, the order of the data is drawn from the generator of everything else.
    "use_seedable_sampler": (True,),
}
_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class RunArguments:
    """How a run trains: fields, meanings and defaults of transformers.TrainingArguments.

    `Run` takes TrainingArguments, or any object with some of these names, as well.

    Args:
        warmup_steps: below 1, a share of all steps.
        warmup_ratio: the same, as older versions have it.
        max_steps: above 0, it takes the place of num_train_epochs.
        max_grad_norm: 0 does not clip.
        seed: of the adapter's start and of the order of the data.
        data_seed: of the order of the data alone.
        train_sampling_strategy: "random" or "sequential".
        eval_strategy: "no", "steps" or "epoch". A run with an eval_dataset is also evaluated at its
            end.
        early_stopping_patience: evaluations in a row without a better metric after which the run
            ends, as with transformers' EarlyStoppingCallback; None: never.
        metric_for_best_model: what `eval_` it is; "loss" by default.

    Raises:
        ValueError: a number is out of range.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    seed: int = 42
    data_seed: int | None = None
    dataloader_drop_last: bool = False
    train_sampling_strategy: str = "random"
    remove_unused_columns: bool = True
    eval_strategy: str = "no"
    eval_steps: float | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            checks.number(name, getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            checks.number(name, getattr(self, name), 0, 1, open_high=True)
        checks.number("warmup_ratio", self.warmup_ratio, 0, 1)
        checks.number("adam_epsilon", self.adam_epsilon, 0, open_low=True)
        for name in ("train_batch_size", "eval_batch_size"):
            checks.integer(f"per_device_{name}", getattr(self, f"per_device_{name}"), 1)
        checks.integer("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        checks.integer("max_steps", self.max_steps, -1)
        if self.max_steps <= 0:
            checks.number("num_train_epochs", self.num_train_epochs, 0, open_low=True)
        checks.integer("seed", self.seed, 0, 2**63 - 1)
        if self.data_seed is not None:
            checks.integer("data_seed", self.data_seed, 0, 2**63 - 1)
        checks.choice(
            "train_sampling_strategy", self.train_sampling_strategy, ("random", "sequential")
        )
        checks.choice("eval_strategy", self.eval_strategy, ("no", "steps", "epoch"))
        if self.eval_strategy == "steps":
            checks.number("eval_steps", self.eval_steps, 0, open_low=True)
        for name in ("dataloader_drop_last", "remove_unused_columns", "load_best_model_at_end"):
            checks.flag(name, getattr(self, name))
        if self.greater_is_better is not None:
            checks.flag("greater_is_better", self.greater_is_better)
        if self.early_stopping_patience is not None:
            checks.integer("early_stopping_patience", self.early_stopping_patience, 1)
        if (self.early_stopping_patience or self.load_best_model_at_end) and (
            self.eval_strategy == "no"
        ):
            raise ValueError("early stopping and load_best_model_at_end need an eval_strategy")
        if self.lr_scheduler_type in _SCHEDULES:
            raise ValueError(f"lr_scheduler_type = {self.lr_scheduler_type!r} is not supported")

    @property
    def metric(self) -> str:
        """The measure that says which model is best: "eval_loss" by default."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def greater(self) -> bool:
        """Whether a larger metric is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric.endswith("loss")

    def warmup(self, steps: int) -> int:
        """The steps of the warm-up, of all steps."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(steps * (self.warmup_steps or self.warmup_ratio))

    def eval_interval(self, steps: int) -> int:
        """Steps between evaluations, with eval_strategy = "steps"."""
        every = self.eval_steps or 0
        return int(every) if every >= 1 else math.ceil(steps * every)


def read(arguments: Any, who: str) -> RunArguments:
    """The honoured fields of `arguments`.

    Raises:
        ValueError: a field would change the result, and is not honoured, or is out of range. The
            message names the field and `who`.
    """
    if isinstance(arguments, RunArguments):
        return arguments
    if isinstance(arguments, dict):
        raise TypeError(f"{who}: arguments must be RunArguments(**...), not a dict")
    for name, harmless in _REFUSED.items():
        value = _plain(getattr(arguments, name, harmless[0]))
        if value not in harmless and not (name == "fsdp" and not value):
            raise ValueError(f"{who}: {name} = {value!r} is not supported here")
    inside = _inside(getattr(arguments, "accelerator_config", None))
    for name, harmless in _REFUSED_INSIDE.items():
        if (value := inside.get(name, harmless[0])) not in harmless:
            raise ValueError(f"{who}: accelerator_config: {name} = {value!r} is not supported here")
    # Trainer takes it in place of gradient_accumulation_steps.
    steps = (inside.get("gradient_accumulation_kwargs") or {}).get("num_steps", 1)
    if steps != 1:
        raise ValueError(
            f"{who}: accelerator_config: num_steps = {steps!r} is not supported here; give "
            "gradient_accumulation_steps"
        )
    fields = {f.name for f in dataclasses.fields(RunArguments)}
    given = {n: _plain(getattr(arguments, n)) for n in fields if hasattr(arguments, n)}
    given = {n: v for n, v in given.items() if v is not None}
    try:
        return RunArguments(**given)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error


def _inside(config: Any) -> Mapping[str, Any]:
    """The fields of an accelerator_config, which may be a mapping or transformers' own object."""
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def _plain(value: Any) -> Any:
    """The value of an enumeration of transformers."""
    return getattr(value, "value", value)
