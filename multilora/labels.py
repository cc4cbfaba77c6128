"""The losses of transformers' models: where their labels belong, and the loss of a router."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.ops.common import IGNORE_INDEX, accumulator

# Names of transformers' classes whose loss is the cross-entropy of `logits` at `labels`, with one
# label for each token or for each example.
_PER_TOKEN = re.compile(
    "ForCausalLM|LMHeadModel|WithLMHead|DoubleHeadsModel|ForMaskedLM|ForTokenClassification"
    "|ForConditionalGeneration|ForImageTextToText|EncoderDecoderModel"
)
_PER_EXAMPLE = re.compile(
    "For(Sequence|Image|Video|Audio)Classification|ForMultipleChoice|ForNextSentencePrediction"
)
# Models that generate, and whose labels nevertheless belong to the positions themselves.
_UNSHIFTED = re.compile(
    "(XLNetLMHead|XLMWithLMHead|FlaubertWithLMHead)Model"
    "|(Bart|MBart|Marian|Pegasus|BigBirdPegasus|Blenderbot|BlenderbotSmall|Mvp|PLBart|TrOCR|Whisper"
    "|CpmAnt)ForCausalLM"
)


class Task:
    """A model's loss: the cross-entropy of its logits at its labels, and the loss of its router.

    Args:
        base: a transformers model whose own loss is of that kind, or another module whose logits
            (B, ..., C) have labels (B, ...).

    Raises:
        ValueError: the model has another loss.
    """

    def __init__(self, base: Any):
        name, config = type(base).__name__, getattr(base, "config", None)
        self.base = base
        self.columns = list(inspect.signature(base.forward).parameters)
        generates = hasattr(base, "can_generate") and bool(base.can_generate())
        decodes = generates and bool(getattr(config, "is_encoder_decoder", False))
        #: Whether position t predicts the label of position t + 1.
        self.shifts = generates and not decodes and not _UNSHIFTED.fullmatch(name)
        #: Whether the decoder reads the labels, one position late.
        self.reads_labels = decodes
        per_token = self.shifts or decodes or bool(_PER_TOKEN.search(name))
        per_example = not per_token and bool(_PER_EXAMPLE.search(name))
        #: The number of axes of the labels; None where only the logits tell.
        self.label_axes = 2 if per_token else 1 if per_example else None
        _check_loss_is_known(base, self.columns, per_token or per_example)
        if "Classification" in name or self.label_axes is None:
            _check_single_label(base)
        self.router = router_loss(base)

    def split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Split a batch into the inputs of the base and the targets.

        Returns:
            The inputs, and the targets (B, ...) of the logits at the last positions.

        Raises:
            ValueError: the labels are of another kind.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        shifted = inputs.pop("shift_labels", None)
        if "use_cache" in self.columns:
            inputs["use_cache"] = False
        if labels is None:
            return inputs, None
        self._check_labels(labels)
        if self.reads_labels and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            inputs |= self._decoder_inputs(labels)
        if not self.shifts:
            return inputs, labels
        tokens = inputs.get("input_ids", labels)
        if tokens.shape != labels.shape:
            shapes = f"{tuple(labels.shape)} for input_ids {tuple(tokens.shape)}"
            raise ValueError(f"a language model needs a label for every token; got {shapes}")
        # Position t predicts token t + 1, and the last one nothing.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted is None else shifted
        first = int((targets != IGNORE_INDEX).any(0).byte().argmax())
        targets = targets[:, first:]
        if "logits_to_keep" in self.columns:
            inputs["logits_to_keep"] = targets.shape[1]
        return inputs, targets

    def logits(self, output: Any, targets: Tensor | None) -> Tensor:
        """The logits (K, B, ..., C) for targets (B, ...), or all of them without targets.

        Raises:
            ValueError: the output has no such logits.
        """
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.base).__name__} returns a {type(output).__name__} instead of logits"
            )
        if self.shifts and targets is not None:
            logits = logits[:, :, -targets.shape[1] :]
        if targets is not None and logits.shape[1:-1] != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)}")
        return logits

    def own_labels(self, batch: dict[str, Any], targets: Tensor) -> Tensor | None:
        """The labels from which the base computes the loss at `targets`; None if it cannot."""
        if "labels" not in self.columns or "shift_labels" in batch:
            return None
        only_last = self.shifts and "logits_to_keep" in self.columns
        return batch["labels"][:, -targets.shape[1] :] if only_last else batch["labels"]

    def differs(
        self, output: Any, logits: Any, inputs: dict[str, Any], targets: Tensor
    ) -> tuple[float, float] | None:
        """The base's own loss in an output, and this one, where they are known and not equal.

        Args:
            output: of the base or one particle, with labels: see `own_labels`.
            logits: those in it, (B, ..., C).
            inputs, targets: see `split`.
        """
        theirs = getattr(output, "loss", None)
        if not isinstance(theirs, Tensor) or not isinstance(logits, Tensor):
            return None
        if self.shifts:
            logits = logits[:, -targets.shape[1] :]
        if logits.shape[:-1] != targets.shape:
            return None
        where = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        ours = F.cross_entropy(logits[where].to(accumulator(logits.dtype)), targets[where])
        if self.router is not None:
            ours = ours + self.router(output, 1, inputs.get("attention_mask"))[0]
        if not bool(ours.isfinite()) or is_same_loss(theirs, ours):
            return None
        return theirs.item(), ours.item()

    def _check_labels(self, labels: Tensor) -> None:
        if labels.is_floating_point() or self.label_axes not in (None, labels.ndim):
            wanted = {1: " (B,) of a classifier", 2: " (B, T) of tokens", None: " of classes"}
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels must be the integers{wanted[self.label_axes]}; got {got}")

    def _decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        shift = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
        # If only its forward can shift them, it also computes a loss, which is ignored.
        return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels)}


def is_same_loss(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two losses () of a batch are equal, but for rounding."""
    # A wrong shift of the labels changes it by more than this, rounding by less.
    tolerance = 1e-4 if theirs.dtype.itemsize >= 4 else 4 * torch.finfo(theirs.dtype).eps
    return math.isclose(theirs.item(), ours.item(), rel_tol=tolerance, abs_tol=1e-6)


def _check_loss_is_known(base: nn.Module, columns: list[str], known: bool) -> None:
    if not _is_of_transformers(base):
        return
    ours = type(base).__module__.startswith("transformers.")
    if "labels" not in columns or (ours and not known):
        raise ValueError(
            f"{type(base).__name__} has no loss that is the cross-entropy of logits at `labels`: "
            "that is trained in causal, masked and encoder-decoder language models, and in "
            "classifiers of examples and of tokens"
        )


def _is_of_transformers(base: nn.Module) -> bool:
    # A program that has not imported transformers has none of its models.
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(base, transformers.PreTrainedModel)


def counts_items(base: nn.Module) -> bool:
    """Whether Trainer would give this model, by itself, the number of labels of a step."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


def _check_single_label(base: nn.Module) -> None:
    config = getattr(base, "config", None)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind not in (None, "single_label_classification") or labels < 2:
        raise ValueError(
            f"{type(base).__name__} with problem_type {kind!r} and {labels} labels is neither a "
            "language model nor a classifier with one label for each example or token"
        )


class RouterLoss:
    """The coefficient times the load-balancing loss of a mixture of experts, for every particle.

    Args:
        balance: transformers' function of (router logits of every layer, experts, experts for each
            token, attention mask).
        experts, chosen: how many experts there are, and how many each token goes to.
        coefficient: the weight of the loss.
    """

    def __init__(
        self, balance: Callable[..., Tensor], experts: int, chosen: int, coefficient: float
    ):
        self.balance, self.experts, self.chosen = balance, experts, chosen
        self.coefficient = coefficient

    def __call__(self, output: Any, particles: int, mask: Tensor | None) -> Tensor:
        """(K,) from router logits of K · B · T rows, particle by particle."""
        layers = [t.reshape(particles, -1, t.shape[-1]) for t in output.router_logits]
        each = [self.of_one([layer[k] for layer in layers], mask) for k in range(particles)]
        return torch.stack(each)

    def of_one(self, layers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """() from the router logits (B · T, E) of one particle in every layer."""
        value = self.balance(tuple(layers), self.experts, self.chosen, mask)
        return self.coefficient * value


def router_loss(base: nn.Module) -> RouterLoss | None:
    """The loss that the model adds for its router; None where it adds nothing.

    Raises:
        ValueError: the loss of the router is not known here.
    """
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    option = inspect.signature(base.forward).parameters.get("output_router_logits")
    counts = None if option is None else option.default
    if counts is None or counts is inspect.Parameter.empty:
        counts = any(getattr(c, "output_router_logits", False) for c in (config, text))
    if not counts:
        return None

    def setting(name: str) -> Any:
        return getattr(base, name, getattr(text, name, None))

    if setting("router_aux_loss_coef") == 0:
        return None
    balance = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    arguments = [] if balance is None else list(inspect.signature(balance).parameters)
    settings = [setting(n) for n in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")]
    known = arguments == ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if balance is None or not known or None in settings:
        raise ValueError(
            f"the router loss of {type(base).__name__} is not one that can be computed "
            "for every particle; train without it, base.config.output_router_logits = False"
        )
    return RouterLoss(balance, *settings)


def with_loss(logits: Tensor, extra: Tensor, weight: float | Tensor) -> Tensor:
    """`logits`, with the backward of another loss, weight · Σ_k extra_k, beside the method's."""
    return _WithLoss.apply(logits, extra, weight)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, extra: Tensor, weight: float | Tensor) -> Tensor:
        ctx.weight = torch.as_tensor(weight, dtype=extra.dtype, device=extra.device)
        ctx.particles = extra.shape
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.weight.expand(ctx.particles), None
