"""python -m bench.soups: how much faster is one pass of M soups, or of S dropout masks, than M?

On the model of the embedded task (a ViT of 0.17 M parameters on 8×8 images), at random weights, in
float32, K = M = S = 8, rank 8 on `qkv`, `proj`, `fc1` and `fc2` with a head per particle: eight
soups of all particles, each particle as a soup, greedy soups of one to eight particles, and eight
dropout masks of one particle. Both ways give the same outputs (with dropout: the same distribution)
and take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import multilora as ml
from bench.clocks import interleave, quartiles
from bench.device import default_device, synchronize
from bench.record import RESULTS, machine, write
from bench.steps import DIGITS_MODEL, DIGITS_TARGETS

#: Goal: one pass is at least so many times as fast as eight.
GOAL = 1.5
COUNT = 8
IMAGES = (16, 64, 256)


def embedded_model(particles: int, dropout: float, device: torch.device) -> ml.ParticleModel:
    import peft
    import timm

    torch.manual_seed(0)
    base = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=5, **DIGITS_MODEL
    )
    config = peft.LoraConfig(
        r=8,
        target_modules=list(DIGITS_TARGETS),
        modules_to_save=["head"],
        lora_dropout=dropout,
    )
    model = ml.get_particle_model(base, config, particles, head_init="reset").to(device).eval()
    with torch.no_grad():
        for p in model.particle_parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def ways(device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (one pass, eight passes), both x -> (8, B, 5)."""
    several, one = embedded_model(COUNT, 0.0, device), embedded_model(1, 0.1, device)

    def soups(weights: Tensor) -> tuple[Callable, Callable]:
        def run(weights: Tensor, x: Tensor) -> Tensor:
            return ml.soups.evaluate(several, weights, lambda: several(x))

        return lambda x: run(weights, x), lambda x: torch.cat([run(w, x) for w in weights.split(1)])

    def masks(samples: int, x: Tensor) -> Tensor:
        with ml.mc_dropout(one, samples):
            return one(x)

    return {
        "soups of all particles": soups(torch.rand(COUNT, COUNT)),
        "each particle as a soup": soups(torch.eye(COUNT)),
        "soups of 1 to 8 particles": soups(torch.ones(COUNT, COUNT).tril()),
        "dropout masks": (
            lambda x: masks(COUNT, x),
            lambda x: torch.cat([masks(1, x) for _ in range(COUNT)]),
        ),
    }


@torch.no_grad()
def compare(
    name: str, passes: tuple[Callable, Callable], x: Tensor, seconds: float, rounds: int
) -> dict[str, Any]:
    together, apart = passes
    # The first pass of a form of inputs is checked against one particle alone.
    differs = (together(x) - apart(x)).abs().max().item()
    record: dict[str, Any] = {"name": f"{name}, {len(x)} images", "failures": {}}
    if name != "dropout masks" and not differs < 1e-4:
        record["failures"]["one pass"] = f"outputs differ by {differs:.1e}"
        return record

    def timed(run: Callable) -> float:
        synchronize(x.device)
        start = time.perf_counter()
        run(x)
        synchronize(x.device)
        return time.perf_counter() - start

    timings = interleave(
        {"one pass": lambda: timed(together), "eight passes": lambda: timed(apart)}, seconds, rounds
    )
    samples = [timings[way].samples for way in ("eight passes", "one pass")]
    ratios = [a / b for a, b in zip(*samples)]
    return record | {
        "seconds": {way: timing.quartiles() for way, timing in timings.items()},
        "rounds": len(ratios),
        "speedup": quartiles(ratios),
        "goal": GOAL,
        "met": statistics.median(ratios) >= GOAL,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soups", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--rounds", type=int, default=15, help="at least [%(default)s]")
    parser.add_argument("--seconds", type=float, default=5, help="at least [%(default)s]")
    parser.add_argument("--out", type=Path, help=f"the record [{RESULTS}/soups/DEVICE.json]")
    args = parser.parse_args(arguments)
    device = default_device()
    cases = []
    for images in args.images:
        x = torch.randn(images, 1, 8, 8, device=device)
        for name, passes in ways(device).items():
            case = compare(name, passes, x, args.seconds, args.rounds)
            cases.append(case)
            speedup = case.get("speedup", (0, 0, 0))[1]
            print(f"{case['name']}: {speedup:.2f} × {case['failures'] or ''}", flush=True)
    out = args.out or RESULTS / "soups" / f"{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, {"machine": machine(device), "cases": cases})
    return 1 if any(case["failures"] for case in cases) else 0


if __name__ == "__main__":
    raise SystemExit(main())
