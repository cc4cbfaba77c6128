"""Under a request, a backend runs its own kernel, or raises, or says that it leaves it."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

import multilora as ml
import oracles
from multilora.app.cli import main
from multilora.ops import dispatch, grouped_linear, lora_add, reference, svgd_update

EXPECTED = {name for name in os.environ.get("MULTILORA_EXPECT_BACKENDS", "").split(",") if name}
# Sizes that every kernel takes: the GEMM for Hopper wants halves, and multiples of 8.
K, T, D_IN, D_OUT, RANK, N, C = 2, 6, 16, 24, 4, 3, 5
# Functions of the native modules that compute nothing.
HELPERS = {"build_info", "level", "set_level", "supported_levels", "kernel_attributes"}
HELPERS |= {"geometry_workspace", "volume_parts", "launches"}
FUNCTIONS = [
    "lora_linear",
    "lora_linear_backward",
    "lora_add_",
    "grouped_linear",
    "grouped_linear_backward",
    "traces",
    "factor_gradients",
    "volume",
    "volume_backward",
]


def with_gradients(function, *leaves):
    outputs = function(*(t.detach().requires_grad_() for t in leaves))
    return torch.autograd.backward([y.sum() for y in outputs])


def linear(dtype=torch.bfloat16, shared=False):
    x = torch.randn(1 if shared else K, T, D_IN, dtype=dtype)
    weight = torch.randn(D_OUT, D_IN, dtype=dtype)
    A, B = torch.randn(K, RANK, D_IN, dtype=dtype), torch.randn(K, D_OUT, RANK, dtype=dtype)
    with_gradients(lambda *t: [ml.lora_linear(t[0], weight, *t[1:])], x, A, B)


def add():
    x, A, B = torch.randn(K, T, D_IN), torch.randn(K, RANK, D_IN), torch.randn(K, D_OUT, RANK)
    with_gradients(lambda *t: [lora_add(torch.randn(K, T, D_OUT), *t)], x, A, B)


def grouped():
    ends = torch.tensor([2, 2, T]).int()
    x, weight = torch.randn(T, D_IN), torch.randn(3, D_OUT, D_IN)
    with_gradients(lambda *t: [grouped_linear(*t, ends)], x, weight)


def geometry(function):
    A, B = torch.randn(K, RANK, D_IN), torch.randn(K, D_OUT, RANK)
    with_gradients(lambda *t: [function(*t)], A, B)


def update():
    A, B, mix = torch.randn(K, RANK, D_IN), torch.randn(K, D_OUT, RANK), torch.rand(1, K, K)
    svgd_update([A], [B], mix, mix, [A], [B])


def volume(function, particles=K):
    targets = torch.randint(C, (N,))
    outputs = lambda z: [*torch.atleast_1d(function(z, targets))]  # noqa: E731
    with_gradients(outputs, torch.randn(particles, N, C))


# Calls that run the operator and its backward.
RUNS = {
    ("lora_linear", "lora_linear_backward"): linear,
    ("lora_add_",): add,
    ("grouped_linear", "grouped_linear_backward"): grouped,
    ("lora_gram", "lora_gram_backward"): lambda: geometry(ml.lora_gram),
    ("pairwise_frobenius", "lora_gram_backward"): lambda: geometry(ml.pairwise_frobenius),
    ("svgd_update",): update,
    ("gram_volume", "gram_volume_backward"): lambda: volume(ml.gram_volume),
    ("particle_loss", "particle_loss_backward"): lambda: volume(ml.particle_loss),
}


@pytest.fixture
def counted(monkeypatch):
    """The backends whose kernels run, one entry a call; the reference's are its functions."""
    seen = []

    def count(name, owner, attribute):
        function = getattr(owner, attribute)
        counting = lambda *args, **kw: seen.append(name) or function(*args, **kw)  # noqa: E731
        monkeypatch.setattr(owner, attribute, counting)

    for function in FUNCTIONS:
        count("reference", reference, function)
    if dispatch.missing_reason("triton") is None:
        from multilora.ops.triton import common

        count("triton", common, "_on_device")
    for name, module in (("cpu", "multilora._C"), ("cuda", "multilora._C_cuda")):
        if dispatch.missing_reason(name) is None:
            assert sys.modules[module].build_info()
            for attribute, value in list(vars(sys.modules[module]).items()):
                if callable(value) and attribute not in HELPERS and not isinstance(value, type):
                    count(name, sys.modules[module], attribute)
    return seen


@pytest.fixture(params=list(dispatch.BACKENDS))
def asked(request):
    """Every backend; one that is missing is an error where it is expected."""
    name = request.param
    reason = dispatch.missing_reason(name)
    if reason is None and name not in dispatch.available_backends(oracles.DEVICE):
        reason = f"it is none for tensors on {oracles.DEVICE}"
    if reason is not None:
        assert name not in EXPECTED, f"{name} is expected, but {reason}"
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.mark.parametrize("operators", RUNS, ids=lambda operators: operators[0])
def test_a_backends_own_kernel_runs_or_it_leaves_the_operator(operators, asked, counted):
    left = {op: dispatch.left_to_reference()[op][asked] for op in operators}
    with ml.use_backend(asked):
        if asked == "cuda" and operators[0] == "lora_linear" and not on_hopper():
            with pytest.raises(ml.BackendUnavailableError, match="Hopper"):
                RUNS[operators]()
            return
        RUNS[operators]()
    # Both directions are left, or none. (The GEMM's thin products are Triton's passes.)
    assert len({reason is None for reason in left.values()}) == 1
    ran = set(counted) - ({"triton"} if asked == "cuda" and "lora_linear" in operators else set())
    assert ran == {"reference" if all(left.values()) else asked}
    assert len(counted) >= len(operators)


def on_hopper() -> bool:
    return oracles.DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0)


def test_every_operator_is_run():
    assert {op for operators in RUNS for op in operators} == set(dispatch.OPERATORS)


REFUSED = [
    ("cuda", lambda: linear(torch.float32)),
    ("cuda", lambda: linear(shared=True)),
    ("cuda", lambda: volume(ml.gram_volume, 33)),
    ("triton", lambda: volume(ml.particle_loss, 33)),
]


@pytest.mark.parametrize("name, run", REFUSED)
def test_nothing_runs_where_a_backend_refuses(name, run, counted):
    if name not in dispatch.available_backends(oracles.DEVICE):
        assert name not in EXPECTED
        pytest.skip(f"{name} is not here")
    with ml.use_backend(name), pytest.raises(ml.BackendUnavailableError) as error:
        run()
    assert counted == [] and f"use_backend({name!r}, otherwise='reference')" in str(error.value)
    with ml.use_backend(name, otherwise="reference"):
        run()
    assert counted == ["reference"] * 2


def test_info_shows_the_table(capsys):
    main(["info"])
    lines = capsys.readouterr().out.splitlines()
    names = next(line.split()[1:] for line in lines if line.startswith("operator "))
    assert names == dispatch.available_backends()
    rows = {line.split(" ")[0]: line for line in lines}
    for op, left in dispatch.left_to_reference().items():
        cells = ["kernel" if why is None else "reference" for why in left.values()]
        assert rows[op].split()[1:] == cells


def test_backends_have_the_same_functions():
    for name in dispatch.available_backends():
        module = dispatch._module(name)
        own = [f for f in FUNCTIONS if f not in module.LEAVES]
        assert all(callable(getattr(module, f)) for f in own)
        assert not any(hasattr(module, f) for f in FUNCTIONS if f in module.LEAVES)


@pytest.fixture
def fake(monkeypatch):
    """A backend that refuses five layers and leaves one operator."""
    module = SimpleNamespace(
        traces=lambda lora_A, lora_B, scaling, distance: torch.full((len(lora_A), K, K), 7.0),
        factor_gradients=lambda upstream, lora_A, lora_B, *_: [
            torch.full_like(t, 7.0) for t in (*lora_A, *lora_B)
        ],
        LEAVES={"gram_volume": "why not"},
        refuses=lambda op, args: "five are too many" if len(args[-1]) == 5 else None,
    )
    monkeypatch.setitem(dispatch.BACKENDS, "fake", "fake")
    monkeypatch.setitem(dispatch._modules, "fake", module)


def layers(number):
    A = [torch.randn(K, 1, 3, requires_grad=True) for _ in range(number)]
    return A, [torch.randn(K, 4, 1) for _ in range(number)]


def test_a_refusal_names_the_shapes_and_the_way_out(fake):
    with ml.use_backend("fake"), pytest.raises(ml.BackendUnavailableError) as error:
        ml.lora_gram(*layers(5))
    message = str(error.value)
    for part in ("'fake'", "lora_gram", "lora_A [(2, 1, 3), ", "float32", "five are too many"):
        assert part in message
    assert "otherwise='reference'" in message and "MULTILORA_BACKEND=fake,reference" in message


@pytest.mark.parametrize("by_environment", [False, True])
def test_otherwise_takes_what_is_refused_and_nothing_else(fake, monkeypatch, by_environment):
    few, many = layers(2), layers(5)
    if by_environment:
        monkeypatch.setenv("MULTILORA_BACKEND", "fake,reference")
        monkeypatch.setattr(dispatch, "_by_environment", dispatch._from_environment())
        ours, theirs = ml.lora_gram(*few), ml.lora_gram(*many)
        monkeypatch.setattr(dispatch, "_by_environment", None)
    else:
        with ml.use_backend("fake", otherwise="reference"):
            ours, theirs = ml.lora_gram(*few), ml.lora_gram(*many)
    assert (ours == 7).all() and (theirs != 7).any()
    # A backward behaves as its forward, wherever it runs.
    (ours.sum() + theirs.sum()).backward()
    assert all((A.grad == 7).all() for A in few[0])
    assert not any((A.grad == 7).any() for A in many[0])


def test_both_may_refuse(fake, monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "other", "other")
    monkeypatch.setitem(dispatch._modules, "other", dispatch._modules["fake"])
    refusal = pytest.raises(ml.BackendUnavailableError, match=r"'fake' does not.*'other' does not")
    with ml.use_backend("fake", otherwise="other"), refusal:
        ml.lora_gram(*layers(5))
    with pytest.raises(ml.BackendUnavailableError, match="'nonsense'"):
        ml.use_backend("fake", otherwise="nonsense").__enter__()


def test_what_is_left_is_the_references(fake, counted):
    with ml.use_backend("fake"):
        ml.gram_volume(torch.randn(K, N, C), torch.zeros(N, dtype=torch.int64))
    assert counted == ["reference"]
    assert dispatch.left_to_reference()["gram_volume"]["fake"] == "why not"
    assert "fake" in dispatch.backends_of("lora_gram")
    assert "fake" not in dispatch.backends_of("gram_volume")
