"""The commonsense tasks: questions that a causal language model answers with one token.

A record becomes a prompt that ends before the answer; the prediction is the softmax over the
answers' tokens of the logits at the prompt's last position. The tasks, with prompts, answers and
files, are in recipes/commonsense.json.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from multilora.app import recipes, untrusted
from multilora.app.options import FLAG, PAIRS, TEXT, TEXTS, choice, integer, option
from multilora.app.tasks.language import create_base, create_tokenizer, json_lines
from multilora.app.tasks.task import ModelOptions, Report, Task, existing

CLASSES = ("answers", "vocabulary")


class Example(NamedTuple):
    prompt: str
    candidates: tuple[str, ...]
    label: int  # of the right candidate


# --- records -> examples -------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    return tuple(recipes.read("commonsense")["datasets"])


def examples(task: str, records: Iterable[Mapping[str, Any]], source: str = "") -> list[Example]:
    """The examples of an iterable of records, such as a datasets.Dataset. See `example`.

    Raises:
        ValueError: A record is wrong, or there is none. The message has `source` and the record's
            number, counted from 1.
    """
    return _examples(task, enumerate(records, start=1), f"{source or task}, record")


def example(task: str, record: Mapping[str, Any]) -> Example:
    """One record as a prompt, the answers that may follow it and the index of the right one.

    Records have the fields of the original releases or of Hugging Face's copies of them:
    WinoGrande {sentence, option1, option2, answer: "1" or "2"};
    ARC and OBQA {question: {stem, choices: [{text, label}]}, answerKey}, or {question or
        question_stem, choices: {text: [...], label: [...]}, answerKey};
    BoolQ {question, passage, answer: true or false}.

    The candidates of a task are the same for every record. Choices are named A, B, ... in their
    order, whatever their labels are (some of ARC's are 1 to 4). ARC has three to five choices; a
    letter without a choice is a class that is never right.

    Raises:
        ValueError: A field is missing, the answer is none of the choices, or there are more choices
            than letters.
    """
    return _example(_task(task), record)


def _task(name: str) -> dict[str, Any]:
    tasks = recipes.read("commonsense")["datasets"]
    if name not in tasks:
        raise ValueError(f"the commonsense tasks are {', '.join(tasks)}; got {name!r}")
    return tasks[name]


def _example(task: dict[str, Any], record: Mapping[str, Any]) -> Example:
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is a JSON object; got {str(record)[:80]!r}")
    answers = tuple(task["answers"])
    fields, choices, label = _READERS[task["record"]](record)
    if len(choices) > len(answers):
        raise ValueError(f"there are {len(choices)} choices and only the answers {answers}")
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(answers, choices))
    return Example(task["prompt"].format(choices=lines, **fields), answers, label)


# A record's fields of the prompt, its choices (none where the answers are words) and its label.
_Read = tuple[dict[str, str], Sequence[str], int]


def _winogrande(record: Mapping[str, Any]) -> _Read:
    label = _right(["1", "2"], _field(record, "answer"))
    choices = [_field(record, "option1"), _field(record, "option2")]
    return {"question": _field(record, "sentence")}, choices, label


def _multiple_choice(record: Mapping[str, Any]) -> _Read:
    stem = "question" if "question" in record else "question_stem"
    question, choices = _field(record, stem), record.get("choices")
    if isinstance(question, Mapping):
        question, choices = _field(question, "stem"), _field(question, "choices")
    if choices is None:
        raise ValueError(f"the field 'choices' is missing; there are {sorted(record)}")
    if isinstance(choices, Mapping):
        labels, texts = _field(choices, "label"), _field(choices, "text")
    else:
        labels = [_field(choice, "label") for choice in choices]
        texts = [_field(choice, "text") for choice in choices]
    return {"question": question}, texts, _right(labels, _field(record, "answerKey"))


def _boolq(record: Mapping[str, Any]) -> _Read:
    fields = {name: _field(record, name) for name in ("passage", "question")}
    return fields, (), _right([False, True], _field(record, "answer"))


_READERS: dict[str, Callable[[Mapping[str, Any]], _Read]] = {
    "winogrande": _winogrande,
    "multiple_choice": _multiple_choice,
    "boolq": _boolq,
}


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"the field {name!r} is missing; there are {sorted(record)}")
    return record[name]


def _right(labels: Sequence[Any], answer: Any) -> int:
    if answer not in labels:
        raise ValueError(f"the answer must be one of {list(labels)}; got {answer!r}")
    return labels.index(answer)


# --- files -> examples ---------------------------------------------------------------------------


def load(task: str, data: str | Path, split: str = "test") -> tuple[list[Example], list[Example]]:
    """(training, evaluation) examples of local data.

    Args:
        data: A folder of JSON lines under the names of the release (train_s.jsonl, dev.jsonl, ...;
            the recipe lists them); a folder that `DatasetDict.save_to_disk` of Hugging Face's
            datasets wrote; or one file of JSON lines, of which every fifth example is held out.
        split: "test" evaluates on the split that is reported; "tune" on the development set, if
            that is another one.

    Raises:
        FileNotFoundError, ValueError: A file is missing or wrong. The message names the file and
            the line or the record.
    """
    data, splits = Path(data), _task(task)["splits"]
    if data.is_file():
        if split != "test":
            raise ValueError(f"{data} is one file: its held-out examples are the only test set")
        found = _examples(task, json_lines(data), f"{data}, line")
        held_out = found[4::5]
        if not held_out:
            raise ValueError(f"{data} needs at least five examples; it has {len(found)}")
        return [e for i, e in enumerate(found) if i % 5 != 4], held_out
    if not data.is_dir():
        raise FileNotFoundError(f"the data {data} does not exist")
    if split not in splits:
        raise ValueError(
            f"{task} has the splits {', '.join(s for s in splits if s != 'train')}; got {split!r}"
        )
    read = _from_disk if (data / "dataset_dict.json").is_file() else _from_folder
    train, test = (_examples(task, *read(data, splits[part])) for part in ("train", split))
    return train, test


def _from_folder(folder: Path, names: list[str]) -> tuple[Iterable[tuple[int, Any]], str]:
    files = [folder / f"{name}.jsonl" for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"none of {', '.join(map(str, files))} exists")
    return json_lines(file), f"{file}, line"


def _from_disk(folder: Path, names: list[str]) -> tuple[Iterable[tuple[int, Any]], str]:
    import datasets
    from datasets.features.features import require_decoding

    try:
        stored = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise ValueError(f"{folder} has the splits {', '.join(stored)} and none of {names}")
    # Images and sounds are not part of a question; decoding them could fetch them from a URL.
    other = [n for n, f in stored[name].features.items() if require_decoding(f)]
    return enumerate(stored[name].remove_columns(other), start=1), f"{folder}, {name}, record"


def _examples(task: str, records: Iterable[tuple[int, Any]], where: str) -> list[Example]:
    definition, found = _task(task), []
    for number, record in records:
        try:
            found.append(_example(definition, record))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} {number}: {error}") from error
    if not found:
        raise ValueError(f"{where.rpartition(',')[0]} has no examples")
    return found


# --- examples -> tensors -------------------------------------------------------------------------


def answer_tokens(tokenizer: Any, example: Example) -> list[int]:
    """The token that continues the example's prompt for each of its candidates.

    Most tokenizers have different tokens for " A" and "A", so each candidate is tokenized after
    the prompt and a space.

    Raises:
        ValueError: A candidate, which the message names, is not exactly one token that the
            tokenizer knows, or has the same token as another candidate.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    tokens: list[int] = []
    for candidate in example.candidates:
        whole = tokenizer(f"{example.prompt} {candidate}")["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        added = whole[same:]
        if same < len(prompt) or len(added) != 1 or added[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the answer {candidate!r} must add one known token to the prompt; "
                f"{type(tokenizer).__name__} turns the prompt's end "
                f"{tokenizer.convert_ids_to_tokens(prompt[same:])} into "
                f"{tokenizer.convert_ids_to_tokens(added)}"
            )
        if added[0] in tokens:
            twin = example.candidates[tokens.index(added[0])]
            raise ValueError(f"the answers {twin!r} and {candidate!r} are the same token")
        tokens += added
    return tokens


class Prompts(Dataset):
    """(token ids (T,) int64, label) of examples.

    A prompt of more than max_length tokens loses its beginning; `truncated` is the number of such
    prompts.
    """

    def __init__(self, tokenizer: Any, examples: Sequence[Example], max_length: int):
        self.labels = [example.label for example in examples]
        texts = [example.prompt for example in examples]
        whole = tokenizer(texts)["input_ids"]
        self.truncated = sum(len(ids) > max_length for ids in whole)
        if self.truncated:
            side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
            try:
                whole = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            finally:
                tokenizer.truncation_side = side
        self.ids = [torch.tensor(ids) for ids in whole]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.ids[index], self.labels[index]


def collate(batch: Sequence[tuple[Tensor, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """({input_ids, attention_mask, position_ids}, each (N, T) int64; labels (N,) int64).

    Padded on the left, so that every prompt ends at the last position.
    """
    ids = [row for row, _ in batch]
    mask = _pad([torch.ones_like(row) for row in ids])
    inputs = {
        "input_ids": _pad(ids),
        "attention_mask": mask,
        # Every prompt starts at position 0, for models that embed absolute positions.
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
    return inputs, torch.tensor([label for _, label in batch])


def _pad(rows: list[Tensor]) -> Tensor:
    # The padding token makes no difference, because it is masked.
    return pad_sequence(rows, batch_first=True, padding_side="left")


# --- tokens -> logits ----------------------------------------------------------------------------


class AnswerLogits:
    """Logits at the last position of left-padded prompts, of a particle model over `base`.

    Args:
        tokens: The token ids of the C candidates, in the order of the labels.
        classes: `learn` trains the cross-entropy among the candidates ("answers") or among all
            tokens ("vocabulary"). With two candidates IBDR's divergence is constant among them.
    """

    def __init__(self, base: nn.Module, tokens: Sequence[int], classes: str = "answers"):
        if classes not in CLASSES:
            raise ValueError(f"classes must be one of {CLASSES}; got {classes!r}")
        self.tokens, self.classes = torch.tensor(tokens), classes
        known = inspect.signature(base.forward).parameters
        self.inputs = [
            name for name in ("input_ids", "attention_mask", "position_ids") if name in known
        ]
        # Only the last position's logits are needed, and no cache, because nothing is generated.
        options = {"logits_to_keep": 1, "use_cache": False}
        self.options = {name: value for name, value in options.items() if name in known}

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (K, N, C) of the candidates."""
        logits = self._last(model, inputs)
        return logits.index_select(-1, self.tokens.to(logits.device))

    def learn(
        self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For a method's closure: logits (K, N, C or vocabulary) and targets (N,)."""
        if self.classes == "answers":
            return self.predict(model, inputs), labels
        return self._last(model, inputs), self.tokens.to(labels.device)[labels]

    def _last(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        taken = {name: inputs[name] for name in self.inputs}
        return model(**taken, **self.options).logits[:, :, -1]  # (K, N, vocabulary)


# --- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    model: str = option(TEXT, "a causal language model of transformers, by name or folder")
    data: str = option(
        TEXT, "a file of JSON lines, a folder of them, or the folder of a saved DatasetDict"
    )
    targets: tuple[str, ...] | None = option(TEXTS, "layers to adapt", ("q_proj", "v_proj"))
    model_args: tuple[tuple[str, Any], ...] = option(
        PAIRS, "arguments of transformers' from_pretrained", ()
    )
    split: str = option(
        choice("test", "tune"), "evaluate on the test set or on the development set", "test"
    )
    classes: str = option(
        choice(*CLASSES), "cross-entropy among the answers' tokens or among all tokens", CLASSES[0]
    )
    max_length: int = option(integer(1, 2**24), "largest number of tokens of a prompt", 512)
    trust_remote_code: bool = option(
        FLAG, "run the code that comes with a language model", False, stored=False
    )

    def check_model(self, where: str, run: Path) -> None:
        untrusted.check_transformers_name(where, self.model, run)

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return recipes.settings(recipes.read("commonsense"), task, method)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """A causal language model on a commonsense task.

    Prompts have at most `options.max_length` tokens, or as many as the model has positions.
    """
    train, test = load(options.task, options.data, options.split)
    model_args = dict(options.model_args)
    if options.trust_remote_code:
        model_args["trust_remote_code"] = True
    tokenizer = create_tokenizer(options.model, bool(model_args.get("trust_remote_code")))
    tokens = answer_tokens(tokenizer, train[0])
    base, _ = create_base(options.model, options.pretrained, seed, options.from_file, **model_args)
    positions = getattr(base.config, "max_position_embeddings", None)
    max_length = min(options.max_length, positions or options.max_length)
    prompts = [Prompts(tokenizer, part, max_length) for part in (train, test)]
    truncated = sum(p.truncated for p in prompts)
    if truncated:
        report(
            f"{truncated} of {len(train) + len(test)} prompts have more than {max_length} tokens "
            "and lose their beginning"
        )
    logits = AnswerLogits(base, tokens, options.classes)
    return Task(
        base=base,
        targets=existing(base, options.targets or ()),
        head=None,
        classes=list(train[0].candidates),
        train=prompts[0],
        test=prompts[1],
        collate=collate,
        predict=logits.predict,
        learn=logits.learn,
        evaluation_batch=32,
    )
