"""The task `text`: files of labelled texts, encoders' heads, and the command line over them."""

import json
import shlex
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import multilora as ml
from command import numbers, refused
from documents import block
from multilora.app import cli
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import text
from multilora.app.tasks.labelled_texts import classes_of, indices, read_parts, read_rows
from texts import ENCODERS, FEELINGS, SIZES, make_tokenizer, save_encoder, sentence, write_csv

# --- files ---------------------------------------------------------------------------------------


def parts_of(path):
    return read_parts(path, "text", "label")


def contents(rows):
    return [(row.text, row.label) for row in rows]


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_fifth_of_each_class_is_held_out_and_always_the_same(tmp_path):
    file = write_csv(tmp_path / "t.csv", 60)
    parts = parts_of(file)
    assert parts.keys() == {"train", "test"}
    assert [[r.label for r in parts["test"]].count(word) for word in FEELINGS] == [4, 4, 4]
    every = contents(parts["train"]) + contents(parts["test"])
    assert sorted(every) == sorted(contents(read_rows(file, "text", "label")))
    assert len(set(every)) == 60
    assert parts_of(file) == parts
    # It is not every fifth line.
    lines = [int(row.where.rpartition(" ")[2]) - 2 for row in parts["test"]]
    assert lines != list(range(4, 60, 5)) and lines == sorted(lines)


def test_json_lines_and_tables_hold_the_same(tmp_path):
    csv = write_csv(tmp_path / "t.csv", 15)
    rows = read_rows(csv, "text", "label")
    records = [{"text": r.text, "label": r.label, "more": None} for r in rows]
    lines = write_lines(tmp_path / "t.jsonl", records)
    assert contents(read_rows(lines, "text", "label")) == contents(rows)
    table = "label\ttext\n" + "".join(f"{r.label}\t{r.text}\n" for r in rows)
    tsv = tmp_path / "t.tsv"
    tsv.write_text(table, encoding="utf-8-sig")
    assert contents(read_rows(tsv, "text", "label")) == contents(rows)


def test_a_text_may_have_several_lines_and_quotes(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('label,text\r\nb,"one,\r\n""two"""\r\n\r\na,three\r\n', newline="")
    rows = read_rows(file, "text", "label")
    assert contents(rows) == [('one,\r\n"two"', "b"), ("three", "a")]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["3", "5"]


def test_a_column_names_the_parts(tmp_path):
    words = ["train", "dev", "test", "train", "validation"]
    records = [{"t": f"t{i}", "y": i % 2, "split": word} for i, word in enumerate(words)]
    parts = read_parts(write_lines(tmp_path / "t.jsonl", records), "t", "y")
    assert {part: contents(rows) for part, rows in parts.items()} == {
        "train": [("t0", "0"), ("t3", "1")],
        "test": [("t2", "0")],
        "validation": [("t1", "1"), ("t4", "0")],
    }


def test_a_folder_has_a_file_for_each_part(tmp_path):
    for part, count in (("train", 9), ("test", 6), ("validation", 3)):
        write_csv(tmp_path / f"{part}.csv", count)
    assert {part: len(rows) for part, rows in parts_of(tmp_path).items()} == {
        "train": 9,
        "test": 6,
        "validation": 3,
    }
    (tmp_path / "validation.csv").unlink()
    assert parts_of(tmp_path).keys() == {"train", "test"}
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"train\.csv and .*train\.jsonl are both there"):
        parts_of(tmp_path)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of test\.csv, test\.tsv, test\.jsonl"):
        parts_of(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "text,label\na,b\nc\n", "line 3: 1 fields; the header has 2"),
        ("t.csv", "text,label\na,b\nc,d,e\n", "line 3: 3 fields; the header has 2"),
        ("t.csv", "text,text\na,b\n", "line 1: the header has 'text' twice"),
        ("t.csv", "text,class\na,b\n", r"line 2: 'label' is missing; there are \['class', 'text'"),
        ("t.csv", "text,label\na,b\n ,b\n", "line 3: 'text' must be a text; got ' '"),
        ("t.csv", "text,label\na,\n", "line 2: 'label' must be a word or an integer; got ''"),
        ("t.csv", 'text,label\na,b\n"c,d\n', "line 3: unexpected end of data"),
        ("t.csv", "text,label\n", "t.csv has no examples"),
        ("t.csv", "", "t.csv has no examples"),
        ("t.csv", b"text,label\na,b\n\xff,b\n", "line .*: 'utf-8' codec can't decode"),
        ("t.csv", "text,label,split\na,b,train\nc,d,\n", "line 3: 'split' is empty"),
        ("t.csv", "text,label,split\na,b,other\n", "line 2: 'split' must be one of train, test"),
        ("t.csv", "text,label,split\na,b,train\n", "t.csv has no test examples"),
        ("t.csv", "text,label\na,1\nb,2\n", "no test examples: give a class at least five"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{\n', "line 2: no JSON"),
        ("t.jsonl", '["a", 1]\n', "line 1: a record is a JSON object"),
        ("t.jsonl", '{"text": "a", "label": 1.5}\n', "line 1: 'label' must be .*; got 1.5"),
        ("t.jsonl", '{"text": "a", "label": true}\n', "line 1: 'label' must be .*; got True"),
        ("t.jsonl", '{"text": 3, "label": 1}\n', "line 1: 'text' must be a text; got 3"),
        ("t.jsonl", '{"text": "a", "label": 1, "split": ["a"]}\n', "line 1: 'split' must be"),
        ("t.txt", "a", r"t.txt must end in one of \.csv, \.tsv, \.jsonl"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}/.*{message}"):
        parts_of(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        parts_of(tmp_path / "none.csv")


def rows_of(labels, tmp_path):
    records = [{"text": "a", "label": label} for label in labels]
    return read_rows(write_lines(tmp_path / "l.jsonl", records), "text", "label")


def test_classes_are_sorted_as_integers_or_as_words(tmp_path):
    assert classes_of({"train": rows_of([10, 9, "-1"], tmp_path)}) == ["-1", "9", "10"]
    assert classes_of({"train": rows_of([10, 9, "b"], tmp_path)}) == ["10", "9", "b"]
    rows = rows_of(["b", "a", "b"], tmp_path)
    assert indices(rows, classes_of({"train": rows})) == [1, 0, 1]


def test_every_class_needs_training_examples(tmp_path):
    train, test = rows_of(["a", "b"], tmp_path), rows_of(["a", "c"], tmp_path)
    with pytest.raises(ValueError, match=r"l\.jsonl, line 2: the class 'c' has no training"):
        classes_of({"train": train, "test": test})
    with pytest.raises(ValueError, match="at least two classes are needed; all labels are 'a'"):
        classes_of({"train": train[:1]})
    with pytest.raises(ValueError, match=r"line 2: the label 'c' is none of the classes a, b"):
        indices(test, ["a", "b"])


# --- the encoders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every encoder with its tokenizer, as transformers saves them."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(root / f"m{i}", name) for i, name in enumerate(ENCODERS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "t.csv", 90)


def options(folder, data, **more):
    return text.Options(model=str(folder), data=str(data), **more)


def particles(task, seed=0):
    """Two particles with heads and adapters that differ."""
    heads = [task.head] if isinstance(task.head, str) else [*task.head]
    config = peft.LoraConfig(r=2, target_modules=task.targets, modules_to_save=heads)
    model = ml.get_particle_model(task.base, config, 2, head_init="reset", seed=seed)
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_the_new_modules_are_the_heads_and_padding_changes_nothing(folders, data, name):
    _, heads, targets = ENCODERS[name]
    task = text.make(options(folders[name], data), 3)
    found = [task.head] if isinstance(task.head, str) else [*task.head]
    assert (found, task.targets, task.classes) == (heads, targets, sorted(FEELINGS))
    model = particles(task).eval()
    stacked = {n for n, _ in model.stacked_modules()}
    assert stacked == set(heads)
    batch = [task.test[i] for i in range(6)]
    assert len({len(x["input_ids"]) for x, _ in batch}) > 1  # something is padded
    inputs, labels = task.collate(batch)
    with torch.no_grad():
        together = task.predict(model, inputs)
        alone = torch.cat([task.predict(model, task.collate([each])[0]) for each in batch], 1)
    assert together.shape == (2, 6, 3) and (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    logits, targets = task.learn(model.train(), inputs, labels)
    assert isinstance(logits, torch.Tensor) and targets is labels


def test_the_pretrained_weights_stay_and_the_seed_draws_the_rest(folders, data):
    bases = [text.make(options(folders["bert"], data), seed).base for seed in (3, 3, 4)]
    stored = BertModel.from_pretrained(folders["bert"])
    for name, p in stored.named_parameters():
        assert torch.equal(bases[2].bert.get_parameter(name), p), name
    heads = [base.classifier.weight for base in bases]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    random = [
        text.make(options(folders["bert"], data, pretrained=False), seed) for seed in (0, 0, 1)
    ]
    words = [task.base.get_input_embeddings().weight for task in random]
    assert torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])
    assert random[0].head == ("bert.pooler", "classifier")


def test_files_of_another_model_are_refused(tmp_path, data):
    small = BertModel(BertConfig(**SIZES | {"num_hidden_layers": 1}))
    small.save_pretrained(tmp_path)
    BertConfig(**SIZES).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 16 weights of BertFor.*bert\.encoder\.layer\.1"):
        text.make(options(tmp_path, data), 0)


def test_inputs_are_those_of_the_model(folders, data):
    for name, extra in (("bert", {"token_type_ids"}), ("distilbert", set())):
        task = text.make(options(folders[name], data), 0)
        inputs, labels = task.collate([task.train[0], task.train[1]])
        assert inputs.keys() == {"input_ids", "attention_mask"} | extra
        assert labels.dtype == torch.int64
    short, long = sorted(inputs["attention_mask"].sum(1).tolist())
    row = int(inputs["attention_mask"].sum(1).argmin())
    assert inputs["attention_mask"][row].tolist() == [1] * short + [0] * (long - short)
    assert inputs["input_ids"][row, short:].tolist() == [1] * (long - short)


def test_long_texts_lose_their_end(folders, tmp_path):
    records = [{"text": "good " + "very " * 60, "label": i % 2} for i in range(10)]
    file = write_lines(tmp_path / "t.jsonl", records)
    said = []
    # RoBERTa's first position is behind that of the padding, 1.
    for name, positions in (("bert", 32), ("roberta", 30)):
        task = text.make(options(folders[name], file), 0, said.append)
        ids = task.train[0][0]["input_ids"]
        assert ids[:2].tolist() == [2, 6] and len(ids) == positions and ids[-1] == 3
        assert said.pop() == (
            f"10 of 10 texts have more than {positions} tokens and lose their end"
        )
        with torch.no_grad():
            task.predict(task.base, task.collate([task.train[0]])[0])
    task = text.make(options(folders["bert"], file, max_length=7), 0, said.append)
    assert len(task.train[0][0]["input_ids"]) == 7


def test_a_tokenizer_without_padding_is_refused(folders, data, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token"):
        text.make(options(tmp_path, data), 0)


# --- the command line ----------------------------------------------------------------------------


def command(folder, data, out, *more):
    lines = ["train", "--task", "text", "--model", folder, "--data", data, "--method", "ensemble"]
    lines += ["--steps", "60", "--lr", "0.03", "--particles", "2", "--out", out, *more]
    return [str(word) for word in lines]


@pytest.fixture(scope="module")
def run(folders, data, tmp_path_factory):
    """A finished run, in which the word that says the class is learnt."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(folders["bert"], data, out)) == 0
    return out


def evaluated(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_learns_and_evaluate_gives_the_same_measures(run, capsys):
    metrics = numbers(run)
    assert metrics["num_examples"] == 18 and metrics["accuracy"] > 0.7  # of three classes
    stored = json.loads((run / "run.json").read_text())
    assert stored["labels"] == ["bad", "good", "plain"] and stored["max_length"] == 128
    again = evaluated(capsys, run)
    assert again["accuracy"] == metrics["accuracy"]
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-6)


def test_a_particle_is_an_adapter_of_the_classifier(run, folders):
    model, task, _ = training.load_run(run)
    x = task.collate([task.test[i] for i in range(3)])[0]
    expected = ml.predict(model.eval(), x)[1]
    plain = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    adapted = peft.PeftModel.from_pretrained(plain, run / "particle_1").eval()
    found = adapted(**x).logits.softmax(-1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


def test_other_data_have_the_classes_of_the_run_by_name(run, tmp_path, capsys):
    # The same texts; "bad", whose logits are the first, has no examples here.
    rows = [(sentence(i), [*FEELINGS][i % 3]) for i in range(60) if i % 3]
    lines = [f"{words},{label}\n" for words, label in rows]
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "".join(lines))
    found = evaluated(capsys, run, "--data", other)
    assert found["num_examples"] == 8 and found["accuracy"] > 0.7
    other.write_text("text,label\n" + "".join(lines) + "it was,worse\n" * 5)
    refused(
        ["evaluate", run, "--data", other],
        capsys,
        "other.csv, line 42: the label 'worse' is none of the classes bad, good, plain",
    )


def test_other_texts_are_shifted_or_unknown_sets(run, tmp_path, capsys):
    file = write_csv(tmp_path / "shift.csv", 30)
    bare = tmp_path / "bare.csv"
    bare.write_text("text\nfilm film film\nthe the\n")
    found = evaluated(capsys, run, "--shift", f"same={file}", "--ood", f"far={bare}")
    assert found["shifted"]["same"]["accuracy"] > 0.7
    _, task, _ = training.load_run(run, shift=[("same", str(file))], ood=[("far", str(bare))])
    # A whole file is measured, not its held-out part.
    assert (len(task.shifted["same"]), len(task.ood["far"])) == (30, 2)
    assert found["ood"]["far"]["auroc"] is not None
    refused(
        ["evaluate", run, "--shift", f"x={bare}"],
        capsys,
        "bare.csv, line 2: 'label' is missing; there are ['text']",
    )
    refused(["evaluate", run, "--corrupt"], capsys, "--corrupt is for tasks of images")
    refused(["evaluate", run, "--fgsm"], capsys, "--fgsm needs a task whose inputs are images")


@pytest.mark.slow
def test_the_commands_of_the_guide_run(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "ENCODER").symlink_to(folders["bert"])
    for name in ("reviews", "march", "news"):
        write_csv(tmp_path / f"{name}.csv", 30)
    monkeypatch.chdir(tmp_path)
    lines = block("docs/guides/text.md", "## Your own texts", "bash").splitlines()
    assert block("README.md", "## The loop", "bash").splitlines() == lines[:2]
    for words in map(shlex.split, lines):
        more = ["--steps", "2"] if words[1] == "train" else []
        assert cli.main([*words[1:], *more]) == 0, capsys.readouterr().err
    assert len(lines) == 3 and numbers(tmp_path / "runs" / "reviews")["num_examples"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibdr", "bbb"])
def test_a_stopped_run_resumes_to_the_same_numbers(folders, data, tmp_path, method):
    settings = recommended(
        "text", method, str(data), model=str(folders["distilbert"]), steps=6, particles=2
    )  # with dropout

    def interrupt(step, steps, stats):
        if step == 4:
            raise KeyboardInterrupt

    training.train(settings, tmp_path / "whole", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=3, on_step=interrupt)
    training.train(settings, tmp_path / "run", save_every=3, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("method", ["ensemble", "ibdr", "tfb"])
def test_a_shared_trunk_gives_the_same_numbers_from_fewer_rows(folders, data, tmp_path, method):
    own = "layer.1.attention.self.query", "layer.1.attention.self.value"
    separate = recommended(
        "text", method, str(data), model=str(folders["bert"]), steps=6, particles=3, targets=own
    )
    shared = replace(separate, share_trunk=True)
    expected = training.train(separate, tmp_path / "separate")
    found = training.train(shared, tmp_path / "shared")
    for name in ("nll", "brier", "mutual_information"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    model, task, settings = training.load_run(tmp_path / "shared")
    rows = []
    for layer in model.base.base_model.encoder.layer:
        layer.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    x, _ = task.collate([task.test[0], task.test[1]])
    assert task.predict(model, x).shape[:2] == (3, 2)
    assert rows[-2:] == [2, 6]  # after those of the check
    assert settings.share_trunk


def test_the_order_of_the_labels_may_be_given(folders, data, capsys, tmp_path):
    given = ("good", "bad", "plain")
    settings = recommended("text", data=str(data), model=str(folders["bert"]), labels=given)
    task = training.make_task(settings, lambda line: None)
    assert task.classes == list(given)
    first = read_parts(data, "text", "label")["train"][0]
    assert task.train[0][1] == given.index(first.label)
    with pytest.raises(ValueError, match="labels must be two or more different classes"):
        replace(settings.options, labels=("a", "a"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model", "{tmp}/none"], "could not load"),
        (["--data", "{tmp}/none.csv"], "none.csv does not exist"),
        (["--targets", "qkv"], "choose targets among ['classifier'"),
        (["--label-column", "class"], "line 2: 'class' is missing; there are ['label', 'text']"),
        (["--model-args", "num_labels=4"], "leave num_labels out of model_args"),
        (["--labels", "bad", "good"], "the label 'plain' is none of the classes bad, good"),
    ],
)
def test_train_says_what_is_wrong(folders, data, tmp_path, capsys, more, message):
    more = [word.replace("{tmp}", str(tmp_path)) for word in more]
    refused(command(folders["bert"], data, tmp_path / "run", *more), capsys, message)


def test_a_run_may_not_name_a_model_that_came_with_it(run, folders, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    save_encoder(copy / "model")
    stored = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(stored | {"model": str(copy / "model")}))
    refused(["evaluate", copy], capsys, "lies in the run's own folder", "--model")
    (copy / "run.json").write_text(
        json.dumps(stored | {"model_args": [["trust_remote_code", True]]})
    )
    refused(["evaluate", copy], capsys, "trust_remote_code is not taken from a file")
    # Only safetensors are read from a model that a file names.
    pickled = save_encoder(tmp_path / "pickled")
    weights = BertModel.from_pretrained(pickled).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    (copy / "run.json").write_text(json.dumps(stored | {"model": str(pickled)}))
    refused(["evaluate", copy], capsys, "could not load", "safetensors")
