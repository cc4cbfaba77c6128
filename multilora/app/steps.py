"""The parts of a training step of the command line: batch, closure, optimizer and schedule."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from multilora import losses
from multilora.app import posthoc
from multilora.app.settings import Settings
from multilora.app.tasks.task import Normalisation, Task, call_and_pass, of_images
from multilora.attach import get_particle_model
from multilora.methods import METHODS, Method
from multilora.model import ParticleModel


class Training:
    """The model of a run, its method and its optimizer, and a step of theirs.

    Attributes:
        schedule: that of the learning rate: a warm-up and a cosine.
    """

    def __init__(self, settings: Settings, task: Task, device: str):
        self.settings, self.task, self.device = settings, task, device
        self.model = particle_model(task, settings).to(device)
        self.method = make_method(
            settings,
            self.model,
            len(task.train),  # type: ignore[arg-type]  # map-style data sets have a length
            task.normalisation,
            # The optimizer is made after the method, whose parameters it has too.
            lambda: self.optimizer.param_groups[0]["lr"],
        )
        self.optimizer = make_optimizer(settings, self.model, self.method)
        self.schedule = warm_up_and_cosine(self.optimizer, settings.steps)

    def batches(self, done: int = 0) -> DataLoader:
        """The (inputs, labels) of the steps after `done`."""
        # A loader draws a number when it starts, which a resumed run does once more: give it a
        # generator that nothing else uses.
        return DataLoader(
            self.task.train,
            batch_sampler=Batches(self.task.train, self.settings, done),
            collate_fn=collate(self.settings, self.task),
            generator=torch.Generator(),
        )

    def step(self, x: Any, y: Tensor, first: bool = False) -> dict[str, Tensor]:
        """Train on a batch; returns what the method says of it.

        Args:
            first: make sure that everything that is to be trained runs and gets a gradient.
        """
        x, y = to(x, self.device), y.to(self.device)
        run = closure(self.settings, self.task, self.method, x, y)
        with all_run(self.model, self.method) if first else contextlib.nullcontext():
            scalars = self.method.backward(run)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return scalars


def make_method(
    settings: Settings,
    model: ParticleModel,
    num_data: int,
    normalisation: Normalisation | None = None,
    lr: Callable[[], float] | None = None,
) -> Method:
    """The method of the settings, with their `method_args` as keywords.

    Args:
        normalisation: that of the task's images.
        lr: gives the optimizer's learning rate at each step; that of the settings where it is None.
    """
    given = dict(settings.method_args)
    check_method_args(settings.method, given)
    known = inspect.signature(settings.entry.make).parameters
    ours: dict[str, Any] = {
        "seed": settings.seed,
        "num_data": num_data,
        "total_steps": settings.steps,
        "lr": settings.lr if lr is None else lr,
    }
    if "mean" in known:
        ours["mean"], ours["std"] = of_images(settings.method, normalisation)
    if settings.label_smoothing:
        ours["loss"] = losses.CrossEntropy(label_smoothing=settings.label_smoothing)
    # The others are those of what comes after the training.
    keywords = {name: value for name, value in (ours | given).items() if name in known}
    return settings.entry.make(model, **keywords)


#: Keywords of methods that other settings decide.
_NOT_GIVEN = ("model", "seed", "lr", "num_data", "total_steps", "accumulation", "mean", "std")


def check_method_args(method: str, given: dict[str, Any]) -> None:
    """Raise ValueError if the method does not take the keywords that are given."""
    entry = METHODS[method]
    parameters = inspect.signature(entry.make).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    defaults |= posthoc.arguments(entry.posthoc)
    known = [name for name in defaults if name not in _NOT_GIVEN]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"{method} has the arguments {known}; got {unknown}")
    for key, value in given.items():
        if isinstance(value, str) and isinstance(defaults[key], (int, float)):
            raise ValueError(f"{key} of {method} is a number or true or false; got {value!r}")


def particle_model(task: Task, settings: Settings) -> ParticleModel:
    import peft

    heads = [task.head] if isinstance(task.head, str) else [*(task.head or ())]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.lora_alpha is None else settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=task.targets,
        modules_to_save=heads or None,
    )
    # A task's heads are new.
    model = get_particle_model(
        task.base,
        None if settings.full else config,
        settings.entry.trained(settings.particles),
        seed=settings.seed,
        head_init="reset" if heads else None,
        head=heads if settings.full else (),
        share_trunk=settings.share_trunk,
        # Copies of a model share no layers, and a loop is right for any model.
        fold="loop" if settings.full else "batch",
    )
    if settings.full and not heads and settings.method != "single":
        _set_apart(model)
    return model


@torch.no_grad()
def _set_apart(model: ParticleModel) -> None:
    """Add noise to each copy's matrices, of 1 % of their standard deviation: copies of a pretrained
    model without a new head would stay equal for ever."""
    for particle, seed in enumerate(model.processes.own(model.seeds)):
        generator = torch.Generator().manual_seed(seed)
        for p in model.particle_parameters():
            if p.ndim > 2:
                noise = torch.randn(p.shape[1:], generator=generator).to(p)
                p[particle] += 0.01 * p[particle].std() * noise


class Batches(Sampler):
    """The batches of the steps after `done`: one permutation per epoch, drawn from seed and epoch.

    Step s has the same batch however often the run was stopped before it.
    """

    def __init__(self, data: Dataset, settings: Settings, done: int):
        self.data, self.settings, self.done = data, settings, done
        self.examples = len(data)  # type: ignore[arg-type]  # map-style data sets have a length
        if self.examples == 0:
            raise ValueError("the training set is empty")

    def __len__(self) -> int:
        return self.settings.steps - self.done

    def __iter__(self) -> Iterator[list[int]]:
        size = min(self.settings.batch_size, self.examples)
        per_epoch = self.examples // size
        for step in range(self.done, self.settings.steps):
            epoch, position = divmod(step, per_epoch)
            if hasattr(self.data, "set_epoch"):  # its images differ from epoch to epoch
                self.data.set_epoch(epoch)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            order = torch.randperm(self.examples, generator=generator)
            yield order[position * size : (position + 1) * size].tolist()


def collate(settings: Settings, task: Task) -> Callable[[list[Any]], Any] | None:
    """How a training batch is made of examples: with mixup where the settings have it.

    It draws from PyTorch's generator, whose state a checkpoint has.
    """
    if settings.mixup == 0:
        return task.collate
    x = task.train[0][0]
    if task.collate is not None or not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"mixup is for tasks of images; got the task {settings.task!r}")
    from torchvision.transforms import v2

    mixup = v2.MixUp(alpha=settings.mixup, num_classes=len(task.classes))
    return lambda examples: mixup(*default_collate(examples))


def to(x: Tensor | dict[str, Tensor], device: str | torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else {k: t.to(device) for k, t in x.items()}


def make_optimizer(
    settings: Settings, model: ParticleModel, method: Method
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": model.particle_parameters()}]
    if own := method.parameters():
        lr = settings.lr if settings.method_lr is None else settings.method_lr
        groups.append({"params": own, "weight_decay": 0.0, "lr": lr})
    if settings.entry.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def warm_up_and_cosine(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    warm_up = max(1, round(0.06 * steps))
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up or 1),
        ],
        [warm_up],
    )


def closure(
    settings: Settings, task: Task, method: Method, x: Any, y: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The closure of a step, over the batch or what the method makes of it.

    A method that splits batches gives each particle its own part, where the task has no other way
    to learn and the batch can be shared equally.
    """
    entry, model = settings.entry, method.model
    own: Any = partial(model, per_particle=True)
    particles = model.num_particles
    if entry.batch is not None:
        return partial(task.learn, own, *entry.batch(method, x, y))
    if entry.split_batch and task.learn is call_and_pass and len(y) % particles == 0:
        x, y = tree_map(lambda t: t.unflatten(0, (particles, -1)), (x, y))
        return partial(task.learn, own, x, y)
    return partial(task.learn, model, x, y)


@contextlib.contextmanager
def all_run(model: ParticleModel, method: Method) -> Iterator[None]:
    """Raise ValueError where a step inside leaves out what is to be trained.

    That is the case if no adapter is called or one of the heads is not, or if no adapter gets a
    gradient.
    """
    layers, heads = dict(model.lora_layers()), dict(model.stacked_modules())
    idle = {*layers, *heads}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: idle.discard(name))
        for name, layer in itertools.chain(layers.items(), heads.items())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    first, idle_heads = ", ".join([*layers][:5]), sorted(idle & heads.keys())
    if idle_heads:
        raise ValueError(f"the head {idle_heads[0]} did not run in the first step: it cannot learn")
    if not layers:  # full copies
        return
    if idle >= layers.keys():
        raise ValueError(
            f"none of the {len(layers)} adapters ran in the first step ({first}): the model reads "
            "the weights of these layers instead of calling them; choose other targets (--targets)"
        )
    means = method.params if method.trains_particles else method.parameters()
    trained = dict(zip(method.params, means))
    gradients = (trained[layer.lora_B].grad for layer in layers.values())
    if not any(g is not None and bool(g.any()) for g in gradients):
        raise ValueError(
            f"none of the {len(layers)} adapters got a gradient in the first step ({first}); "
            "choose other targets (--targets)"
        )
