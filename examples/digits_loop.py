"""The plain loop: pretrain a small model, attach K particles, train, evaluate, save, load.

    python examples/digits_loop.py --method ibdr --particles 4

The data are handwritten digits that ship with scikit-learn. The base learns the digits 0-4; the
particles learn 5-9 from a few examples of each. With --timm NAME the base is a pretrained timm
model (downloaded unless it is cached) on the same images, enlarged.
"""

import argparse
import copy

import peft
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import multilora as ml

METHODS = {"ensemble": ml.Ensemble, "svgd": ml.SVGD, "ibdr": ml.IBDR}


def pretrained_mlp(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """A network of two hidden layers, trained on the images x and labels y."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 5),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(300):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ensemble", choices=METHODS)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--timm", metavar="NAME", help="a pretrained timm ViT as the base")
    parser.add_argument("--out", default="runs/digits_loop", help="where the particles are saved")
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images).float()[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    if args.timm:
        import timm

        base = timm.create_model(args.timm, pretrained=True, num_classes=5)
        x = nn.functional.interpolate(x.expand(-1, 3, -1, -1), 224)
        config = peft.LoraConfig(
            r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"]
        )
    else:
        base = pretrained_mlp(x[y < 5], y[y < 5])
        config = peft.LoraConfig(
            r=8, lora_alpha=8, target_modules=["1", "3"], modules_to_save=["5"]
        )
    untouched = copy.deepcopy(base)  # get_particle_model changes the base in place

    data = TensorDataset(x[y >= 5], y[y >= 5] - 5)
    train, held_out = random_split(data, [0.1, 0.9], torch.Generator().manual_seed(0))
    model = ml.get_particle_model(base, config, args.particles, head_init="reset")
    method = METHODS[args.method](model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=3e-3)
    loader = DataLoader(train, batch_size=16, shuffle=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    for epoch in range(args.epochs):
        for images, labels in loader:
            stats = method.backward(lambda images=images, labels=labels: (model(images), labels))
            ml.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}:", {name: round(v.item(), 3) for name, v in stats.items()})

    test = DataLoader(held_out, batch_size=256)
    measures = ml.metrics.evaluate(*ml.metrics.predict_loader(model, test))
    print("members:", [round(a, 3) for a in measures["member_accuracy"]])
    for name in ("accuracy", "nll", "ece", "brier", "mutual_information"):
        print(f"{name}: {measures[name]:.3f}")

    model.save_pretrained(args.out)
    loaded = ml.load_particle_model(untouched, args.out)
    assert torch.equal(ml.predict(loaded, x[:4]), ml.predict(model, x[:4]))
    print(f"saved, and loaded again: {args.out}")


if __name__ == "__main__":
    main()
