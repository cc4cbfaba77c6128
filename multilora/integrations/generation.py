"""Generation by the ensemble: one sequence per prompt, from the particles' averaged predictive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from multilora import forward_state, metrics
from multilora.model import ParticleModel

#: The neutral values of options of transformers that would change a distribution after the average.
_NEUTRAL = {
    "num_return_sequences": (None, 1),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "watermarking_config": (None,),
}


class Generation(NamedTuple):
    """What `generate` returns: B sequences, and how sure the ensemble was of each new token.

    Attributes:
        sequences: int64 (B, T), as the base's own `generate` returns them.
        token_entropy: H[p̄_t] (B, T_new) in nats, of the predictive before temperature, top-k and
            top-p. After the end of a sequence it is NaN; its end-of-sequence token still counts.
            So `token_entropy.nanmean(-1)` is the entropy of an answer (Bella, eq. 7).
        token_mi: the mutual information H[p̄_t] − mean_k H[p_kt] (B, T_new), likewise.
    """

    sequences: Tensor
    token_entropy: Tensor
    token_mi: Tensor


def generate(
    model: ParticleModel,
    inputs: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Generation:
    """One sequence per prompt, each token from p̄ = (1/K) Σ_k p_k given the tokens before it.

    All K particles read the same tokens, so this is not `model.call("generate", ...)`, in which
    every particle continues its own sequence. Greedy decoding takes the argmax of p̄. Sampling
    applies temperature, top-k, top-p and min-p to log p̄ and draws one token for all particles, with
    one particle from the distribution that the base samples from. Other processors of logits, such
    as a repetition penalty, change each particle's logits before the average. The mode of the
    model, training or evaluation, stays as it is.

    Args:
        model: particles over a model of transformers that generates.
        inputs: the prompts, as the first argument of the base's `generate`, or by name in options.
            Prompts of different lengths are padded on the left.
        generator: draws the samples; PyTorch's default generator where it is None.
        options: the arguments of the base's `generate`.

    Raises:
        TypeError: `model` is not a ParticleModel, or its base does not generate.
        ValueError: the particles do not run together (fold="loop", several processes, base_only),
            or an option is not for one sequence from one distribution: beams, several sequences
            per prompt, assisted decoding, streamers, watermarks, other cutoffs than those above.
    """
    config = _configuration(model, options)
    ensemble = EnsembleLogits(
        model.num_particles, _warpers(config) if config.do_sample else None, generator
    )
    processors = [*(options.pop("logits_processor", None) or ()), ensemble]
    options |= {"logits_processor": LogitsProcessorList(processors)}
    options |= {"return_dict_in_generate": False}
    prompts = () if inputs is None else (inputs,)
    sequences = model.call("generate", *prompts, **options)
    return ensemble.generation(sequences[0], config.eos_token_id)


class EnsembleLogits(LogitsProcessor):
    """The same choice for the rows of all K particles: the next token of their averaged predictive.

    Scores (K·B, V) become 0 at the chosen token and −∞ elsewhere, so that whatever transformers
    does next takes that token. An object serves one call of `generate`.

    Args:
        particles: K; rows are particle first.
        warpers: what changes log p̄ (B, V) before a token is drawn; None takes the argmax.
        generator: draws the Gumbel noise, once for all particles.
    """

    def __init__(
        self,
        particles: int,
        warpers: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
    ):
        self.particles, self.warpers, self.generator = particles, warpers, generator
        self._prompts: Tensor | None = None  # (B, ...), the tokens before the first choice
        self._chosen: list[Tensor] = []
        self._measures: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompts is None:
            self._prompts = input_ids[: len(input_ids) // self.particles]
        members = scores.unflatten(0, (self.particles, -1)).log_softmax(-1)
        self._measures.append(metrics.token_entropy(members))
        log_p = metrics.log_mean(members)
        if self.warpers is not None:
            log_p = self.warpers(input_ids[: len(log_p)], log_p)
            log_p = log_p + _gumbel(log_p, self.generator)
        chosen = log_p.argmax(-1)
        self._chosen.append(chosen)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, chosen.repeat(self.particles)[:, None], 0.0)

    def generation(self, sequences: Tensor, end: int | Iterable[int] | None) -> Generation:
        """The result for the sequences (B, T) that were generated with this object."""
        assert self._prompts is not None
        before = self._prompts.shape[1]
        tokens = sequences[:, before:]
        steps = tokens.shape[1]
        chosen = torch.stack(self._chosen, -1)[:, :steps].to(tokens.device)
        if not (
            steps
            and torch.equal(sequences[:, :before], self._prompts)
            and torch.equal(tokens[:, 0], chosen[:, 0])
        ):
            raise ValueError(
                "the base's own `generate` returns other tokens than were chosen, so their "
                "entropies have no place in its sequences: use a model whose `generate` is that of "
                "transformers.GenerationMixin"
            )
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
        # Padding follows an end, also one that only a stopping criterion knows.
        over = tokens != chosen
        over[:, 1:] |= is_end[:, :-1]
        over = over.cumsum(-1) > 0
        entropy, information = (
            torch.stack(values, -1)[:, :steps].to(tokens.device).masked_fill(over, torch.nan)
            for values in zip(*self._measures)
        )
        return Generation(sequences, entropy, information)


def _configuration(model: ParticleModel, options: dict[str, Any]) -> GenerationConfig:
    """The options as transformers will resolve them, after all checks."""
    if not isinstance(model, ParticleModel):
        raise TypeError(f"generate needs a ParticleModel; got {type(model).__name__}")
    base: Any = model.base
    if not isinstance(base, GenerationMixin):
        raise TypeError(f"{type(base).__name__} is not a model of transformers that generates")
    state = forward_state.current()
    if state is not None and state.owner is model and state.frozen:
        raise ValueError("base_only runs no particles: call model.base.generate there")
    if model.fold == "loop" or model.processes.particle_size > 1:
        raise ValueError(
            'generate averages the particles after every token, which needs fold="batch" and all '
            f"particles in one process; got fold={model.fold!r} and "
            f"{model.processes.particle_size} processes"
        )
    given = {
        name: value
        for name, value in options.items()
        if name not in ("logits_processor", "stopping_criteria")
    }
    config, rest = base._prepare_generation_config(given.pop("generation_config", None), **given)
    mode = config.get_generation_mode(rest.get("assistant_model"))
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"generate decodes greedily or samples; got options for {mode.value}")
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ValueError(f"generate returns one sequence from p̄; it cannot use {name}={value}")
    for name in ("streamer", "custom_generate", "per_particle"):
        if options.get(name):
            raise ValueError(f"generate cannot use {name}={options[name]!r}")
    return config


def _warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What transformers applies to scores before it samples, in its order."""
    chosen = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        chosen.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chosen.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        chosen.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        chosen.append(MinPLogitsWarper(config.min_p))
    return chosen


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """−log E with E ~ Exp(1): argmax(log p + noise) is a draw from p."""
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=like.dtype, device=device)
    return -noise.exponential_(generator=generator).log().to(like.device)
