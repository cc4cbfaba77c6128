"""Peak memory of a training step with K particles against one, at the same number of rows.

The model is timm's vit_tiny_patch16_224 (192 wide, 12 blocks, 197 tokens an image) at random
weights, with rank 8 on `qkv` and a head a particle. Both runs see as many rows: K = 8 particles
with rows/8 images each, or one particle with all of them. A step is the method's backward and
AdamW.

Each number is taken in a process of its own: `python -m bench.memory --particles 8`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import multilora as ml
from bench.measure import default_device, peak_memory

METHODS = {"ensemble": ml.Ensemble, "ibdr": ml.IBDR}
GOAL = 1.3


def train(
    particles: int, rows: int, method: str, steps: int, device: torch.device, pixels: int = 224
) -> None:
    """Build the model and take some steps of training."""
    import peft
    import timm

    torch.manual_seed(0)
    size = {"img_size": pixels, "num_classes": 10}
    base = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size).to(device)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    model = ml.get_particle_model(base, config, particles).train()
    algorithm = METHODS[method](model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=1e-3)
    # An image for every row also where particles could share them: equal inputs on both sides.
    x = torch.randn(particles, rows // particles, 3, pixels, pixels, device=device)
    y = torch.randint(10, (rows // particles,), device=device)
    for _ in range(steps):
        optimizer.zero_grad()
        algorithm.backward(lambda: (model(x, per_particle=True), y))
        optimizer.step()


def measure(particles: int, rows: int, method: str) -> dict[str, int | None]:
    """Bytes at the highest point of two steps (the second one has AdamW's state from the start).

    resident: the process's peak resident memory over what it was before the model was built, with
        PyTorch imported and a step of one image behind it; None on a GPU.
    allocated: what PyTorch's allocator held at once: weights, adapters, gradients, AdamW's state,
        saved activations and temporaries.
    """
    device = default_device()
    resident = None
    if device.type == "cpu":
        # Imports, thread pools and the libraries' own caches belong to neither side.
        train(1, 1, method, 1, device)
        before = status("VmRSS")
        train(particles, rows, method, 2, device)
        resident = status("VmHWM") - before
    allocated = peak_memory(lambda: train(particles, rows, method, 2, device), device)
    return {"resident": resident, "allocated": allocated}


def compare(rows: int, repetitions: int) -> list[dict[str, Any]]:
    """K = 8 against K = 1 for each method, each in fresh processes that take turns."""
    results = []
    for method in METHODS:
        peaks: dict[int, list[dict[str, int | None]]] = {8: [], 1: []}
        for _ in range(repetitions):
            for particles, measured in peaks.items():
                measured.append(_in_fresh_process(particles, rows, method))
        for kind in ("allocated", "resident"):
            samples = {k: [m[kind] for m in measured] for k, measured in peaks.items()}
            if None in samples[1]:
                continue
            many, one = (statistics.median(samples[k]) for k in (8, 1))
            results.append(
                {
                    "name": f"{method} step, {kind}",
                    "rows": rows,
                    "bytes_K8": samples[8],
                    "bytes_K1": samples[1],
                    "ratio": many / one,
                    "goal": GOAL,
                }
            )
    return results


def _in_fresh_process(particles: int, rows: int, method: str) -> dict[str, int | None]:
    command = [sys.executable, "-m", "bench.memory"]
    command += ["--particles", str(particles), "--rows", str(rows), "--method", method]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status(field: str) -> int:
    """A size that Linux keeps for this process. getrusage's ru_maxrss would not do: a process
    inherits it from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--method", choices=METHODS, default="ensemble")
    args = parser.parse_args()
    print(json.dumps(measure(args.particles, args.rows, args.method)))
