"""Training and evaluation of a task: an ordinary training loop, and the measures."""

from __future__ import annotations

import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from multilora import checks, metrics
from multilora.app import posthoc, untrusted, validation
from multilora.app.evaluation import evaluate, predictive, validate
from multilora.app.folders import (
    CHECKPOINT,
    HISTORY,
    METRICS,
    clear_run_folder,
    make_run_folder,
    write_json,
)
from multilora.app.options import described
from multilora.app.other_data import add_sets
from multilora.app.pictures import Entropies, write_pictures
from multilora.app.resume import RunState, check_base, read_state, shown
from multilora.app.settings import (
    MAX_STEPS,
    MEASURED,
    SETTINGS,
    Settings,
    check_foreign,
    read_settings,
)
from multilora.app.steps import Training, check_method_args
from multilora.app.tasks import TASKS
from multilora.app.tasks.task import ModelOptions, Report, Task
from multilora.checkpoint import load_particle_model
from multilora.model import ParticleModel
from multilora.ops import pairwise_frobenius

#: What a clock or the machine decides among the numbers of metrics.json.
MACHINE = ("step_ms", "seconds", "peak_memory_mb")
#: Of the examples that are held out from training. It is no run's seed, so that no run trains on
#: what another one holds out, where both have the same training examples to start from.
_HELD_OUT_SEED = 0
OnStep = Callable[[int, int, dict[str, float]], None]


def make_task(settings: Settings, report: Report = print) -> Task:
    """The task with its data and the base model, and with all sets that are measured.

    Raises:
        ValueError: The settings hold out as many training examples as there are, or more, or the
            task has validation examples of its own.
    """
    task = TASKS[settings.task].make(settings.options, settings.seed, report)
    task = add_sets(task, settings, report)
    if settings.validation == 0:
        return task
    if task.validation is not None:
        raise ValueError(
            f"validation = {settings.validation}: the task {settings.task!r} has validation "
            "examples of its own; leave it out"
        )
    examples = len(task.train)  # type: ignore[arg-type]  # map-style data sets have a length
    if settings.validation >= examples:
        raise ValueError(f"validation = {settings.validation} of {examples} training examples")
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(_HELD_OUT_SEED))
    held, rest = order[: settings.validation].tolist(), order[settings.validation :].tolist()
    return replace(task, train=_Part(task.train, rest), validation=Subset(task.train, held))


class _Part(Subset):
    """A part of the training examples, which may differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def train(
    settings: Settings,
    out: str | Path,
    resume: bool = False,
    device: str = "cpu",
    save_every: int = 50,
    report: Report = print,
    on_step: OnStep | None = None,
    measure: str = "test",
    pictures: bool = True,
    overwrite: bool = False,
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
        measure: "test" measures the test set and all others; "validation" the validation examples
            only, as a search for hyper-parameters must.
        pictures: Whether the pictures are drawn.
        overwrite: Remove the run that `out` holds, just before the first step of the new one. Files
            that no run writes are an error.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: `out` holds other files, a run with a checkpoint while resume and overwrite are
            False, or a run of other settings; its checkpoint is damaged or of another run, which
            is found before the model is changed; or no adapter runs in the first step.
        NotADirectoryError: `out` is a file.
        FloatingPointError: The loss is not finite.
    """
    checks.integer("save_every", save_every, 1, MAX_STEPS)
    checks.choice("measure", measure, ("test", "validation"))
    check_method_args(settings.method, dict(settings.method_args))
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite removes it; give one of them")
    after = posthoc.of(settings)
    out = Path(out)
    make_run_folder(out, settings, resume, overwrite)
    task = make_task(settings, report)
    validation.check(settings, task)
    if measure == "validation" and task.validation is None:
        raise ValueError(f"the task {settings.task!r} has no validation examples to be measured")
    if len(task.test) == 0:  # type: ignore[arg-type]  # map-style data sets have a length
        raise ValueError("the test set is empty")
    _seed_everything(settings.seed)
    training = Training(settings, task, device)
    state = RunState(out / CHECKPOINT, training)
    if resume:
        state.load()
    over = state.best.ends(settings)
    batches: Iterable[Any] = [] if over else training.batches(state.step)
    if overwrite:
        clear_run_folder(out)
    # From here on the folder belongs to this run, whose settings have all been used once.
    write_json(out / SETTINGS, settings.flat())
    training.model.train()
    _take_steps(state, batches, save_every, on_step)
    memory = peak_memory_mb(device)
    if state.best.parameters is None:
        training.method.sample()
    else:
        state.best.use(training.model)
    model = after(training.model, task)
    model.save_pretrained(out)
    return _write_results(out, state, model, memory, measure, pictures)


def _take_steps(
    state: RunState, batches: Iterable[Any], save_every: int, on_step: OnStep | None
) -> None:
    training, settings = state.training, state.training.settings
    model, interval = training.model, settings.validation_interval
    # Reading the statistics waits for a GPU, so a long run reads them at every tenth step only.
    read_every = max(1, min(10, settings.steps // 20))
    stats: dict[str, float] = {}
    first = state.step + 1
    for step, (x, y) in enumerate(batches, start=first):
        started = time.perf_counter()
        scalars = training.step(x, y, step == first)
        last = step == settings.steps
        read = step % read_every == 0 or last
        if read:
            stats = shown({name: value.item() for name, value in scalars.items()})
            if not all(map(math.isfinite, stats.values())):
                raise FloatingPointError(f"step {step} of {settings.method} diverged: {stats}")
        state.step = step
        state.step_ms.append(1000 * (time.perf_counter() - started))
        row: dict[str, float] = {"step": step}
        row |= {**stats, **_distance(model)} if read else {}
        if interval and (step % interval == 0 or last):
            row |= validation.measure(step, training, state.best)
        if len(row) > 1:
            state.history.append(row)
        if on_step is not None:
            on_step(step, settings.steps, stats)
        last = last or state.best.ends(settings)
        if step % save_every == 0 or last:
            state.save()
        if last:
            return


@torch.no_grad()
def _distance(model: ParticleModel) -> dict[str, float]:
    """The mean Frobenius distance ‖ΔW_i − ΔW_j‖ of two particles, over all adapted layers."""
    particles = model.num_particles
    if particles == 1 or model.peft_config is None:
        return {}
    A, B, scaling = zip(*((a.lora_A, a.scaled(), a.scaling) for a in model.adapters()))
    squared = pairwise_frobenius(A, B, scaling).sum(0)
    mean = squared.sqrt().sum() / (particles * (particles - 1))
    return {"particle_distance": mean.item()}


def _write_results(
    out: Path, state: RunState, model: ParticleModel, memory: float, measure: str, pictures: bool
) -> dict[str, Any]:
    settings, task = state.training.settings, state.training.task
    options: dict[str, Any] = {
        "particle_chunk": settings.particle_chunk,
        "combine": settings.combine,
    }
    entropies = Entropies(settings.combine)
    with predictive(model, settings):
        if measure == "validation":
            measured = validate(model, task, **options)
        else:
            measured, predictions, targets = evaluate(
                model, task, **options, on_predictions=entropies.add
            )
    result = {
        "method": settings.method,
        "particles": settings.particles,
        "rank": None if settings.full else settings.rank,
        "seed": settings.seed,
        **measured,
        **({} if settings.full else {"vendi_weights": metrics.vendi(model.cosines())}),
        "step_ms": statistics.median(state.step_ms),
        "seconds": sum(state.step_ms) / 1000,
        "steps_taken": state.step,
        "peak_memory_mb": memory,
        "trainable_per_particle": sum(p[0].numel() for p in model.particle_parameters()),
        "forward_rows": settings.particles,
    }
    if state.best.step:
        result["best_step"] = state.best.step
    write_json(out / HISTORY, state.history)
    if pictures and measure == "test":
        write_pictures(out, result, predictions, targets, entropies.groups(), state.history)
    write_json(out / METRICS, result)
    return result


def peak_memory_mb(device: str) -> float:
    """The most memory that this process has needed so far: of the GPU, or else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
    particles.share_trunk = settings.share_trunk
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


def _seed_everything(seed: int) -> None:
    """Seed everything that a data set may draw from: augmentations use all three generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
