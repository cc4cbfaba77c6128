"""Processes that share the data and the particles.

    torchrun --standalone --nproc-per-node 4 examples/distributed.py --data 2 --particle 2

Each process holds particles/particle of the particles, and sees 1/data of the data. It runs on GPUs
where there are some (one for each process), else on CPUs. The data are the handwritten digits of
scikit-learn.
"""

import argparse
import os

import peft
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import multilora as ml

METHODS = {"ensemble": ml.Ensemble, "svgd": ml.SVGD, "ibdr": ml.IBDR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=2, help="processes along the data")
    parser.add_argument("--particle", type=int, default=2, help="processes along the particles")
    parser.add_argument("--particles", type=int, default=4, help="particles of all processes")
    parser.add_argument("--method", default="ibdr", choices=METHODS)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/distributed")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) != args.data * args.particle:
        parser.error(
            f"start it with torchrun --standalone --nproc-per-node {args.data * args.particle} "
            "examples/distributed.py"
        )

    torch.manual_seed(0)  # the same data and base in every process
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], modules_to_save=["2"])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (args.data, args.particle), mesh_dim_names=("data", "particle"))
    model = ml.get_particle_model(base, config, args.particles, mesh=mesh, head_init="reset")
    model = model.to(device)
    method = METHODS[args.method](model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=3e-3)

    train = TensorDataset(x[:1200], y[:1200])
    # Processes that hold other particles for the same data must see the same batches.
    sampler = DistributedSampler(train, mesh["data"].size(), mesh.get_local_rank("data"))
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(train, batch_size=16, sampler=sampler):
            images, labels = images.to(device), labels.to(device)
            stats = method.backward(lambda images=images, labels=labels: (model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: nll {stats['nll'].item():.3f}", flush=True)

    # Every process gets the predictions of all particles, and they write the files together.
    log_p = ml.predict(model, x[1200:].to(device), log=True)
    measures = ml.metrics.evaluate(log_p.cpu(), y[1200:])
    model.save_pretrained(args.out)
    if dist.get_rank() == 0:
        print(
            f"accuracy {measures['accuracy']:.3f}, nll {measures['nll']:.3f}; saved in {args.out}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
