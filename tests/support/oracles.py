"""The operators in their most direct form, in float64: every ΔW is formed, nothing is fused.

Written from the mathematics alone; shares no line with multilora/ops. Autograd through these
functions gives the gradients.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from multilora.ops import dispatch
from multilora.ops._library import compute_on

#: What kind of device the tests compute on.
DEVICE = torch.get_default_device().type


def each_backend(op: str, but: tuple[str, ...] = ()) -> list[pytest.MarkDecorator]:
    """For pytestmark: every test of the file once on every backend that has kernels for `op`.

    Backend "cuda" executes its kernels' PTX on a CPU, slowly: tests ask for it by name there.
    """
    but = (*but, "cuda") if DEVICE == "cpu" else but
    names = [name for name in dispatch.backends_of(op, DEVICE) if name not in but]
    return [
        pytest.mark.usefixtures("backend"),
        pytest.mark.parametrize("backend", names, indirect=True),
    ]


def delta_weights(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW_k = s B_k A_k: (K, d_out, d_in)."""
    return scaling * torch.einsum("kor,kri->koi", lora_B.double(), lora_A.double())


def lora_linear(x, weight, lora_A, lora_B, bias=None, scaling=1.0) -> Tensor:
    """y_k = x_k (W + ΔW_k)ᵀ + bias; x (K or 1, *, d_in)."""
    adapted = weight.double() + delta_weights(lora_A, lora_B, scaling)
    x = x.double().expand(lora_A.shape[0], *x.shape[1:])
    y = torch.einsum("k...i,koi->k...o", x, adapted)
    return y if bias is None else y + bias.double()


def lora_gram(lora_A, lora_B, scaling=1.0) -> Tensor:
    delta = delta_weights(lora_A, lora_B, scaling)
    return torch.einsum("ioc,joc->ij", delta, delta)


def pairwise_frobenius(lora_A, lora_B, scaling=1.0) -> Tensor:
    delta = delta_weights(lora_A, lora_B, scaling)
    return (delta[:, None] - delta[None]).square().sum((-1, -2))


def gram_volume(logits, targets, eps=1e-4, kind="logdet") -> Tensor:
    """(K, N, C), (N,) -> (N,), one example at a time, for C >= 3."""
    logits = logits.double()
    values = [logits.new_zeros(())] * len(targets)
    for n, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        rest = torch.cat([logits[:, n, :target], logits[:, n, target + 1 :]], -1)  # (K, C − 1)
        p = rest.softmax(-1)
        f = p / p.norm(dim=-1, keepdim=True)
        gram = f @ f.T
        if kind == "det":
            values[n] = -torch.linalg.det(gram)
        else:
            eye = torch.eye(len(gram), dtype=torch.float64)
            values[n] = -torch.linalg.slogdet(eye + gram / eps).logabsdet
    return torch.stack(values) if values else logits.new_zeros(0)


def gradients(function, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The gradients of ⟨upstream, function(*tensors)⟩, strides of the tensors kept."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = function(*leaves)
    return list(torch.autograd.grad(value, leaves, upstream.to(value.dtype)))


def double_gradients(function, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The same of an oracle, from float64 copies of the tensors."""
    return gradients(function, [t.double() for t in tensors], upstream.double())


def check_compiled(function, problems, compiler: str, dynamic: bool) -> None:
    """The compiled function's values and gradients are the eager ones, for every problem.

    problems: lists of the function's tensors, of different sizes where dynamic: one compilation
    has to serve them all.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tensors in problems:
            got, expected = _everything(compiled, tensors), _everything(function, tensors)
            torch.testing.assert_close(got, expected)


def _everything(function, tensors: list[Tensor]) -> list[Tensor]:
    """The outputs and, for a fixed random upstream gradient, the gradients of all inputs."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    outputs = _tensors(function(*tensors))
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    leaves = [t for t in tensors if t.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True))


def check_operator(op, args: tuple, **tolerances) -> None:
    """torch.library.opcheck, and what it leaves out: the strides that the fake operator promises.

    Inductor plans its buffers with these strides and fails at run time where they are wrong.
    """
    torch.library.opcheck(op, args, **tolerances)
    with FakeTensorMode() as mode:
        fake = _tensors(op(*tree_map_only(Tensor, mode.from_tensor, args)))
    real = _tensors(op(*args))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    assert [_strides(t) for t in fake] == [_strides(t) for t in real]


def _tensors(output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _strides(t: Tensor) -> list[int]:
    """The strides that mean something: an axis of length one may have any."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1 and t.numel() > 0]


def check_second_derivatives(function, tensors) -> None:
    """The derivative of the gradient is right, or asking for it raises: never silently wrong."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    try:
        right = torch.autograd.gradgradcheck(
            function, leaves, raise_exception=False, fast_mode=True
        )
    except (RuntimeError, NotImplementedError):
        return
    assert right


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """‖value − oracle‖ / ‖oracle‖ in float64 (NaN where either has one); shapes must agree."""
    assert value.shape == oracle.shape, (value.shape, oracle.shape)
    value, oracle = value.detach().double(), oracle.detach().double()
    return ((value - oracle).norm() / oracle.norm().clamp_min(1e-300)).item()


class Inside(TorchDispatchMode):
    """Every torch operator that runs, as (name, argument shapes, output shapes).

    A dispatch mode sees multilora's operators from outside; this one runs their kernels itself.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]], list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "multilora":
            with self:
                return compute_on(dispatch.module_of(func._opname, args), func._opname, *args)
        output = func(*args, **(kwargs or {}))
        self.calls.append((func._opname, _shapes(args), _shapes(output)))
        return output


def _shapes(values) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tree_leaves(values) if isinstance(t, Tensor)]
