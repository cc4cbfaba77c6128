"""The peers in plain PyTorch: what a user without multilora writes.

Dims: K particles, T or N rows, C classes, r rank.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- lora_linear ---------------------------------------------------------------------------------


def lora_loop(
    xs: Sequence[Tensor],
    weight: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor,
    scaling: float,
) -> list[Tensor]:
    """Three linears per particle, one particle after the other; outputs as K models have them."""
    return [
        F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)
        for x, A, B in zip(xs, lora_As, lora_Bs)
    ]


def lora_baddbmm(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """One base GEMM for all rows, then a batched product and one that accumulates.

    x (K, T, d_in), or (T, d_in) where the particles share it.
    """
    if x.ndim == 2:
        shrunk = F.linear(x, lora_A.flatten(0, 1)).unflatten(1, lora_A.shape[:2]).transpose(0, 1)
        base = F.linear(x, weight, bias).expand(lora_A.shape[0], -1, -1)
    else:
        shrunk = torch.bmm(x, lora_A.mT)
        base = F.linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])
    return torch.baddbmm(base, shrunk, lora_B.mT, alpha=scaling)


def lora_vmap(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """torch.func.vmap over the particle's forward; the frozen weight is shared, not stacked."""

    def one(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)

    return torch.func.vmap(one, in_dims=(None if x.ndim == 2 else 0, 0, 0))(x, lora_A, lora_B)


def lora_addmm(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """Shrink, expand into y together with the bias, and a base GEMM that accumulates into it."""
    shrunk = torch.bmm(x, lora_A.mT)
    y = torch.baddbmm(bias.expand(len(x), 1, -1), shrunk, lora_B.mT, alpha=scaling).flatten(0, 1)
    # In place on a view, autograd would copy the gradient.
    add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
    return add(y, x.flatten(0, 1), weight.mT).unflatten(0, x.shape[:2])


class SwitchedAdapters:
    """PEFT: one linear layer with K adapters, of which one is active at a time.

    autocast: PEFT's default, autocast_adapter_dtype=True: half-precision adapters are kept in
    float32, and x is cast to it.
    """

    def __init__(
        self,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor,
        scaling: float,
        autocast: bool,
    ):
        import peft

        d_out, d_in = weight.shape
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, device=weight.device)
        linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        rank = lora_A.shape[1]
        config = peft.LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=["0"])
        kept = {"autocast_adapter_dtype": autocast}
        self.names = [f"particle_{k}" for k in range(len(lora_A))]
        self.model = peft.get_peft_model(nn.Sequential(linear), config, self.names[0], **kept)
        for name in self.names[1:]:
            self.model.add_adapter(name, config, **kept)
        layer = self.model.base_model.model[0]
        self.factors = [(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in self.names]
        with torch.no_grad():
            for (A, B), new_A, new_B in zip(self.factors, lora_A, lora_B):
                A.copy_(new_A)
                B.copy_(new_B)

    def forward(self, particle: int, x: Tensor) -> Tensor:
        self.model.set_adapter(self.names[particle])
        return self.model(x)


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + ΔW_k of every particle (K, d_out, d_in), rounded to the weight's dtype."""
    delta = scaling * torch.bmm(lora_B.float(), lora_A.float())
    return (weight.float() + delta).to(weight.dtype)


# --- geometry ------------------------------------------------------------------------------------


def frobenius_by_differences(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖ΔW_i − ΔW_j‖²_F (K, K) by its definition, with care: every pair once, one at a time."""
    # unbind, not indexing: the backward of every delta[i] would fill a tensor of delta's size.
    deltas = (scaling * torch.bmm(lora_B, lora_A)).unbind(0)
    pairs = torch.stack([(a - b).square().sum() for a, b in itertools.combinations(deltas, 2)])
    i, j = torch.triu_indices(len(deltas), len(deltas), 1, device=pairs.device)
    upper = pairs.new_zeros(len(deltas), len(deltas)).index_put((i, j), pairs)
    return upper + upper.mT


def frobenius_by_broadcast(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The definition in one line, as one writes it first: K² differences at once."""
    delta = scaling * torch.bmm(lora_B, lora_A)
    return (delta[:, None] - delta[None]).square().sum((-1, -2))


def frobenius_by_gram(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The distances from one GEMM of the flattened ΔW with themselves."""
    delta = scaling * torch.bmm(lora_B, lora_A).flatten(1)
    gram = delta @ delta.mT
    norms = gram.diagonal()
    return norms[:, None] + norms[None] - 2 * gram


def frobenius_by_factors(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The distances without ΔW: ⟨B_iA_i, B_jA_j⟩ = ⟨A_iA_jᵀ, B_iᵀB_j⟩, from two small products."""
    particles, rank, _ = lora_A.shape
    A, B = lora_A.flatten(0, 1), lora_B.mT.flatten(0, 1)
    blocks = ((A @ A.mT) * (B @ B.mT)).view(particles, rank, particles, rank)
    gram = scaling**2 * blocks.sum((1, 3))
    norms = gram.diagonal()
    return norms[:, None] + norms[None] - 2 * gram


# --- particle loss -------------------------------------------------------------------------------


def particle_loss(logits: Tensor, targets: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every particle (K,) and the mean −log det(I + G/eps) over the examples.

    G (N, K, K) is the Gram matrix of the unit vectors of predictions without the target class.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = targets.expand(z.shape[:2])
    f = z.softmax(-1).scatter(-1, labels.unsqueeze(-1), 0)
    gram = _damped_gram(F.normalize(f, dim=-1), eps)
    volume = len(z) * math.log(eps) - torch.logdet(gram)
    return _cross_entropy(z, labels), volume.mean()


def particle_loss_masked(
    logits: Tensor, targets: Tensor, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The same with the target masked before the softmax, so that no p → 1 can underflow the rest,
    and a Cholesky factor, which does not pivot."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = targets.expand(z.shape[:2])
    f = z.scatter(-1, labels.unsqueeze(-1), -torch.inf).softmax(-1)
    factor = torch.linalg.cholesky_ex(_damped_gram(F.normalize(f, dim=-1), eps)).L
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _cross_entropy(z, labels), (len(z) * math.log(eps) - log_det).mean()


def _damped_gram(f: Tensor, eps: float) -> Tensor:
    """f (K, N, C) -> G + eps·I (N, K, K)."""
    f = f.transpose(0, 1)
    return torch.bmm(f, f.mT) + eps * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)


def _cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """z (K, N, C), labels (K, N) -> the mean of every particle (K,)."""
    nll = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
    return nll.view(labels.shape).mean(1)


# --- K models ------------------------------------------------------------------------------------


class LoopedModels(nn.Module):
    """K PEFT models over one set of frozen weights, run one after the other."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
    ):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.call = call
        self.trainable = [[p for p in m.parameters() if p.requires_grad] for m in models]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.call(model, x) for model in self.models])

    def flat(self) -> list[Tensor]:
        """The tensors to train, particle by particle."""
        return [p for params in self.trainable for p in params]

    def stack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in the order of `flat` -> one (K, ...) for every tensor of a particle."""
        each = len(self.trainable[0])
        return [torch.stack(list(tensors[i::each])) for i in range(each)]

    def unstack(self, stacked: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `stack`."""
        return [t for particle in zip(*(s.unbind(0) for s in stacked)) for t in particle]


class StackedModels(nn.Module):
    """K models in one, whose trainable tensors are stacked (K, ...)."""

    def flat(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.requires_grad]

    def stack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def unstack(self, stacked: Sequence[Tensor]) -> list[Tensor]:
        return list(stacked)


class VmappedModels(StackedModels):
    """The same models as one functional model under torch.func.vmap over stacked tensors.

    Only what is trained is stacked. The frozen weights stay shared.
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        # Not in the module tree: its own trainable tensors are never used.
        self.__dict__["template"] = copy.deepcopy(models[0])
        self.names = [n for n, p in models[0].named_parameters() if p.requires_grad]
        params = [dict(m.named_parameters()) for m in models]
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([p[name].detach() for p in params])) for name in self.names
        )

    def forward(self, x: Tensor) -> Tensor:
        def one(*params: Tensor) -> Tensor:
            return torch.func.functional_call(self.template, dict(zip(self.names, params)), (x,))

        return torch.func.vmap(one)(*self.stacked)


class FoldedLinear(nn.Module):
    """A linear of K PEFT models: one product of all rows with W, and `lora_baddbmm` on top."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        (name,) = layers[0].active_adapters
        self.base, self.scaling = layers[0].base_layer, layers[0].scaling[name]
        self.lora_A = _stacked([layer.lora_A[name].weight for layer in layers])
        self.lora_B = _stacked([layer.lora_B[name].weight for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        rows = x.reshape(len(A), -1, x.shape[-1])
        y = lora_baddbmm(rows, self.base.weight, A, B, self.base.bias, self.scaling)
        return y.view(*x.shape[:-1], -1)


class FoldedHead(nn.Module):
    """A trained linear of K models."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1])
        bias = self.bias.to(x.dtype).unsqueeze(1)
        y = torch.baddbmm(bias, rows, self.weight.to(x.dtype).mT)
        return y.view(*x.shape[:-1], -1)


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([t.detach() for t in tensors]))


class FoldedModels(StackedModels):
    """The same models as one whose batch holds the rows of all particles, in plain PyTorch: what
    multilora does, as somebody would write it for one model without kernels of their own."""

    def __init__(self, models: Sequence[nn.Module], compile_it: bool = False):
        super().__init__()
        self.particles = len(models)
        self.template = copy.deepcopy(models[0]).get_base_model()
        bases = [model.get_base_model() for model in models]
        for name, module in list(self.template.named_modules()):
            same = [base.get_submodule(name) for base in bases]
            if hasattr(module, "lora_A"):
                self.template.set_submodule(name, FoldedLinear(same))
            elif hasattr(module, "modules_to_save"):
                heads = [m.modules_to_save[m.active_adapters[0]] for m in same]
                self.template.set_submodule(name, FoldedHead(heads))
        self.run = torch.compile(self._run, dynamic=False) if compile_it else self._run

    def _run(self, x: Tensor) -> Tensor:
        rows = x.expand(self.particles, *x.shape).flatten(0, 1)
        return self.template(rows).unflatten(0, (self.particles, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


Models = LoopedModels | StackedModels


def ensemble_backward(models: Models, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The cross-entropy of every particle."""
    if isinstance(models, LoopedModels):
        # Nothing joins the models, so each has its backward before the next one's forward.
        losses = []
        for model in models.models:
            loss = F.cross_entropy(models.call(model, x).float(), y)
            loss.backward()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).mean()}
    logits = models(x)
    losses = _cross_entropy(logits, y.expand(logits.shape[:2]))
    losses.sum().backward()
    return {"loss": losses.detach().mean()}


class IBDR:
    """`multilora.IBDR` at its defaults, in plain PyTorch: joint divergence, proximal ascent, λ from
    how far the predicted probabilities move."""

    alpha, clip, rho, lambda_lr, lambda_bounds = 0.02, 0.15, 0.03, 2.0, (0.05, 5.0)

    def __init__(self, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.lambda_ = torch.full((), 3.0, dtype=dtype, device=like.device)

    def backward(self, models: Models, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        params = models.flat()
        start = [p.detach().clone() for p in params]
        at_theta = models(x)
        nll, divergence = particle_loss(at_theta, y)
        grads = torch.autograd.grad(nll.sum() + self.alpha * divergence, params)
        grads = models.stack(grads)
        norm = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()  # (K,)
        step = (self.clip / norm).clamp_max(1) / (2 * self.lambda_)
        climb = [(g * step.view(-1, *[1] * (g.ndim - 1))).to(g.dtype) for g in grads]
        with torch.no_grad():
            torch._foreach_add_(params, models.unstack(climb))
        moved = models(x)
        nll, divergence = particle_loss(moved, y)
        (nll.sum() + self.alpha * divergence).backward()
        with torch.no_grad():
            torch._foreach_copy_(params, start)
            probabilities = [t.to(norm.dtype).softmax(-1) for t in (moved, at_theta)]
            cost = torch.linalg.vector_norm(probabilities[0] - probabilities[1], dim=-1).mean()
        self.lambda_.sub_(self.lambda_lr * (self.rho - cost)).clamp_(*self.lambda_bounds)
        loss = nll.detach().mean() + self.alpha * divergence.detach()
        return {"loss": loss, "cost": cost}


def svgd_backward(
    models: Models,
    x: Tensor,
    y: Tensor,
    scaling: float,
    adapted: int,
    gamma: float = 0.01,
    distances: Callable[[Tensor, Tensor, float], Tensor] | None = None,
) -> dict[str, Tensor]:
    """`multilora.SVGD` at its defaults, in plain PyTorch.

    The tensors of a particle are (lora_A, lora_B) of the adapted layers, then the head's.
    """
    stats = ensemble_backward(models, x, y)
    params = models.flat()
    grads = models.stack([p.grad for p in params])
    stacked = models.stack([p.detach() for p in params])
    direction = svgd_direction(stacked, grads, scaling, adapted, gamma, distances=distances)
    for p, d in zip(params, models.unstack(direction)):
        p.grad = d.to(p.dtype)
    return stats


def svgd_direction(
    stacked: Sequence[Tensor],
    grads: Sequence[Tensor],
    scaling: float,
    adapted: int,
    gamma: float = 0.01,
    floor: float = 1e-3,
    distances: Callable[[Tensor, Tensor, float], Tensor] | None = None,
) -> list[Tensor]:
    """One kernel per layer and one for the head, on materialised ΔW unless `distances` is given.
    The widths have SVGD's floor."""
    stacked = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in stacked]
    stacked = [t.detach().requires_grad_() for t in stacked]
    groups = [stacked[2 * i : 2 * i + 2] for i in range(adapted)]
    groups += [head] if (head := stacked[2 * adapted :]) else []
    particles = len(stacked[0])
    i, j = torch.triu_indices(particles, particles, 1, device=stacked[0].device)
    total, driven = 0, []
    for index, group in enumerate(groups):
        if index < adapted and distances is not None:
            distance = distances(*group, scaling)
        elif index < adapted:
            lora_A, lora_B = group
            distance = _squared_distances(scaling * torch.bmm(lora_B, lora_A).flatten(1))
        else:
            distance = _squared_distances(torch.cat([t.flatten(1) for t in group], 1))
        width = distance.detach()[i, j].quantile(0.5) / math.log(particles + 1)
        sized = [scaling * group[0]] if index < adapted else group
        least = 1e-12 + floor * sum(t.detach().square().sum() for t in sized) / particles
        kernel = torch.exp(-distance / width.maximum(least))
        # Its gradient is Σ_j ∇_i k_ij: every pair is in the sum twice.
        total = total + 0.5 * kernel.sum()
        driven += [kernel.detach().mean(1)] * len(group)
    repulsion = torch.autograd.grad(total, stacked)
    return [
        grad * weight.view(-1, *[1] * (grad.ndim - 1)) + (gamma / particles) * force
        for grad, force, weight in zip(grads, repulsion, driven)
    ]


def _squared_distances(weight: Tensor) -> Tensor:
    """(K, P) -> (K, K)"""
    return (weight[:, None] - weight[None]).square().sum(-1)
