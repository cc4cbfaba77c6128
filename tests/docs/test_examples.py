"""Every script of examples/ runs on a CPU, without a network."""

import os
import subprocess
import sys

import pytest

from documents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
#: What a script prints when it has done what it shows.
SAYS = {
    "digits_loop": "saved, and loaded again",
    "llm_trainer": "4 PEFT adapters",
    "qlora": "which load over the same 4-bit base",
    "many_particles": "best particle",
    "distributed": "saved in",
}


def test_every_example_is_here():
    assert {file.stem for file in EXAMPLES} == SAYS.keys()
    listed = (ROOT / "examples" / "README.md").read_text()
    assert all(file.name in listed for file in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name, tmp_path):
    launcher = TORCHRUN if name == "distributed" else []
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[name] in done.stdout, done.stdout
