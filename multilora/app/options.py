"""Options as fields of a dataclass: each has its default, its help text and its check in one place.

The command line makes its arguments from these fields, and a run's folder is read through them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from multilora import checks


@dataclass(frozen=True)
class Kind:
    """The values that an option takes.

    check(name, value) returns the value to store, or raises ValueError with the name. argument:
    how argparse reads it.
    """

    check: Callable[[str, Any], Any]
    argument: Mapping[str, Any]


def integer(low: int, high: int, metavar: str | None = None) -> Kind:
    argument = {"type": int, "metavar": metavar}
    return Kind(lambda name, value: checks.integer(name, value, low, high), argument)


def number(high: float, positive: bool = False) -> Kind:
    """A number from 0, or from above 0, to `high`."""
    return Kind(
        lambda name, value: checks.number(name, value, 0, high, open_low=positive), {"type": float}
    )


def choice(*words: str) -> Kind:
    return Kind(lambda name, value: checks.choice(name, value, words), {"choices": words})


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{name} must be a name or a folder; got {value!r}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not (
        isinstance(value, (tuple, list)) and value and all(isinstance(t, str) and t for t in value)
    ):
        raise ValueError(f"{name} must be a list of names; got {value!r}")
    return tuple(value)


def _pairs(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    def named(pair: Any) -> bool:
        return isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)

    if not isinstance(value, (tuple, list)) or not all(map(named, value)):
        raise ValueError(f"{name} must be pairs of a name and a value; got {value!r}")
    for key, one in value:
        try:
            json.dumps(one, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {key} = {one!r}: {error}") from error
    return tuple((key, one) for key, one in value)


def _paths(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    pairs = _pairs(name, value)
    if not all(key and isinstance(path, str) and path for key, path in pairs):
        raise ValueError(f"{name} must be pairs of a name and a path; got {value!r}")
    names = [key for key, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must have different names; got {names}")
    return pairs


def name_path(text: str) -> tuple[str, str]:
    """NAME=PATH as a pair. A shell leaves the ~ in the middle of a word to us."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"NAME=PATH is needed; got {text!r}")
    return name, os.path.expanduser(path)


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE as a pair; the value is JSON, or else the text itself."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"KEY=VALUE is needed; got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_command(
    commands: Any, name: str, run: Callable[[Any], int], text: str, about: str, epilog: str
) -> argparse.ArgumentParser:
    """A command whose description keeps its lines.

    text: of the list of commands.
    """
    parser = commands.add_parser(
        name,
        help=text,
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


FLAG = Kind(checks.flag, {})
TEXT = Kind(_text, {})
TEXTS = Kind(_texts, {"nargs": "+", "metavar": "NAME"})
PAIRS = Kind(_pairs, {"nargs": "+", "metavar": "KEY=VALUE", "type": key_value})
#: The option is given once for each pair.
PATHS = Kind(_paths, {"action": "append", "metavar": "NAME=PATH", "type": name_path})


def option(
    kind: Kind, help: str, default: Any = MISSING, shown: str | None = None, stored: bool = True
) -> Any:
    """A field of an `Options` dataclass. It must be given if it has no default.

    shown: what the help text calls the default, if not by its value.
    stored: whether run.json has it. What only the user may decide is not stored.
    """
    metadata = {"kind": kind, "help": help, "shown": shown, "stored": stored}
    return field(default=default, metadata=metadata)


class Checked:
    """A dataclass that checks its fields when it is made. None is allowed only as a default."""

    def __post_init__(self) -> None:
        for name, f in described(type(self)).items():
            value = getattr(self, name)
            if value is not None or f.default is not None:
                object.__setattr__(self, name, f.metadata["kind"].check(name, value))


def described(cls: type[Any]) -> dict[str, Field[Any]]:
    """The fields that `option` made."""
    return {f.name: f for f in fields(cls) if "kind" in f.metadata}


def stored(options: Any) -> dict[str, Any]:
    """The values that run.json holds."""
    found = described(type(options)).items()
    return {name: getattr(options, name) for name, f in found if f.metadata["stored"]}


def add_argument(
    group: Any, name: str, options: Mapping[str, Field[Any]], default: Any = None
) -> None:
    """Add --name to an argparse group.

    options: the field of each owner of the option, by the owner's name; where their help texts or
    defaults differ, the text names the owners. default: for argparse; None marks what is not given.
    """
    first = next(iter(options.values()))
    kind: Kind = first.metadata["kind"]
    owners: dict[str, list[str]] = {}
    for owner, f in options.items():
        owners.setdefault(_help(f), []).append(owner)
    named = len(owners) > 1
    text = "; ".join(f"{', '.join(o)}: {text}" if named else text for text, o in owners.items())
    flag, argument = f"--{name.replace('_', '-')}", dict(kind.argument)
    if "choices" in argument:
        every = (f.metadata["kind"].argument["choices"] for f in options.values())
        argument["choices"] = tuple(dict.fromkeys(itertools.chain.from_iterable(every)))
    if kind is FLAG and first.default is True:
        flag = f"--no-{name.replace('_', '-')}"
        argument |= {"dest": name, "action": "store_false"}
    elif kind is FLAG:
        argument["action"] = "store_true"
    group.add_argument(flag, default=default, help=text.replace("%", "%%"), **argument)


def _help(f: Field[Any]) -> str:
    text, shown = f.metadata["help"], f.metadata["shown"]
    if shown is None and not (f.default in (MISSING, None, ()) or isinstance(f.default, bool)):
        shown = " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)
    return text if shown is None else f"{text} [{shown}]"
