"""The command line's training loop: an ordinary PyTorch loop around `method.backward`."""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from multilora import atomic, checks, metrics
from multilora.app import untrusted
from multilora.app.plots import reliability_diagram
from multilora.app.resume import CHECKPOINT, RunState, check_base, read_state
from multilora.app.settings import INTEGERS, SETTINGS, Settings, differences, read_settings
from multilora.app.tasks import commonsense
from multilora.app.tasks.commonsense import questions
from multilora.app.tasks.digits import digits
from multilora.app.tasks.images import images
from multilora.app.tasks.task import Report, Task
from multilora.app.tasks.vtab import vtab1k
from multilora.attach import get_particle_model
from multilora.checkpoint import load_particle_model
from multilora.methods import IBDR, SVGD, Ensemble, Method
from multilora.model import ParticleModel

_METRICS = "metrics.json"
OnStep = Callable[[int, int, dict[str, float]], None]


def make_task(
    settings: Settings,
    report: Report = print,
    trust_remote_code: bool = False,
    from_file: bool = False,
) -> Task:
    """The task with its data and the base model.

    trust_remote_code: run the code that comes with a language model. from_file: the settings'
    model is a file's word, not the user's; see `load_run`.
    """
    if trust_remote_code and settings.task not in commonsense.names():
        raise ValueError(
            f"trust_remote_code is for the tasks {', '.join(commonsense.names())}; got the task "
            f"{settings.task!r}"
        )
    if settings.task == "digits":
        return digits(settings.seed, settings.shots, report)
    common = {
        "data": settings.data,
        "model": settings.model,
        "pretrained": settings.pretrained,
        "targets": settings.targets,
        "seed": settings.seed,
        "from_file": from_file,
    }
    model_args = dict(settings.model_args)
    reserved = sorted(model_args.keys() & {*common, "augment", "split", "task", "report"})
    if reserved:
        raise ValueError(f"model_args cannot give {reserved}, which are settings of the run")
    common |= model_args
    if trust_remote_code:
        common["trust_remote_code"] = True
    if settings.task == "images":
        return images(**common, augment=settings.augment)
    if settings.task == "vtab":
        return vtab1k(**common, augment=settings.augment, split=settings.split)
    return questions(
        settings.task,
        **common,
        split=settings.split,
        classes=settings.classes,
        max_length=settings.max_length,
        report=report,
    )


def make_method(
    name: str, model: ParticleModel, seed: int, method_args: dict[str, Any] | None = None
) -> Method:
    """The method by its name, with `method_args` as keywords of its class."""
    kind = {"ibdr": IBDR, "svgd": SVGD}.get(name, Ensemble)
    keywords = dict(method_args or {})
    known = [p for p in inspect.signature(kind).parameters if p not in ("model", "seed")]
    unknown = sorted(keywords.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} has the arguments {known}; got {unknown}")
    if kind is IBDR:
        keywords["seed"] = seed
    for key, value in keywords.items():
        default = inspect.signature(kind).parameters[key].default
        if isinstance(value, str) and isinstance(default, (int, float)):
            raise ValueError(f"{key} of {name} is a number or true or false; got {value!r}")
    return kind(model, **keywords)


def train(
    settings: Settings,
    out: str | Path,
    resume: bool = False,
    device: str = "cpu",
    save_every: int = 50,
    report: Report = print,
    on_step: OnStep | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and write OUT; -> what OUT/metrics.json holds.

    OUT/: run.json (settings), checkpoint.pt (every `save_every` steps, replaced as a whole),
    particle_k/ and multilora.json, metrics.json, reliability.png.

    resume: continue from OUT/checkpoint.pt (from the start where a run was stopped before its
    first): a run that was killed at any time, also while it wrote, ends with the numbers of one
    that was not. The random state is PyTorch's, NumPy's and Python's, seeded here.

    trust_remote_code: see `make_task`.

    Raises ValueError where OUT holds a run and resume is False, or one of other settings, or other
    files and no run; where its checkpoint is damaged or another run's, which is found before the
    model is changed; where no adapter runs in the first step; NotADirectoryError where OUT is a
    file.
    """
    checks.integer("save_every", save_every, 1, INTEGERS["steps"])
    out = Path(out)
    _check_free(out, settings, resume)
    task = make_task(settings, report, trust_remote_code)
    if len(task.test) == 0:
        raise ValueError("the test set is empty")
    _seed_everything(settings.seed)
    model = particle_model(task, settings).to(device)
    method = make_method(settings.method, model, settings.seed, dict(settings.method_args))
    optimizer = torch.optim.AdamW(
        [*model.particle_parameters(), *method.parameters()],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    warm_up = max(1, round(0.06 * settings.steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps - warm_up or 1),
        ],
        [warm_up],
    )
    state = RunState(out / CHECKPOINT, settings, model, method, optimizer, schedule)
    done, step_ms = state.load() if resume else (0, [])
    # From here on the folder is this run's: nothing is wrong with its settings.
    _write_json(out / SETTINGS, asdict(settings))

    model.train()
    # Its own generator: a loader draws a number when it starts, which is once more in a run that
    # was stopped.
    batches = DataLoader(
        task.train,
        batch_sampler=_Batches(task.train, settings, done),
        collate_fn=task.collate,
        generator=torch.Generator(),
    )
    stats: dict[str, float] = {}
    for step, (x, y) in enumerate(batches, start=done + 1):
        started = time.perf_counter()
        x, y = _to(x, device), y.to(device)
        with _all_run(model) if step == done + 1 else contextlib.nullcontext():
            scalars = method.backward(lambda x=x, y=y: task.learn(model, x, y))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 10 == 0 or step == settings.steps:
            stats = {name: value.item() for name, value in scalars.items()}
            if not all(map(_finite, stats.values())):
                raise FloatingPointError(f"step {step} of {settings.method} diverged: {stats}")
        step_ms.append(1000 * (time.perf_counter() - started))
        if on_step is not None:
            on_step(step, settings.steps, stats)
        if step % save_every == 0 or step == settings.steps:
            state.save(step, step_ms)

    model.save_pretrained(out)
    result, predictions, targets = evaluate(model, task, particle_chunk=settings.particle_chunk)
    result = {
        "method": settings.method,
        "particles": settings.particles,
        "rank": settings.rank,
        "seed": settings.seed,
        **result,
        "step_ms": statistics.median(step_ms),
        "trainable_per_particle": sum(p[0].numel() for p in model.particle_parameters()),
    }
    atomic.write_file(
        out / "reliability.png",
        lambda stream: reliability_diagram(predictions, targets, stream),
    )
    _write_json(out / _METRICS, result)
    return result


@contextlib.contextmanager
def _all_run(model: ParticleModel) -> Iterator[None]:
    """Raise ValueError where what is trained inside has no part in the model's predictions.

    That is where no adapter, or a head not, is called, or where no adapter gets a gradient.
    """
    layers, heads = dict(model.lora_layers()), dict(model.stacked_modules())
    idle = {*layers, *heads}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: idle.discard(name))
        for name, layer in (*layers.items(), *heads.items())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    first, idle_heads = ", ".join([*layers][:5]), sorted(idle & heads.keys())
    if idle_heads:
        raise ValueError(f"the head {idle_heads[0]} did not run in the first step: it cannot learn")
    if idle >= layers.keys():
        raise ValueError(
            f"none of the {len(layers)} adapters ran in the first step ({first}): the model reads "
            "the weights of these layers instead of calling them; choose other targets (--targets)"
        )
    gradients = (layer.lora_B.grad for layer in layers.values())
    if not any(g is not None and bool(g.any()) for g in gradients):
        raise ValueError(
            f"none of the {len(layers)} adapters got a gradient in the first step ({first}); "
            "choose other targets (--targets)"
        )


def particle_model(task: Task, settings: Settings) -> ParticleModel:
    import peft

    heads = [task.head] if isinstance(task.head, str) else task.head
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.lora_alpha is None else settings.lora_alpha,
        target_modules=task.targets,
        modules_to_save=heads and list(heads),
    )
    # A task's heads are new.
    return get_particle_model(
        task.base, config, settings.particles, seed=settings.seed, head_init="reset"
    )


def load_run(
    folder: str | Path,
    report: Report = print,
    model: str | None = None,
    data: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[ParticleModel, Task, Settings]:
    """The trained model of a run's folder, with its task.

    The folder may be anybody's, so no code runs that comes with it or that it names; SECURITY.md
    says what else is expected of it.

    model, data, model_args: in place of what the folder says. As the caller's word they are not
        checked: the model may be any, with weights in any file.
    trust_remote_code: run the code that comes with a language model.

    Raises ValueError, naming the file, where it is damaged or asks for what a file must not.
    """
    folder, own_args = Path(folder), dict(model_args or {})
    settings = read_settings(folder)
    file = folder / SETTINGS
    theirs = [
        (name, value)
        for name, value in settings.model_args
        if name not in own_args and not (trust_remote_code and name == "trust_remote_code")
    ]
    untrusted.check_arguments(str(file), theirs)
    if model is None and settings.task in commonsense.names():
        untrusted.check_transformers_name(str(file), settings.model, folder)
    elif model is None and settings.model is not None:
        untrusted.check_timm_name(str(file), settings.model)
    settings = replace(
        settings,
        model=model or settings.model,
        data=data or settings.data,
        model_args=tuple((dict(theirs) | own_args).items()),
    )
    task = make_task(settings, report, trust_remote_code, model is None)
    particles = load_particle_model(task.base, folder)
    for name, here in (("particles", particles.num_particles), ("rank", particles.peft_config.r)):
        if getattr(settings, name) != here:
            raise ValueError(
                f"{file} is of another run: {name} = {getattr(settings, name)}, and the particles "
                f"in {folder} have {here}"
            )
    check_base(folder / CHECKPOINT, read_state(folder / CHECKPOINT), particles)
    return particles, task, settings


def evaluate(
    model: ParticleModel,
    task: Task,
    batch_size: int | None = None,
    particle_chunk: int | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Measures on the clean, corrupted and out-of-distribution examples.

    batch_size: examples a forward; the task's own where it is None. particle_chunk: particles a
    forward; all where it is None. -> the measures (clean at the top, "corrupted": means over the
    corruptions, "ood"), and the clean predictions (K, N, C) with their targets.
    """
    size = task.evaluation_batch if batch_size is None else batch_size
    chunk = model.num_particles if particle_chunk is None else particle_chunk
    sizes = checks.integer("batch_size", size, 1), checks.integer("particle_chunk", chunk, 1)
    log_p, targets = _predictions(model, task, task.test, *sizes)
    ood = None if task.ood is None else _predictions(model, task, task.ood, *sizes)[0]
    result = metrics.evaluate(log_p, targets, ood_logits=ood)
    if task.corrupted:
        each = {
            name: metrics.evaluate(*_predictions(model, task, data, *sizes))
            for name, data in task.corrupted.items()
        }
        measures = ("accuracy", "nll", "ece", "brier", "mutual_information")
        result["corrupted"] = {
            m: statistics.fmean(values[m] for values in each.values()) for m in measures
        } | {f"{name}_accuracy": values["accuracy"] for name, values in each.items()}
    return result, log_p.exp(), targets


@torch.no_grad()
def _predictions(
    model: ParticleModel, task: Task, data: Dataset, batch_size: int, particle_chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (K, N, C) and targets (N,) on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    rows, targets = [], []
    for x, y in DataLoader(data, batch_size, collate_fn=task.collate):
        x = _to(x, device)
        logits = model.in_chunks(particle_chunk, lambda x=x: task.predict(model, x))
        rows.append(logits.float().log_softmax(-1).cpu())
        targets.append(y)
    model.train(training)
    return torch.cat(rows, 1), torch.cat(targets)


def _to(x: Tensor | dict[str, Tensor], device: str | torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else {k: t.to(device) for k, t in x.items()}


class _Batches(Sampler):
    """The batches of the steps after `done`: a permutation an epoch, drawn from seed and epoch.

    Step s has the same batch however often the run was stopped before it.
    """

    def __init__(self, data: Dataset, settings: Settings, done: int):
        self.data, self.settings, self.done = data, settings, done
        self.examples = len(data)
        if self.examples == 0:
            raise ValueError("the training set is empty")

    def __len__(self) -> int:
        return self.settings.steps - self.done

    def __iter__(self) -> Iterator[list[int]]:
        size = min(self.settings.batch_size, self.examples)
        per_epoch = self.examples // size
        for step in range(self.done, self.settings.steps):
            epoch, position = divmod(step, per_epoch)
            if hasattr(self.data, "set_epoch"):  # whose images differ from epoch to epoch
                self.data.set_epoch(epoch)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            order = torch.randperm(self.examples, generator=generator)
            yield order[position * size : (position + 1) * size].tolist()


def _seed_everything(seed: int) -> None:
    """What a data set may draw from: augmentations use all three."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _check_free(out: Path, settings: Settings, resume: bool) -> None:
    """Make `out`, which must hold no other run and no files of the user's."""
    if (out / SETTINGS).is_file():
        if not resume:
            raise ValueError(
                f"{out} holds a run already; continue it with --resume, or choose another --out"
            )
        different = differences(asdict(read_settings(out)), asdict(settings))
        if different:
            raise ValueError(f"{out} holds a run of other settings (there, here): {different}")
        # What a run writes must not land elsewhere.
        links = [entry for entry in out.rglob("*") if entry.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link; a run writes into its own folder only")
    elif out.is_dir():
        # A run that was killed while it wrote its settings leaves a part of them.
        strangers = [f.name for f in out.iterdir() if not f.match(f".{SETTINGS}.*.tmp")]
        if strangers:
            raise ValueError(
                f"{out} holds no run but other files, which a run might replace: "
                f"{', '.join(sorted(strangers)[:5])}; choose another --out"
            )
    atomic.make_folder(out)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def to_json(value: Any) -> str:
    """JSON text; it has no NaN, so an undefined measure is null."""
    return json.dumps(_defined(value), indent=2)


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(v) for v in value]
    return None if isinstance(value, float) and not _finite(value) else value


def _write_json(file: Path, value: Any) -> None:
    atomic.write_text(file, to_json(value) + "\n")
