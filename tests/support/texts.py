"""Small encoders with a tokenizer, and labelled texts, for the tests of the tasks on texts."""

import io
import json
import tarfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

# The padding is at 1, as RoBERTa's.
WORDS = "[UNK] [PAD] [CLS] [SEP] bad plain good the a very so film it was is".split()
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "initializer_range": 0.3,  # a random model whose attention looks at something
    "hidden_dropout_prob": 0.0,  # and that learns in few steps; DistilBERT's has dropout
    "attention_probs_dropout_prob": 0.0,
}
DISTILBERT = {
    "vocab_size": len(WORDS),
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
MODERN = {
    "cls_token_id": 2,
    "sep_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "attn_implementation": "sdpa",
}


def classifier_of(classes):
    return lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=classes))


#: name -> (a model, the heads that are new in a classifier of 3 classes over it, the targets)
ENCODERS = {
    "bert": (lambda: BertModel(BertConfig(**SIZES)), ["classifier"], ["query", "value"]),
    "bert without a pooler": (
        lambda: BertForMaskedLM(BertConfig(**SIZES)),
        ["bert.pooler", "classifier"],
        ["query", "value"],
    ),
    "bert for 5 classes": (classifier_of(5), ["classifier"], ["query", "value"]),
    "bert for 3 classes": (classifier_of(3), ["classifier"], ["query", "value"]),
    "roberta": (lambda: RobertaModel(RobertaConfig(**SIZES)), ["classifier"], ["query", "value"]),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)),
        ["pre_classifier", "classifier"],
        ["q_lin", "v_lin"],
    ),
    "modernbert": (
        lambda: ModernBertModel(ModernBertConfig(**SIZES, **MODERN)),
        ["head", "classifier"],
        ["Wqkv"],
    ),
    "deberta": (
        lambda: DebertaV2Model(DebertaV2Config(**SIZES, type_vocab_size=0)),
        ["pooler", "classifier"],
        ["query_proj", "value_proj"],
    ),
}


def make_tokenizer():
    """One token per word, between [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_encoder(folder, name="bert"):
    torch.manual_seed(0)
    ENCODERS[name][0]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


FEELINGS = {"bad": -2, "plain": 0, "good": 3}


def sentence(i):
    """A text of 4 to 9 words, in which one word says the class, the (i mod 3)rd of `FEELINGS`."""
    filler = ["the", "film", "was", "very", "so", "is"]
    word = [*FEELINGS][i % 3]
    return " ".join(["it", *filler[: 2 + i % 5], *["very"] * (i % 2), word])


def write_csv(file, count, words=tuple(FEELINGS)):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f'"{sentence(i)}, a{i}",{words[i % 3]}\n' for i in range(count)]
    file.write_text("text,label\n" + "".join(rows))
    return file


def packed(files):
    """A .tar.gz of {name: bytes}."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


STEMS = {
    "tweets": "tweets",
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


def domain_files(domain, count, disagreeing=()):
    """The two files of a domain, as VADER's; the ids `disagreeing` have a wrong mean in one."""
    texts, people = [], []
    for i in range(count):
        feeling = [*FEELINGS.values()][i % 3]
        ratings = [feeling] * 3 + [0]  # three of four agree, or all
        mean = sum(ratings) / len(ratings)
        stated = mean + 1 if i in disagreeing else mean
        texts.append(f"{i + 1}\t{stated:.9f}\t{sentence(i)} {domain} no{i} &amp;\r\n")
        people.append(f"{i + 1}\t{mean:.9f}\t0.5\t{json.dumps(ratings)}\r\n")
    stem = f"hutto_ICWSM_2014/{STEMS[domain]}"
    return {
        f"{stem}_GroundTruth.txt": "".join(texts).encode("utf-8-sig"),
        f"{stem}_anonDataRatings.txt": "".join(people).encode(),
    }


def vader(files):
    """The source distribution over the files of the inner archive."""
    inner = packed(files | {"hutto_ICWSM_2014/paper.pdf": b"\xff\xfe"})
    name = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    return packed({"vaderSentiment-2.5/setup.py": b"1/0", name: inner})
