"""The operators in plain PyTorch: their definition, the oracle of every kernel, and the fallback.

They are the nine functions of a backend; their callers have checked shapes and dtypes.
Dims: K particles, T or N rows, C classes, r rank, L layers.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.ops.common import (
    IGNORE_INDEX,
    TABLE_IS_NOT_THERE,
    accumulator,
    by_row,
    check_targets,
    core_dtype,
    expand_gradient,
    row_counts,
)

#: It computes every operator, for all arguments.
LEAVES: dict[str, str] = {}


def refuses(op: str, args: tuple[Any, ...]) -> None:
    """The reference refuses nothing."""


# --- lora_linear ---------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    particles, rows = lora_A.shape[0], x.shape[1]
    # One GEMM over all rows of all particles, in two dimensions: an expanded x would make three
    # a broadcast product.
    base = F.linear(x.flatten(0, 1), weight, bias)
    shrunk = _shrink(x, lora_A)
    expander = _cast(lora_B, x.dtype).mT
    if x.shape[0] == particles:
        # Not a view: autograd would refuse in-place changes by the caller.
        base = base.resize_(particles, rows, weight.shape[0])
        return base.baddbmm_(shrunk, expander, alpha=scaling), shrunk
    base = base.expand(particles, -1, -1)
    return torch.baddbmm(base, shrunk, expander, alpha=scaling), shrunk


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes its time also where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y (K·T rows of d_out) += scaling·(x Aᵀ) Bᵀ for x (K or 1, T, d_in) -> S = x Aᵀ (K, T, r)."""
    shrunk = _shrink(x, lora_A)
    rows = y.view(*shrunk.shape[:2], lora_B.shape[1])
    rows.baddbmm_(shrunk, _cast(lora_B, y.dtype).mT, alpha=scaling)
    return shrunk


def _shrink(x: Tensor, lora_A: Tensor) -> Tensor:
    """S = x Aᵀ (K, T, r) in x's dtype, in one product where the particles share x."""
    particles, rank, _ = lora_A.shape
    lora_A = _cast(lora_A, x.dtype)
    if x.shape[0] == particles:
        return torch.bmm(x, lora_A.mT)
    shrunk = F.linear(x[0], lora_A.flatten(0, 1))  # (T, K·r)
    return shrunk.view(x.shape[1], particles, rank).transpose(0, 1).contiguous()


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (K, T, d_out) -> dx (as x), dA (K, r, d_in), dB (K, d_out, r); empty where not needed.

    dS = s·dY·B, dX = dY·W + dS·A, dA = dSᵀ·X, dB = s·dYᵀ·S. Without a weight dX = dS·A.
    """
    needs_x, needs_A, needs_B = needs
    particles, rank, d_in = lora_A.shape
    rows = x.shape[1]
    shared = x.shape[0] != particles
    dx = dA = dB = None
    # beta=0: it gives the products a factor, and is not read.
    unread = grad.new_empty(())
    # Products with a rank on one side are several times faster on a CPU where it is not the last
    # axis in memory: dSᵀ (K, r, T) and dBᵀ (K, r, d_out).
    if needs_x or needs_A:
        B = _cast(lora_B, grad.dtype)
        turned = torch.baddbmm(unread, B.mT, grad.mT, beta=0, alpha=scaling)
    if needs_x:
        A = _cast(lora_A, grad.dtype)
        if weight is None:
            dx = expand_gradient(turned.mT, A, shared)
        elif shared:
            # The rows are the same for all particles, so dY is summed before the large product.
            dx = torch.mm(grad.sum(0), weight)
            dx = dx.addmm_(by_row(turned.mT), A.flatten(0, 1)).unsqueeze(0)
        else:
            dx = torch.mm(grad.flatten(0, 1), weight).view(particles, rows, d_in)
            dx = dx.baddbmm_(turned.mT, A)
    if needs_A:
        if shared:
            dA = torch.mm(turned.flatten(0, 1), x[0]).view(particles, rank, d_in)
        else:
            dA = torch.bmm(turned, x)
        dA = _cast(dA, lora_A.dtype)
    if needs_B:
        # Scaled in the factors' dtype, which may reach further than a float16.
        dB = _cast(torch.bmm(shrunk.mT, grad), lora_B.dtype).mT
        dB = torch.mul(dB, scaling, out=lora_B.new_empty(lora_B.shape))
    if dx is None:
        dx = x.new_empty(0)
    return dx, lora_A.new_empty(0) if dA is None else dA, lora_B.new_empty(0) if dB is None else dB


# --- grouped_linear ------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (T, d_in), weight (G, d_out, d_in), ends (G,) -> y (T, d_out)."""
    return _by_group(x, _cast(weight, x.dtype).mT, ends)


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad (T, d_out) -> dx (T, d_in), dW (G, d_out, d_in); empty where not needed."""
    dx, dW = x.new_empty(0), weight.new_empty(0)
    if needs[0]:
        dx = _by_group(grad, _cast(weight, grad.dtype), ends)
    if needs[1]:
        dW = _cast(_outer_by_group(grad, x, ends), weight.dtype)
    return dx, dW


def _by_group(x: Tensor, factor: Tensor, ends: Tensor) -> Tensor:
    """The product of every row of x (T, d) with its group's matrix in factor (G, d, cols)."""
    rows, (groups, depth, cols) = x.shape[0], factor.shape
    counts = row_counts(ends, rows) if ends.is_cpu else None
    if counts is None or not _all_equal(counts):
        if _grouped_mm_takes(x, factor):
            # Its rows may lie apart on a GPU.
            return F.grouped_mm(x, factor, offs=ends).contiguous()
        counts = counts or row_counts(ends, rows)
    if _all_equal(counts):
        return torch.bmm(x.view(groups, rows // groups, depth), factor).view(rows, cols)
    y = x.new_empty(rows, cols)
    parts = zip(x.split_with_sizes(counts), factor.unbind(), y.split_with_sizes(counts))
    for count, (own, matrix, out) in zip(counts, parts):
        if count:
            torch.mm(own, matrix, out=out)
    return y


def _outer_by_group(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """gradᵀ·x over the rows of every group: (G, d_out, d_in) from grad (T, d_out), x (T, d_in)."""
    groups, rows, (d_out, d_in) = ends.shape[0], x.shape[0], (grad.shape[1], x.shape[1])
    counts = row_counts(ends, rows) if ends.is_cpu else None
    if counts is None or not _all_equal(counts):
        if _grouped_mm_takes(grad.mT, x):
            return F.grouped_mm(grad.mT, x, offs=ends).contiguous()
        counts = counts or row_counts(ends, rows)
    if _all_equal(counts):
        each = (groups, rows // groups)
        return torch.bmm(grad.view(*each, d_out).mT, x.view(*each, d_in))
    dW = x.new_empty(groups, d_out, d_in)
    parts = zip(grad.split_with_sizes(counts), x.split_with_sizes(counts), dW.unbind())
    for above, own, out in parts:
        # Without rows it is the sum over nothing.
        torch.mm(above.mT, own, out=out)
    return dW


def _all_equal(counts: list[int]) -> bool:
    return counts.count(counts[0]) == len(counts)


#: The dtypes that PyTorch's grouped product computes without waiting for the ends. (On a GPU it
#: takes the others too, one group after another.)
_GROUPED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}


def _grouped_mm_takes(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these two."""
    return a.dtype in _GROUPED_DTYPES.get(a.device.type, ()) and all(map(_in_lines, (a, b)))


def _in_lines(t: Tensor) -> bool:
    """Whether every row, or every column, of t is contiguous and on a 16-byte boundary."""
    (height, width), (down, right) = t.shape[-2:], t.stride()[-2:]
    if down == 1 and right >= height:
        steps = (right, *t.stride()[:-2])
    elif right == 1 and down >= width:
        steps = (down, *t.stride()[:-2])
    else:
        return False
    starts = (t.data_ptr(), *(step * t.element_size() for step in steps))
    return t.numel() > 0 and all(start % 16 == 0 for start in starts)


# --- adapter geometry ----------------------------------------------------------------------------


def traces(
    lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float], distance: bool
) -> Tensor:
    """T (L, K, K), T_ij = s² ⟨A_i A_jᵀ, B_iᵀ B_j⟩; or D_ij = T_ii + T_jj − 2 T_ij."""
    T = _gram64(lora_A, lora_B, scaling)
    if distance:
        norms = T.diagonal(dim1=-2, dim2=-1)
        T = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - T - T.mT).clamp_min_(0)
        T.diagonal(dim1=-2, dim2=-1).zero_()
    return T.to(accumulator(lora_A[0].dtype))


def factor_gradients(
    upstream: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    mix: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of ⟨upstream, T⟩ for all lora_A, then for all lora_B; with mix (L, K, K), or
    (L, K) for a diagonal, plus Σ_j mix_ij grads_j.

    dA_i = Σ_j U_ij (B_iᵀ B_j) A_j and dB_i = Σ_j U_ij B_j (A_j A_iᵀ), where
    U = s² (upstream + upstreamᵀ).
    """
    out = [*lora_A, *lora_B]
    if mix is not None:
        mix = mix.double()
    for i, like, gradient in _gradients64(upstream, lora_A, lora_B, scaling):
        if mix is not None and grads is not None:
            weight, grad = mix[i % len(scaling)], grads[i].double().flatten(1)
            mixed = weight @ grad if mix.ndim == 3 else weight[:, None] * grad
            gradient = mixed.view(like.shape) + gradient
        out[i] = gradient.to(like.dtype, memory_format=torch.contiguous_format)
    return out


def _gradients64(
    grad: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every factor's place among all lora_A and lora_B, the factor and its gradient in float64."""
    layers = len(scaling)
    plan = _plan_of(lora_A, lora_B, scaling)
    U = (grad + grad.mT).double() * plan.scales
    if plan.order is not None:
        U = U.index_select(0, plan.order)
    for members, u in zip(plan.groups, U.split([len(group) for group in plan.groups])):
        A, B = _stack64(lora_A, lora_B, members)
        rank = lora_A[members[0]].shape[1]
        u = u.repeat_interleave(rank, -1).repeat_interleave(rank, -2)
        dA = torch.bmm(torch.bmm(B, B.mT).mul_(u), A)
        dB = torch.bmm(torch.bmm(A, A.mT).mul_(u), B)
        for layer, a, b in zip(members, dA, dB):
            like_a, like_b = lora_A[layer], lora_B[layer]
            particles, d_out, _ = like_b.shape
            yield layer, like_a, a.view(like_a.shape)
            yield layers + layer, like_b, b.view(particles, rank, d_out).mT


def _gram64(lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> Tensor:
    particles, parts = lora_A[0].shape[0], []
    plan = _plan_of(lora_A, lora_B, scaling)
    for members in plan.groups:
        A, B = _stack64(lora_A, lora_B, members)
        rank = lora_A[members[0]].shape[1]
        blocks = torch.bmm(A, A.mT).mul_(torch.bmm(B, B.mT))  # (l, K·r, K·r)
        parts.append(blocks.view(-1, particles, rank, particles, rank).sum((2, 4)))
    T = torch.cat(parts)
    if plan.places is not None:
        T = T.index_select(0, plan.places)
    return T.mul_(plan.scales)


class _Plan(NamedTuple):
    """The layers' indices, grouped by shape, for one batched product a group: layer order[i] is
    the i-th in the groups and layer i the places[i]-th (None: as they are). scales: s² (L, 1, 1)"""

    groups: list[list[int]]
    order: Tensor | None
    places: Tensor | None
    scales: Tensor


def _plan_of(lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> _Plan:
    shapes = tuple(A.shape + B.shape for A, B in zip(lora_A, lora_B))
    return _plan(shapes, tuple(scaling), lora_A[0].device)


@functools.cache
def _plan(shapes: tuple[torch.Size, ...], scaling: tuple[float, ...], device: torch.device):
    """Copied to the device once for the sizes of a model, and kept, as captured graphs read it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(TABLE_IS_NOT_THERE)
    groups = defaultdict(list)
    for layer, shape in enumerate(shapes):
        groups[shape].append(layer)
    layers = [layer for members in groups.values() for layer in members]
    scales = torch.tensor(scaling, dtype=torch.float64, device="cpu").square()[:, None, None]
    if layers == sorted(layers):
        return _Plan(list(groups.values()), None, None, scales.to(device))
    order = torch.tensor(layers, device="cpu")
    return _Plan(
        list(groups.values()), order.to(device), order.argsort().to(device), scales.to(device)
    )


def _stack64(
    lora_A: list[Tensor], lora_B: list[Tensor], members: list[int]
) -> tuple[Tensor, Tensor]:
    """The factors of some layers as (l, K·r, d_in) and (l, K·r, d_out), in float64.

    Distances of nearly equal particles are small differences of large traces; float64 products
    of float32 factors are exact, so nothing is lost.
    """
    # No operation a layer: on a GPU its launch would take longer than it runs.
    A = lora_A[0].new_empty(len(members), *lora_A[members[0]].shape, dtype=torch.float64)
    torch._foreach_copy_(A.unbind(), [lora_A[layer] for layer in members])
    # Products over a contiguous axis are the fastest.
    B = torch.stack([lora_B[layer] for layer in members]).mT
    B = B.to(torch.float64, memory_format=torch.contiguous_format)
    return A.flatten(1, 2), B.flatten(1, 2)


# --- gram volume and particle loss ---------------------------------------------------------------
#
# With z the logits without the target class (z_y = −∞) and e = exp(z − max z), the unit vector of
# the masked softmax is f̃ = e/‖e‖ whatever the true logit is, so nothing underflows when p_y → 1.
# With M = ∂v/∂G for a function v of G = F̃F̃ᵀ (rows are particles), the chain through the norm and
# the masked softmax collapses to
#     ∂v/∂z_i = 2 f̃_i ∘ (X_i − ⟨X_i, f̃_i⟩ f̃_i),   X = M F̃,
# because the term that the softmax Jacobian subtracts, ⟨q_i, ∂v/∂q_i⟩, is zero.
#
# Nearly equal particles make G nearly singular, and eps is far below float32's digits of it. All of
# G is therefore made and used in float64. With fewer particles than classes F̃ itself is float32's:
# that is as if the logits had been rounded, and G is still a Gram matrix. Otherwise the gradient is
# a difference of sums over all particles, each 1/eps times larger, so F̃ and core are float64 too.


def volume(
    logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
) -> tuple[Tensor, ...]:
    """-> value (N,), stats (3, K, N), core (N, m, m); or, with means, nll (K,) and divergence (),
    stats, core, count ()."""
    check_targets(logits, targets)
    f, stats, nll = _normalise(logits, targets)
    value, core = _volume(f, targets, eps, kind)
    if not means:
        return value.to(stats.dtype), stats, core
    count = (targets != IGNORE_INDEX).sum().clamp_min(1)
    nll, divergence = nll.sum(-1) / count, value.sum() / count
    dtype = stats.dtype
    return nll.to(dtype), divergence.to(dtype), stats, core, count.to(dtype)


def volume_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    core: Tensor,
    grad_nll: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """grad (N,) of the values; or grad () of their mean, and grad_nll (K,) -> dlogits (K, N, C)."""
    valid, labels = _labels(logits, targets)
    f = _renormalise(logits, targets, stats)
    if grad_nll is None or count is None:
        dz = _volume_gradient(f, core, grad, f.new_zeros(f.shape[:2])).mul_(f)
        return _zero_ignored(dz, valid).to(logits.dtype)
    top, norm, rest = stats
    # e_y = exp(z_y − top); it may overflow, and p_y is then 1 and the rest of the softmax 0.
    e_y = torch.exp(logits.gather(-1, labels).squeeze(-1).to(f.dtype) - top)
    weight = (grad_nll[:, None] / count).expand(f.shape[:2])
    # The softmax is f̃ · ‖e‖/(Σe + e_y) off the target, and p_y − 1 = −Σe/(Σe + e_y) on it.
    offset = (weight * norm / (rest + e_y)).where(valid, 0)
    on_target = (-weight * rest / (rest + e_y)).where(valid, 0)
    dz = _volume_gradient(f, core, (grad / count).expand(targets.shape), offset)
    dz = dz.mul_(f).scatter_(-1, labels, on_target.unsqueeze(-1))
    return _zero_ignored(dz, valid).to(logits.dtype)


def _volume(f: Tensor, targets: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """f̃ (K, N, C) -> the value (N,), float64, and core (N, m, m) in f̃'s dtype, m = min(K, C).

    K < C: core = M − diag(M G), so that X_i − ⟨X_i, f̃_i⟩ f̃_i = (core F̃)_i.
    K >= C, where G is singular: core = −(F̃ᵀF̃ + εI)⁻¹ (C, C), and X = F̃ core by the push-through
    identity.
    """
    particles, rows, classes = f.shape
    side = min(particles, classes)
    if classes == 2 or (kind == "det" and particles > classes - 1):
        return f.new_zeros(rows, dtype=torch.float64), f.new_zeros(rows, side, side)
    by_example = f.transpose(0, 1).double()  # (N, K, C)
    if particles < classes:
        gram = torch.bmm(by_example, by_example.mT)
    else:
        gram = torch.bmm(by_example.mT, by_example)
    if kind == "det":
        value, core = _negative_det(gram)
    else:
        damped = gram + eps * torch.eye(side, dtype=gram.dtype, device=gram.device)
        # cholesky_ex does not wait for the device, and eps keeps the matrix positive definite.
        factor = torch.linalg.cholesky_ex(damped).L
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = side * math.log(eps) - log_det
        core = -torch.cholesky_inverse(factor)
    if particles < classes:
        core = core - torch.diag_embed((core * gram).sum(-1))
    valid = targets != IGNORE_INDEX
    # where, not a product: an ignored row may hold anything.
    return value.where(valid, 0), core.where(valid[:, None, None], 0).to(f.dtype).contiguous()


def _negative_det(gram: Tensor) -> tuple[Tensor, Tensor]:
    """−det G and −adj G for (N, K, K), also where G is singular."""
    side = gram.shape[-1]
    eye = torch.eye(side, dtype=torch.bool, device=gram.device)
    # LAPACK raises on NaN; here a broken example gives NaN and leaves the others alone.
    broken = ~gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eigenvalues, vectors = torch.linalg.eigh(gram.where(~broken, eye.to(gram.dtype)))
    eigenvalues = eigenvalues.clamp_min(0).where(~broken.squeeze(-1), torch.nan)
    others = eigenvalues[:, None, :].expand(-1, side, -1).masked_fill(eye, 1).prod(-1)
    return -eigenvalues.prod(-1), -(vectors * others[:, None, :]) @ vectors.mT


def _volume_gradient(f: Tensor, core: Tensor, grad: Tensor, offset: Tensor) -> Tensor:
    """offset + 2·grad·(X_i − ⟨X_i, f̃_i⟩ f̃_i): what f̃ is multiplied with. -> (K, N, C)

    grad (N,) of the values, offset (K, N).
    """
    particles, _, classes = f.shape
    by_example = f.transpose(0, 1)
    core = core * (2 * grad.to(f.dtype))[:, None, None]
    if particles < classes:
        offset = offset.mT[..., None].expand(-1, -1, classes)
        return torch.baddbmm(offset, core, by_example).transpose(0, 1).contiguous()
    x = torch.bmm(by_example, core).transpose(0, 1)
    along = (x * f).sum(-1, keepdim=True)
    return (x - along * f + offset[..., None]).contiguous()


def _normalise(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> f̃ (K, N, C), stats (3, K, N) = (top, ‖e‖, Σe), nll (K, N), with e = exp(z − top)."""
    valid, labels = _labels(logits, targets)
    z = logits.to(core_dtype(logits))
    z_y = z.gather(-1, labels).squeeze(-1)
    z = z.scatter(-1, labels, -torch.inf)
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp_()
    norm = torch.linalg.vector_norm(e, dim=-1)
    rest = e.sum(-1)
    # −log p_y = log(1 + Σe / exp(z_y − top))
    nll = torch.logaddexp(rest.log() - (z_y - top.squeeze(-1)), torch.zeros_like(z_y))
    stats = torch.stack([top.squeeze(-1), norm, rest]).to(accumulator(logits.dtype))
    return e.div_(norm.unsqueeze(-1)), stats, nll.where(valid, 0)


def _renormalise(logits: Tensor, targets: Tensor, stats: Tensor) -> Tensor:
    """f̃ (K, N, C) again, from the logits and their stats."""
    _, labels = _labels(logits, targets)
    top, norm, _ = stats.unsqueeze(-1)
    z = logits.to(core_dtype(logits)) - top
    return z.scatter_(-1, labels, -torch.inf).exp_().div_(norm)


def _zero_ignored(dz: Tensor, valid: Tensor) -> Tensor:
    """A zero gradient for ignored rows, also where their logits are not finite."""
    return dz.masked_fill_(~valid[:, None], 0)


def _labels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """valid (N,) and class indices (K, N, 1) that are safe to gather with."""
    valid = targets != IGNORE_INDEX
    labels = targets.where(valid, 0).expand(logits.shape[0], -1).unsqueeze(-1)
    return valid, labels
