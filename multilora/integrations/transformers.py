"""transformers.Trainer for particles."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from multilora import metrics
from multilora.checkpoint import load_particles
from multilora.integrations.generation import EnsembleLogits, Generation, generate
from multilora.labels import Task, counts_items, with_loss
from multilora.losses import NAMES
from multilora.methods import Method
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX, accumulator
from multilora.optim import (
    EachParticle,
    SeparateParameter,
    clip_grad_norm_,
    is_elementwise,
    separate_parameters,
)
from multilora.randomness import RandomState

__all__ = ["EnsembleLogits", "Generation", "ParticleTrainer", "generate"]

_METHOD = "multilora_method.pt"


class ParticleTrainer(Trainer):
    """transformers.Trainer with `method.backward(closure)` for the backward of the loss.

    Labels are classes (B,), or classes of tokens (B, T), with −100 where there is none. Those of a
    causal model are its token ids, not shifted. Only labelled positions reach the method.

    K particles step as K Trainers would step them. If Trainer counts labels for this model
    (`num_items_in_batch`, here always over all processes), a step is the mean over all labels of
    its M micro-batches. If the model ignores that count, as many classifiers of transformers do, it
    is the sum of the micro-batches' means; otherwise the mean of their means. A micro-batch without
    labels takes no part. max_grad_norm clips each particle by itself. An optimizer that is not
    known to treat all elements of a tensor alike (Adafactor, ...) is made once per particle, with
    `EachParticle`. An optimizer that you pass must treat them alike, or be over
    model.particle_parameters(separate=True).

    Log lines also hold nll_particle_k, router_loss and what `method.backward` returns (divergence,
    lambda, ...), as means since the last line; grad_norm is the largest of the last step's
    grad_norm_particle_k.

    A method that draws the particles (ml.Variational) draws them anew before each evaluation and
    before they are saved, with its posterior beside them; max_grad_norm clips the posterior's
    gradient as one.

    Evaluation is of the averaged predictive. Predictions are log((1/K) Σ_k p_k), (N, C) for a
    classifier. For tokens they are (N, L, V), with predictions[n, i] for the token label_ids[n, i]:
    outputs of a causal model are already shifted, and columns before the batch's first label are
    cut off. eval_loss is the mean NLL over all labels of the set. For classifiers of examples, the
    measures of `metrics.evaluate` over the whole set, and those of each particle, come with it,
    unless args.prediction_loss_only. As many particles run at a time as in the method
    (particle_chunk).

    checkpoint-N holds K PEFT adapters and no base model, and a run that is resumed from it ends
    with the numbers of one that was never stopped. (Trainer of transformers 4.51 skips wrong
    batches where accumulation does not divide an epoch.) resume_from_checkpoint=True passes over
    checkpoints whose writing was interrupted.

    Args:
        model: a ParticleModel over a language model, causal, masked or encoder-decoder, or over a
            classifier of examples or of tokens: a model whose own loss is the cross-entropy of its
            logits at its labels. The router loss of a mixture of experts counts, for each particle.
        args, options: those of Trainer. What would not reach the method is refused: an overridden
            compute_loss, compute_loss_func, label smoothing (the methods' `loss=` takes both),
            NEFTune, DeepSpeed, FSDP, DataParallel, and optimizers that step inside the backward.
        method: a function, model -> Method, such as ml.SVGD or
            lambda model: ml.IBDR(model, alpha=0.02). It is called once, when the model is where it
            is trained; `trainer.method` is its result.

    Raises:
        TypeError: the model or the method is of another kind.
        ValueError: a model, labels or options do not fit; in the first step, the model's own loss
            is not the one that is trained here.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any

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
        if model.peft_config is None:
            raise ValueError("ParticleTrainer trains adapters; full copies need a loop of your own")
        if model.processes.data is not None or model.processes.particle is not None:
            raise ValueError("make the model without a mesh: Trainer shares the data by itself")
        _check_options(args, options)
        self._check_compute_loss()
        base = model.base
        self._task = Task(base)
        # Trainer asks the model for them.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(base, name):
                setattr(model, name, functools.partial(_not_reentrant, getattr(base, name)))
        super().__init__(model, args, **options)
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel would mix the particles; use one GPU, or torchrun")
        # ParticleModel's signature and class tell Trainer something else than the base's.
        self.label_names, self.model_accepts_loss_kwargs = ["labels"], counts_items(base)
        self._loss_shifts_labels = self._task.shifts and (
            LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
        )
        if self.optimizer is not None:
            _check_optimizer(self.optimizer, model)
        self.add_callback(_ZeroGrad())
        self._make_method = method
        self._method: Method | None = None
        self._micro_batches = 1
        self._loss_checked = False
        self._sums_means: bool | None = None
        self._grad_norms: Tensor | None = None  # of the particles, in the last step
        self._log_names: list[str] = []
        self._log_sum: Tensor | None = None  # over the steps since the last line
        self._log_steps = 0.0
        # In an evaluation: the sum and number of labels per example; log-probabilities, targets.
        self._eval_nll: list[Tensor] = []
        self._eval_members: list[list[Tensor]] = []

    @property
    def method(self) -> Method:
        """The method, which is made at its first use."""
        if self._method is None:
            if self.args.world_size > 1 and self.model_wrapped is self.model:
                # The method averages over the processes that it finds in the wrapper.
                self.model_wrapped = self.accelerator.prepare_model(self.model)
            method = self._make_method(self.model_wrapped)
            if not isinstance(method, Method):
                raise TypeError(f"method must return a Method; got {type(method).__name__}")
            self._method = method
        return self._method

    def _method_so_far(self) -> Method | None:
        """Over several processes the method is made by `train`, and wraps the model."""
        return self.method if self.args.world_size == 1 else self._method

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Trainer would clip, and measure, everything in the model as one gradient.
        self.accelerator.clip_grad_norm_ = self._clip_each

    def _clip_each(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip every particle's gradient -> the largest norm."""
        self.accelerator.unscale_gradients()
        if not self.method.trains_particles:
            return nn.utils.clip_grad_norm_(self.method.parameters(), max_norm, norm_type)
        self._grad_norms = clip_grad_norm_(self.model, max_norm, norm_type)
        return self._grad_norms.max()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        own = self.method.parameters()
        if self.optimizer is None:
            kind, options = self._optimizer_class()
            if not is_elementwise(kind) and self.method.trains_particles:
                self.optimizer = self._each_particle(kind, options, own)
        super().create_optimizer(*args, **kwargs)
        optimizer: Any = self.optimizer
        if self.method.needs_plain_sgd:
            _require_plain_sgd(self.method, optimizer, self.args)
        given = {
            id(p.stacked if isinstance(p, SeparateParameter) else p)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        own = [p for p in own if id(p) not in given]
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        if self.model_wrapped is not self.model:
            # transformers 4 leaves the optimizer of a model that is wrapped by now as it is.
            optimizer = self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        return optimizer

    def _optimizer_class(self) -> tuple[type, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        return self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def _each_particle(
        self, kind: type, options: dict[str, Any], own: list[Tensor]
    ) -> EachParticle:
        """An optimizer for each particle, with Trainer's groups: decayed, not decayed."""
        decayed = set(self.get_decay_parameter_names(self.model))
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        decay = {id(p): self.args.weight_decay * (n in decayed) for n, p in named}
        leaves = [*separate_parameters(self.model), *(separate_parameters(own) if own else [])]
        groups = [
            {
                "params": [p for p in leaves if (decay.get(id(p.stacked), 0) != 0) == is_decayed],
                "weight_decay": self.args.weight_decay if is_decayed else 0.0,
            }
            for is_decayed in (True, False)
        ]
        return EachParticle(groups, lambda of_one: kind(of_one, **options))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        local = self.args.world_size > 1 and not self.args.average_tokens_across_devices
        if items is not None and local:
            items = torch.as_tensor(items, device=self.args.device)
            items = self.accelerator.gather(items).sum()
        # The last step of an epoch may have fewer than args.gradient_accumulation_steps.
        self._micro_batches = len(batches)
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        inputs, targets = self._task.split(batch)
        if targets is None:
            raise ValueError(f"a training batch needs labels; got {sorted(inputs)}")
        where = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        at_labels: tuple[Any, ...] = (slice(None), *where)
        share = self._share(len(where[0]), num_items_in_batch)
        if share == 0:
            return torch.zeros((), device=self.args.device)
        router = self._task.router
        # Trainer adds the router's loss once a micro-batch to a loss that counts labels.
        router_share = share
        if num_items_in_batch is not None:
            averaged = self.args.world_size > 1 and self.args.average_tokens_across_devices
            router_share = float(self.args.world_size if averaged else 1)
            if self._leaves_means(batch, inputs, targets):
                share = router_share
        scaler = self.accelerator.scaler
        scale = scaler.scale(torch.tensor(share, device=self.args.device)) if scaler else share
        routed: list[Tensor] = []

        def closure() -> tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                output = model(**inputs)
            logits = self._task.logits(output, targets)
            chosen = logits[at_labels]  # (K, N, C)
            if router is not None:
                extra = router(output, len(logits), inputs.get("attention_mask"))
                routed.append(extra.detach())
                chosen = with_loss(chosen, extra, scale * (router_share / share))
            return chosen, targets[where]

        stats = self.method.backward(closure, scale=scale)
        self._check_own_loss(batch, inputs, targets)
        members = self.method.particle_nll
        assert members is not None
        each = {f"nll_particle_{k}": nll for k, nll in enumerate(members)}
        logged = {name: value for name, value in stats.items() if name != "loss"} | each
        loss = stats["loss"] * share
        if router is not None:
            # The router losses of the last pass.
            extra = torch.cat(routed)[-self.model.num_particles :].mean()
            logged["router_loss"] = extra
            loss = loss + extra * router_share
        # The sums stay on the device, because reading a number would wait for it.
        row = share * torch.stack([value.float() for value in logged.values()])
        self._log_sum = row if self._log_sum is None else self._log_sum + row
        self._log_names, self._log_steps = list(logged), self._log_steps + share
        return loss

    def _share(self, labels: int, items: Any) -> float:
        """The weight of the mean over a micro-batch's labels in its step."""
        if items is None:
            return 1 / self._micro_batches
        if self.args.world_size > 1:
            here = torch.tensor(labels, device=self.args.device)
            labels = int(self.accelerator.gather(here).sum())
        # In a step without any label, some methods still move.
        return labels / float(items) if float(items) else 1 / self._micro_batches

    def _leaves_means(self, batch: dict[str, Any], inputs: dict[str, Any], targets: Tensor) -> bool:
        """Whether the base ignores the number of a step's labels, which Trainer gives it. Its loss
        is then a mean, and Trainer adds up those of the micro-batches."""
        if self._sums_means is None:
            labels, found = self._own_labels(batch, targets), False
            if labels is not None:
                items = max(int((targets != IGNORE_INDEX).sum()), 1)
                outputs = [
                    self._own_output(inputs, labels, num_items_in_batch=n * items) for n in (1, 2)
                ]
                one, two = (getattr(output, "loss", None) for output in outputs)
                found = one is not None and two is not None and one.item() == two.item()
            if self.args.world_size > 1:
                here = torch.tensor(int(found), device=self.args.device)
                found = bool(self.accelerator.gather(here).max())
            self._sums_means = found
        return self._sums_means

    def _own_labels(self, batch: dict[str, Any], targets: Tensor) -> Tensor | None:
        """The labels from which the base computes the method's loss; None where it cannot."""
        labels = self._task.own_labels(batch, targets)
        loss = getattr(self.method, "loss", "ensemble")
        return labels if loss == "ensemble" or loss is NAMES["particle"] else None

    @torch.no_grad()
    def _own_output(self, inputs: dict[str, Any], labels: Tensor, **options: Any) -> Any:
        """The base's own output for particle 0, with its loss; random numbers stay as they are."""
        before = RandomState(self.model.devices())
        with self.model.particles(0, 1), self.compute_loss_context_manager():
            output = self.model(**inputs | {"labels": labels} | options)
        before.restore()
        return output

    @torch.no_grad()
    def _check_own_loss(
        self, batch: dict[str, Any], inputs: dict[str, Any], targets: Tensor
    ) -> None:
        """In the first step, raise if the base computes another loss from the labels of a batch."""
        if self._loss_checked:
            return
        self._loss_checked = True
        labels = self._own_labels(batch, targets)
        if labels is None:
            return  # The base computes no loss, or the user chose another one.
        output = self._own_output(inputs, labels)
        logits = self._task.logits(output, targets)[0]
        if different := self._task.differs(output, logits, inputs, targets):
            theirs, ours = different
            raise ValueError(
                f"the loss of {type(self._task.base).__name__} itself is {theirs:.6g} for particle "
                f"0, and the cross-entropy at its labels is {ours:.6g}: ParticleTrainer would "
                "train another loss than Trainer. Give the method the model's loss, such as "
                "ml.Ensemble(model, loss=...)"
            )

    def _check_compute_loss(self) -> None:
        if type(self).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(self):
            raise ValueError(
                "compute_loss is overridden, and ParticleTrainer does not call it: a method needs "
                "every particle's logits. Give the loss to the method, such as "
                "ml.Ensemble(model, loss=...), a function (logits (K, N, C), targets (N,)) -> (K,)"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._log_sum is not None:
            means = (self._log_sum / self._log_steps).tolist()
            logs = logs | dict(zip(self._log_names, means))
            self._log_sum, self._log_steps = None, 0.0
        if "grad_norm" in logs and self._grad_norms is not None:
            each = enumerate(self._grad_norms.tolist())
            logs = logs | {f"grad_norm_particle_{k}": norm for k, norm in each}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, targets = self._task.split(self._prepare_inputs(inputs))
        # As many particles at a time as the method runs.
        method = self._method_so_far()
        chunk = self.model.num_particles if method is None else method.passes.chunk
        with self.compute_loss_context_manager():
            logits = self.model.in_chunks(
                chunk, lambda: self._task.logits(model(**inputs), targets)
            )
        members, loss = logits.to(accumulator(logits.dtype)).log_softmax(-1), None
        if targets is not None:
            valid = targets != IGNORE_INDEX
            index = (targets * valid).expand(members.shape[:-1])[..., None]
            nll = -metrics.log_mean(members.gather(-1, index).squeeze(-1)) * valid
            # Sum and number of labels of every example.
            pair = torch.stack([t.reshape(len(t), -1).sum(1).to(nll) for t in (nll, valid)], 1)
            loss = pair[:, 0].sum() / pair[:, 1].sum()
            self._eval_nll.append(self.gather_function(pair).cpu())
            if targets.ndim == 1 and not self.args.prediction_loss_only:
                both = self.gather_function((members.transpose(0, 1).contiguous(), targets))
                self._eval_members.append([t.cpu() for t in both])
        if prediction_loss_only:
            return loss, None, None
        return loss, metrics.log_mean(members), targets

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_nll, self._eval_members = [], []
        method = self._method_so_far()
        if method is not None:
            method.sample()
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
        self._check_compute_loss()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_whole_checkpoint(Path(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        # In all processes, so that they go on with the same draws.
        if self._method is not None:
            self._method.sample()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        self.model.save_pretrained(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))
        if self._method is not None and not self._method.trains_particles:
            self._save_method(output_dir)

    def _save_method(self, folder: str) -> None:
        state = {"method": type(self.method).__name__, "state": self.method.state_dict()}
        torch.save(state, Path(folder) / _METHOD)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._save_method(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_particles(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        load_particles(self.model, best)
        if not self.method.trains_particles:
            _load_method(self.method, Path(best) / _METHOD)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            _load_method(self.method, Path(checkpoint) / _METHOD)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self._task.columns, "label", "label_ids", *self.label_names]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # A card describes the model that was fine-tuned: its name, its task.
        particles, self.model = self.model, self.model.base
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.model = particles

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies from the checkpoint the files that it knows, and ours are in folders.
        self._save()
        super()._push_from_checkpoint(checkpoint_folder)


class _ZeroGrad(TrainerCallback):
    """Trainer clears the gradients of the model; the method's own parameters are not in it."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


def _not_reentrant(enable: Callable[..., None], **options: Any) -> None:
    """Enable activation checkpointing, by default of the kind that methods can use."""
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
        optim = str(getattr(args.optim, "value", args.optim))
        # These choose among the base's layers, or step where Trainer's own backward runs.
        chooses = any(name in optim for name in ("galore", "apollo", "lomo", "layerwise"))
        refused["optim"] = optim if chooses else None
    for name, value in refused.items():
        if value:
            raise ValueError(f"ParticleTrainer does not support {name}={value!r}")


def _check_optimizer(optimizer: torch.optim.Optimizer, model: ParticleModel) -> None:
    """Raise where an optimizer would take K particles' tensors for one parameter."""
    stacked = {id(p) for p in model.particle_parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    if not is_elementwise(type(optimizer)) and any(id(p) in stacked for p in given):
        raise ValueError(
            f"{type(optimizer).__name__} may take a stacked tensor (K, ...) for one parameter: "
            "make it over model.particle_parameters(separate=True), or one for every particle, "
            "multilora.optim.EachParticle"
        )


def _require_plain_sgd(method: Method, optimizer: Any, args: TrainingArguments) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    plain = type(inner) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] for group in inner.param_groups
    )
    if not plain or args.max_grad_norm:
        raise ValueError(
            f"{type(method).__name__} needs plain SGD, whose steps give its noise the right size: "
            f'optim="sgd", weight_decay=0 and max_grad_norm=0; got {type(inner).__name__} and '
            f"max_grad_norm={args.max_grad_norm}"
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
            raise ValueError(f"it belongs to the method {saved['method']}")
        method.load_state_dict(saved["state"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged or not of this run's {name}: {error!r}") from error
