"""The Laplace approximation around a trained adapter, which laplace-torch computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from multilora import checks, particle_folders, peft_tensors
from multilora.checkpoint import load_particle_model
from multilora.model import MOST_PARTICLES, ParticleModel
from multilora.prediction import chosen


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
            model(**input) for a mapping, nor their `.logits`. A language model's gives those of the
            answers.
        seed: of the draws.
        **laplace_args: further arguments of `laplace.Laplace`, such as temperature.

    Returns:
        The particle model, in eval mode.

    Raises:
        ModuleNotFoundError: laplace-torch is not installed; it is the extra "laplace".
        ValueError: an argument is out of range, a batch is none, or the adapter does not fit.
        NotImplementedError: subset="all" of an adapter with target_parameters.
        FileNotFoundError, PermissionError: as `load_particle_model`. `base` is unchanged by all.
    """
    check_laplace(subset, structure, prior_precision)
    checks.integer("num_particles", num_particles, 1, MOST_PARTICLES)
    checks.integer("seed", seed, 0, 2**63 - 1)
    Laplace = _laplace_torch()
    network, keys = _as_peft_loads_it(path, base, forward, subset)
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
        return chosen(self.model(**x) if isinstance(x, Mapping) else self.model(x), None)


#: The key under which laplace-torch finds the labels of a batch that is a mapping.
_LABELS = "labels"


def _as_peft_loads_it(
    path: str | Path,
    base: nn.Module,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    subset: str,
) -> tuple[_Network, dict[str, str]]:
    """The adapter over a copy of `base`, and {a trained tensor's name: its key in PEFT's file}."""
    import peft
    from peft.utils import get_peft_model_state_dict

    (config,) = particle_folders.read([path]).configs  # its errors name the file
    if subset == "all" and config.target_parameters:
        # PEFT holds their factors in linears that it never calls.
        raise NotImplementedError(
            f"{path} has target_parameters, for which laplace-torch finds no curvature; "
            'subset="last_layer" keeps them as they are'
        )
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
