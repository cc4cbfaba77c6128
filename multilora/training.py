"""The command line's training loop: an ordinary PyTorch loop around `method.backward`."""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from multilora import checks, files, metrics, recipes
from multilora.checkpoint import load_particle_model
from multilora.integrations import commonsense, untrusted, vtab
from multilora.methods import IBDR, SVGD, Ensemble, Method
from multilora.model import ParticleModel, get_particle_model
from multilora.plots import reliability_diagram
from multilora.tasks import Report, Task, digits, images, names, questions, vtab1k

METHODS = ("ibdr", "svgd", "ensemble", "single")
_CHECKPOINT = "checkpoint.pt"
_SETTINGS = "run.json"
_METRICS = "metrics.json"
#: What run.json may have, in bytes: it is a kilobyte.
_MAX_SETTINGS = 2**20
OnStep = Callable[[int, int, dict[str, float]], None]
#: The integers of Settings, which begin at 1 (the seed at 0), and where they end.
_INTEGERS = {
    "particles": 2**16,
    "rank": 2**16,
    "seed": 2**32 - 1,
    "steps": 10**9,
    "batch_size": 2**20,
    "shots": 10**6,
    "max_length": 2**24,
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers."""

    task: str = "digits"
    method: str = "ibdr"
    particles: int = 4
    rank: int = 8
    seed: int = 0
    steps: int = 200
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    shots: int = 20
    model: str | None = None
    data: str | None = None
    pretrained: bool = True
    targets: tuple[str, ...] | None = None
    model_args: tuple[tuple[str, Any], ...] = ()
    lora_alpha: float | None = None  # the rank
    method_args: tuple[tuple[str, Any], ...] = ()
    augment: bool = False
    split: str = "test"
    classes: str = "answers"
    max_length: int = 512

    def __post_init__(self):
        checks.choice("method", self.method, METHODS)
        checks.choice("split", self.split, vtab.SPLITS)
        checks.choice("classes", self.classes, commonsense.CLASSES)
        for name, high in _INTEGERS.items():
            checks.integer(name, getattr(self, name), 0 if name == "seed" else 1, high)
        checks.number("lr", self.lr, 0, 1e3, open_low=True)
        checks.number("weight_decay", self.weight_decay, 0, 1e3)
        if self.lora_alpha is not None:
            checks.number("lora_alpha", self.lora_alpha, 0, 1e6, open_low=True)
        for name in ("pretrained", "augment"):
            checks.flag(name, getattr(self, name))
        self._check_texts()
        if (self.model is None) != (self.data is None):
            raise ValueError("a task of your own needs both --model and --data")
        if self.task not in names():
            raise ValueError(f"the tasks are {', '.join(names())}; got {self.task!r}")
        if self.task == "digits" and self.model is not None:
            object.__setattr__(self, "task", "images")
        if self.task != "digits" and self.model is None:
            raise ValueError(f"the task {self.task!r} needs --model and --data")
        self._check_options()
        if self.method == "single" and self.particles != 1:
            raise ValueError(f"a single model has 1 particle; got {self.particles}")

    @property
    def particle_chunk(self) -> int | None:
        """How many particles run at a time; None: all."""
        return dict(self.method_args).get("particle_chunk")

    def _check_texts(self) -> None:
        for name in ("model", "data"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"{name} must be a name or a folder; got {value!r}")
        targets = self.targets
        if isinstance(targets, list):
            object.__setattr__(self, "targets", targets := tuple(targets))
        if targets is not None and not (
            isinstance(targets, tuple)
            and targets
            and all(isinstance(t, str) and t for t in targets)
        ):
            raise ValueError(f"targets must be names of layers; got {targets!r}")
        for name in ("model_args", "method_args"):
            pairs = getattr(self, name)
            if not isinstance(pairs, (tuple, list)) or not all(map(_is_named, pairs)):
                raise ValueError(f"{name} must be pairs of a name and a value; got {pairs!r}")
            for key, value in pairs:
                try:
                    json.dumps(value, allow_nan=False)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{name}: {key} = {value!r}: {error}") from error

    def _check_options(self) -> None:
        """An option that the task would ignore is an error."""
        for option, tasks in (
            ("augment", ("images", "vtab")),
            ("split", ("vtab", *commonsense.names())),
            ("classes", commonsense.names()),
            ("max_length", commonsense.names()),
        ):
            value = getattr(self, option)
            if self.task not in tasks and value != getattr(Settings, option):
                raise ValueError(
                    f"{option} = {value!r} is for the tasks {', '.join(tasks)}; "
                    f"got the task {self.task!r}"
                )


def recommended(
    task: str = "digits", method: str = "ibdr", data: str | None = None, **given: Any
) -> Settings:
    """The settings of the task's recipe (recipes/*.json), with those given in place of its own.

    given: fields of Settings; method_args are merged by name.
    """
    recipe: dict[str, Any] = {"particles": {"svgd": 5, "single": 1}.get(method, 4)}
    if task == "vtab":
        if data is None:
            raise ValueError("the task 'vtab' needs --data, the folder of one of its data sets")
        vtab.num_classes(data)  # says what is wrong with the folder's name
        recipe = recipes.settings(recipes.read("vtab1k"), vtab.dataset_name(data), method)
    elif task in commonsense.names():
        recipe = recipes.settings(recipes.read("commonsense"), task, method)
    method_args = recipe.pop("method_args", {}) | dict(given.pop("method_args", ()))
    chosen = {"task": task, "method": method, "data": data} | recipe | given
    if chosen.get("targets"):
        chosen["targets"] = tuple(chosen["targets"])
    return Settings(**chosen, method_args=tuple(method_args.items()))


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
    checks.integer("save_every", save_every, 1, _INTEGERS["steps"])
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
    state = _State(out / _CHECKPOINT, settings, model, method, optimizer, schedule)
    done, step_ms = state.load() if resume else (0, [])
    # From here on the folder is this run's: nothing is wrong with its settings.
    _write_json(out / _SETTINGS, asdict(settings))

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
    files.write_file(
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
    settings = _read_settings(folder)
    file = folder / _SETTINGS
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
    _check_base(folder / _CHECKPOINT, _read_state(folder / _CHECKPOINT), particles)
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


class _State:
    """What a killed run continues from, in one file that is replaced as a whole."""

    def __init__(self, file: Path, settings: Settings, model, method, optimizer, schedule):
        self.file, self.settings, self.model = file, settings, model
        self.parts = {"method": method, "optimizer": optimizer, "schedule": schedule}

    def save(self, step: int, step_ms: list[float]) -> None:
        kind, keys, *rest = np.random.get_state()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "settings": asdict(self.settings),
            "step": step,
            "step_ms": step_ms,
            "parameters": {name: p.detach() for name, p in self._trained().items()},
            "base": _fingerprint(self.model),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy_rng": (kind, keys.tolist(), *rest),
            "python_rng": random.getstate(),
        }
        files.write_file(self.file, lambda stream: torch.save(state, stream))

    def load(self) -> tuple[int, list[float]]:
        if not self.file.is_file():
            return 0, []
        state = _read_state(self.file)
        self._check(state)
        try:
            for name, part in self.parts.items():
                what = f"state of the {name}"
                part.load_state_dict(state[name])
            what = "random state"
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            np.random.set_state(state["numpy_rng"])
            random.setstate(state["python_rng"])
        except Exception as error:
            raise ValueError(f"{self.file}: the {what} does not fit: {error!r}") from error
        parameters = self._trained()
        with torch.no_grad():
            for name, value in state["parameters"].items():
                parameters[name].copy_(value)
        return state["step"], state["step_ms"]

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `state` is not of this run."""
        keys = "settings step step_ms parameters base rng cuda_rng numpy_rng python_rng".split()
        missing = [key for key in [*keys, *self.parts] if key not in state]
        if missing:
            raise ValueError(
                f"{self.file} lacks {missing}: another version of multilora, or none, wrote it"
            )
        different = _differences(state["settings"], asdict(self.settings))
        if different:
            raise ValueError(
                f"{self.file} is of a run of other settings (there, here): {different}"
            )
        _check_base(self.file, state, self.model)
        step, steps = state["step"], self.settings.steps
        if type(step) is not int or not 1 <= step <= steps or len(state["step_ms"]) != step:
            raise ValueError(
                f"{self.file} is damaged: it is of step {step!r} of {steps}, and has "
                f"{len(state['step_ms'])} times of steps"
            )
        trained, optimizer = self._trained(), self.parts["optimizer"]
        self._check_layout(state["parameters"], trained, "parameters")
        self._check_layout(state["method"], self.parts["method"].state_dict(), "method")
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        expected = {
            # AdamW's two means of every parameter; "step" is a number.
            i: {"step": None, "exp_avg": p, "exp_avg_sq": p}
            for i, p in enumerate(tensors)
        }
        expected = {"state": expected, "param_groups": None}
        self._check_layout(state["optimizer"], expected, "optimizer")

    def _check_layout(self, there: Any, here: Any, what: str) -> None:
        """Raise ValueError where dictionaries differ in keys or tensors in shape, at any depth."""
        if isinstance(here, dict):
            keys = list(there) if isinstance(there, dict) else type(there).__name__
            if not isinstance(there, dict) or set(keys) != set(here):
                raise ValueError(f"{self.file}: {what} has {keys}, this run {list(here)}")
            for key, value in here.items():
                self._check_layout(there[key], value, f"{what}.{key}")
        elif isinstance(here, Tensor):
            shape = tuple(there.shape) if isinstance(there, Tensor) else type(there).__name__
            if shape != tuple(here.shape):
                raise ValueError(
                    f"{self.file}: {what} has shape {shape}, this run {tuple(here.shape)}"
                )


def _read_state(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with open(file, "rb") as stream:
            archive = zipfile.ZipFile(stream)
            # torch.save compresses nothing, so that a file cannot unfold to more than its size.
            whole = sum(entry.file_size for entry in archive.infolist())
            if whole > file.stat().st_size:
                raise ValueError(f"it unfolds to {whole} bytes")
            # torch.save writes checksums, and torch.load does not look at them.
            broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__} and not the state of a run")
    return state


def _check_base(file: Path, state: dict[str, Any], model: ParticleModel) -> None:
    here = _fingerprint(model)
    if state.get("base") != here:
        raise ValueError(
            f"{file} was trained over another base model: sums of its frozen weights are "
            f"{state.get('base')}, here {here}"
        )


def _fingerprint(model: ParticleModel) -> list[float]:
    """Two sums over the frozen weights, which another base model would not have."""
    frozen = [p.detach().double() for p in model.parameters() if not p.requires_grad]
    sums = (sum(p.sum().item() for p in frozen), sum(p.abs().sum().item() for p in frozen))
    return [float(f"{s:.9g}") for s in sums]


def _check_free(out: Path, settings: Settings, resume: bool) -> None:
    """Make `out`, which must hold no other run and no files of the user's."""
    if (out / _SETTINGS).is_file():
        if not resume:
            raise ValueError(
                f"{out} holds a run already; continue it with --resume, or choose another --out"
            )
        different = _differences(asdict(_read_settings(out)), asdict(settings))
        if different:
            raise ValueError(f"{out} holds a run of other settings (there, here): {different}")
        # What a run writes must not land elsewhere.
        links = [entry for entry in out.rglob("*") if entry.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link; a run writes into its own folder only")
    elif out.is_dir():
        # A run that was killed while it wrote its settings leaves a part of them.
        strangers = [f.name for f in out.iterdir() if not f.match(f".{_SETTINGS}.*.tmp")]
        if strangers:
            raise ValueError(
                f"{out} holds no run but other files, which a run might replace: "
                f"{', '.join(sorted(strangers)[:5])}; choose another --out"
            )
    files.make_folder(out)


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (theirs, ours)} of the settings that differ."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {n: (theirs.get(n), ours.get(n)) for n in names if theirs.get(n) != ours.get(n)}


def _read_settings(folder: Path) -> Settings:
    file = folder / _SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} holds no run of `multilora train`")
    try:
        if file.stat().st_size > _MAX_SETTINGS:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        for name in ("model_args", "method_args"):
            values[name] = tuple(map(tuple, values.get(name, ())))
        return Settings(**values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _is_named(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)


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
    files.write_text(file, to_json(value) + "\n")
