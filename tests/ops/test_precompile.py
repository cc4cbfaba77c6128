"""Triton's cache, filled before: a launch finds there what it would compile."""

import os
import subprocess
import sys

import peft
import pytest
import timm
import torch

import multilora as ml
from multilora.ops.triton import common
from multilora.tools.kernels.compile import as_on_a_gpu
from multilora.tools.kernels.precompile import model_problem, specialisation

pytestmark = pytest.mark.slow

_PROBLEMS = """
import torch
from multilora.tools.kernels import calls
from multilora.ops.triton.common import H200

def chosen():
    return [
        calls.linear(2, 5, 16, 24, 3, torch.bfloat16),
        calls.geometry("two", [(16, 24), (5, 7)], 2, 3, torch.float32),
        calls.loss(2, 5, 7, torch.float32),
    ]
"""

_FILL = (
    _PROBLEMS
    + """
from multilora.tools.kernels.precompile import fill

if __name__ == "__main__":
    filled = fill(H200, chosen(), 2)
    assert filled.compiled > 5 and not filled.present and not filled.failures, filled
"""
)

# The path of a launch on a GPU, with memory of the CPU and a driver that does nothing.
_LAUNCH = (
    _PROBLEMS
    + """
from types import SimpleNamespace
from triton import knobs
from triton.runtime import driver
from multilora.ops.triton import common
from multilora.tools.kernels.compile import AbsentGPU

launched, hits = [], []

class Driver(AbsentGPU):
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *_: launched.append(source.name)

driver.set_active(Driver(H200))
common.compile_only(H200, lambda kernel, grid, args, meta: kernel[grid](*args, **meta))
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
calls._meta = lambda dtype, *shape: torch.zeros(shape, dtype=dtype)
for problem in chosen():
    problem.run()
assert len(launched) > len(hits) > 5 and all(hits), (launched, hits)
# And what was not requested is not there.
calls.geometry("other", [(16, 24)], 2, 3, torch.float64).run()
assert not all(hits)
"""
)


def run(script, folder):
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, folder / "script.py"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_a_launch_compiles_nothing_that_was_precompiled(tmp_path):
    run(_FILL, tmp_path)
    run(_LAUNCH, tmp_path)


def launches(run):
    """The specialisations of all launches, as Triton sees them."""
    seen = set()

    def record(kernel, grid, args, meta):
        key = tuple(map(specialisation, as_on_a_gpu(args)))
        seen.add((kernel.__name__, key, tuple(sorted(meta.items(), key=str))))

    common.compile_only(common.H200, record)
    try:
        run()
    finally:
        common.compile_only(None, None)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_problem_has_the_launches_of_its_steps(dtype):
    name, targets = "test_vit", ["qkv", "fc1"]
    filled = launches(model_problem(name, targets, 3, 2, 2, dtype, 11).run)

    base = timm.create_model(name, pretrained=False, num_classes=11).to(dtype)
    config = peft.LoraConfig(r=2, target_modules=targets)
    model = ml.get_particle_model(base, config, 3, check_isolation=False).train()
    x, y = torch.zeros(2, 3, 160, 160, dtype=dtype), torch.arange(2)

    def steps():
        with ml.use_backend("triton"):
            for kind in (ml.Ensemble, ml.SVGD, ml.IBDR):
                kind(model, nonfinite="ignore").backward(lambda: (model(x), y))

    seen = launches(steps)
    assert len(seen) > 6 and seen <= filled
    other = launches(model_problem(name, targets, 3, 4, 2, dtype, 11).run)
    assert not seen <= other


def test_a_models_problem_needs_no_gpu(tmp_path):
    run(
        """
import torch
from multilora.ops.triton import common
from multilora.tools.kernels.precompile import model_problem

launched = []
common.compile_only(common.H200, lambda kernel, *_: launched.append(kernel.__name__))
model_problem("test_vit", ["qkv"], 3, 2, 2, torch.bfloat16, 11).run()
assert {"_lora_linear_gemm_kernel", "_volume_backward_kernel"} <= set(launched), launched
""",
        tmp_path,
    )


def test_what_cannot_be_precompiled_is_said(tmp_path):
    def kernels(*args, **environment):
        script = "import sys; from multilora.app.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", script, "kernels", *args],
            env={**os.environ, "TRITON_INTERPRET": "0", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = kernels("--precompile", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "say which chip is meant, with --target" in done.stderr
    done = kernels("--model", "vit_tiny_patch16_224")
    assert done.returncode == 1 and "options of --precompile" in done.stderr
