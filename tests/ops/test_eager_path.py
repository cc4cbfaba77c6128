"""How operators are called: directly in plain eager mode, by torch's dispatcher elsewhere.

Both ways give the same numbers, and whoever has to see an operator sees it.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import multilora as ml
import oracles
from multilora.ops import _library, dispatch, frobenius, lora, volume
from multilora.ops.triton import common

K, T, D_IN, D_OUT, RANK, N, C = 4, 5, 6, 7, 2, 6, 9


def problems():
    """Every differentiable operator: its public function, its tensors, its registered operator."""
    x, A, B = torch.randn(K, T, D_IN), torch.randn(K, RANK, D_IN), torch.randn(K, D_OUT, RANK)
    weight, bias = torch.randn(D_OUT, D_IN), torch.randn(D_OUT)
    logits, targets = torch.randn(K, N, C), torch.randint(C, (N,))
    ops = torch.ops.multilora
    return {
        "lora_linear": (
            lambda x, A, B: ml.lora_linear(x, weight, A, B, bias, 0.5),
            lambda x, A, B: ops.lora_linear(x, weight, A, B, bias, 0.5)[0],
            [x, A, B],
        ),
        "lora_gram": (
            lambda A, B: ml.lora_gram([A, A], [B, B], [1.0, 2.0]),
            lambda A, B: ops.lora_gram([A, A], [B, B], [1.0, 2.0]),
            [A, B],
        ),
        "pairwise_frobenius": (
            lambda A, B: ml.pairwise_frobenius([A, A], [B, B], 0.5),
            lambda A, B: ops.pairwise_frobenius([A, A], [B, B], [0.5, 0.5]),
            [A, B],
        ),
        "gram_volume": (
            lambda z: ml.gram_volume(z, targets),
            lambda z: ops.gram_volume(z, targets, 1e-4, "logdet")[0],
            [logits],
        ),
        "particle_loss": (
            lambda z: torch.cat([o.flatten() for o in ml.particle_loss(z, targets)]),
            lambda z: torch.cat(
                [o.flatten() for o in ops.particle_loss(z, targets, 1e-4, "logdet")[:2]]
            ),
            [logits],
        ),
    }


NAMES = ["lora_linear", "lora_gram", "pairwise_frobenius", "gram_volume", "particle_loss"]


def with_gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.linspace(0.5, 1.5, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


on_each_backend = pytest.mark.parametrize(
    "name, backend",
    [
        (name, backend)
        for name in NAMES
        for backend in dispatch.backends_of(name, "cpu")
        if backend in ("reference", "cpu")
    ],
)


@pytest.fixture
def overloads(monkeypatch):
    """The names of the operators that torch's dispatcher gets to see."""
    seen = []

    class Overload:
        def __init__(self, overload):
            self.overload = overload

        def __call__(self, *args):
            seen.append(self.overload._opname)
            return self.overload(*args)

    for module in (lora, frobenius, volume):
        for operator in vars(module).values():
            if isinstance(operator, _library.Operator):
                monkeypatch.setattr(operator, "overload", Overload(operator.overload))
    return seen


@on_each_backend
def test_both_ways_give_the_same_bits(name, backend):
    direct, registered, tensors = problems()[name]
    with ml.use_backend(backend):
        assert equal(with_gradients(direct, tensors), with_gradients(registered, tensors))
        with torch.no_grad():
            assert torch.equal(direct(*tensors), registered(*tensors))


@on_each_backend
def test_compiled_gradients_are_eagers_bits(name, backend):
    direct, _, tensors = problems()[name]
    torch.compiler.reset()
    compiled = torch.compile(direct, backend="aot_eager", fullgraph=True)
    with ml.use_backend(backend):
        assert equal(with_gradients(direct, tensors), with_gradients(compiled, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_plain_eager_mode_does_not_ask_the_dispatcher(name, overloads):
    direct, _, tensors = problems()[name]
    with_gradients(direct, tensors)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        direct(*tensors)
    assert overloads == []


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_who_has_to_see_an_operator_does(name, overloads):
    direct, _, tensors = problems()[name]
    with Watching():
        direct(*tensors)
    assert overloads == [name]
    direct(*(t.as_subclass(Subclass) for t in tensors))
    assert overloads == [name] * 2
    # The backward too: the dispatch mode is there when it runs.
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = direct(*leaves).sum()
    with Watching():
        value.backward()
    assert len(overloads) == 3 and overloads[-1].endswith("_backward")
    with contextlib.suppress(Exception):
        torch.func.vmap(direct)(*(t[None] for t in tensors))
    assert len(overloads) == 4


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_raise_both_ways(name):
    for function in problems()[name][:2]:
        leaves = [t.clone().requires_grad_() for t in problems()[name][2]]
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            sum(g.sum() for g in grads).backward()


def test_only_one_of_two_losses_is_used():
    logits, targets = torch.randn(K, N, C, requires_grad=True), torch.randint(C, (N,))

    def gradient(of):
        return torch.autograd.grad(of(*ml.particle_loss(logits, targets)), logits)[0]

    both = [gradient(lambda nll, _: nll.sum()), gradient(lambda _, divergence: divergence)]
    together = gradient(lambda nll, divergence: nll.sum() + divergence)
    torch.testing.assert_close(both[0] + both[1], together)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("particles", [1, 2, 3, 4])
def test_the_gradient_of_expanded_rows(particles, dtype):
    weight, A, B = torch.randn(D_OUT, D_IN), torch.randn(particles, RANK, D_IN), None
    A, B = A.to(dtype), torch.randn(particles, D_OUT, RANK, dtype=dtype)
    weight = weight.to(dtype)
    rows = torch.randn(T, D_IN, dtype=dtype)
    found = []
    for shared in (lambda x: x.expand(particles, -1, -1), lambda x: x[None]):
        x = rows.clone().requires_grad_()
        y = ml.lora_linear(shared(x), weight, A, B)
        found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert torch.equal(*found)
    x = rows.clone().requires_grad_()
    expanded = x.expand(particles, -1, -1)
    y = ml.lora_linear(expanded, weight, A, B)
    (grad,) = torch.autograd.grad(y, expanded, torch.ones_like(y))
    torch.testing.assert_close(grad.sum(0), found[0])


def test_checks_are_kept_and_still_raise():
    x, weight, A, B = (torch.randn(*s) for s in ((2, 3, 4), (5, 4), (2, 1, 4), (2, 5, 1)))
    for _ in range(2):
        ml.lora_linear(x, weight, A, B)
        with pytest.raises(TypeError, match="float64"):
            ml.lora_linear(x.double(), weight, A, B)
        with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
            ml.lora_linear(x[..., :3], weight, A, B)
        with pytest.raises(ValueError, match="finite"):
            ml.lora_linear(x, weight, A, B, scaling=float("nan"))


# --- Triton's launches ---------------------------------------------------------------------------


class Kernel:
    """A stand-in for Triton's kernel[grid](...), which compiles and returns a launchable object."""

    __name__ = "kernel"

    def __init__(self):
        self.log = []
        self.params = [SimpleNamespace(name=n) for n in ("x", "y", "rows", "WIDTH", "LAST")]

    def __getitem__(self, grid):
        def compile_and_run(*args, **meta):
            self.log.append(("compiled", grid, args, meta))
            return {grid: lambda *again: self.log.append(("launched", grid, again))}

        return compile_and_run


def test_what_was_compiled_is_launched_again():
    kernel = Kernel()
    launch = common.Launch(kernel, (7,), (), (3,), LAST=2, WIDTH=1, num_warps=4)
    x, y = torch.randn(8), torch.randn(9)
    odd = y[1:]
    options = {"LAST": 2, "WIDTH": 1, "num_warps": 4, "enable_fp_fusion": True}
    for tensors in ((x, y), (x, y), (x, odd), (x, odd), (y, x)):
        launch(*tensors)
    kinds = [entry[0] for entry in kernel.log]
    assert kinds == ["compiled", "launched", "compiled", "launched", "launched"]
    assert kernel.log[0][1:] == ((7, 1, 1), (x, y, 3), options)
    # Constants come by their order in the kernel.
    assert kernel.log[1][1:] == ((7, 1, 1), (x, y, 3, 1, 2))
    assert kernel.log[4][2][:2] == (y, x)


def test_descriptors_after_the_first_have_its_fields_and_their_tensor():
    seen = []
    launch = common.Launch(Kernel(), (1,), (((2, 4, 8), (4, 8)), None), (), num_warps=4)
    common.compile_only(common.H200, lambda kernel, grid, args, meta: seen.append(args))
    try:
        tensors = [torch.randn(2, 4, 8) for _ in range(2)]
        for t in tensors:
            launch(t, t)
    finally:
        common.compile_only(None, None)
    (first, *_), (second, *_) = seen
    assert first.base is tensors[0] and second.base is tensors[1] and type(second) is type(first)
    assert {**vars(first), "base": None} == {**vars(second), "base": None}
    assert second.block_shape == [1, 4, 8] and second.strides == [32, 8, 1]
    assert seen[0][1] is None


def test_other_factors_and_other_rules_are_other_plans(monkeypatch):
    from multilora.ops.triton import configs, linear

    x, A, B = torch.randn(2, 3, 4).half(), torch.randn(2, 1, 4), torch.randn(2, 5, 1)
    one = linear._problem(x, A, B, 1.0)
    assert linear._problem(x, A, B, 1.0) == one
    assert linear._problem(x, A.half(), B.half(), 1.0) != one
    assert linear._problem(x, A, B, 2.0) != one
    monkeypatch.setattr(configs, "lora_gemm", lambda *args: None)
    assert linear._problem(x, A, B, 1.0) != one


def test_oracle_of_the_direct_way():
    x, weight, A, B = (torch.randn(*s) for s in ((2, 3, 4), (5, 4), (2, 1, 4), (2, 5, 1)))
    y = ml.lora_linear(x, weight, A, B, None, 0.5)
    assert oracles.relative_error(y, oracles.lora_linear(x, weight, A, B, None, 0.5)) < 1e-6
