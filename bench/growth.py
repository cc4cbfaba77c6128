"""python -m bench.growth: how memory and time grow with the particles, and what a trunk saves.

Questions about training steps (the method's backward and AdamW) in float32 at random weights:
- growth: CLIP's ViT-B/32, rank 4 on the MLPs (Bella's set-up), K = 4, 20 and 100, four particles at
  a time, 32 images: how do peak memory and time grow with K? Every K runs in its own process with
  the C library's allocator, including heap fragmentation; on a GPU, it is the peak of PyTorch's.
- trunk: ViT-B/16, rank 8 on the last four of twelve blocks, on their MLPs or on `qkv`, K = 8: how
  much faster is a step whose trunk runs once for all particles (for both passes of IBDR, through
  `model.trunk`)? Both ways take turns in one process.
- `python -m bench` asks a third one: timm's vit_tiny_patch16_224, rank 8 on `qkv` and a head per
  particle: how much more memory do K = 8 particles need than one, on the same number of rows?
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import multilora as ml
from bench.clocks import interleave, peak_memory, quartiles
from bench.device import default_device, synchronize
from bench.processes import ROOT
from bench.record import RESULTS, machine, write

FOLDER = RESULTS / "many_particles"
PARTICLES, CHUNK = (4, 100, 20), 4
#: Trainable numbers per particle: 12 blocks · 2 linears · r (768 + 3072).
TRAINABLE = 368_640
#: Goals: at most so many times the memory, K = 8 against 1 on the same rows, and K = 100 against 4.
ROWS_GOAL, MEMORY_GOAL = 1.3, 1.25
#: Goal: a step with the shared trunk is at least so many times as fast.
TRUNK_GOAL = 1.8
TARGETS = {
    "mlp": r"blocks\.(8|9|10|11)\.mlp\.fc[12]",
    "qkv": r"blocks\.(8|9|10|11)\.attn\.qkv",
}
METHODS = {"ensemble": ml.Ensemble, "svgd": ml.SVGD, "ibdr": ml.IBDR}


def bella_model(particles: int) -> ml.ParticleModel:
    """CLIP ViT-B/32 as timm builds it, with its image encoder's head frozen (512 numbers)."""
    import peft
    import timm

    torch.manual_seed(0)
    base = timm.create_model("vit_base_patch32_clip_224", pretrained=False, num_classes=100)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["mlp.fc1", "mlp.fc2"])
    return ml.get_particle_model(base, config, particles)


def bella(particles: int, chunk: int, images: int, device: torch.device) -> dict[str, Any]:
    """Bytes (`resident` in this process; on a GPU, of the device) and seconds of an SVGD step with
    AdamW."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else status("VmRSS")
    model = bella_model(particles).to(device).train()
    trainable = sum(p[0].numel() for p in model.particle_parameters())
    if trainable != TRAINABLE:
        raise AssertionError(f"{trainable} trainable numbers per particle, not {TRAINABLE}")
    method = ml.SVGD(model, particle_chunk=chunk)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=1e-3)
    # Make AdamW's state, as in the middle of a training.
    for p in model.particle_parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    x = torch.randn(images, 3, 224, 224, device=device)
    y = torch.randint(100, (images,), device=device)

    def step() -> None:
        method.backward(lambda: (model(x), y))
        optimizer.step()
        synchronize(device)

    if on_gpu:
        # The first step loads the kernels.
        step()
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else status("VmHWM")
    return {"resident": peak - before, "seconds": wall, "cpu_seconds": cpu}


def growth(images: int, particles: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    results = []
    for k in particles:
        options = ["--images", str(images), "--threads", str(torch.get_num_threads())]
        measured = in_fresh_process("--particles", str(k), *options, "--device", device.type)
        results.append({"particles": k, "chunk": CHUNK, "images": images, **measured})
        print(
            f"CLIP ViT-B/32, SVGD, K = {k:3}, {CHUNK} at a time, {images} images: "
            f"{measured['resident'] / 2**20:.0f} MiB, {measured['seconds']:.1f} s, "
            f"{measured['cpu_seconds']:.1f} s of CPU, "
            f"{measured['cpu_seconds'] / k:.2f} per particle",
            flush=True,
        )
    return results


def trunk(
    method: str, targets: str, images: int, seconds: float, rounds: int, device: torch.device
) -> dict[str, Any]:
    """A step with the shared trunk and without it, taking turns; the same gradients first."""
    import peft
    import timm

    torch.manual_seed(0)
    base = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10)
    config = peft.LoraConfig(r=8, target_modules=TARGETS[targets], modules_to_save=["head"])
    model = ml.get_particle_model(base, config, 8).to(device).train()
    algorithm = METHODS[method](model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=1e-4)
    x = torch.randn(images, 3, 224, 224, device=device)
    y = torch.randint(10, (images,), device=device)

    def backward(shared: bool) -> torch.Tensor:
        model.share_trunk = shared
        optimizer.zero_grad()
        # IBDR's two passes use the same rows at the cut.
        inputs = model.trunk(x) if shared and algorithm.interacts else x
        algorithm.backward(lambda: (model(inputs), y))
        return torch.cat([p.grad.flatten() for p in model.particle_parameters()])

    def step(shared: bool) -> float:
        synchronize(device)
        start = time.perf_counter()
        backward(shared)
        optimizer.step()
        synchronize(device)
        return time.perf_counter() - start

    state = algorithm.state_dict()
    with_ = backward(True)
    algorithm.load_state_dict(state)
    without = backward(False)
    error = (torch.linalg.vector_norm(with_ - without) / torch.linalg.vector_norm(without)).item()
    record: dict[str, Any] = {
        "group": "shared trunk",
        "name": f"ViT-B/16, {targets} of 4 of 12 blocks, K8, {images} images, {method} step",
        "error": error,
        "failures": {},
    }
    if not error < 1e-4:
        record["failures"]["shared"] = f"gradients differ by {error:.1e}"
        return record
    timings = interleave(
        {name: lambda s=s: step(s) for name, s in (("shared", True), ("off", False))},
        seconds,
        rounds,
    )
    ratios = [a / b for a, b in zip(timings["off"].samples, timings["shared"].samples)]
    record |= {
        "seconds": {name: timing.quartiles() for name, timing in timings.items()},
        "rounds": len(ratios),
        "speedup": quartiles(ratios),
        "goal": TRUNK_GOAL,
        "met": statistics.median(ratios) >= TRUNK_GOAL,
    }
    return record


# --- K particles against one, on the same rows ---------------------------------------------------


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
    # One image per row even if particles could share images: both sides have equal inputs.
    x = torch.randn(particles, rows // particles, 3, pixels, pixels, device=device)
    y = torch.randint(10, (rows // particles,), device=device)
    for _ in range(steps):
        optimizer.zero_grad()
        algorithm.backward(lambda: (model(x, per_particle=True), y))
        optimizer.step()


def peak_of(particles: int, rows: int, method: str) -> dict[str, int | None]:
    """Bytes at the highest point of two steps (the second one has AdamW's state from the start).

    resident: the process's peak resident memory over that before the model was built, after
        importing PyTorch and a step of one image; None on a GPU.
    allocated: what PyTorch's allocator held at once: weights, adapters, gradients, AdamW's state,
        saved activations and temporaries.
    """
    device = default_device()
    resident = None
    if device.type == "cpu":
        # Imports, thread pools and the libraries' caches belong to neither side.
        train(1, 1, method, 1, device)
        before = status("VmRSS")
        train(particles, rows, method, 2, device)
        resident = status("VmHWM") - before
    allocated = peak_memory(lambda: train(particles, rows, method, 2, device), device)
    return {"resident": resident, "allocated": allocated}


def compare_memory(rows: int, repetitions: int) -> list[dict[str, Any]]:
    """K = 8 against K = 1 for each method, each in fresh processes that take turns."""
    results = []
    for method in ("ensemble", "ibdr"):
        peaks: dict[int, list[dict[str, int | None]]] = {8: [], 1: []}
        for _ in range(repetitions):
            for particles, measured in peaks.items():
                measured.append(
                    in_fresh_process(
                        "--particles", str(particles), "--rows", str(rows), "--method", method
                    )
                )
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
                    "goal": ROWS_GOAL,
                }
            )
    return results


def in_fresh_process(*options: str) -> dict[str, Any]:
    """The output of this command with these options."""
    command = [sys.executable, "-m", "bench.growth", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status(field: str) -> int:
    """A size that Linux keeps for this process. (The ru_maxrss of getrusage is inherited from the
    process that started it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# --- the command ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.growth", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("growth", "trunk"), help="one question alone")
    parser.add_argument("--out", default="latest", help="results/many_particles/PART-OUT.json")
    parser.add_argument("--particles", type=int, help="one K of growth, in this process")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="with --particles: at a time")
    parser.add_argument("--images", type=int, help="[32 for growth, 1 for trunk]")
    parser.add_argument("--rows", type=int, help="with --particles: the third question's rows")
    parser.add_argument("--method", choices=METHODS, default="ensemble", help="with --rows")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of trunk")
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out-dir", type=Path, default=FOLDER, metavar="DIR")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.particles and args.rows:
        print(json.dumps(peak_of(args.particles, args.rows, args.method)))
        return 0
    if args.particles:
        print(json.dumps(bella(args.particles, args.chunk, args.images or 32, args.device)))
        return 0
    wrong = False
    if args.part != "growth":
        wrong = _trunk_part(args)
    if args.part != "trunk":
        _growth_part(args)
    return 1 if wrong else 0


def _trunk_part(args: argparse.Namespace) -> bool:
    """Whether anything was wrong."""
    cases = []
    for targets, method in itertools.product(args.targets, METHODS):
        case = trunk(method, targets, args.images or 1, 0.0, args.rounds, args.device)
        cases.append(case)
        if case["failures"]:
            print(f"{case['name']}: WRONG, not compared: {case['failures']}")
            continue
        low, median, high = case["speedup"]
        print(
            f"{case['name']}: {case['seconds']['shared'][1]:.2f} s against "
            f"{case['seconds']['off'][1]:.2f} s, ×{median:.2f} [{low:.2f}, {high:.2f}] "
            f"(goal {TRUNK_GOAL}: {'met' if case['met'] else 'missed'})",
            flush=True,
        )
    _save(args, "trunk", {"cases": cases})
    return any(case["failures"] for case in cases)


def _growth_part(args: argparse.Namespace) -> None:
    measured = growth(args.images or 32, PARTICLES, args.device)
    measured.sort(key=lambda result: result["particles"])
    first, last = measured[0], measured[-1]
    memory = last["resident"] / first["resident"]
    clock = "seconds" if args.device.type == "cuda" else "cpu_seconds"
    time_ratio = last[clock] / first[clock]
    print(
        f"K = {last['particles']} against {first['particles']}: ×{memory:.3f} memory "
        f"(goal {MEMORY_GOAL}), ×{time_ratio:.1f} time"
    )
    ratios = {"memory_ratio": memory, "memory_goal": MEMORY_GOAL, "time_ratio": time_ratio}
    _save(args, "growth", {"growth": measured} | ratios)


def _save(args: argparse.Namespace, part: str, results: dict[str, Any]) -> None:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write(args.out_dir / f"{part}-{args.out}.json", {"machine": machine(args.device)} | results)


if __name__ == "__main__":
    sys.exit(main())
