"""Everything that decides the numbers of a run, and the file that holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from multilora.app.options import (
    FLAG,
    PAIRS,
    PATHS,
    Checked,
    choice,
    described,
    integer,
    number,
    option,
    stored,
)
from multilora.app.tasks import TASKS, digits
from multilora.app.tasks.task import TaskOptions
from multilora.methods import METHODS, Entry

DEFAULT_METHOD = "ibdr"
MAX_STEPS = 10**9
#: The settings that decide what is measured and how; training does not depend on them.
MEASURED = ("combine", "shift", "ood", "corrupt")
#: The file of a run's folder that holds its settings.
SETTINGS = "run.json"
#: Options that older versions stored also for tasks that ignored them.
_ONCE_IGNORED = ("shots", "pretrained", "targets", "model_args")
#: And what they stored for tasks that have such an option now: (task, option, value).
_ONCE_FOREIGN = [("digits", "split", "test")]
#: The largest size of that file in bytes; it is about a kilobyte.
_MAX_SETTINGS = 2**20


@dataclass(frozen=True)
class Settings(Checked):
    """Everything that decides a run's numbers."""

    method: str = option(choice(*METHODS), "how the particles train", DEFAULT_METHOD)
    particles: int = option(
        integer(1, 2**16, "K"),
        "number of particles",
        METHODS[DEFAULT_METHOD].particles,
        shown="that of the method",
    )
    full: bool = option(FLAG, "train K copies of the whole model in place of adapters", False)
    share_trunk: bool = option(
        FLAG,
        "run the blocks below the first adapted one once for all particles; dropout there has one "
        "mask for all",
        False,
    )
    rank: int = option(integer(1, 2**16), "rank of the adapters", 8)
    lora_alpha: float | None = option(
        number(1e6, positive=True),
        "scale of the adapters: ΔW is multiplied by LORA_ALPHA / RANK",
        None,
        shown="the rank",
    )
    seed: int = option(integer(0, 2**32 - 1), "seed of the data, the particles and the noise", 0)
    steps: int = option(integer(1, MAX_STEPS), "number of optimizer steps", 200)
    batch_size: int = option(
        integer(1, 2**20),
        "batch size; all particles see the same batch, or in bbb, blob and sa_bnn each a part",
        16,
        shown="16; rounded up to a multiple of K where it is split",
    )
    lr: float = option(number(1e3, positive=True), "learning rate of the optimizer", 3e-3)
    method_lr: float | None = option(
        number(1e3, positive=True),
        "learning rate of the method's own parameters, such as log σ",
        None,
        shown="that of the particles",
    )
    weight_decay: float = option(number(1e3), "weight decay of AdamW", 0.01)
    lora_dropout: float = option(
        number(0.99), "dropout before the adapters", 0.0, shown="0; 0.1 for mc_dropout"
    )
    label_smoothing: float = option(
        number(1), "share of every training target that is spread over all classes", 0.0
    )
    mixup: float = option(
        number(1e3),
        "mix pairs of training images, and their labels, with weights of Beta(MIXUP, MIXUP); 0: no",
        0.0,
    )
    validation: int = option(
        integer(0, 2**31, "N"),
        "training examples to hold out from training, to choose soups and steps on; the test set "
        "is never used for that",
        0,
    )
    validate_every: int | None = option(
        integer(0, MAX_STEPS),
        "steps between two measurements of the NLL on the validation examples; 0: none",
        None,
        shown="a twentieth of the steps with --select best or --patience, else 0",
    )
    select: str = option(
        choice("last", "best"),
        "which particles the run ends with: those of the last step, or those with the lowest NLL "
        "on the validation examples",
        "last",
    )
    patience: int = option(
        integer(0, MAX_STEPS),
        "stop when this many measurements in a row found no lower NLL on the validation examples; "
        "0: never",
        0,
    )
    method_args: tuple[tuple[str, Any], ...] = option(
        PAIRS, "hyper-parameters of the method, e.g. alpha=0.05 rho=0.1", ()
    )
    combine: str = option(
        choice("prob", "logit"),
        "prediction of all particles: prob, the mean of their probabilities, or logit, the softmax "
        "of their mean logits",
        "prob",
        shown="prob; evaluate takes the run's",
    )
    shift: tuple[tuple[str, str], ...] = option(
        PATHS,
        "test set of the same classes under distribution shift: a folder of CLASS folders, of "
        "domains, or CIFAR-C, or a file of labelled texts; may be given several times",
        (),
        stored=False,
    )
    ood: tuple[tuple[str, str], ...] = option(
        PATHS,
        "folder of images of other classes, or file of texts, to be told apart; may be given "
        "several times",
        (),
        stored=False,
    )
    corrupt: bool = option(
        FLAG,
        "measure copies of the test images with noise, blur, contrast, brightness, JPEG or "
        "pixelation, at five severities each",
        False,
        stored=False,
    )
    #: The options of the task, of the class `Options` in the task's module.
    options: TaskOptions = field(default_factory=digits.Options)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.options, TaskOptions):
            raise TypeError(f"options must be those of a task; got {self.options!r}")
        if self.particles > (self.entry.most_particles or self.particles):
            raise ValueError(f"{self.method} has 1 particle; got {self.particles}")
        if self.entry.posthoc == "mc_dropout" and self.lora_dropout == 0:
            raise ValueError("mc_dropout needs lora_dropout > 0; got 0")
        if self.full and self.method in ("blob", "dverge"):
            raise ValueError(f"{self.method} needs adapters, and full has none")
        if self.full and self.share_trunk:
            raise ValueError("share_trunk needs adapters, and full has none")
        if self.full and self.entry.posthoc:
            raise ValueError(f"{self.method} makes particles of an adapter, and full has none")
        if self.chooses and self.validate_every == 0:
            raise ValueError("select = 'best' and patience need validate_every > 0; got 0")
        if self.label_smoothing and "loss" in dict(self.method_args):
            raise ValueError(
                "label_smoothing is part of the loss, cross-entropy: leave out one of it and the "
                "loss in method_args"
            )

    @property
    def entry(self) -> Entry:
        return METHODS[self.method]

    @property
    def chooses(self) -> bool:
        """Whether the validation examples decide when the run ends, or with which particles."""
        return self.select == "best" or self.patience > 0

    @property
    def validation_interval(self) -> int:
        """Steps between two validations; 0 where there are none."""
        if self.validate_every is not None:
            return self.validate_every
        return max(1, self.steps // 20) if self.chooses else 0

    @property
    def task(self) -> str:
        return self.options.task

    @property
    def particle_chunk(self) -> int | None:
        """How many particles run at a time; None: all."""
        return dict(self.method_args).get("particle_chunk")

    def flat(self) -> dict[str, Any]:
        """The settings as run.json holds them: those of the task beside the others."""
        return {"task": self.task, **stored(self), **stored(self.options)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `flat` gives, and those that the user gives by name.

        An option of another task may stand at its default, as it does in the folders of older
        versions; anything else that the task has no use for is an error.

        Raises:
            ValueError: A name or a value is wrong, or the task lacks an option that it needs.
        """
        given = dict(values)
        task = given.pop("task", digits.Options.task)
        own = {name: given.pop(name) for name in described(cls) if name in given}
        return cls(**own, options=_task_options(task, given))

    @classmethod
    def of_file(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that a run's folder holds, also one of an older version."""
        forbidden = sorted(values.keys() & _unstored())
        if forbidden:
            raise ValueError(f"a file cannot give {forbidden}; if you mean it, give it yourself")
        task = values.get("task", digits.Options.task)
        known = described(TASKS[task].Options) if task in TASKS else {}
        own = {
            name: value
            for name, value in values.items()
            if (name in known or name not in _ONCE_IGNORED)
            and (task, name, value) not in _ONCE_FOREIGN
        }
        return cls.of(own)


def _task_options(task: Any, given: dict[str, Any]) -> TaskOptions:
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"the tasks are {', '.join(TASKS)}; got {task!r}")
    kind = TASKS[task].Options
    known = described(kind)
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            check_foreign(name, value, task)
        elif value is not None or known[name].default is None:
            options[name] = value
    missing = [name for name, f in known.items() if f.default is MISSING and name not in options]
    if missing:
        needed = [f"--{name}" for name, f in known.items() if f.default is MISSING]
        both = "both " if len(needed) > 1 else ""
        raise ValueError(f"the task {task!r} needs {both}{' and '.join(needed)}")
    return kind(task=task, **options)


def check_foreign(name: str, value: Any, task: str) -> None:
    """Raise ValueError for an option that the task does not have, unless it is at its default."""
    owners = {t: f for t in TASKS if (f := described(TASKS[t].Options).get(name)) is not None}
    if not owners:
        raise ValueError(f"there is no setting {name!r}")
    f = next(iter(owners.values()))
    value = tuple(value) if isinstance(value, list) else value
    if value is not None and all(value != f.default for f in owners.values()):
        given = f"{name} = {value!r}" if f.metadata["stored"] else name
        raise ValueError(f"{given} is for the tasks {', '.join(owners)}; got the task {task!r}")


def recommended(
    task: str = "digits", method: str = DEFAULT_METHOD, data: str | None = None, **given: Any
) -> Settings:
    """The settings of the task's recipe (recipes/*.json), where `given` does not replace them.

    Args:
        given: Fields of `Settings` and options of the task; method_args are merged by name.
    """
    if data is not None:
        given["data"] = data
    recipe: dict[str, Any] = {}
    if method in METHODS:
        entry = METHODS[method]
        recipe = {"particles": entry.particles, "lora_dropout": entry.lora_dropout}
    if task in TASKS:
        recipe |= TASKS[task].Options.recipe(task, method, given)
    if method in METHODS and METHODS[method].split_batch and "batch_size" not in given:
        # A part of the same size for each particle.
        particles = given.get("particles", recipe["particles"])
        size = recipe.get("batch_size", described(Settings)["batch_size"].default)
        recipe["batch_size"] = -(-size // particles) * particles
    method_args = recipe.pop("method_args", {}) | dict(given.pop("method_args", ()))
    chosen = {"task": task, "method": method} | recipe | given
    return Settings.of(chosen | {"method_args": tuple(method_args.items())})


def differences(theirs: Settings, ours: Settings) -> dict[str, tuple[Any, Any]]:
    """{name: (theirs, ours)} of the settings that differ."""
    there, here = theirs.flat(), ours.flat()
    names = [*here, *(name for name in there if name not in here)]
    return {n: (there.get(n), here.get(n)) for n in names if there.get(n) != here.get(n)}


def read_settings(folder: Path) -> Settings:
    file = folder / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} holds no run of `multilora train`")
    try:
        if file.stat().st_size > _MAX_SETTINGS:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        return Settings.of_file(values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _unstored() -> set[str]:
    """The options that only the user may give."""
    return {
        name
        for kind in (Settings, *(module.Options for module in TASKS.values()))
        for name, f in described(kind).items()
        if not f.metadata["stored"]
    }
