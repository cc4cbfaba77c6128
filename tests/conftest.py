"""Fixtures for all tests: seeded random numbers, every backend, poisoned memory."""

# ruff: noqa: E402
import gc
import os

# The operators' tests also run on a GPU, with MULTILORA_TEST_DEVICE=cuda; the rest is for the CPU.
DEVICE = os.environ.get("MULTILORA_TEST_DEVICE", "cpu")
# Before Triton is imported: on the CPU its kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1" if DEVICE == "cpu" else "0"

from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# pytest explains assertions in these modules as it does in tests.
pytest.register_assert_rewrite("adapter_files", "one_by_one", "separate_runs")

import compiled.child
import tiers
from ptx import native

# Another build of the CPU kernels, such as one with sanitizers.
if "MULTILORA_TEST_C" in os.environ:
    native.load_module("multilora._C", Path(os.environ["MULTILORA_TEST_C"]))
if DEVICE == "cpu" and native.missing() is None:
    # Backend "cuda" then executes its kernels' PTX, which is built when a test first runs one.
    native.install()

import multilora as ml

if not hasattr(InterpreterBuilder, "get_bf16"):
    # The interpreter keeps bfloat16 as its bits and cannot make a constant of it.
    def get_bf16(self, value):
        bits = np.array([value], dtype=np.float32).view(np.uint32) >> 16
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.get_bf16 = get_bf16

torch.set_default_device(DEVICE)
# The tests' problems are tiny, and pytest-xdist has a process for every core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """torch.empty and its relatives hand out NaN (the largest integer, for integers).

    Fresh memory is mostly zero, which hides a kernel that does not write all of its output.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """accelerate keeps a process's settings: forget them, and what Trainer tells it by variable."""
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def quick_collections():
    """Trainer collects garbage at every start: half a second for all that tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if DEVICE == "cpu":
        tiers.mark(items)


def pytest_collection_finish():
    # The emulator looks for tensors among all objects: not among those that are here by now.
    gc.collect()
    gc.freeze()


@pytest.fixture
def executed_ptx(poison):
    """Backend "cuda", whose kernels are executed from their PTX, in poisoned memory."""
    if DEVICE != "cpu" or native.missing() is not None:
        pytest.skip(native.missing() or "on a GPU the kernels themselves run")
    with ml.use_backend("cuda"):
        yield


@pytest.fixture
def backend(request, poison):
    """The backend that the test runs on, one of `oracles.each_backend`."""
    with ml.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def compiling():
    """Another process, in which Triton compiles: this one has its interpreter."""
    child = compiled.child.Child()
    yield child
    child.close()
