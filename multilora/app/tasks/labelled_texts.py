"""Files of labelled texts: CSV with a header, or JSON lines."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from multilora.app.tasks.language import json_lines

#: The ending of a file of labelled texts, and the separator of its fields (JSON lines have none).
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
#: The parts of a data set, and the words for them in a column `split`.
_PARTS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SPLIT = "split"


class Row(NamedTuple):
    """A text with its label; `where` is its file and line, for messages."""

    where: str
    text: str
    label: str
    part: str | None


def read_parts(path: str | Path, text: str, label: str) -> dict[str, list[Row]]:
    """The rows of "train", "test" and, where the data have them, "validation".

    Args:
        path: A folder with a file for each part, such as train.csv, test.csv and validation.csv;
            or one file. Where that has no column `split`, every fifth example of each class, in an
            order that is always the same, is the test set.
        text: The name of the texts' column or field.
        label: The name of the labels' column or field. Labels are words or integers.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A row, whose file and line the message names, is wrong; or a part is empty.
    """
    path = Path(path)
    if path.is_dir():
        files = {part: _file_of(path, part) for part in ("train", "test", "validation")}
        for part in ("train", "test"):
            if files[part] is None:
                names = ", ".join(f"{part}{ending}" for ending in _SEPARATORS)
                raise FileNotFoundError(f"{path} has none of {names}")
        parts = {part: read_rows(f, text, label) for part, f in files.items() if f is not None}
    else:
        rows = read_rows(path, text, label)
        parts = _by_column(path, rows) if rows[0].part is not None else _fifth_held_out(rows)
    for part in ("train", "test"):
        if not parts.get(part):
            raise ValueError(
                f"{path} has no {part} examples: give a class at least five, or a column {_SPLIT!r}"
            )
    return parts


def read_rows(file: Path, text: str, label: str | None) -> list[Row]:
    """All rows of a file; with label=None their labels are empty, and need not be there.

    Raises:
        FileNotFoundError, ValueError: As `read_parts`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the data {file} does not exist")
    if file.suffix not in _SEPARATORS:
        raise ValueError(f"{file} must end in one of {', '.join(_SEPARATORS)}")
    separator = _SEPARATORS[file.suffix]
    records = json_lines(file) if separator is None else _table(file, separator)
    rows = []
    for line, record in records:
        where = f"{file}, line {line}"
        try:
            rows.append(_row(where, record, text, label))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no examples")
    if len({row.part is None for row in rows}) > 1:
        bare = next(row for row in rows if row.part is None)
        raise ValueError(f"{bare.where}: {_SPLIT!r} is empty, and other lines have it")
    return rows


def classes_of(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """The labels in order: integers by their value, words by the alphabet.

    Raises:
        ValueError: There is only one class, or one has no training examples.
    """
    trained = {row.label for row in parts["train"]}
    for row in (row for rows in parts.values() for row in rows):
        if row.label not in trained:
            raise ValueError(f"{row.where}: the class {row.label!r} has no training examples")
    if len(trained) < 2:
        raise ValueError(f"at least two classes are needed; all labels are {min(trained)!r}")
    integers = all(label.removeprefix("-").isdecimal() for label in trained)
    return sorted(trained, key=(lambda label: (int(label), label)) if integers else None)


def indices(rows: Iterable[Row], classes: Sequence[str]) -> list[int]:
    """The class of each row, as a number.

    Raises:
        ValueError: A label is none of the classes.
    """
    known = {name: index for index, name in enumerate(classes)}
    found = []
    for row in rows:
        if row.label not in known:
            raise ValueError(
                f"{row.where}: the label {row.label!r} is none of the classes {', '.join(classes)}"
            )
        found.append(known[row.label])
    return found


def _row(where: str, record: Any, text: str, label: str | None) -> Row:
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is a JSON object; got {str(record)[:80]!r}")
    for name in (text, *([] if label is None else [label])):
        if name not in record:
            raise ValueError(f"{name!r} is missing; there are {sorted(record)}")
    if not isinstance(record[text], str) or not record[text].strip():
        raise ValueError(f"{text!r} must be a text; got {record[text]!r}")
    part = None if _SPLIT in (text, label) else record.get(_SPLIT) or None
    if part is not None and str(part) not in _PARTS:
        raise ValueError(f"{_SPLIT!r} must be one of {', '.join(_PARTS)}; got {part!r}")
    return Row(
        where,
        record[text],
        "" if label is None else _label(label, record[label]),
        None if part is None else _PARTS[str(part)],
    )


def _label(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{name!r} must be a word or an integer; got {value!r}")
    return str(value).strip()


def _table(file: Path, separator: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, values by column) of each row below the header."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator, strict=True)
        try:
            header = next(reader, [])
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise ValueError(f"the header has {twice[0]!r} twice")
            for row in reader:
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields; the header has {len(header)}")
                yield reader.line_num, dict(zip(header, row))
        except (csv.Error, ValueError) as error:  # an encoding other than UTF-8 is a ValueError
            raise ValueError(f"{file}, line {max(reader.line_num, 1)}: {error}") from error


def _file_of(folder: Path, part: str) -> Path | None:
    found = [f for ending in _SEPARATORS if (f := folder / f"{part}{ending}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are both there: leave one")
    return found[0] if found else None


def _by_column(path: Path, rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = {part: [row for row in rows if row.part == part] for part in set(_PARTS.values())}
    return {part: rows for part, rows in found.items() if rows}


def _fifth_held_out(rows: Sequence[Row]) -> dict[str, list[Row]]:
    seen: Counter[str] = Counter()
    held = set()
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        seen[rows[i].label] += 1
        if seen[rows[i].label] % 5 == 0:
            held.add(i)
    return {
        "train": [row for i, row in enumerate(rows) if i not in held],
        "test": [row for i, row in enumerate(rows) if i in held],
    }
