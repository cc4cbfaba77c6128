"""Soups: weighted sums of K particles' updates, as models to choose among and as one PEFT adapter.

A soup with the weights w (K,) is the model with ΔW = Σ_k w_k ΔW_k in every layer. Averaging A and B
separately would be wrong: a mean of products is not the product of means.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from multilora import embeddings, peft_tensors
from multilora.copies import StackedModule, stacked_modules
from multilora.layers import lora_layers
from multilora.ops.common import IGNORE_INDEX
from multilora.parallel import Processes
from multilora.particle_folders import replace, write_adapter
from multilora.peft_format import PREFIX
from multilora.prediction import predict_loader

if TYPE_CHECKING:
    import peft

#: (M, K) weights of M soups -> (M,) a number for each, the larger the better.
Score = Callable[[Tensor], Tensor]
_Result = TypeVar("_Result")


def evaluate(model: Any, weights: Tensor, run: Callable[[], _Result]) -> _Result:
    """run() while the model is M soups, which run in one pass: see `ParticleModel.mixtures`.

    Args:
        model: a ParticleModel.
        weights: (M, K).
        run: such as `lambda: ml.predict(model, loader)`, which then gives (M, N, C).
    """
    with model.mixtures(weights):
        return run()


def accuracy(
    model: Any, loader: Iterable[Any], particle_chunk: int | None = None, **reading: Any
) -> Score:
    """A score for `greedy` and `wise`: the share of right predictions in a labelled data set.

    The data must be validation data: soups that are chosen on the test set look better than they
    are.

    Args:
        model: a ParticleModel.
        loader: batches of inputs and labels, as `metrics.predict_loader` takes them.
        particle_chunk: the most soups to run at a time.
        reading: class_axis, output and forward of `metrics.predict_loader`.

    Returns:
        score(weights (M, K)) -> float64 (M,).
    """

    def score(weights: Tensor) -> Tensor:
        log_p, targets = evaluate(
            model, weights, lambda: predict_loader(model, loader, particle_chunk, **reading)
        )
        valid = targets != IGNORE_INDEX
        return (log_p.argmax(-1) == targets)[:, valid].double().mean(1)

    return score


def greedy(model: Any, score: Score) -> Tensor:
    """The weights of a greedy soup: particles join it while its score does not fall.

    The particles are sorted by their own score. The best begins the soup; then each, in this order,
    stays in it if the mean with it does not score worse. So the soup never scores below the best
    particle. A particle whose own score is NaN comes last; a mean whose score is NaN is not taken.

    All candidates for the next place are scored at once, so `score` is called K times at most:
    once with the identity, and once for each particle that joins, and perhaps once more.

    Args:
        model: a ParticleModel.
        score: score(weights (M, K)) -> (M,) on validation data, the same in all processes.

    Returns:
        float64 (K,), 1/n for the n particles of the soup and 0 for the others, for
        `ParticleModel.soup` and `mixtures`.

    Raises:
        ValueError: the score has another shape, or is NaN for every particle.

    Wortsman et al., *Model soups: averaging weights of multiple fine-tuned models improves accuracy
    without increasing inference time*, ICML 2022.
    """
    particles = _particles(model)
    own = _scores(score, torch.eye(particles, dtype=torch.float64))
    order = own.argsort(dim=0, descending=True, stable=True).tolist()
    best, kept, waiting = own[order[0]], order[:1], order[1:]
    while waiting:
        trials = torch.stack([_mean_of([*kept, k], particles) for k in waiting])
        scores = _scores(score, trials, of_some=False)
        joins = (scores >= best).nonzero().flatten().tolist()
        if not joins:
            break
        # Those before it do not fit into this soup; those behind it are still to be tried.
        first = joins[0]
        best, kept, waiting = scores[first], [*kept, waiting[first]], waiting[first + 1 :]
    return _mean_of(kept, particles)


def wise(model: Any, score: Score, alphas: Tensor | Sequence[float] | None = None) -> Tensor:
    """The weights of the best soup between the base (α = 0) and the particles' mean (α = 1).

    All α are scored in one call, with the weights α/K for every particle. WiSE-FT interpolates a
    head only where the base had one for the same classes. So it is for models without
    `modules_to_save`: language models, or CLIP with the frozen head of its text encoder. With a
    module to save, α scales the adapters alone, below the mean head, and this function warns. For
    full copies α interpolates every tensor.

    Args:
        model: a ParticleModel.
        score: score(weights (M, K)) -> (M,) on validation data, the same in all processes.
        alphas: the values to try; 0, 0.1, …, 1 by default.

    Returns:
        float64 (K,), α/K for the α of the best score, and for the first of equals.

    Raises:
        ValueError: alphas are not a list of finite numbers, or the score has another shape, or is
            NaN for every α.

    Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022.
    """
    particles = _particles(model)
    tried = torch.as_tensor(
        torch.linspace(0, 1, 11, dtype=torch.float64) if alphas is None else alphas
    ).double()
    if tried.ndim != 1 or not tried.numel() or not tried.isfinite().all():
        raise ValueError(f"alphas must be a list of finite numbers; got {alphas!r}")
    heads = [name for name, _ in model.stacked_modules() if name]  # a whole base has no name
    if heads:
        warnings.warn(
            f"wise scales the adapters below the mean of {', '.join(heads)}, which the base did "
            "not have: with modules_to_save this is not the interpolation of WiSE-FT",
            stacklevel=2,
        )
    trials = tried[:, None].expand(-1, particles) / particles
    return trials[_scores(score, trials).argmax()].clone()


def _particles(model: Any) -> int:
    """K, of all processes."""
    return model.num_particles * model.processes.particle_size


def _mean_of(which: Sequence[int], particles: int) -> Tensor:
    weights = torch.zeros(particles, dtype=torch.float64)
    weights[list(which)] = 1 / len(which)
    return weights


def _scores(score: Score, weights: Tensor, of_some: bool = True) -> Tensor:
    """The scores (M,), with −∞ for NaN. of_some: whether one of them at least must be a number."""
    found = torch.as_tensor(score(weights)).detach().cpu().double()
    if found.shape != weights.shape[:1]:
        raise ValueError(
            f"score must return ({len(weights)},), a number for each soup of weights "
            f"{tuple(weights.shape)}; got {tuple(found.shape)}"
        )
    if of_some and found.isnan().all():
        raise ValueError(f"none of the {len(weights)} soups has a score that is a number")
    return found.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


# --- the arithmetic ------------------------------------------------------------------------------


def checked(weights: Tensor, particles: int, form: str) -> Tensor:
    """The weights in float64 on the CPU.

    form: "mixtures" for (M, K), "soup" for (K,).

    Raises:
        ValueError: they have another shape or dtype, or are not finite.
    """
    rows = form == "mixtures"
    shape = f"(M, {particles}), M >= 1" if rows else f"({particles},)"
    got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if (
        not (isinstance(weights, Tensor) and weights.is_floating_point())
        or weights.ndim != 1 + rows
        or weights.shape[-1] != particles
        or not weights.numel()
    ):
        dtype = f"{weights.dtype} " if isinstance(weights, Tensor) else ""
        raise ValueError(f"{form} needs floating weights {shape}; got {dtype}{got}")
    if not weights.isfinite().all():
        raise ValueError(f"{form} needs finite weights; got {weights.tolist()}")
    return weights.detach().cpu().double()


class Recipe(NamedTuple):
    """The particles of M soups, n for each, with their weights.

    A soup of fewer particles than n repeats its first one with the weight 0. So a particle of
    weight 0, which may not be finite, is in no soup, and the rank of M soups is no larger than it
    must be.
    """

    which: Tensor  # (M, n)
    weights: Tensor  # (M, n)

    @staticmethod
    def of_adapters(weights: Tensor) -> Recipe:
        """For weights (M, K) of the updates."""
        kept = weights != 0
        most = max(1, int(kept.sum(1).max()))
        which = kept.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        weights = weights.gather(1, which)
        return Recipe(torch.where(weights != 0, which, which[:, :1]), weights)

    @staticmethod
    def of_heads(weights: Tensor) -> Recipe:
        """For weights (M, K) of the updates: Σ_k w_k head_k / Σ_k w_k, or the mean head where
        Σ_k w_k is zero up to rounding."""
        total = weights.sum(1, keepdim=True)
        is_zero = total.abs() <= 1e-6 * weights.abs().sum(1, keepdim=True)
        mean = weights.new_full((), 1 / weights.shape[1])
        return Recipe.of_adapters(torch.where(is_zero, mean, weights / total))

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (K, r, d_in), B (K, d_out, r) -> (M, n·r, d_in), (M, d_out, n·r): the particles' side
        by side, so that nothing is approximated. Of a bank, all are (·, E, ·, ·)."""
        which = self.which.to(A.device)
        each = self.weights.to(B).view(*which.shape, *[1] * (B.ndim - 1))
        each = B[which] * each  # (M, n, d_out, r)
        return A[which].movedim(1, -3).flatten(-3, -2), each.movedim(1, -2).flatten(-2)

    def sums(self, t: Tensor) -> Tensor:
        """t (K, ...) -> (M, ...)."""
        which, weights = self.which.to(t.device), self.weights.to(t)
        first, *others = (
            t[which[:, i]] * weights[:, i].view(-1, *[1] * (t.ndim - 1))
            for i in range(which.shape[1])
        )
        return sum(others, first)


def mixed(base: nn.Module, whole: dict[Tensor, Tensor], weights: Tensor) -> dict[Tensor, Tensor]:
    """The stacked tensors of M soups, (M, ...) in place of (K, ...); see `ParticleModel.mixtures`.

    whole: for every stacked tensor, that of the particles of all processes.
    """
    adapters, heads = Recipe.of_adapters(weights), Recipe.of_heads(weights)
    parts: dict[Tensor, Tensor] = {}
    for _, layer in lora_layers(base):
        A, B = whole[layer.lora_A], whole[layer.lora_B]
        parts[layer.lora_A], parts[layer.lora_B] = adapters.factors(A, B)
    originals = base.originals() if isinstance(base, StackedModule) else {}
    for p, values in whole.items():
        if p in originals:
            rest = (1 - weights.sum(1)).to(values).view(-1, *[1] * (p.ndim - 1))
            parts[p] = adapters.sums(values) + rest * originals[p]
        elif p not in parts:
            parts[p] = heads.sums(values)
    return parts


# --- files ---------------------------------------------------------------------------------------


def save_soup(
    base: nn.Module,
    config: peft.LoraConfig,
    processes: Processes,
    path: str | Path,
    kind: str,
    weights: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Write Σ_k w_k ΔW_k as one adapter; see `ParticleModel.soup`."""
    if kind not in ("exact", "svd"):
        raise ValueError(f'kind must be "exact" or "svd"; got {kind!r}')
    whole = peft_tensors.of_all_processes(base, processes)
    particles = len(next(iter(whole.values())))
    weights = _mean_of(range(particles), particles) if weights is None else weights
    weights = checked(weights, particles, "soup")[None]
    adapters, heads = Recipe.of_adapters(weights), Recipe.of_heads(weights)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for name, layer in lora_layers(base):
        A, B = (
            f[0] for f in adapters.factors(whole[layer.lora_A], whole[layer.lora_B] * layer.scaling)
        )
        for factor, what in ((A, "lora_A"), (B, "lora_B times its scaling")):
            _require_finite(f"{name}: {what}", factor)
        known = peft_tensors.pattern_name(name, layer)
        errors[known] = 0.0
        if kind == "svd":
            A, B, errors[known] = _truncate(A, B, layer.rank)
        ranks[known] = A.shape[-2]
        tensors |= peft_tensors.of_adapter(name, layer, A, B)
    for name, stacked in stacked_modules(base):
        for inner, parameter in stacked.module.named_parameters():
            mean = heads.sums(whole[parameter])[0]
            _require_finite(f"{name}.{inner}", mean)
            tensors[f"{PREFIX}{name}.{inner}"] = mean
        tensors |= peft_tensors.of_buffers(name, stacked.module)
    tensors |= embeddings.to_save(base, "auto")
    config = copy.deepcopy(config)
    # The scaling is inside B now: alpha = rank everywhere.
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    replace(base, processes, path, lambda folder: write_adapter(folder, tensors, config))
    return {"relative_error": errors}


def _require_finite(name: str, tensor: Tensor) -> None:
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ValueError(
            f"the mean of the particles is not finite: {wrong} of {tensor.numel()} numbers of "
            f"{name}"
        )


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-`rank` factors of B A, or of each B A of a bank (E, ...), through the QR of
    both: no d_out × d_in matrix.

    Also ‖B A − its best‖_F / ‖B A‖_F.
    """
    dtype = A.dtype
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    norm = s.norm().item()
    lost = s[..., rank:].norm().item() / norm if norm > 0 else 0.0
    root = s[..., :rank].sqrt()
    A = root[..., None] * (vh[..., :rank, :] @ q_a.mT)
    B = (q_b @ u[..., :rank]) * root[..., None, :]
    # A rank that the matrix does not have is filled with zeros.
    A = nn.functional.pad(A, (0, 0, 0, rank - A.shape[-2]))
    B = nn.functional.pad(B, (0, rank - B.shape[-1]))
    return A.to(dtype), B.to(dtype), lost
