"""The command `multilora sweep`: adapters of a file of runs, all over one base, in one process."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from multilora import atomic, checks
from multilora.app.evaluation import predictions
from multilora.app.options import add_command
from multilora.app.report import print_rows
from multilora.app.run import make_task
from multilora.app.settings import MAX_STEPS, Settings
from multilora.app.tasks.task import Task, call_and_pass
from multilora.checkpoint import load_particle_model
from multilora.many import Row, Run, RunArguments, fit_many
from multilora.many.runs import ASKED, CHECKPOINT, TABLE, TABLE_CSV, check_name
from multilora.metrics import evaluate
from multilora.slots import plain

_ABOUT = """\
Train a LoRA adapter for each run of a file, all of them over one frozen model and in its every
pass. Each run has its own rank, targets, learning rate, batches, steps and seed, and ends as it
would alone.

The file is YAML or JSON:

  task: digits                # or with options, {name: digits, shots: 10}
  validation: 25              # training examples to hold out, to choose on
  keep: 3                     # of the adapters, the best ones; all by default
  defaults: {rank: 8, batch_size: 8, steps: 200, lr: 3e-3}
  grid: {rank: [2, 8], lr: [1e-3, 3e-3]}       # every combination
  runs:                                        # and, or instead, these
    - {name: patient, lr: 1e-4, steps: 1000}
"""
#: Keys of a file, beside those of its runs.
_KEYS = ("task", "base", "seed", "validation", "defaults", "grid", "runs", "keep", "at_once")
#: Short names of fields of RunArguments, as `train` has them.
_SHORT = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "patience": "early_stopping_patience",
}
#: The largest size of a file of runs, in bytes.
_MAX_FILE = 2**20
#: Which runs a file may have.
_MOST_RUNS = 10_000


def _number(value: Any) -> Any:
    """The number of a text: YAML reads 1e-3 as one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a word; got {value!r}")
    return value


def _names(name: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{name} must be the names of layers; got {value!r}")
    return names


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be names and values; got {value!r}")
    return value


#: Keys of a run that decide its adapter, and the check of each.
_ADAPTER: dict[str, Callable[[str, Any], Any]] = {
    "rank": lambda name, value: checks.integer(name, value, 1, 2**16),
    "lora_alpha": lambda name, value: checks.number(name, _number(value), 0, open_low=True),
    "lora_dropout": lambda name, value: checks.number(name, _number(value), 0, 1, open_high=True),
    "use_rslora": checks.flag,
    "target_modules": _names,
}
#: The check of each type that RunArguments has; ranges are its own to check.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "float": lambda name, value: checks.number(name, _number(value)),
    "int": checks.integer,
    "bool": checks.flag,
    "str": _word,
    "dict[str, Any]": _mapping,
}
_TYPES = {f.name: str(f.type) for f in fields(RunArguments)}


def add_parser(commands: Any) -> None:
    text = "train many adapters of their own at once, from a file of runs"
    epilog = f"Keys of a run: name, {', '.join(_known())}."
    parser = add_command(commands, "sweep", run, text, _ABOUT, epilog)
    parser.add_argument("file", metavar="FILE", help="the runs, in YAML or JSON")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the table (table.json, table.csv) and of a PEFT adapter for each run "
        "[runs/sweep-FILE]",
    )
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --out")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="how many runs share a pass [that of FILE, or all]"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=200,
        metavar="PASSES",
        help="passes between two checkpoints [%(default)s]",
    )
    parser.add_argument("--device", help="device of the model [cuda if there is one, else cpu]")


def run(args: argparse.Namespace) -> int:
    checks.integer("save_every", args.save_every, 1, MAX_STEPS)
    if args.at_once is not None:
        checks.integer("at_once", args.at_once, 1, _MOST_RUNS)
    asked = read(Path(args.file))
    out = Path(args.out) if args.out else Path("runs") / f"sweep-{Path(args.file).stem}"
    sweep = planned(asked)
    task = make_task(sweep.settings, print)
    runs = runs_of(sweep, task)
    _take_folder(out, asked, sweep.runs, args.resume)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    task.base.to(device)
    at_once = args.at_once
    if at_once is None and not (args.resume and (out / CHECKPOINT).is_file()):
        at_once = asked.get("at_once")
    results = fit_many(
        task.base,
        runs,
        out=out,
        resume=args.resume,
        keep=asked.get("keep"),
        at_once=at_once,
        save_every=args.save_every,
        seed=sweep.settings.seed,
        head_init="reset" if task.head else None,
    )
    _test([row for row in results if row.folder is not None], out, task, at_once)
    results.write(out)
    print_rows(results.table())
    print(f"\n{out} holds table.json, table.csv and a PEFT adapter for each run in the table")
    return 1 if all(row.status == "failed" for row in results) else 0


@dataclass(frozen=True)
class Planned:
    """What a file asks for: the task's settings, and the values of each run by its name."""

    settings: Settings
    runs: dict[str, dict[str, Any]]


def read(file: Path) -> dict[str, Any]:
    """The content of a file of runs.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not YAML, or has an unknown key.
    """
    import yaml  # type: ignore[import-untyped]

    if not file.is_file():
        raise FileNotFoundError(f"the file of runs {file} does not exist")
    try:
        if file.stat().st_size > _MAX_FILE:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        asked = yaml.load(file.read_text(), _loader())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file} is no file of runs: {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"{file} is no file of runs: it holds a {type(asked).__name__}")
    if unknown := sorted(map(str, asked.keys() - {*_KEYS})):
        raise ValueError(f"{file} has the keys {unknown}; a file of runs has {', '.join(_KEYS)}")
    return asked


def _loader() -> Any:
    """YAML's safe loader, for which a key that stands twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node, keys = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands there twice",
                        problem_mark=key.start_mark,
                    )
                keys.add(key.value)
            return node

    return Loader


def planned(asked: Mapping[str, Any]) -> Planned:
    """What the content of a file asks for.

    Raises:
        ValueError: a key or a value is wrong; the message names the run.
    """
    task = asked.get("task", "digits")
    options = dict(task) if isinstance(task, dict) else {"name": task}
    if "name" not in options:
        raise ValueError(f"task needs a name, and may have options; got {task!r}")
    options = {"task": options["name"], **{n: v for n, v in options.items() if n != "name"}}
    options |= {name: asked[name] for name in ("seed", "validation") if name in asked}
    if "base" in asked:
        options["model"] = asked["base"]
    defaults = _values("defaults", asked.get("defaults", {}))
    runs: dict[str, dict[str, Any]] = {}
    for name, given in _each(asked):
        check_name(name)
        if name in runs:
            raise ValueError(f"two runs have the name {name!r}")
        runs[name] = defaults | _values(f"run {name!r}", given)
    if not 0 < len(runs) <= _MOST_RUNS:
        raise ValueError(f"a file of runs has runs, a grid or both; got {len(runs)} runs")
    return Planned(Settings.of(options), runs)


def _each(asked: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The runs that a file names, and those of its grid."""
    grid, listed = asked.get("grid") or {}, asked.get("runs") or []
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ValueError(f"grid must be names with a list of values each; got {grid!r}")
    if not isinstance(listed, list) or not all(isinstance(r, dict) for r in listed):
        raise ValueError(f"runs must be a list of runs, each names and values; got {listed!r}")
    found = []
    for values in itertools.product(*grid.values()) if grid else ():
        given = dict(zip(grid, values))
        found.append((",".join(f"{n}={_short(v)}" for n, v in given.items()), given))
    for number, one in enumerate(listed):
        given = dict(one)
        name = given.pop("name", f"run_{number}")
        if name is None or isinstance(name, bool):
            raise ValueError(f"runs[{number}]: name must be a word; got {name!r}, to YAML")
        found.append((str(name), given))
    return found


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _known() -> list[str]:
    return [*_ADAPTER, *_SHORT, *_TYPES]


def _values(who: str, given: Any) -> dict[str, Any]:
    """The values of a run by their long names."""
    if not isinstance(given, dict):
        raise ValueError(f"{who}: names and values are needed; got {given!r}")
    unknown = sorted(map(str, given.keys() - {*_known()}))
    if unknown:
        raise ValueError(f"{who} has the keys {unknown}; a run has name, {', '.join(_known())}")
    values: dict[str, Any] = {}
    for name, value in given.items():
        long = _SHORT.get(str(name), str(name))
        if long in values:
            raise ValueError(f"{who} gives {long} twice")
        values[long] = _checked(f"{who}: {name}", long, value)
    return values


def _checked(name: str, field: str, value: Any) -> Any:
    """The value of a field, which messages call `name`."""
    if field in _ADAPTER:
        return _ADAPTER[field](name, value)
    kind, _, optional = _TYPES[field].partition(" | ")
    return None if value is None and optional else _CHECKS[kind](name, value)


def runs_of(sweep: Planned, task: Task) -> list[Run]:
    """The runs, over the data of a task.

    Raises:
        ValueError: the task learns from something else than its logits, or a value is wrong.
    """
    import peft

    if task.learn is not call_and_pass:
        raise ValueError(f"the task {sweep.settings.task!r} learns in a way that a sweep cannot")
    heads = [task.head] if isinstance(task.head, str) else [*(task.head or ())]
    layers = [f".{name}" for name, _ in task.base.named_modules()]
    made = []
    for name, values in sweep.runs.items():
        rank = values.get("rank", 8)
        targets = values.get("target_modules", task.targets)
        for target in targets:
            if not any(layer.endswith(f".{target}") for layer in layers):
                raise ValueError(f"run {name!r}: target_modules: no layer is named {target!r}")
        own = {n: v for n, v in values.items() if n not in _ADAPTER}
        try:
            arguments = RunArguments(**own)
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=values.get("lora_alpha", rank),
                lora_dropout=values.get("lora_dropout", 0.0),
                use_rslora=values.get("use_rslora", False),
                target_modules=list(targets),
                modules_to_save=list(heads) or None,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"run {name!r}: {error}") from error
        if arguments.eval_strategy != "no" and task.validation is None:
            raise ValueError(
                f"run {name!r}: eval_strategy needs validation examples, which the task "
                f"{sweep.settings.task!r} has none of; hold some out with validation: N"
            )
        made.append(
            Run(
                config,
                task.train,
                arguments,
                name,
                eval_dataset=task.validation,
                collate=task.collate,
            )
        )
    return made


def _take_folder(out: Path, asked: Mapping[str, Any], names: Collection[str], resume: bool) -> None:
    """Make the folder, which must hold neither another sweep nor other files.

    names: of the runs. A sweep that ended before its first checkpoint holds nothing to be lost.
    """
    atomic.make_folder(out)
    file, text = out / ASKED, json.dumps(asked, indent=2, sort_keys=True, default=str) + "\n"
    begun = (out / CHECKPOINT).is_file()
    if begun and not resume:
        raise ValueError(
            f"{out} holds a sweep already; continue it with --resume, or choose another --out"
        )
    if begun and (not file.is_file() or file.read_text() != text):
        raise ValueError(f"{out} holds a sweep of another file of runs; choose another --out")
    own = {ASKED, CHECKPOINT, TABLE, TABLE_CSV, *names}
    strangers = sorted(
        entry.name
        for entry in out.iterdir()
        if entry.name not in own and not any(entry.match(f".{name}.*.tmp") for name in own)
    )
    if strangers:
        raise ValueError(
            f"{out} holds other files: {', '.join(strangers[:5])}; choose another --out"
        )
    atomic.write_text(file, text)


def _test(kept: Sequence[Row], out: Path, task: Task, at_once: int | None) -> None:
    """Add what the adapters that were kept measure on the test set, where they can be measured.

    at_once: how many adapters share a pass.
    """
    if not kept:
        return
    folders = [out / row.name for row in kept]
    try:
        model = load_particle_model(plain(task.base), folders, own_configurations=True).eval()
        log_p, targets = predictions(model, task, task.test, particle_chunk=at_once)
    except (ValueError, FloatingPointError) as error:
        # Of the others, one that has diverged must not cost what they measure.
        if len(kept) == 1:
            print(f"run {kept[0].name!r} cannot be measured on the test set: {error}")
            return
        for row in kept:
            _test([row], out, task, at_once)
        return
    measured = evaluate(log_p, targets)
    for k, row in enumerate(kept):
        row.measures["test_accuracy"] = measured["member_accuracy"][k]
        row.measures["test_nll"] = measured["member_nll"][k]
