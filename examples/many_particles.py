"""A hundred particles in the memory of a few: SVGD with particle_chunk.

    python examples/many_particles.py --particles 100 --chunk 10

The method calls the closure for `chunk` particles at a time. Distances and kernels are of all
particles. The base is a small network on the handwritten digits of scikit-learn.
"""

import argparse
import time

import peft
import torch
from sklearn.datasets import load_digits
from torch import nn

import multilora as ml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=10, help="particles that run at a time")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, held_out = order[:600], order[600:]
    base = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"], modules_to_save=["4"])
    model = ml.get_particle_model(base, config, args.particles, head_init="reset")
    each = sum(p[0].numel() for p in model.particle_parameters())
    print(f"{args.particles} particles of {each} numbers over one base")

    method = ml.SVGD(model, particle_chunk=args.chunk)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=3e-3)
    started = time.perf_counter()
    for step in range(args.steps):
        batch = train[torch.randint(len(train), (32,))]
        stats = method.backward(lambda batch=batch: (model(x[batch]), y[batch]))
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(
                f"step {step + 1}: nll {stats['nll'].item():.3f}, mean kernel "
                f"{stats['kernel'].item():.3f}, mean distance² {stats['distance'].item():.3f}"
            )
    print(f"{1000 * (time.perf_counter() - started) / args.steps:.0f} ms per step")

    log_p = ml.predict(model, x[held_out], particle_chunk=args.chunk, log=True)
    measures = ml.metrics.evaluate(log_p, y[held_out])
    best = max(measures["member_accuracy"])
    print(
        f"accuracy {measures['accuracy']:.3f} (best particle {best:.3f}), nll {measures['nll']:.3f}"
    )


if __name__ == "__main__":
    main()
