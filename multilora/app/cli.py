"""The `multilora` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from multilora import atomic, checks
from multilora.app import recipes
from multilora.tools.kernels import command as kernels

#: (heading, path in metrics.json, decimals) of the tables; higher is better where marked ↑.
_COLUMNS = (
    ("accuracy ↑", ("accuracy",), 3),
    ("NLL ↓", ("nll",), 3),
    ("ECE ↓", ("ece",), 3),
    ("Brier ↓", ("brier",), 3),
    ("MI", ("mutual_information",), 3),
    ("corrupted accuracy ↑", ("corrupted", "accuracy"), 3),
    ("corrupted NLL ↓", ("corrupted", "nll"), 3),
    ("corrupted ECE ↓", ("corrupted", "ece"), 3),
    ("corrupted Brier ↓", ("corrupted", "brier"), 3),
    ("OOD AUROC ↑", ("auroc_ood",), 3),
    ("OOD AUROC (MI) ↑", ("auroc_ood_mi",), 3),
    ("step ms ↓", ("step_ms",), 1),
)
#: The options of `train` that are fields of settings.Settings, but for those of a whole comparison.
_SETTINGS = (
    "model data pretrained targets rank lora_alpha steps batch_size lr weight_decay shots "
    "augment split classes max_length"
).split()

#: What `export` wrote into a folder, beside it.
_EXPORT = "multilora_export.json"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"multilora: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        wanted = {
            "triton": "the kernels need the package triton",
            "datasets": "a folder of Hugging Face's datasets needs the package datasets",
        }.get(error.name, "the tasks need the extra: pip install 'multilora[vision]'")
        print(f"multilora: {error}; {wanted}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="multilora", description="K interacting LoRA particles over one frozen model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train particles; without options, IBDR on handwritten digits",
        epilog="* For vtab and the commonsense tasks, see their recipes (multilora/app/recipes).",
    )
    train.set_defaults(run=_train)
    default = " [%(default)s]"
    train.add_argument(
        "--task",
        help="digits, images, vtab, "
        + ", ".join(recipes.read("commonsense")["datasets"])
        + " [digits; with --model, images]",
    )
    train.add_argument(
        "--method",
        default="ibdr",
        choices=("ibdr", "svgd", "ensemble", "single"),
        help="how the particles train" + default,
    )
    train.add_argument(
        "--method-args",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        type=_key_value,
        help="hyper-parameters of the method, e.g. alpha=0.05 rho=0.1 [its own*]",
    )
    train.add_argument("--particles", type=int, metavar="K", help="[4*; 5* for svgd, 1 for single]")
    train.add_argument("--rank", type=int, help="of the adapters [8*]")
    train.add_argument("--lora-alpha", type=float, help="ΔW is scaled by it / rank [the rank*]")
    train.add_argument("--seed", type=int, default=0, help="of data, particles, noise" + default)
    train.add_argument("--steps", type=int, help="of the optimizer [200*]")
    train.add_argument("--batch-size", type=int, help="shared by all [16*]")
    train.add_argument("--lr", type=float, help="of AdamW [0.003*]")
    train.add_argument("--weight-decay", type=float, help="of AdamW [0.01*]")
    train.add_argument("--shots", type=int, help="examples a class (digits) [20]")
    train.add_argument(
        "--model",
        help="a timm model; for the commonsense tasks, a causal language model of transformers, "
        "by name or folder",
    )
    train.add_argument(
        "--data",
        metavar="DIR",
        help="a folder of images, train/ and val/ by class; vtab: a data set's folder, named as "
        "VTAB-1K names it; commonsense: JSON lines, or a folder of them or of a saved DatasetDict",
    )
    train.add_argument(
        "--split",
        choices=("test", "tune"),
        help="what to evaluate on: the test set, or that for tuning (vtab: train on train800, "
        "evaluate on val200) [test]",
    )
    train.add_argument(
        "--augment", action="store_true", default=None, help="timm's augmentation of images"
    )
    train.add_argument(
        "--classes",
        choices=("answers", "vocabulary"),
        help="commonsense: cross-entropy among the answers' tokens, or all tokens [*]",
    )
    train.add_argument("--max-length", type=int, help="commonsense: tokens of a prompt [512*]")
    train.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        default=None,
        help="--model starts random",
    )
    train.add_argument(
        "--targets", nargs="+", help="layers to adapt with --model [qkv; q_proj v_proj]"
    )
    train.add_argument(
        "--model-args",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        type=_key_value,
        help="for timm.create_model, e.g. img_size=32, or transformers' from_pretrained",
    )
    trust = {
        "action": "store_true",
        "help": "run the code that comes with a language model",
    }
    train.add_argument("--trust-remote-code", **trust)
    train.add_argument(
        "--out", metavar="DIR", help="a new folder [runs/TASK-METHOD-SEED, numbered if taken]"
    )
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument(
        "--save-every", type=int, default=50, metavar="STEPS", help="a checkpoint" + default
    )
    train.add_argument("--device", help="[cuda if there is one, else cpu]")
    train.add_argument(
        "--compare",
        action="store_true",
        help="single, ensemble, svgd and ibdr on the same splits, at equal settings",
    )
    train.add_argument("--seeds", type=int, default=5, help="how many, for --compare" + default)

    # A run's folder may be anybody's: what it must not ask for, the user may.
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--model", help="in place of the one that DIR names")
    own.add_argument("--data", metavar="FOLDER", help="in place of the one that DIR names")
    own.add_argument(
        "--model-args",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        type=_key_value,
        help="in place of those of the same names in DIR",
    )
    own.add_argument("--trust-remote-code", **trust)

    evaluate = commands.add_parser("evaluate", parents=[own], help="measure a trained run again")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("dir", metavar="DIR")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser(
        "export", parents=[own], help="average a run's particles into one PEFT adapter"
    )
    export.set_defaults(run=_export)
    export.add_argument("dir", metavar="DIR")
    export.add_argument("out", metavar="OUT", help="a new folder, or that of an earlier export")
    export.add_argument("--soup", default="exact", choices=("exact", "svd"))

    kernels.add_parser(commands)
    info = commands.add_parser("info", help="versions, devices and backends")
    info.set_defaults(run=_info)
    return parser


def _train(args: argparse.Namespace) -> int:
    import torch

    from multilora.app.run import to_json, train
    from multilora.app.settings import METHODS, Settings, recommended

    if args.resume and args.out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def settings(method: str, seed: int, particles: int | None) -> Settings:
        # What is not given is the recipe's, or the default of Settings.
        given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
        if particles is not None:
            given["particles"] = particles
        return recommended(
            args.task or ("digits" if args.model is None else "images"),
            method,
            seed=seed,
            model_args=tuple(args.model_args),
            method_args=args.method_args,
            **given,
        )

    def run(settings: Settings, out: Path) -> dict[str, Any]:
        with _Progress(f"{settings.method} seed {settings.seed}") as progress:
            return train(
                settings,
                out,
                resume=args.resume,
                device=device,
                save_every=args.save_every,
                report=progress.print,
                on_step=progress.step,
                trust_remote_code=args.trust_remote_code,
            )

    checks.integer("--seeds", args.seeds, 1, 1000)
    if not args.compare:
        chosen = settings(args.method, args.seed, args.particles)
        out = Path(args.out) if args.out else _free_folder(chosen)
        result = run(chosen, out)
        _print_table([(args.method, [result])])
        print(
            f"{out}: particle_0 … particle_{chosen.particles - 1} (PEFT adapters), metrics.json, "
            "reliability.png"
        )
        return 0

    seeds = range(args.seed, args.seed + args.seeds)
    out = Path(args.out) if args.out else _free_folder(settings("ibdr", args.seed, None), "compare")
    table = out / "compare.json"
    started = any((out / f"{m}-{s}" / "run.json").is_file() for m in METHODS for s in seeds)
    if out.is_dir() and (table.exists() and not started if args.resume else any(out.iterdir())):
        raise ValueError(
            f"{out} holds files already; continue a comparison with --resume, or choose another "
            "--out"
        )
    rows = []
    for method in reversed(METHODS):
        particles = 4 if args.particles is None else args.particles
        results = [
            run(
                settings(method, seed, 1 if method == "single" else particles),
                out / f"{method}-{seed}",
            )
            for seed in seeds
        ]
        rows.append((method, results))
    atomic.write_text(table, to_json(dict(rows)) + "\n")
    _print_table(rows)
    print(f"mean ± standard error over {args.seeds} seeds; every run is in {out}")
    return 0


def _load_run(args: argparse.Namespace) -> Any:
    from multilora.app.run import load_run

    return load_run(
        args.dir,
        report=lambda line: print(line, file=sys.stderr),
        model=args.model,
        data=args.data,
        model_args=dict(args.model_args),
        trust_remote_code=args.trust_remote_code,
    )


def _evaluate(args: argparse.Namespace) -> int:
    from multilora.app.run import evaluate, to_json

    model, task, settings = _load_run(args)
    result, _, _ = evaluate(model, task, particle_chunk=settings.particle_chunk)
    if args.json:
        print(to_json(result))
    else:
        _print_table([(settings.method, [result])])
    return 0


def _export(args: argparse.Namespace) -> int:
    out = Path(args.out)
    _check_export(out)
    model, _, _ = _load_run(args)
    model.soup(out, kind=args.soup)
    record = {
        "run": str(args.dir),
        "soup": args.soup,
        "files": {f.name: atomic.digest(f) for f in out.iterdir() if f.name != _EXPORT},
    }
    atomic.write_text(out / _EXPORT, json.dumps(record, indent=2) + "\n")
    print(f"{out}: the mean of {model.num_particles} particles as one PEFT adapter")
    return 0


def _check_export(out: Path) -> None:
    """Raise ValueError where `out` holds anything but an unchanged earlier export."""
    try:
        written = dict(json.loads((out / _EXPORT).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        written = {}
    inside = out.iterdir() if out.is_dir() else ()
    strangers = sorted(
        f.name
        for f in inside
        if not f.is_file() or (f.name != _EXPORT and written.get(f.name) != atomic.digest(f))
    )
    if strangers or ((out / _EXPORT).exists() and not written):
        raise ValueError(
            f"{out} holds files that are not of an earlier export: "
            f"{', '.join(strangers[:5] or [_EXPORT])}; choose another folder"
        )


def _info(args: argparse.Namespace) -> int:
    import platform
    from importlib import metadata

    import torch

    from multilora import __version__
    from multilora.ops import dispatch

    print(f"multilora {__version__}, Python {platform.python_version()}")
    for package in ("torch", "triton", "peft", "timm", "transformers", "torchmetrics"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} not installed")
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        print("cuda: no device")
    print("backends:")
    for name in dispatch.BACKENDS:
        reason = dispatch.missing_reason(name)
        print(f"  {name}: {'available' if reason is None else f'missing: {reason}'}")
    for module in ("_C", "_C_cuda"):
        print(f"multilora.{module}: {_built(module)}")
    print(f"used by default: {_default(dispatch)}")
    _print_kernels()
    _print_operators(dispatch.left_to_reference())
    print("CUDA C++ kernels: experimental, never run on a GPU; none is a default")
    print("backend cuda: lora_linear's thin products are Triton's passes, without Triton PyTorch's")
    return 0


def _print_operators(table: dict[str, dict[str, str | None]]) -> None:
    """Which operators each backend computes where it is asked for by name."""
    width, names = max(map(len, table)), next(iter(table.values()))
    print("".join((f"{'operator':{width}}", *(f"{name:>11}" for name in names))))
    left: dict[tuple[str, str], list[str]] = {}
    for op, reasons in table.items():
        cells = ("its own" if reason is None else "reference" for reason in reasons.values())
        print("".join((f"{op:{width}}", *(f"{cell:>11}" for cell in cells))))
        for name, reason in reasons.items():
            if reason is not None:
                left.setdefault((name, reason), []).append(op)
    for (name, reason), ops in left.items():
        print(f"backend {name} leaves {', '.join(ops)} to the reference: {reason}")


def _built(module: str) -> str:
    """How a native module was built."""
    try:
        native = import_module(f"multilora.{module}")
    except ImportError as error:
        return f"missing ({error})"
    about = ", ".join(native.build_info().values())
    return f"{about}, level {native.level()}" if module == "_C" else about


def _default(dispatch: Any) -> str:
    """What runs on each kind of device where no backend is asked for."""
    if os.environ.get("MULTILORA_BACKEND"):
        return f"{dispatch.current_backend()} (MULTILORA_BACKEND)"
    of = dispatch.current_backend
    return f"{of('cpu')} on a CPU, {of('cuda')} on a GPU"


def _print_kernels() -> None:
    """Whether the GPU kernels have run on a GPU, and are ahead."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return
    from multilora.ops import records
    from multilora.ops.triton import configs

    measured = [entry for entry in configs.table().values() if entry["record"] is not None]
    if not measured:
        print("Triton kernels: experimental, never run on a GPU; none is a default")
    for capability in sorted({entry["capability"] for entry in measured}):
        here = [entry for entry in measured if entry["capability"] == capability]
        ahead = sum(entry["ahead"] for entry in here)
        print(
            f"Triton kernels on sm_{capability}: measured at {len(here)} sizes, ahead of the "
            f"reference and the default at {ahead}"
        )
    for promotion in records.promotions():
        print(
            f"{promotion.op} in {promotion.dtype} on sm_{promotion.capability}: "
            f"{promotion.backend} is the default at {promotion.sizes}, ahead at all "
            f"{promotion.shapes} measured ({promotion.record})"
        )


class _Progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stats]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task(title, total=None, stats="")

    def __enter__(self) -> _Progress:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def print(self, line: str) -> None:
        self.progress.console.print(line)

    def step(self, step: int, steps: int, stats: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.3g}" for name, value in stats.items() if name != "nll")
        self.progress.update(self.task, completed=step, total=steps, stats=shown)


def _print_table(rows: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """A line a measure, a column a method: its value, or mean ± standard error over runs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Markdown, so that a result can be pasted; a pipe has no width to fit it to.
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for method, _ in rows:
        table.add_column(method, justify="right")
    for heading, path, decimals in _COLUMNS:
        cells = [_cell([_look_up(r, path) for r in results], decimals) for _, results in rows]
        if any(cells):
            table.add_row(heading, *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _look_up(result: dict[str, Any], path: tuple[str, ...]) -> float | None:
    for key in path:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def _cell(values: list[float | None], decimals: int) -> str:
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {error:.{decimals}f}"


def _free_folder(settings: Any, method: str | None = None) -> Path:
    """runs/TASK-METHOD-SEED, numbered where it is taken."""
    task = settings.model if settings.task == "images" else settings.task
    if task == "vtab":
        task += f"-{Path(settings.data).name}"
    stem = f"{task}-{method or settings.method}-{settings.seed}".replace("/", "_")
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"KEY=VALUE is needed; got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
