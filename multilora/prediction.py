"""Predictions of K particles: class probabilities for a batch or a whole data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from multilora import checks
from multilora.ops.common import accumulator


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Any,
    particle_chunk: int | None = None,
    *,
    log: bool = False,
    class_axis: int | None = None,
    output: str | int | None = None,
) -> Tensor:
    """Every particle's class probabilities (K, B, C), in eval mode and without gradients.

    Args:
        model: the particle model. Every module is left in the mode that it was in.
        x: the model's input, or a mapping of its keyword arguments. An iterable of batches, such as
            a DataLoader, stands for many inputs: each batch is an input, a mapping, or a pair of
            one of these and labels, which are ignored. (An input that is itself iterable goes into
            a mapping.) Batches are moved to the model's device; their results are joined on the
            CPU.
        particle_chunk: run this many particles at a time, to save memory.
        log: return log-probabilities, which `evaluate` takes as they are. They keep the NLL of
            every confident mistake, where a probability below 1e-308 would be zero.
        class_axis: the axis of the classes in the output of one particle. It is needed where that
            has more axes than (B, C): −1 for the (B, T, V) of a language model, 1 for the
            (B, C, H, W) of segmentation.
        output: which of the model's outputs to use, by name or index. By default that is `.logits`
            or "logits", else the first of a tuple, or the only tensor of a mapping.

    Returns:
        Probabilities of all particles, also of those that other processes hold. They are float32 or
        better, and float64 where float32 would round one of them to zero.

    Raises:
        ValueError: the outputs are not class logits: they lack a batch or a class axis, or have a
            single unit, whose softmax is always one.
    """
    checks.flag("log", log)
    reading = _Reading(particle_chunk, class_axis, output)

    def predicted(inputs: Any) -> Tensor:
        logits, axis = reading.logits(model, inputs)
        return logits.log_softmax(axis) if log else _probabilities(logits, axis)

    with evaluating(model):
        if isinstance(x, (Tensor, Mapping)) or not isinstance(x, Iterable):
            return predicted(x)
        if isinstance(x, tuple):
            raise TypeError("predict needs an input, a mapping or a list of batches; got a tuple")
        return _joined([predicted(inputs).cpu() for inputs, _ in _batches(model, x)])


@torch.no_grad()
def predict_loader(
    model: nn.Module,
    loader: Iterable[Any],
    particle_chunk: int | None = None,
    *,
    class_axis: int | None = None,
    output: str | int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """log p_k of a whole labelled data set, and its targets: the arguments of `evaluate`.

        log_p, targets = ml.metrics.predict_loader(model, loader)
        measures = ml.metrics.evaluate(log_p, targets)

    Args:
        model: as in `predict`.
        loader: batches of an input and its labels, as pairs, or as mappings with the key "labels",
            which is removed before the model is called. Labels (B,), or one for each position of a
            dense output (B, T) or (B, H, W), are those of the model's output at the same place:
            those of a causal language model are shifted first, by `causal_targets`.
        particle_chunk: as in `predict`.
        class_axis: as in `predict`.
        output: as in `predict`.
        forward: the call of the model, forward(model, inputs) -> outputs, where that is not
            model(inputs), or model(**inputs) for a mapping.

    Returns:
        log_p (K, N, C) and targets (N,), both on the CPU; N counts the positions of dense outputs.

    Raises:
        ValueError: as `predict`, and for a batch without labels or with labels that do not fit.
    """
    reading = _Reading(particle_chunk, class_axis, output, forward)
    rows, targets = [], []
    with evaluating(model):
        for inputs, labels in _batches(model, loader):
            if labels is None and isinstance(inputs, dict):
                labels = inputs.pop("labels", None)
            if not isinstance(labels, Tensor):
                raise ValueError(
                    'predict_loader needs labels with every batch: pairs, or a mapping\'s "labels"'
                )
            logits, axis = reading.logits(model, inputs)
            log_p = logits.log_softmax(axis).movedim(axis, -1)
            if labels.shape != log_p.shape[1:-1]:
                raise ValueError(
                    f"labels {tuple(labels.shape)} do not fit the model's output "
                    f"{tuple(logits.shape)}: they need one entry for each of its predictions, "
                    f"{tuple(log_p.shape[1:-1])}"
                )
            rows.append(log_p.flatten(1, -2).cpu())
            targets.append(labels.flatten().cpu())
    return _joined(rows), torch.cat(targets)


@contextlib.contextmanager
def mc_dropout(model: Any, samples: int = 10, *, seed: int | None = None) -> Iterator[None]:
    """Inside, the model is S samples of MC dropout: copies whose adapters' dropout masks differ.

    All S masks run in one pass, as particles do: model(x) and `predict` give (S, ...). The masks
    are those of `lora_dropout`, for each row and sample their own; every other module is in eval
    mode. Of K particles each has S masks, and the model is all K·S, particle first.

        with ml.mc_dropout(model, samples=10):
            p = ml.predict(model, x)  # (10, B, C)

    Args:
        model: a ParticleModel with `lora_dropout` above 0; mostly of one particle.
        samples: S.
        seed: draw the masks from this seed, and leave PyTorch's generators as they were. None draws
            them from these generators.

    Raises:
        ValueError: samples is not an integer >= 1.
        NotImplementedError: the particles have configurations of their own.

    Gal and Ghahramani, *Dropout as a Bayesian approximation*, ICML 2016.
    """
    checks.integer("samples", samples, 1)
    model.require_uniform("mc_dropout")
    particles = model.num_particles * model.processes.particle_size
    copies = torch.eye(particles, dtype=torch.float64).repeat_interleave(samples, 0)
    layers = [(layer, layer.sampling) for _, layer in model.lora_layers()]
    devices = [device for device in model.devices() if device.type == "cuda"]
    with (
        torch.random.fork_rng(devices, enabled=seed is not None),
        evaluating(model),
        model.mixtures(copies),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for layer, _ in layers:
                layer.sampling = True
            yield
        finally:
            for layer, before in layers:
                layer.sampling = before


class _Reading(NamedTuple):
    """How a model is called and which of its outputs are the logits; see `predict`."""

    particle_chunk: int | None
    class_axis: int | None
    output: str | int | None
    forward: Callable[[nn.Module, Any], Any] | None = None

    def logits(self, model: Any, inputs: Any) -> tuple[Tensor, int]:
        """The logits (K, B, ...) of all particles, and the axis of their classes."""
        if self.particle_chunk is None:
            z = self._run(model, inputs)
        else:
            chunk = checks.integer("particle_chunk", self.particle_chunk, 1)
            z = model.in_chunks(chunk, lambda: self._run(model, inputs))
        z = model.processes.gather(z) if hasattr(model, "processes") else z
        axis = -1 if self.class_axis is None else self.class_axis
        return z, axis + (axis >= 0)

    def _run(self, model: nn.Module, inputs: Any) -> Tensor:
        if getattr(model, "has_own_widths", False):
            raise NotImplementedError(
                "the particles' heads have widths of their own, so their probabilities are no "
                "tensor (K, B, C): model(x) gives a list of logits, model.particle(k)(x) one"
            )
        if self.forward is not None:
            out = self.forward(model, inputs)
        else:
            out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        z = chosen(out, self.output)
        check_logits(z, self.class_axis)
        return z.to(accumulator(z.dtype))


def chosen(out: Any, name: str | int | None) -> Tensor:
    """The tensor of logits among a model's outputs."""
    if name is not None:
        try:
            is_container = isinstance(out, (Mapping, tuple, list))
            z = cast(Any, out)[name] if is_container else getattr(out, str(name))
        except (KeyError, IndexError, AttributeError, TypeError):
            has = sorted(out) if isinstance(out, Mapping) else type(out).__name__
            raise ValueError(f"the model has no output {name!r}; it gave {has}") from None
    elif hasattr(out, "logits"):
        z = out.logits
    elif isinstance(out, Mapping):
        tensors = [key for key, value in out.items() if isinstance(value, Tensor)]
        if "logits" not in out and len(tensors) != 1:
            raise ValueError(f"predict needs output=, one of the model's outputs: {sorted(out)}")
        z = out["logits" if "logits" in out else tensors[0]]
    else:
        z = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(z, Tensor):
        raise ValueError(f"predict needs a tensor of logits; the model gave a {type(z).__name__}")
    return z


def check_logits(z: Tensor, class_axis: int | None) -> None:
    """Raise ValueError unless z (K, B, ...) has classes, and says where."""
    axes = z.ndim - 1
    if axes < 2 or not z.is_floating_point():
        raise ValueError(
            "predict needs logits (K, B, C), K particles' for B examples and C classes; "
            f"got {z.dtype} {tuple(z.shape)}"
        )
    if class_axis is None and axes > 2:
        raise ValueError(
            "predict needs class_axis=, where the classes are in the outputs "
            f"{tuple(z.shape[1:])} of one particle: -1 for the (B, T, V) of a language model, "
            "1 for the (B, C, H, W) of segmentation"
        )
    axis = -1 if class_axis is None else checks.integer("class_axis", class_axis, -axes, axes - 1)
    if axis % axes == 0:
        raise ValueError(f"class_axis = {class_axis} is the batch of {tuple(z.shape[1:])}")
    if z.shape[1:][axis] < 2:
        raise ValueError(
            f"predict needs two classes or more, and one output unit's softmax is 1 for any input; "
            f"got {tuple(z.shape)}: a regression, or a sigmoid, which the model itself gives"
        )


def _probabilities(logits: Tensor, axis: int) -> Tensor:
    p = logits.softmax(axis)
    # The NLL of a confident mistake is the logarithm of such a probability.
    lost = (p < torch.finfo(p.dtype).tiny) & logits.isfinite()
    return logits.double().softmax(axis) if bool(lost.any()) else p


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(model: nn.Module, loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The inputs of every batch, on the model's device, and its labels or None."""
    device = next((p.device for p in model.parameters()), None)
    for batch in loader:
        labels = None
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            batch, labels = (*batch, None)[:2]
        if isinstance(batch, Mapping):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        elif isinstance(batch, Tensor):
            batch = batch.to(device)
        else:
            raise TypeError(
                "predict needs batches that are an input, a mapping, or a pair of one of these and "
                f"labels; got a {type(batch).__name__}"
            )
        yield batch, labels


def _joined(parts: list[Tensor]) -> Tensor:
    if not parts:
        raise ValueError("predict needs at least one batch; the loader gave none")
    shapes = {(len(p), *p.shape[2:]) for p in parts}
    if len(shapes) > 1:
        raise ValueError(
            "predict joins the batches of a loader, whose outputs must have the same axes but for "
            f"the batch; got {[tuple(p.shape) for p in parts][:4]}"
        )
    return torch.cat(parts, 1)
