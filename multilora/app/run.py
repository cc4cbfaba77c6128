"""Training and evaluation of a task: an ordinary training loop, and the measures."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from multilora import checks, losses, metrics
from multilora.app import posthoc, untrusted
from multilora.app.evaluation import evaluate, predictive
from multilora.app.folders import (
    HISTORY,
    METRICS,
    make_run_folder,
    write_json,
)
from multilora.app.options import described
from multilora.app.other_data import add_sets
from multilora.app.pictures import Entropies, write_pictures
from multilora.app.resume import CHECKPOINT, RunState, check_base, read_state
from multilora.app.settings import (
    MAX_STEPS,
    MEASURED,
    SETTINGS,
    Settings,
    check_foreign,
    read_settings,
)
from multilora.app.tasks import TASKS
from multilora.app.tasks.task import (
    ModelOptions,
    Normalisation,
    Report,
    Task,
    call_and_pass,
    of_images,
)
from multilora.attach import get_particle_model
from multilora.checkpoint import load_particle_model
from multilora.methods import METHODS, Method
from multilora.model import ParticleModel
from multilora.ops import pairwise_frobenius

OnStep = Callable[[int, int, dict[str, float]], None]


def make_task(settings: Settings, report: Report = print) -> Task:
    """The task with its data and the base model, and with all sets that are measured.

    Raises:
        ValueError: The settings hold out as many training examples as there are, or more.
    """
    task = TASKS[settings.task].make(settings.options, settings.seed, report)
    task = add_sets(task, settings, report)
    if settings.validation == 0:
        return task
    examples = len(task.train)  # type: ignore[arg-type]  # map-style data sets have a length
    if settings.validation >= examples:
        raise ValueError(f"validation = {settings.validation} of {examples} training examples")
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(settings.seed))
    held, rest = order[: settings.validation].tolist(), order[settings.validation :].tolist()
    return replace(task, train=_Part(task.train, rest), validation=Subset(task.train, held))


class _Part(Subset):
    """A part of the training examples, which may differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


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
    _check_method_args(settings.method, given)
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


def _check_method_args(method: str, given: dict[str, Any]) -> None:
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


def train(
    settings: Settings,
    out: str | Path,
    resume: bool = False,
    device: str = "cpu",
    save_every: int = 50,
    report: Report = print,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train, evaluate and write the folder `out`.

    The folder holds run.json (settings), checkpoint.pt (every `save_every` steps, replaced as a
    whole), particle_k/ and multilora.json, metrics.json, history.json and the pictures
    that `folders.PICTURES` lists.

    Args:
        resume: Continue from out/checkpoint.pt, or from the start if the run was stopped before its
            first one. A run that was killed at any time, also while it wrote, ends with the numbers
            of one that was not. The random state is PyTorch's, NumPy's and Python's, seeded here.
        on_step: on_step(step, steps, stats) is called after each step, with the latest statistics.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: `out` holds other files, a run while resume is False, or a run of other
            settings; its checkpoint is damaged or of another run, which is found before the model
            is changed; or no adapter runs in the first step.
        NotADirectoryError: `out` is a file.
        FloatingPointError: The loss is not finite.
    """
    checks.integer("save_every", save_every, 1, MAX_STEPS)
    _check_method_args(settings.method, dict(settings.method_args))
    after = posthoc.of(settings)
    out = Path(out)
    make_run_folder(out, settings, resume)
    task = make_task(settings, report)
    if len(task.test) == 0:  # type: ignore[arg-type]  # map-style data sets have a length
        raise ValueError("the test set is empty")
    _seed_everything(settings.seed)
    model = particle_model(task, settings).to(device)
    method = make_method(
        settings,
        model,
        len(task.train),  # type: ignore[arg-type]  # map-style data sets have a length
        task.normalisation,
        # The optimizer is made after the method, whose parameters it has too.
        lambda: optimizer.param_groups[0]["lr"],
    )
    optimizer = _optimizer(settings, model, method)
    schedule = _warm_up_and_cosine(optimizer, settings.steps)
    state = RunState(out / CHECKPOINT, settings, model, method, optimizer, schedule)
    training = replace(task, collate=_collate(settings, task))
    if resume:
        state.load()
    # From here on the folder belongs to this run, whose settings have all been used once.
    write_json(out / SETTINGS, settings.flat())
    model.train()
    _take_steps(state, training, device, save_every, on_step)
    method.sample()
    state.model = after(model, task)
    state.model.save_pretrained(out)
    return _write_results(out, state, task)


def _collate(settings: Settings, task: Task) -> Callable[[list[Any]], Any] | None:
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


def _optimizer(settings: Settings, model: ParticleModel, method: Method) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": model.particle_parameters()}]
    if own := method.parameters():
        lr = settings.lr if settings.method_lr is None else settings.method_lr
        groups.append({"params": own, "weight_decay": 0.0, "lr": lr})
    if settings.entry.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def _warm_up_and_cosine(
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


def _take_steps(
    state: RunState, task: Task, device: str, save_every: int, on_step: OnStep | None
) -> None:
    settings, model, method = state.settings, state.model, state.method
    # Reading the statistics waits for a GPU, so a long run reads them at every tenth step only.
    read_every = max(1, min(10, settings.steps // 20))
    # A loader draws a number when it starts, which a resumed run does once more: give it a
    # generator that nothing else uses.
    batches = DataLoader(
        task.train,
        batch_sampler=_Batches(task.train, settings, state.step),
        collate_fn=task.collate,
        generator=torch.Generator(),
    )
    stats: dict[str, float] = {}
    first = state.step + 1
    for step, (x, y) in enumerate(batches, start=first):
        started = time.perf_counter()
        x, y = _to(x, device), y.to(device)
        closure = _closure(settings, task, method, x, y)
        with _all_run(model, method) if step == first else contextlib.nullcontext():
            scalars = method.backward(closure)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.schedule.step()
        read = step % read_every == 0 or step == settings.steps
        if read:
            stats = {name: value.item() for name, value in scalars.items()}
            if not all(map(math.isfinite, stats.values())):
                raise FloatingPointError(f"step {step} of {settings.method} diverged: {stats}")
        state.step = step
        state.step_ms.append(1000 * (time.perf_counter() - started))
        if read:
            state.history.append({"step": step, **stats, **_distance(model)})
        if on_step is not None:
            on_step(step, settings.steps, stats)
        if step % save_every == 0 or step == settings.steps:
            state.save()


def _closure(
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


@torch.no_grad()
def _distance(model: ParticleModel) -> dict[str, float]:
    """The mean Frobenius distance ‖ΔW_i − ΔW_j‖ of two particles, over all adapted layers."""
    particles = model.num_particles
    if particles == 1 or model.peft_config is None:
        return {}
    A, B, scaling = zip(*((a.lora_A, a.lora_B, a.scaling) for a in model.adapters()))
    squared = pairwise_frobenius(A, B, scaling).sum(0)
    mean = squared.sqrt().sum() / (particles * (particles - 1))
    return {"particle_distance": mean.item()}


def _write_results(out: Path, state: RunState, task: Task) -> dict[str, Any]:
    settings, model = state.settings, state.model
    entropies = Entropies(settings.combine)
    with predictive(model, settings):
        result, predictions, targets = evaluate(
            model,
            task,
            particle_chunk=settings.particle_chunk,
            combine=settings.combine,
            on_predictions=entropies.add,
        )
    result = {
        "method": settings.method,
        "particles": settings.particles,
        "rank": None if settings.full else settings.rank,
        "seed": settings.seed,
        **result,
        **({} if settings.full else {"vendi_weights": metrics.vendi(model.cosines())}),
        "step_ms": statistics.median(state.step_ms),
        "trainable_per_particle": sum(p[0].numel() for p in model.particle_parameters()),
    }
    write_json(out / HISTORY, state.history)
    write_pictures(out, result, predictions, targets, entropies.groups(), state.history)
    write_json(out / METRICS, result)
    return result


@contextlib.contextmanager
def _all_run(model: ParticleModel, method: Method) -> Iterator[None]:
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


def load_run(
    folder: str | Path,
    report: Report = print,
    adapter: str | Path | None = None,
    **own: Any,
) -> tuple[ParticleModel, Task, Settings]:
    """The trained model of a run's folder, with its task.

    The folder may come from anybody, so no code runs that comes with it or that it names;
    SECURITY.md says what else is expected of it.

    Args:
        adapter: The folder of one PEFT adapter, such as an exported soup, to load in place of the
            run's particles. The model then has one particle.
        own: Options of the task in place of the folder's: model, data, model_args (merged by name)
            and trust_remote_code. As the caller's word they are not checked: the model may be any,
            with weights in any file. And what is measured: combine, shift, ood and corrupt.

    Raises:
        ValueError: A file, which the message names, is damaged or asks for what it must not.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    measured = {n: own.pop(n) for n in MEASURED if n in own}
    given = {name: value for name, value in measured.items() if value is not None}
    if own.get("data") is not None:
        given["validation"] = 0  # that part is of the run's own data
    settings = replace(settings, options=_vouched(settings.options, folder, own), **given)
    task = make_task(settings, report)
    if adapter is not None:
        return load_particle_model(task.base, [adapter]), task, settings
    particles = load_particle_model(task.base, folder, fold="loop" if settings.full else "batch")
    for name, theirs, here in (
        ("particles", settings.entry.saved(settings.particles), particles.num_particles),
        (
            "rank",
            None if settings.full else settings.rank,
            getattr(particles.peft_config, "r", None),
        ),
    ):
        if theirs != here:
            raise ValueError(
                f"{folder / SETTINGS} is of another run: {name} = {theirs}, and the particles in "
                f"{folder} have {here}"
            )
    check_base(folder / CHECKPOINT, read_state(folder / CHECKPOINT), particles)
    return particles, task, settings


def _vouched(options: Any, folder: Path, own: Mapping[str, Any]) -> Any:
    """The options of a run's folder, checked, with the user's own in place of the folder's."""
    given = {name: value for name, value in own.items() if value not in (None, False)}
    for name, value in given.items():
        if name not in described(type(options)):
            check_foreign(name, value, options.task)
    if not isinstance(options, ModelOptions):
        return options
    own_args = dict(given.pop("model_args", ()))
    theirs = [
        (name, value)
        for name, value in options.model_args
        if name not in own_args and not (name in given and name == "trust_remote_code")
    ]
    untrusted.check_arguments(str(folder / SETTINGS), theirs)
    if "model" not in given:
        options.check_model(str(folder / SETTINGS), folder)
    return replace(
        options,
        **given,
        model_args=tuple((dict(theirs) | own_args).items()),
        from_file="model" not in given,
    )


def _to(x: Tensor | dict[str, Tensor], device: str | torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else {k: t.to(device) for k, t in x.items()}


class _Batches(Sampler):
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


def _seed_everything(seed: int) -> None:
    """Seed everything that a data set may draw from: augmentations use all three generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
