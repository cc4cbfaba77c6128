"""Visual question answering: the measures of VQA v2, human confidence, and the release's files.

Accuracy and the normalisation of answers follow the description of the VQA evaluation (Antol et al.
2015; Goyal et al. 2017); exact match and human confidence are Bella's, equations 6 and 8.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ANSWER_TYPES = ("yes/no", "number", "other")
#: The thresholds of Bella's figure 6, in nats.
THRESHOLDS = tuple(i / 10 for i in range(1, 9))

_DIGITS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def _contractions() -> dict[str, str]:
    """dont -> don't; words that mean something without the apostrophe (were, well) are left out."""
    endings = {
        "n't": """ai are ca could did does do had has have is might must need ought should was were
            wo would""",
        "'ve": "could i might must should they we what who would you",
        "'re": "there they what who you",
        "'ll": "it that there they what who you",
        "'d": "he how it that there they what where who you",
        "'s": "he here how let she somebody someone that there what when where who why",
        "'m": "i",
    }
    whole = [stem + ending for ending, stems in endings.items() for stem in stems.split()]
    whole += ["o'clock", "y'all", "ma'am"]
    return {word.replace("'", ""): word for word in whole}


_CONTRACTIONS = _contractions()


class Question(NamedTuple):
    """One question of the release with its annotators' answers."""

    question_id: int
    image_id: int
    question: str
    answer_type: str
    answers: tuple[str, ...]


def normalize(answer: str) -> str:
    """The answer as the VQA evaluation compares it.

    Letters become lower case, number words become digits (none is 0), and articles go. A
    contraction without its apostrophe gets it. Full stops go except in decimals, and commas between
    digits go. Brackets, quotation marks and ; / = + - _ < > @ ? ! and the like become spaces;
    apostrophes (girl's), colons (2:50), % and $ stay.
    """
    text = answer.lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.%$&#*]|_", " ", text)
    words = (_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def accuracy(answer: str, humans: Sequence[str]) -> float:
    """min(number of humans who said the answer / 3, 1), averaged over the sets without one human.

    Args:
        answer: the model's.
        humans: ten answers in VQA v2. All answers are normalised first.

    Raises:
        ValueError: there are fewer than two humans.
    """
    _require_answers("accuracy", humans, 2)
    said = [normalize(answer) == normalize(human) for human in humans]
    return sum(min((sum(said) - own) / 3, 1) for own in said) / len(said)


def exact_match(answer: str, humans: Sequence[str]) -> bool:
    """Whether `accuracy` is 1: at least four of ten humans said the answer (Bella, eq. 6)."""
    return accuracy(answer, humans) == 1


def human_confidence(humans: Sequence[str]) -> float:
    """The share of humans who gave the most frequent answer (Bella, eq. 8).

    Raises:
        ValueError: there are no humans.
    """
    _require_answers("human_confidence", humans, 1)
    return max(Counter(map(normalize, humans)).values()) / len(humans)


def confidence_curve(
    entropy: Tensor, confidence: Tensor, thresholds: Iterable[float] = THRESHOLDS
) -> tuple[Tensor, Tensor]:
    """The mean human confidence where the model is sure and where it is not (Bella, figure 6).

    It needs no VQA: any labels of several raters have a confidence.

    Args:
        entropy: (N,), one for each question, in nats and not normalised: for sequences the means
            over tokens of eq. 7, as `metrics.sequence_entropy` returns them.
        confidence: (N,), `human_confidence` of each question.
        thresholds: M numbers in nats.

    Returns:
        The means (M,) over the questions with entropy <= threshold, and (M,) over those with
        entropy > threshold, float64; NaN where there is no such question.

    Raises:
        ValueError: the shapes differ, or an entropy is NaN.
    """
    if entropy.ndim != 1 or entropy.shape != confidence.shape:
        raise ValueError(
            f"confidence_curve needs entropy (N,), confidence (N,); got {tuple(entropy.shape)}, "
            f"{tuple(confidence.shape)}"
        )
    if entropy.isnan().any():
        raise ValueError(f"{int(entropy.isnan().sum())} of {len(entropy)} entropies are NaN")
    confidence = confidence.double()
    is_low = entropy <= torch.tensor(list(thresholds)).to(entropy)[:, None]  # (M, N)
    low, high = ((confidence * part).sum(-1) / part.sum(-1) for part in (is_low, ~is_low))
    return low, high


def read(
    questions: str | Path, annotations: str | Path, answer_type: str | None = None
) -> list[Question]:
    """The questions of VQA v2's files, in the order of the annotations.

    Args:
        questions: a file such as v2_OpenEnded_mscoco_val2014_questions.json.
        annotations: the file that goes with it, such as v2_mscoco_val2014_annotations.json.
        answer_type: "yes/no", "number" or "other"; None reads all.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of that form, an annotation has no question, or no question is of
            the type. The message names the file and the record.
    """
    if answer_type is not None and answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type must be one of {ANSWER_TYPES}; got {answer_type!r}")
    asked = {}
    for where, record in _records(Path(questions), "questions"):
        asked[_field(where, record, "question_id", int)] = _field(where, record, "question", str)
    found = []
    for where, record in _records(Path(annotations), "annotations"):
        number = _field(where, record, "question_id", int)
        kind = _field(where, record, "answer_type", str)
        if kind not in ANSWER_TYPES:
            raise ValueError(f"{where}: answer_type must be one of {ANSWER_TYPES}; got {kind!r}")
        if number not in asked:
            raise ValueError(f"{where}: question {number} is not in {questions}")
        given = _field(where, record, "answers", list)
        answers = tuple(_field(where, one, "answer", str) for one in given)
        image = _field(where, record, "image_id", int)
        if answer_type in (None, kind):
            found.append(Question(number, image, asked[number], kind, answers))
    if not found:
        raise ValueError(f"{annotations} has no question of the type {answer_type!r}")
    return found


def _records(file: Path, name: str) -> list[tuple[str, Any]]:
    """The list `name` of a JSON file, each entry with the words for an error."""
    if not file.is_file():
        raise FileNotFoundError(f"the file of the {name}, {file}, does not exist")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    records = content.get(name) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{file} needs a list {name!r}, as the files of VQA v2 have it")
    return [(f"{file}, {name}[{i}]", record) for i, record in enumerate(records)]


def _field(where: str, record: Any, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name!r} must be of type {kind.__name__}; got {value!r}")
    return value


def _require_answers(name: str, humans: Sequence[str], least: int) -> None:
    if isinstance(humans, str) or len(humans) < least:
        raise ValueError(f"{name} needs a list of at least {least} answers; got {humans!r}")
