"""Functions that the durability tests run in new processes, most of which are killed in them."""

import contextlib
import io
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import multilora as ml
from multilora import particle_folders
from multilora.app import run as training
from multilora.app.tasks.task import Task

STEPS, SAVE_EVERY = 30, 7


class Augmented(Dataset):
    """Rows with noise from every generator that augmentations draw from."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(6)
        return self.x[i] + noise.float(), self.y[i]


def small_task(*_) -> Task:
    """Four classes of rows, and a base with dropout."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    y = (x[:, :4] + 0.5 * x[:, 2:]).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 4))
    train, test = Augmented(x[:60], y[:60]), TensorDataset(x[60:], y[60:])
    return Task(base, ["0"], "3", list("abcd"), train, test)


def settings(method: str = "ibdr", **changes) -> training.Settings:
    small = {"particles": 3, "rank": 2, "steps": STEPS, "batch_size": 8}
    return training.Settings(method=method, **small | changes)


def train(
    out: Path,
    method: str,
    die: tuple[str, int] | None = None,
    save_every: int = SAVE_EVERY,
    pause: float = 0.0,
) -> None:
    """A run that is started or resumed.

    die: the place, and at which visit of it the process dies. pause: seconds after every step.
    """
    torch.set_num_threads(1)
    training.make_task = small_task
    # The pictures take as long as the rest.
    training.write_pictures = lambda *_: None
    where, count = die or ("", 0)
    if where == "state":
        torch.save = dying_in_the_middle(torch.save, count)
    if where == "adapters":
        save_file = particle_folders.save_file
        particle_folders.save_file = dying_with_half_a_file(save_file, count)
    if where == "moves":
        die_before_change(out, count, lambda path: ".multilora-commit" in path)

    def on_step(step, steps, stats):
        time.sleep(pause)
        if where == "step" and step == count:
            die_now()

    training.train(
        settings(method), out, resume=True, save_every=save_every, report=print, on_step=on_step
    )


def save(path: Path, seed: int, die_at: int | None = None) -> None:
    """Save `particles(seed)`; die_at: which change of the file system it does not survive."""
    if die_at is not None:
        die_before_change(path, die_at)
    particles(seed).save_pretrained(path)


def keep_saving(
    path: Path, seeds: tuple[int, ...], seconds: float, what: str = "particles"
) -> None:
    """Save these particles in turn, or their soups, perhaps beside a process that does so too."""
    models = [particles(seed) for seed in seeds]
    end = time.monotonic() + seconds
    for model in itertools.cycle(models):
        if time.monotonic() > end:
            return
        with contextlib.suppress(OSError):
            model.save_pretrained(path) if what == "particles" else model.soup(path)


def particles(seed: int) -> ml.ParticleModel:
    """Three particles, all of whose numbers are the seed's."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"])
    model = ml.get_particle_model(small_task().base, config, num_particles=3)
    with torch.no_grad():
        for parameter in model.particle_parameters():
            parameter.fill_(seed)
    return model


def die_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in_the_middle(save, count):
    """torch.save, whose count-th call writes the first half and dies."""
    calls = iter(range(1, 1000))

    def write(state, stream):
        buffer = io.BytesIO()
        save(state, buffer)
        whole = next(calls) < count
        stream.write(buffer.getvalue() if whole else buffer.getvalue()[: buffer.tell() // 2])
        if not whole:
            stream.flush()
            die_now()

    return write


def dying_with_half_a_file(save_file, count):
    """safetensors' save_file, whose count-th call leaves the first half and dies."""
    calls = iter(range(1, 1000))

    def write(tensors, file, metadata):
        save_file(tensors, file, metadata)
        if next(calls) == count:
            os.truncate(file, file.stat().st_size // 2)
            die_now()

    return write


def die_before_change(folder: Path, count: int, where=lambda path: True) -> None:
    """Die before the count-th time that a file or folder below `folder` is made, moved or removed.

    The interpreter announces each to its audit hooks before the system does it.
    """
    events = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove"}
    calls = iter(range(1, 1000))

    def hook(event, args):
        if event not in events or not isinstance(args[0], (str, os.PathLike)):
            return
        if event == "open" and args[1] != "w":
            return
        path = os.fspath(args[0])
        if path.startswith(str(folder)) and where(path) and next(calls) == count:
            die_now()

    sys.addaudithook(hook)
