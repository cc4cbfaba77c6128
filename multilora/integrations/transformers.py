"""transformers.Trainer for particles."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from multilora import metrics
from multilora.checkpoint import load_particles
from multilora.methods import Method
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX, accumulator

_METHOD = "multilora_method.pt"


class ParticleTrainer(Trainer):
    """transformers.Trainer with `method.backward(closure)` for the backward of the loss.

    model: a ParticleModel over a causal language model (without an encoder) or a classifier.
    args, options: Trainer's. Refused is what would not reach the method: label smoothing,
        compute_loss_func, NEFTune, DeepSpeed, FSDP, DataParallel.
    method: model -> Method, such as ml.SVGD or lambda model: ml.IBDR(model, alpha=0.02), called
        once, when the model is where it is trained; `trainer.method` is what it made.

    labels: token ids (B, T), not shifted, −100 where no answer is: only labelled positions reach
    the method. For a classifier, classes (B,). A step of M micro-batches takes the mean of their
    gradients, each of the mean over its labels. Log lines also hold nll_particle_k and what
    `method.backward` returns (divergence, lambda, ...), as means since the last line.

    Evaluation is of the averaged predictive. Predictions are log((1/K) Σ_k p_k), (N, C) of a
    classifier; of a language model (N, L, V), with predictions[n, i] of the token label_ids[n, i]:
    nothing is left to shift, and columns before a batch's first label are cut off both. eval_loss
    is the mean NLL over all labels of the set. Measures of `metrics.evaluate` over the whole set,
    and each particle's, come with it for classifiers, unless args.prediction_loss_only.
    It runs as many particles at a time as the method does (particle_chunk).

    checkpoint-N holds K PEFT adapters and no base model, and a run resumed from it ends with the
    numbers of one that was never stopped. (Trainer of transformers 4.51 skips wrong batches where
    accumulation does not divide an epoch.) resume_from_checkpoint=True passes over checkpoints
    whose writing was interrupted.

    Raises TypeError for another model or method, ValueError for labels or options that do not fit.
    """

    def __init__(
        self,
        model: ParticleModel,
        args: TrainingArguments | None = None,
        *,
        method: Callable[[nn.Module], Method],
        **options: Any,
    ):
        if not isinstance(model, ParticleModel):
            raise TypeError(f"model must be a ParticleModel; got {type(model).__name__}")
        if not callable(method):
            raise TypeError(f"method must be a callable, model -> Method; got {method!r}")
        if model.ranks.data is not None or model.ranks.particle is not None:
            raise ValueError("make the model without a mesh: Trainer shares the data by itself")
        _check_options(args, options)
        base = model.base
        self._columns = list(inspect.signature(base.forward).parameters)
        self._causal = hasattr(base, "can_generate") and bool(base.can_generate())
        self._causal = self._causal and not base.config.is_encoder_decoder
        if not self._causal:
            _check_classifier(base)
        # Trainer asks the model for them.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(base, name):
                setattr(model, name, functools.partial(_not_reentrant, getattr(base, name)))
        super().__init__(model, args, **options)
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel would mix the particles; use one GPU, or torchrun")
        # The signature of ParticleModel.forward tells Trainer something else.
        self.label_names, self.model_accepts_loss_kwargs = ["labels"], False
        self.add_callback(_ZeroGrad())
        self._make_method, self._method = method, None
        self._micro_batches = 1
        self._log_names: list[str] = []
        self._log_sum: Tensor | None = None  # over the steps since the last line
        self._log_steps = 0.0

    @property
    def method(self) -> Method:
        if self._method is None:
            if self.args.world_size > 1 and self.model_wrapped is self.model:
                # The method averages over the processes that it finds in the wrapper.
                self.model_wrapped = self.accelerator.prepare_model(self.model)
            method = self._make_method(self.model_wrapped)
            if not isinstance(method, Method):
                raise TypeError(f"method must return a Method; got {type(method).__name__}")
            self._method = method
        return self._method

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        super().create_optimizer(*args, **kwargs)
        given = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = [p for p in self.method.parameters() if id(p) not in given]
        if own:
            self.optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        if self.model_wrapped is not self.model:
            # transformers 4 leaves the optimizer of a model that is wrapped by now as it is.
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        # The last step of an epoch may have fewer than args.gradient_accumulation_steps.
        self._micro_batches = len(batches)
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs, targets = self._split(self._prepare_inputs(inputs))
        if targets is None:
            raise ValueError(f"a training batch needs labels; got {sorted(inputs)}")
        where = (targets != IGNORE_INDEX).nonzero(as_tuple=True)

        def closure() -> tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                logits = self._logits(model, inputs, targets)
            return logits[(slice(None), *where)], targets[where]

        share = 1 / self._micro_batches
        scaler = self.accelerator.scaler
        scale = scaler.scale(torch.tensor(share, device=self.args.device)) if scaler else share
        stats = self.method.backward(closure, scale=scale)
        each = {f"nll_particle_{k}": nll for k, nll in enumerate(self.method.particle_nll)}
        logged = {name: value for name, value in stats.items() if name != "loss"} | each
        # Kept on the device: to read a number is to wait for it.
        row = share * torch.stack([value.float() for value in logged.values()])
        self._log_sum = row if self._log_sum is None else self._log_sum + row
        self._log_names, self._log_steps = list(logged), self._log_steps + share
        return stats["loss"] * share

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._log_sum is not None:
            means = (self._log_sum / self._log_steps).tolist()
            logs = logs | dict(zip(self._log_names, means))
            self._log_sum, self._log_steps = None, 0.0
        super().log(logs, *args, **kwargs)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """-> what the base takes, and the targets of its last L positions: (B, L), or (B,)."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if "use_cache" in self._columns:
            inputs["use_cache"] = False
        if labels is None:
            return inputs, None
        if labels.is_floating_point() or labels.ndim != (2 if self._causal else 1):
            wanted = "(B, T) of a language model" if self._causal else "(B,) of a classifier"
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels must be the integers {wanted}; got {got}")
        if not self._causal:
            return inputs, labels
        tokens = inputs.get("input_ids", labels)
        if tokens.shape != labels.shape:
            shapes = f"{tuple(labels.shape)} for input_ids {tuple(tokens.shape)}"
            raise ValueError(f"a language model needs a label for every token; got {shapes}")
        # Position t predicts token t + 1, and the last one nothing.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        first = int((targets != IGNORE_INDEX).any(0).byte().argmax())
        targets = targets[:, first:]
        if "logits_to_keep" in self._columns:
            inputs["logits_to_keep"] = targets.shape[1]
        return inputs, targets

    def _logits(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | None) -> Tensor:
        """(K, B, L, V) for targets (B, L), (K, B, C) for (B,); without targets, what there is."""
        output = model(**inputs)
        logits = getattr(output, "logits", output)
        if self._causal and targets is not None:
            logits = logits[:, :, -targets.shape[1] :]
        if targets is not None and logits.shape[1:-1] != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)}")
        return logits

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, targets = self._split(self._prepare_inputs(inputs))
        # As many particles at a time as the method runs. (Over several processes it is made by
        # `train`, and wraps the model.)
        method = self.method if self.args.world_size == 1 else self._method
        chunk = self.model.num_particles if method is None else method.passes.chunk
        with self.compute_loss_context_manager():
            logits = self.model.in_chunks(chunk, lambda: self._logits(model, inputs, targets))
        members, loss = logits.to(accumulator(logits.dtype)).log_softmax(-1), None
        if targets is not None:
            valid = targets != IGNORE_INDEX
            index = (targets * valid).expand(members.shape[:-1])[..., None]
            nll = -metrics.log_mean(members.gather(-1, index).squeeze(-1)) * valid
            # Sum and number of labels of every example.
            pair = torch.stack([t.reshape(len(t), -1).sum(1).to(nll) for t in (nll, valid)], 1)
            loss = pair[:, 0].sum() / pair[:, 1].sum()
            self._eval_nll.append(self.gather_function(pair).cpu())
            if not self._causal and not self.args.prediction_loss_only:
                both = self.gather_function((members.transpose(0, 1).contiguous(), targets))
                self._eval_members.append([t.cpu() for t in both])
        if prediction_loss_only:
            return loss, None, None
        return loss, metrics.log_mean(members), targets

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_nll, self._eval_members = [], []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_members:
            members, targets = map(torch.cat, zip(*self._eval_members))
            measures = metrics.evaluate(members.transpose(0, 1), targets)
            for name in ("accuracy", "nll"):
                each = enumerate(measures[f"member_{name}"])
                measures |= {f"{name}_particle_{k}": value for k, value in each}
            for name, value in measures.items():
                if isinstance(value, float) and math.isfinite(value):
                    output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        if self._eval_nll:
            total, labels = torch.cat(self._eval_nll).double().sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / labels if labels else math.nan
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_whole_checkpoint(Path(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        self.model.save_pretrained(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"method": type(self.method).__name__, "state": self.method.state_dict()}
            torch.save(state, Path(output_dir) / _METHOD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_particles(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_particles(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            _load_method(self.method, Path(checkpoint) / _METHOD)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self._columns, "label", "label_ids", *self.label_names]


class _ZeroGrad(TrainerCallback):
    """Trainer clears the gradients of the model; the method's own parameters are not in it."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


def _not_reentrant(enable: Callable[..., None], **options: Any) -> None:
    """Enable activation checkpointing, if not asked otherwise of the kind that methods can use."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if name in options:
            options[name] = {"use_reentrant": False} | (options[name] or {})
    enable(**options)


def _check_options(args: TrainingArguments | None, options: dict[str, Any]) -> None:
    refused = {"compute_loss_func": options.get("compute_loss_func")}
    if args is not None:
        names = ("label_smoothing_factor", "neftune_noise_alpha", "deepspeed", "fsdp")
        refused |= {name: getattr(args, name) for name in names}
        refused["label_names"] = args.label_names if args.label_names != ["labels"] else None
    for name, value in refused.items():
        if value:
            raise ValueError(f"ParticleTrainer does not support {name}={value!r}")


def _check_classifier(base: nn.Module) -> None:
    config = getattr(base, "config", None)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind not in (None, "single_label_classification") or labels < 2:
        raise ValueError(
            f"{type(base).__name__} with problem_type {kind!r} and {labels} labels is neither a "
            "causal language model nor a classifier with one label an example"
        )


def _last_whole_checkpoint(folder: Path) -> str:
    """The latest checkpoint-N whose last file, Trainer's state, is whole."""
    paths = folder.glob("checkpoint-*[0-9]")
    for path in sorted(paths, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return str(path)
        except (OSError, ValueError):
            continue
    raise ValueError(f"{folder} holds no checkpoint that was written to its end")


def _load_method(method: Method, file: Path) -> None:
    name = type(method).__name__
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["method"] != name:
            raise ValueError(f"it is of the method {saved['method']}")
        method.load_state_dict(saved["state"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged or not of this run's {name}: {error!r}") from error
