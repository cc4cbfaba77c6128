"""Posteriors after training: K particles from the one adapter of an ordinary run."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from multilora import checks, particle_folders, peft_tensors
from multilora.checkpoint import load_particle_model
from multilora.layers import LoraLayer
from multilora.model import ParticleModel

#: No machine has memory for more particles.
_MOST = 2**20


# --- training-free Bayesianisation ---------------------------------------------------------------


@torch.no_grad()
def bayesianize(
    model: ParticleModel,
    score: Callable[[ParticleModel], float],
    tolerance: float,
    num_particles: int = 10,
    steps: int = 12,
    *,
    largest: float | None = None,
    seed: int = 0,
) -> float:
    """Turn a trained model of one particle into K draws of a posterior, without training (TFB).

    Every adapter s B A, with s B = U diag(d) Vᵀ and positive d, becomes B' = U diag(d) / s and
    A' = Vᵀ A, which leaves ΔW as it is. Particle k then has row i of A' plus (σ/d_i) ε_ki, where
    ε ~ N(0, I). So every column of ΔW has noise of covariance σ² U Uᵀ, which lies in the space of
    the columns of B and does not depend on how ΔW is factored. A row with d_i = 0 gets no noise,
    and neither do modules to save. One σ serves all layers: the largest whose score is at most
    `tolerance` below that of the trained model, found by bisection with the same ε for all σ.

    The model is changed in place, from one particle to `num_particles`: it then predicts and saves
    as any other model of K particles. It has new parameters, so an optimizer of it is void.

    Source: Shi et al., Training-Free Bayesianization for Low-Rank Adapters of Large Language
    Models, NeurIPS 2025.

    Args:
        model: a model of one particle, which has been trained.
        score: score(model) -> a number that is higher for a better model, on an anchor set that is
            not the test set: accuracy, or minus the NLL of the mean prediction. It is called once
            with the trained model, then `steps` times with `num_particles` particles. With
            processes along the data, it has to be the same in all of them.
        tolerance: >= 0, how much the score may lose, in its own unit.
        num_particles: K >= 1, the number of draws.
        steps: number of bisections; σ is known to largest/2^steps.
        largest: the upper end of the search. By default, the σ at which the noise on ΔW has twice
            the Frobenius norm of ΔW, over all layers together.
        seed: of ε.

    Returns:
        σ, in units of the entries of ΔW. It is 0 if no σ that was tried keeps the score; a warning
        says if none lost it.

    Raises:
        ValueError: the model has more than one particle or no trained adapter, an argument is out
            of range, or the score of the trained model is not finite. The model is unchanged then,
            and also where `score` raises.
    """
    checks.number("tolerance", tolerance, 0)
    checks.integer("num_particles", num_particles, 1, _MOST)
    checks.integer("steps", steps, 1, 1000)
    if len(model.seeds) != 1:
        raise ValueError(f"bayesianize needs a model of one particle; got {len(model.seeds)}")
    layers = [layer for _, layer in model.lora_layers()]
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0, 2**63 - 1))
    factors = [_Factors.of(layer, num_particles, generator) for layer in layers]
    if largest is None:
        largest = _twice_the_norm(factors)
    checks.number("largest", largest, 0, open_low=True)
    trained = checks.number("the score of the trained model", float(score(model)))
    low, high = 0.0, largest
    with model.mixtures(torch.ones(num_particles, 1)):
        for _ in range(steps):
            sigma = (low + high) / 2
            for layer, of_layer in zip(layers, factors):
                layer.lora_A.data, layer.lora_B.data = of_layer.draws(sigma)
            if trained - float(score(model)) <= tolerance:
                low = sigma
            else:
                high = sigma
    if high == largest:
        warnings.warn(
            f"no score was more than {tolerance:g} below that of the trained model: σ = {low:g} is "
            "the end of the search (largest), and the anchor set says nothing about it",
            stacklevel=3,  # this function is inside torch.no_grad's
        )
    model.repeat(num_particles)
    for layer, of_layer in zip(layers, factors):
        for parameter, drawn in zip((layer.lora_A, layer.lora_B), of_layer.draws(low)):
            parameter.copy_(drawn)
    return low


class _Factors(NamedTuple):
    """One adapter in the basis of its singular vectors, and its noise."""

    A: Tensor  # (r, d_in), A'
    B: Tensor  # (d_out, r), B'
    noise: Tensor  # (K, r, d_in), ε/d
    squared_norm: float  # ‖ΔW‖²
    noise_size: int  # the noise on ΔW has the expected squared norm σ² · noise_size

    @staticmethod
    def of(layer: LoraLayer, particles: int, generator: torch.Generator) -> _Factors:
        A, B = layer.lora_A[0].double(), layer.lora_B[0].double() * layer.scaling
        U, d, Vh = torch.linalg.svd(B, full_matrices=False)
        # Where the rank exceeds d_out, the rows that U lacks are zero.
        lacking = len(A) - len(d)
        A, B = Vh @ A, U * d / layer.scaling if layer.scaling else torch.zeros_like(U)
        squared_norm = (d[:, None] * A).square().sum().item()
        A = torch.nn.functional.pad(A, (0, 0, 0, lacking))
        B = torch.nn.functional.pad(B, (0, lacking))
        d = torch.nn.functional.pad(d, (0, lacking))
        zero = d <= d.max() * max(layer.lora_B.shape) * torch.finfo(layer.lora_B.dtype).eps
        epsilon = torch.randn(particles, *A.shape, generator=generator).to(A)
        noise = torch.where(zero[:, None], 0, epsilon / torch.where(zero, 1, d)[:, None])
        A, B, noise = (t.to(layer.lora_A.dtype) for t in (A, B, noise))
        return _Factors(A, B, noise, squared_norm, int((~zero).sum()) * A.shape[1])

    def draws(self, sigma: float) -> tuple[Tensor, Tensor]:
        """A (K, r, d_in) and B (K, d_out, r) of the particles."""
        return self.A + sigma * self.noise, self.B.expand(len(self.noise), -1, -1).contiguous()


def _twice_the_norm(factors: Sequence[_Factors]) -> float:
    norm = sum(f.squared_norm for f in factors)
    size = sum(f.noise_size for f in factors)
    if not norm > 0:
        raise ValueError(
            f"bayesianize needs a trained model; ΔW of its {len(factors)} adapters is zero"
        )
    return 2 * math.sqrt(norm / size)


# --- the Laplace approximation -------------------------------------------------------------------


def laplace(
    path: str | Path,
    base: nn.Module,
    loader: Iterable[Any],
    num_particles: int = 10,
    *,
    subset: str = "all",
    structure: str = "kron",
    prior_precision: str | float = "marglik",
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    **laplace_args: Any,
) -> ParticleModel:
    """K draws of a Gaussian posterior around one trained adapter, as a particle model over `base`.

    The posterior is N(θ*, (Σ_n ∇² ℓ_n(θ*) + δ I)⁻¹): θ* is the adapter, ℓ_n the cross-entropy of
    example n, its Hessian the generalised Gauss-Newton matrix, and δ the prior's precision. The
    package laplace-torch computes it, on a copy of `base` with the adapter as PEFT loads it.

    Sources: Daxberger et al., Laplace Redux, NeurIPS 2021; Yang et al., Bayesian Low-rank
    Adaptation for Large Language Models (Laplace-LoRA), ICLR 2024.

    Args:
        path: a folder of one PEFT adapter, such as particle_0 of a run with one particle.
        base: the plain model that the adapter belongs to. It becomes that of the particle model.
        loader: the training data, every example once; it is read twice or more. Batches are pairs
            of an input, a tensor or a mapping of tensors, and its labels (B,).
        num_particles: K >= 1, the number of draws.
        subset: the tensors with a posterior: "all" that the adapter trains, or its "last_layer",
            for which it needs exactly one module to save, a linear. The others stay at θ*.
        structure: of the Hessian: Kronecker-factored per layer ("kron"), "diag" or "full".
        prior_precision: δ > 0, or "marglik", the one that maximises the marginal likelihood.
        forward: forward(model, input) -> logits (B, C), where that is not model(input), or
            model(**input) for a mapping. A language model's gives those of the answers.
        seed: of the draws.
        **laplace_args: further arguments of `laplace.Laplace`, such as temperature.

    Returns:
        The particle model, in eval mode.

    Raises:
        ModuleNotFoundError: laplace-torch is not installed; it is the extra "laplace".
        ValueError: an argument is out of range, a batch is none, or the adapter does not fit.
        FileNotFoundError, PermissionError: as `load_particle_model`. `base` is unchanged by all.
    """
    check_laplace(subset, structure, prior_precision)
    checks.integer("num_particles", num_particles, 1, _MOST)
    checks.integer("seed", seed, 0, 2**63 - 1)
    Laplace = _laplace_torch()
    network, keys = _as_peft_loads_it(path, base, forward)
    if subset == "last_layer":
        laplace_args["last_layer_name"] = _last_layer(network)
    given = {} if prior_precision == "marglik" else {"prior_precision": prior_precision}
    posterior = Laplace(
        network,
        "classification",
        subset_of_weights=subset,
        hessian_structure=structure,
        **given,
        **laplace_args,
    )
    device = next(network.parameters()).device
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels lack derivatives that the fit takes
        posterior.fit(_Batches(loader, device))
    if not given:
        with warnings.catch_warnings():
            # It says which predictive is its default; ours are the draws.
            warnings.filterwarnings("ignore", "By default `link_approx`")
            posterior.optimize_prior_precision()
    draws = posterior.sample(num_particles, generator=torch.Generator(device).manual_seed(seed))
    names, parameters = zip(*_drawn_parameters(network, laplace_args.get("last_layer_name")))
    parts = draws.split([p.numel() for p in parameters], 1)
    model = load_particle_model(base, [path]).eval()
    model.repeat(num_particles)
    peft_tensors.fill(
        model.base,
        [{keys[n]: part[k] for n, part in zip(names, parts)} for k in range(num_particles)],
    )
    return model


def check_laplace(subset: str, structure: str, prior_precision: str | float) -> None:
    """Raise ValueError where `laplace` would refuse one of these."""
    checks.choice("subset", subset, ("all", "last_layer"))
    checks.choice("structure", structure, ("kron", "diag", "full"))
    if prior_precision != "marglik":
        checks.number('prior_precision, unless it is "marglik",', prior_precision, 0, open_low=True)


def _laplace_torch() -> Any:
    try:
        from laplace import Laplace
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; posthoc.laplace needs the extra: pip install 'multilora[laplace]'",
            name=error.name,
        ) from error
    return Laplace


class _Network(nn.Module):
    """One PEFT model as laplace-torch calls it: input -> logits (B, C)."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor] | None):
        super().__init__()
        self.model, self.logits = model, forward

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Mapping):
            x = {name: tensor for name, tensor in x.items() if name != _LABELS}
        if self.logits is not None:
            return self.logits(self.model, x)
        return self.model(**x) if isinstance(x, Mapping) else self.model(x)


#: The key under which laplace-torch finds the labels of a batch that is a mapping.
_LABELS = "labels"


def _as_peft_loads_it(
    path: str | Path, base: nn.Module, forward: Callable[[nn.Module, Any], Tensor] | None
) -> tuple[_Network, dict[str, str]]:
    """The adapter over a copy of `base`, and {a trained tensor's name: its key in PEFT's file}."""
    import peft
    from peft.utils import get_peft_model_state_dict

    particle_folders.read([path])  # its errors name the file
    try:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the base model: {error}") from error
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    key_of = {tensor.data_ptr(): key for key, tensor in stored.items()}
    network = _Network(model, forward).eval()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    return network, {name: key_of[p.data_ptr()] for name, p in trained.items()}


def _last_layer(network: _Network) -> str:
    """The name of the only module to save."""
    from peft.utils.other import ModulesToSaveWrapper

    saved = {n: m for n, m in network.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    own = {f"{n}.modules_to_save.{m.active_adapters[0]}": m for n, m in saved.items()}
    found = [name for name in own if isinstance(network.get_submodule(name), nn.Linear)]
    if len(saved) != 1 or not found:
        raise ValueError(
            'subset="last_layer" needs an adapter with one linear in modules_to_save; got '
            f"{sorted(saved) or 'none'}"
        )
    return found[0]


def _drawn_parameters(network: nn.Module, last: str | None) -> Iterator[tuple[str, Tensor]]:
    """The parameters whose entries make laplace-torch's vector, in its order, by their names."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad if last is None else name.startswith(f"{last}."):
            yield name, parameter


class _Batches:
    """A loader's batches on a device, as laplace-torch reads them, and their number of examples."""

    def __init__(self, loader: Iterable[Any], device: torch.device):
        if iter(loader) is loader:
            raise ValueError(f"laplace reads its loader twice; got an iterator, {loader!r}")
        self.loader, self.device = loader, device
        #: laplace-torch takes the length of it.
        self.dataset = range(sum(len(labels) for _, labels in self._pairs()))
        if not self.dataset:
            raise ValueError("laplace needs a loader with at least one example; it has none")

    def _pairs(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(
                    f"laplace needs batches (input, labels); the loader gave {type(batch).__name__}"
                )
            yield batch[0], batch[1]

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # tqdm asks, and does without it

    def __iter__(self) -> Iterator[Any]:
        for x, labels in self._pairs():
            labels = labels.to(self.device)
            if isinstance(x, Mapping):
                yield {name: t.to(self.device) for name, t in x.items()} | {_LABELS: labels}
            else:
                yield x.to(self.device), labels
