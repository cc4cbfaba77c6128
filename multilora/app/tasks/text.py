"""The task `text`: an encoder of transformers, with a new classification head, on your texts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from multilora.app import untrusted
from multilora.app.options import FLAG, PAIRS, TEXT, TEXTS, integer, option
from multilora.app.tasks.labelled_texts import classes_of, indices, read_parts, read_rows
from multilora.app.tasks.language import create_base, create_tokenizer
from multilora.app.tasks.task import ModelOptions, Report, Task, existing

#: The layers that make queries and values, under the names of transformers' models. Where one layer
#: makes keys, too, it is adapted as a whole.
_QUERY_AND_VALUE = (
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("in_proj",),
    ("Wqkv",),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
)

Inputs = dict[str, Tensor]


class Texts(Dataset):
    """(inputs of the model, each (T,) int64; label) of tokenised texts.

    A text of more than max_length tokens loses its end; `truncated` is the number of such texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        inputs: Sequence[str],
        texts: Sequence[str],
        labels: Sequence[int],
        max_length: int,
    ):
        self.labels = list(labels)
        lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
        self.truncated = sum(length > max_length for length in lengths)
        tokens = tokenizer(list(texts), truncation=True, max_length=max_length)
        self.inputs = [
            {name: torch.tensor(tokens[name][i]) for name in inputs} for i in range(len(texts))
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Inputs, int]:
        return self.inputs[index], self.labels[index]


def collate(
    batch: Sequence[tuple[Inputs, int]], padding: Mapping[str, int], side: str = "right"
) -> tuple[Inputs, Tensor]:
    """The inputs (N, T) int64 of a batch, and its labels (N,) int64.

    Args:
        padding: The value of each input at padded positions.
        side: Where these are, "right" or "left".
    """
    inputs = {
        name: pad_sequence([x[name] for x, _ in batch], True, value, side)
        for name, value in padding.items()
    }
    return inputs, torch.tensor([label for _, label in batch])


def query_and_value(base: nn.Module) -> list[str]:
    """The layers of `base` that make attention's queries and values, by the ends of their names.

    Raises:
        ValueError: There are none under a name that transformers' models have.
    """
    ends = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    for names in _QUERY_AND_VALUE:
        if ends.issuperset(names):
            return list(names)
    raise ValueError(
        f"{type(base).__name__} has no queries and values under a known name: choose targets "
        f"(--targets) among {sorted(ends)}"
    )


def new_heads(base: Any, drawn: set[str]) -> tuple[str, ...]:
    """The modules at the model's end that hold no pretrained weights; they are trained whole.

    These are the encoder's pooler and what follows the encoder, as far as their weights were drawn,
    and always the last module: a stored classifier is of other classes.

    Args:
        base: A model for classification of transformers.
        drawn: The names of its parameters that are random.

    Raises:
        ValueError: There is no head, or weights of the encoder were drawn beside pretrained ones.
    """
    encoder = base.base_model
    modules = dict(base.named_modules())
    outside = [
        name
        for name, module in base.named_children()
        if module is not encoder and _has_weights(module)
    ]
    if not outside:
        raise ValueError(f"{type(base).__name__} has no classification head")
    pooler = getattr(encoder, "pooler", None)
    candidates = [name for name, m in modules.items() if m is pooler and _has_weights(m)] + outside
    heads = [
        name
        for name in candidates
        if name == outside[-1]
        or all(f"{name}.{inner}" in drawn for inner, _ in modules[name].named_parameters())
    ]
    lost = sorted(n for n in drawn if not n.startswith(tuple(f"{head}." for head in heads)))
    if lost and len(drawn) < len(list(base.parameters())):
        raise ValueError(
            f"the model's files lack {len(lost)} weights of {type(base).__name__}, such as "
            f"{lost[0]}: they are of another model"
        )
    return tuple(heads)


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


class Encoder:
    """An encoder with a new head, its tokenizer, and how its inputs are made.

    Args:
        name: Of the model, or its folder.
        classes: How many.

    Raises:
        RuntimeError: transformers cannot load the model or its tokenizer.
        ValueError: The model is unfit, or an argument of it is one of the task's.
    """

    def __init__(self, options: Options, name: str, classes: int, seed: int):
        model_args = dict(options.model_args)
        if "num_labels" in model_args:
            raise ValueError(f"the task has {classes} classes: leave num_labels out of model_args")
        if options.trust_remote_code:
            model_args["trust_remote_code"] = True
        self.tokenizer = create_tokenizer(name, bool(model_args.get("trust_remote_code")))
        padding = self.tokenizer.pad_token_id
        if padding is None:
            raise ValueError(f"the tokenizer of {name!r} has no padding token")
        with _without_report():
            self.base, drawn = create_base(
                name,
                options.pretrained,
                seed,
                options.from_file,
                kind="AutoModelForSequenceClassification",
                **{"num_labels": classes, "ignore_mismatched_sizes": True} | model_args,
            )
        self.heads = new_heads(self.base, drawn)
        known = inspect.signature(self.base.forward).parameters
        values = {"input_ids": padding, "attention_mask": 0, "token_type_ids": 0}
        given = self.tokenizer("")
        self.padding = {n: value for n, value in values.items() if n in known and n in given}
        self.max_length = min(
            options.max_length, self.tokenizer.model_max_length, _positions(self.base)
        )

    def texts(self, texts: Sequence[str], labels: Sequence[int]) -> Texts:
        return Texts(self.tokenizer, list(self.padding), texts, labels, self.max_length)

    def task(self, options: Options, report: Report, **parts: Any) -> Task:
        """The task of these parts: fields of `Task`, among them the training and test texts."""
        sets = [parts["train"], parts["test"], parts.get("validation")]
        found = [part for part in sets if part is not None]
        truncated, count = sum(p.truncated for p in found), sum(map(len, found))
        if truncated:
            report(
                f"{truncated} of {count} texts have more than {self.max_length} tokens and lose "
                "their end"
            )
        return Task(
            base=self.base,
            targets=(
                existing(self.base, options.targets)
                if options.targets
                else query_and_value(self.base)
            ),
            head=self.heads[0] if len(self.heads) == 1 else self.heads,
            collate=partial(collate, padding=self.padding, side=self.tokenizer.padding_side),
            read_set=self._reader(options, parts["classes"]),
            evaluation_batch=64,
            **parts,
        )

    def _reader(self, options: Options, classes: Sequence[str]) -> Callable[[str, bool], Texts]:
        def read(path: str, labelled: bool) -> Texts:
            label = options.label_column if labelled else None
            rows = read_rows(Path(path), options.text_column, label)
            labels = indices(rows, classes) if labelled else [0] * len(rows)
            return self.texts([row.text for row in rows], labels)

        return read


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers does not warn about the new head. `new_heads` looks at what is random."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _positions(base: Any) -> int:
    """The largest number of tokens that the model has positions for."""
    found = 2**24
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts from behind the position of padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found = min(found, module.num_embeddings - first)
    return min(found, getattr(base.config, "max_position_embeddings", None) or found)


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    task: str = "text"
    model: str = option(TEXT, "an encoder of transformers, by name or folder")
    data: str = option(
        TEXT,
        "labelled texts: a file of CSV or JSON lines, of which a fifth is held out, or a folder of "
        "train.csv, test.csv and, optionally, validation.csv",
    )
    targets: tuple[str, ...] | None = option(
        TEXTS, "layers to adapt", None, shown="query and value of attention"
    )
    model_args: tuple[tuple[str, Any], ...] = option(
        PAIRS, "arguments of transformers' from_pretrained", ()
    )
    text_column: str = option(TEXT, "column or field of the texts", "text")
    label_column: str = option(TEXT, "column or field of the labels", "label")
    labels: tuple[str, ...] | None = option(
        TEXTS, "the classes, in the order of the logits", None, shown="the sorted labels"
    )
    max_length: int = option(integer(1, 2**24), "largest number of tokens of a text", 128)
    trust_remote_code: bool = option(
        FLAG, "run the code that comes with a language model", False, stored=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"labels must be two or more different classes; got {self.labels}")

    def check_model(self, where: str, run: Path) -> None:
        untrusted.check_transformers_name(where, self.model, run)

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The classes of the data, so that a run keeps them when it is measured on other data."""
        if given.get("data") is None or given.get("labels") is not None:
            return {}
        columns = [given.get(f"{n}_column") or n for n in ("text", "label")]
        return {"labels": tuple(classes_of(read_parts(given["data"], *columns)))}


def make(options: Options, seed: int, report: Report = print) -> Task:
    """An encoder of transformers on labelled texts; the seed draws its head."""
    parts = read_parts(options.data, options.text_column, options.label_column)
    classes = classes_of(parts) if options.labels is None else list(options.labels)
    labels = {part: indices(rows, classes) for part, rows in parts.items()}
    encoder = Encoder(options, options.model, len(classes), seed)
    sets = {
        part: encoder.texts([row.text for row in rows], labels[part])
        for part, rows in parts.items()
    }
    return encoder.task(options, report, classes=classes, **sets)
