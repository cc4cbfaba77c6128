"""Backends: asking for one, missing ones, the environment; and what `import multilora` imports."""

import asyncio
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import multilora as ml
from multilora.ops import dispatch, lora_add


def python(program: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a new process, where no test has imported anything."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_expected_backends_are_here():
    # A CI job names the backends that it exists to test, so that none is left out unseen.
    # That each runs its own kernels: test_which_kernel_runs.py.
    names = os.environ.get("MULTILORA_EXPECT_BACKENDS", "reference").split(",")
    missing = {name: dispatch.missing_reason(name.strip()) for name in names if name.strip()}
    assert not any(missing.values()), missing
    assert {name.strip() for name in names} <= {*dispatch.available_backends(), ""}


def test_fresh_memory_is_poisoned(poison):
    # The operators' tests rely on this.
    x = torch.zeros(3)
    for fresh in (torch.empty(5), torch.empty_like(x), x.new_empty(2, 3), torch.empty(2, 2).half()):
        assert fresh.isnan().all()


@pytest.fixture
def fake_backend(monkeypatch):
    """A backend that answers 7 whatever it is asked."""
    calls = []

    def traces(lora_A, lora_B, scaling, distance):
        calls.append("forward")
        return torch.full((len(lora_A), 2, 2), 7.0)

    def factor_gradients(upstream, lora_A, lora_B, scaling, mix=None, grads=None):
        calls.append("backward")
        return [torch.full_like(t, 7.0) for t in (*lora_A, *lora_B)]

    module = SimpleNamespace(
        traces=traces,
        factor_gradients=factor_gradients,
        LEAVES={},
        refuses=lambda op, args: None,
        calls=calls,
    )
    monkeypatch.setitem(dispatch.BACKENDS, "fake", "fake_kernels")
    monkeypatch.setitem(dispatch._modules, "fake", module)
    return module


def test_operators_run_on_the_backend_that_was_asked_for(fake_backend):
    lora_A, lora_B = torch.randn(2, 1, 3, requires_grad=True), torch.randn(2, 4, 1)
    with ml.use_backend("fake"):
        value = ml.lora_gram(lora_A, lora_B)
        value.sum().backward()
    assert (value == 7).all() and (lora_A.grad == 7).all()
    assert fake_backend.calls == ["forward", "backward"]
    assert (ml.lora_gram(lora_A, lora_B) != 7).any()
    assert fake_backend.calls == ["forward", "backward"]


def test_the_choice_holds_in_other_threads(fake_backend):
    # CUDA's backward runs on a thread of autograd's own.
    seen = []
    with ml.use_backend("fake"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["fake"]


def in_thread(function, *args):
    """The function's result in a new thread, or the error that it raises."""
    results = []

    def run():
        try:
            results.append(function(*args))
        except ml.BackendUnavailableError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_overlapping_blocks_of_two_threads(fake_backend):
    # Enter A, enter B, leave A, leave B: each thread has its own, and nothing is left behind.
    default = dispatch.current_backend("cpu")
    entered, left, seen = threading.Event(), threading.Event(), {}

    def other():
        with ml.use_backend("fake"):
            entered.set()
            left.wait(60)
            seen["other"] = dispatch.current_backend("cpu")

    thread = threading.Thread(target=other)
    with ml.use_backend("reference"):
        thread.start()
        assert entered.wait(60)
        seen["here"] = dispatch.current_backend("cpu")
        # Which of the two would be meant?
        third = in_thread(dispatch.current_backend)
    # The one block that is still open decides, in a thread that chooses nothing.
    seen["after"] = in_thread(dispatch.current_backend)
    left.set()
    thread.join()
    assert seen == {"here": "reference", "after": "fake", "other": "fake"}
    assert "fake, reference" in str(third) and "its own use_backend block" in str(third)
    assert dispatch.current_backend("cpu") == default
    assert in_thread(dispatch.current_backend, "cpu") == default


def test_blocks_that_are_left_in_any_order_and_by_any_thread(fake_backend):
    default = dispatch.current_backend()
    first, second, third = (ml.use_backend(name) for name in ("fake", "reference", "fake"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.current_backend() == "reference"
    third.__enter__()
    assert dispatch.current_backend() == "fake"
    in_thread(third.__exit__, None, None, None)
    assert dispatch.current_backend() == "reference"
    second.__exit__(None, None, None)
    assert dispatch.current_backend() == default == in_thread(dispatch.current_backend)


def test_tasks_have_a_backend_of_their_own(fake_backend):
    async def task(name, own, other):
        with ml.use_backend(name):
            own.set()
            await other.wait()
            return dispatch.current_backend()

    async def both():
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("fake", one, two), task("reference", two, one))

    assert asyncio.run(both()) == ["fake", "reference"]


def test_the_backward_runs_on_the_backend_of_its_forward(fake_backend):
    lora_A, lora_B = torch.randn(2, 1, 3, requires_grad=True), torch.randn(2, 4, 1)
    with ml.use_backend("fake"):
        here, there = ml.lora_gram(lora_A, lora_B).sum(), ml.lora_gram(lora_A, lora_B).sum()
    with ml.use_backend("reference"):
        here.backward()
        assert dispatch.current_backend() == "reference"
    # The same holds on autograd's own threads.
    in_thread(there.backward)
    assert fake_backend.calls == ["forward"] * 2 + ["backward"] * 2
    with ml.use_backend("reference"):
        value = ml.lora_gram(lora_A, lora_B).sum()
    with ml.use_backend("fake"):
        value.backward()
    # A forward without a request keeps its default in the backward.
    value = ml.lora_gram(lora_A, lora_B).sum()
    with ml.use_backend("fake"):
        value.backward()
    assert fake_backend.calls == ["forward"] * 2 + ["backward"] * 2


def test_the_backward_of_lora_add_runs_on_the_backend_of_its_forward(monkeypatch):
    asked = []
    module_of = dispatch.module_of
    monkeypatch.setattr(
        dispatch,
        "module_of",
        lambda op, args: asked.append((op, dispatch.requested())) or module_of(op, args),
    )
    y, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    lora_A, lora_B = torch.randn(2, 1, 5, requires_grad=True), torch.randn(2, 4, 1)
    with ml.use_backend("reference"):
        value = lora_add(y, x, lora_A, lora_B).sum()
    value.backward()
    here = dispatch.Request("reference")
    assert asked == [("lora_add_", here), ("lora_linear_backward", here)]


def test_nesting_restores(fake_backend):
    default = dispatch.current_backend()
    with ml.use_backend("fake"):
        with ml.use_backend("reference"):
            assert dispatch.current_backend() == "reference"
        assert dispatch.current_backend() == "fake"
        with pytest.raises(ZeroDivisionError), ml.use_backend("reference"):
            raise ZeroDivisionError
        assert dispatch.current_backend() == "fake"
        with pytest.raises(ml.BackendUnavailableError), ml.use_backend("nonsense"):
            pass
        assert dispatch.current_backend() == "fake"
    assert dispatch.current_backend() == default


def test_unknown_backend():
    with pytest.raises(ml.BackendUnavailableError) as error, ml.use_backend("tpu"):
        pass
    message = str(error.value)
    assert "'tpu'" in message and "no backend of that name" in message
    for name in ("reference", "cpu", "triton", "cuda"):
        assert name in message


def test_missing_backend(monkeypatch):
    monkeypatch.setattr(
        dispatch, "missing_reason", lambda name: "the sun is up" if name == "triton" else None
    )
    with pytest.raises(ml.BackendUnavailableError) as error, ml.use_backend("triton"):
        pass
    message = str(error.value)
    assert "'triton'" in message and "the sun is up" in message
    available = message.split("available here: ")[1]
    assert "reference" in available and "triton" not in available


def test_known_backends_are_available_or_say_why():
    available = dispatch.available_backends()
    assert "reference" in available
    for name in ("reference", "cpu", "triton", "cuda"):
        reason = dispatch.missing_reason(name)
        assert (name in available) == (reason is None)
        if reason is not None:
            with pytest.raises(ml.BackendUnavailableError) as error, ml.use_backend(name):
                pass
            assert reason in str(error.value)


@pytest.mark.slow
def test_environment_names_a_backend_and_imports_stay_few():
    # Each of these takes seconds to import; they are imported where they are used.
    program = """
import sys, time, torch
start = time.process_time()
import multilora
took = time.process_time() - start
from multilora.ops import dispatch
heavy = "transformers timm peft matplotlib accelerate torchmetrics sklearn datasets tokenizers"
heavy += " torch._dynamo"
print(took, dispatch.current_backend(), sorted(set(heavy.split()) & sys.modules.keys()))
"""
    for _ in range(2):  # the first time Python may have to compile the modules
        done = python(program, MULTILORA_BACKEND="reference", PYTHONDONTWRITEBYTECODE="")
        assert done.returncode == 0, done.stderr
    took, *rest = done.stdout.split()
    assert rest == ["reference", "[]"]
    # Seconds of a CPU over `import torch`; time on a busy machine says nothing.
    assert float(took) <= 0.2


@pytest.mark.slow
def test_environment_names_a_backend_that_is_missing():
    program = """
import torch, multilora
multilora.lora_gram(torch.ones(2, 1, 3), torch.ones(2, 3, 1))
"""
    done = python(program, MULTILORA_BACKEND="nonsense")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailableError" in last and "MULTILORA_BACKEND" in last
    assert "'nonsense'" in last and "available here: reference" in last
