"""The commonsense tasks: records, prompts, tokens, and the command line over a tiny model."""

import json
import warnings

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import multilora as ml
from command import numbers, refused
from documents import recipe
from multilora.app import cli
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import commonsense

WINOGRANDE = {
    "sentence": "The cup did not fit the box because the _ was small.",
    "option1": "cup",
    "option2": "box",
    "answer": "2",
}
BOOLQ = {"question": "is snow white", "passage": "Snow is white.", "answer": True}


def arc(i, labels="ABCD", flat=False):
    """A question whose right choice is the colour that it names."""
    colours = ["red", "green", "blue", "grey", "brown"][: len(labels)]
    right = i % len(labels)
    record = {"id": str(i), "answerKey": labels[right]}
    stem = f"What is {colours[right]}?"
    if flat:
        return record | {
            "question": stem,
            "choices": {"text": colours, "label": list(labels)},
        }
    choices = [{"text": text, "label": label} for text, label in zip(colours, labels)]
    return record | {"question": {"stem": stem, "choices": choices}}


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def prompts():
    records = {
        "winogrande_s": [WINOGRANDE],
        "boolq": [BOOLQ],
        "arc_easy": [arc(i, "ABCDE") for i in range(5)],
    }
    return [e for task, each in records.items() for e in commonsense.examples(task, each)]


def make_tokenizer(corpus, vocab_size=400):
    """A byte-level BPE as GPT-2's, with Llama's token before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"{e.prompt} {candidate}" for e in prompts() for candidate in e.candidates]
    return make_tokenizer(texts * 3)


def llama(vocabulary):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,  # a random model whose attention looks at something
        )
    )


def gpt2(vocabulary):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    )


@pytest.fixture(scope="module", params=[llama, gpt2])
def base(request, tokenizer):
    return request.param(len(tokenizer)).eval()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A Llama and its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("llama")
    llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def arc_data(tmp_path):
    """ARC-Easy's files; choices are labelled by letters or numbers, three to five of them."""
    labels = ["ABCD", "1234", "ABC", "ABCDE"]
    for part, size in (("Train", 40), ("Dev", 8), ("Test", 12)):
        records = [arc(i, labels[i % 4]) for i in range(size)]
        write_lines(tmp_path / "arc" / f"ARC-Easy-{part}.jsonl", records)
    return tmp_path / "arc"


# --- records -------------------------------------------------------------------------------------


def test_winogrande():
    found = commonsense.example("winogrande_m", WINOGRANDE)
    assert found.prompt.endswith(
        "The cup did not fit the box because the _ was small.\nA. cup\nB. box\n\nAnswer:"
    )
    assert (found.candidates, found.label) == (("A", "B"), 1)


def test_boolq():
    found = commonsense.example("boolq", BOOLQ)
    assert found.prompt == "Snow is white.\n\nTrue or false: is snow white?\n\nAnswer:"
    assert found.candidates[found.label] == "True"
    assert commonsense.example("boolq", BOOLQ | {"answer": False}).label == 1 - found.label


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("labels", ["ABCD", "1234", "ABC", "ABCDE"])
def test_arc(labels, flat):
    found = commonsense.example("arc_challenge", arc(2, labels, flat))
    assert "What is blue?\nA. red\nB. green\nC. blue\n" in found.prompt
    assert found.prompt.count("\nD. grey") == (len(labels) > 3)
    # One set of candidates for all records, so that their logits make one tensor.
    assert (found.candidates, found.label) == (tuple("ABCDE"), 2)


def test_obqa():
    flat = arc(3, flat=True)
    flat["question_stem"] = flat.pop("question")
    assert commonsense.example("obqa", flat) == commonsense.example("obqa", arc(3))
    assert commonsense.example("obqa", flat).candidates == tuple("ABCD")


def test_braces_in_a_record_are_text():
    assert "{x}?" in commonsense.example("boolq", BOOLQ | {"question": "is {x}"}).prompt


@pytest.mark.parametrize(
    "task, record, message",
    [
        ("winogrande_s", WINOGRANDE | {"answer": ""}, r"one of \['1', '2'\]; got ''"),
        ("winogrande_s", BOOLQ, r"one of \['1', '2'\]; got True"),
        ("winogrande_s", {"answer": "1"}, "'option1' is missing"),
        ("boolq", BOOLQ | {"answer": "true"}, "got 'true'"),
        ("arc_easy", {"question": "?", "answerKey": "A"}, "'choices' is missing"),
        ("arc_easy", arc(0) | {"answerKey": "F"}, "got 'F'"),
        ("obqa", arc(0, "ABCDE"), "there are 5 choices"),
        ("obqa", [], "JSON object"),
        ("hellaswag", {}, "tasks are winogrande_s"),
    ],
)
def test_a_record_that_does_not_fit_is_named(task, record, message):
    with pytest.raises(ValueError, match=message):
        commonsense.examples(task, [record])


# --- files ---------------------------------------------------------------------------------------


def test_a_folder_of_json_lines(arc_data):
    train, test = commonsense.load("arc_easy", arc_data)
    assert (len(train), len(test)) == (40, 12)
    assert len(commonsense.load("arc_easy", arc_data, "tune")[1]) == 8


def test_of_one_file_every_fifth_example_is_held_out(arc_data):
    file = arc_data / "ARC-Easy-Test.jsonl"
    train, test = commonsense.load("arc_easy", file)
    each = commonsense.examples("arc_easy", map(json.loads, file.read_text().splitlines()))
    assert test == [each[4], each[9]]
    assert train == each[:4] + each[5:9] + each[10:]


def test_a_saved_dataset(tmp_path):
    parts = {"train": 6, "validation": 3, "test": 2}
    stored = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([arc(i, flat=True) for i in range(size)])
            for name, size in parts.items()
        }
    )
    stored.save_to_disk(tmp_path)
    train, test = commonsense.load("arc_challenge", tmp_path)
    assert train == commonsense.examples("arc_challenge", [arc(i) for i in range(6)])
    assert len(test) == 2 and len(commonsense.load("arc_challenge", tmp_path, "tune")[1]) == 3
    # And without files: any iterable of records.
    assert commonsense.examples("arc_challenge", stored["train"]) == train
    datasets.DatasetDict(test=stored["test"]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has the splits test and none of \['ARC-Challenge-Train"):
        commonsense.load("arc_challenge", tmp_path / "other")


def test_what_is_no_text_in_a_saved_dataset_is_not_decoded(tmp_path):
    picture = {"path": None, "bytes": b"no picture"}
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "passage": datasets.Value("string"),
            "answer": datasets.Value("bool"),
            "picture": datasets.Image(),
        }
    )
    stored = datasets.Dataset.from_list([BOOLQ | {"picture": picture}] * 2, features=features)
    datasets.DatasetDict(train=stored, validation=stored).save_to_disk(tmp_path / "data")
    train, _ = commonsense.load("boolq", tmp_path / "data")
    assert train == commonsense.examples("boolq", [BOOLQ] * 2)


def test_a_damaged_dataset_is_named(tmp_path):
    stored = datasets.Dataset.from_list([BOOLQ])
    datasets.DatasetDict(train=stored, validation=stored).save_to_disk(tmp_path)
    for file in (tmp_path / "train").glob("*.arrow"):
        file.write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged"):
        commonsense.load("boolq", tmp_path)


@pytest.mark.parametrize(
    "task, lines, split, message",
    [
        ("boolq", [BOOLQ, {"question": ""}], "test", r"train.jsonl, line 2: the field 'passage'"),
        ("boolq", [], "test", "train.jsonl has no examples"),
        ("boolq", [BOOLQ], "test", "none of .*dev.jsonl, .*validation.jsonl exists"),
        ("boolq", [BOOLQ], "tune", "boolq has the splits test; got 'tune'"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, task, lines, split, message):
    write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        commonsense.load(task, tmp_path, split)


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "boolq.jsonl"
    file.write_text(json.dumps(BOOLQ) + "\n{\n")
    with pytest.raises(ValueError, match=r"boolq\.jsonl, line 2: no JSON"):
        commonsense.load("boolq", file)
    write_lines(file, [BOOLQ] * 3)
    with pytest.raises(ValueError, match="at least five examples; it has 3"):
        commonsense.load("boolq", file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        commonsense.load("boolq", tmp_path / "none")


# --- tokens --------------------------------------------------------------------------------------


def test_answers_are_the_tokens_that_continue_the_prompt(tokenizer):
    for example in prompts():
        tokens = commonsense.answer_tokens(tokenizer, example)
        assert tokenizer.convert_ids_to_tokens(tokens) == [f"Ġ{c}" for c in example.candidates]


def test_an_answer_of_two_tokens_is_named(tokenizer):
    example = prompts()[0]._replace(candidates=("A", "Zeppelin"))
    with pytest.raises(ValueError, match="the answer 'Zeppelin' must add one known token"):
        commonsense.answer_tokens(tokenizer, example)


def test_an_answer_outside_the_vocabulary_is_named():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1, "A": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    example = commonsense.Example("Answer:", ("A", "B"), 0)
    with pytest.raises(ValueError, match="the answer 'B' must add one known token"):
        commonsense.answer_tokens(words, example)
    with pytest.raises(ValueError, match="'A' and 'A' are the same token"):
        commonsense.answer_tokens(words, example._replace(candidates=("A", "A")))


def test_a_long_prompt_keeps_its_start_token_and_its_end(tokenizer):
    short, long = prompts()[:2], prompts()[2:]
    length = max(len(tokenizer(e.prompt)["input_ids"]) for e in short[1:])
    data = commonsense.Prompts(tokenizer, [short[1], long[0]], length)
    assert data.truncated == 1 and tokenizer.truncation_side == "right"
    whole = tokenizer(long[0].prompt)["input_ids"]
    assert data[1][0].tolist() == [tokenizer.bos_token_id, *whole[-(length - 1) :]]
    assert data[0][0].tolist() == tokenizer(short[1].prompt)["input_ids"]


# --- logits --------------------------------------------------------------------------------------


def particles(base, count=2):
    """`count` particles with B drawn at random, so that they differ."""
    import copy

    targets = ["c_attn"] if isinstance(base, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    model = ml.get_particle_model(copy.deepcopy(base), config, count, seed=0)
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B.normal_(std=0.1)
    return model


@pytest.mark.parametrize("classes", ["answers", "vocabulary"])
def test_padding_does_not_change_the_logits(base, tokenizer, classes):
    examples = prompts()
    model = particles(base)
    tokens = commonsense.answer_tokens(tokenizer, examples[-1])
    answers = commonsense.AnswerLogits(base, tokens, classes)
    data = commonsense.Prompts(tokenizer, examples, 128)
    inputs, labels = commonsense.collate([data[i] for i in range(len(data))])
    assert len({len(row) for row in data.ids}) > 1  # something is padded
    with torch.no_grad():
        found = answers.predict(model, inputs)
        logits, targets = answers.learn(model, inputs, labels % 5)
        # The definition: the whole prompt alone, its last position, the candidates' columns.
        alone = [model(input_ids=row[None]).logits[:, 0, -1] for row in data.ids]
    alone = torch.stack(alone, 1)  # (K, N, vocabulary)
    assert alone.std(0).max() > 1e-3  # the particles differ
    torch.testing.assert_close(found, alone[..., tokens], rtol=1e-4, atol=1e-5)
    expected = alone if classes == "vocabulary" else alone[..., tokens]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    right = torch.tensor(tokens)[labels % 5] if classes == "vocabulary" else labels % 5
    assert torch.equal(targets, right)


def test_two_answers_have_a_divergence_in_the_vocabulary(tokenizer):
    base = llama(len(tokenizer))
    data = commonsense.Prompts(tokenizer, prompts()[1:2] * 2, 128)
    tokens = commonsense.answer_tokens(tokenizer, prompts()[1])
    inputs, labels = commonsense.collate([data[0], data[1]])
    model = particles(base)
    method = ml.IBDR(model)
    divergence = {}
    for classes in commonsense.CLASSES:
        answers = commonsense.AnswerLogits(base, tokens, classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if classes == "answers" else "error")
            stats = method.backward(lambda a=answers: a.learn(model, inputs, labels))
        divergence[classes] = stats["divergence"].item()
    assert divergence["answers"] == 0 and divergence["vocabulary"] < -1


def test_classes_are_checked(tokenizer):
    with pytest.raises(ValueError, match=r"'answers', 'vocabulary'.*'letters'"):
        commonsense.AnswerLogits(llama(len(tokenizer)), [1, 2], "letters")


# --- the command line ----------------------------------------------------------------------------


def command(folder, data, out, *more):
    lines = ["train", "--task", "arc_easy", "--model", str(folder), "--data", str(data)]
    lines += ["--steps", "40", "--batch-size", "8", "--lr", "0.02", "--particles", "2"]
    return [*lines, "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run, in which the answers are learnt."""
    path = tmp_path_factory.mktemp("run")
    for part, size in (("Train", 40), ("Test", 20)):
        write_lines(path / f"ARC-Easy-{part}.jsonl", [arc(i, "1234") for i in range(size)])
    assert cli.main(command(folder, path, path / "out")) == 0
    return path / "out"


def test_train_learns_and_evaluate_gives_the_same_measures(run, capsys):
    metrics = numbers(run)
    assert metrics["num_examples"] == 20 and metrics["particles"] == 2
    assert metrics["accuracy"] > 0.5  # of four choices
    settings = json.loads((run / "run.json").read_text())
    assert settings["lora_alpha"] == 16 and settings["classes"] == "answers"
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == metrics["accuracy"]
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-6)


def test_other_questions_are_measured_in_place_of_the_runs(run, tmp_path, capsys):
    for part, size in (("Train", 1), ("Test", 7)):
        write_lines(tmp_path / f"ARC-Easy-{part}.jsonl", [arc(i, "1234") for i in range(size)])
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_examples"] == 7 and found["accuracy"] > 0.5
    refused(["evaluate", run, "--data", tmp_path / "none"], capsys, "none does not exist")


def test_the_recipe_of_the_guide(folder, tmp_path, monkeypatch):
    (tmp_path / "MODEL_OR_FOLDER").symlink_to(folder)
    for part, size in (("Train", 20), ("Test", 10)):
        file = tmp_path / "ARC-Challenge" / f"ARC-Challenge-{part}.jsonl"
        write_lines(file, [arc(i, "1234") for i in range(size)])
    monkeypatch.chdir(tmp_path)
    assert cli.main([*recipe("--task arc_challenge"), "--steps", "2"]) == 0
    assert numbers(tmp_path / "runs" / "arc")["num_examples"] == 10
    settings = json.loads((tmp_path / "runs" / "arc" / "run.json").read_text())
    assert settings["batch_size"] == 8 and settings["targets"] == ["q_proj", "v_proj"]


def test_a_particle_is_an_adapter_of_the_language_model(run, folder):
    model, task, _ = training.load_run(run)
    x = task.collate([task.test[i] for i in range(3)])[0]
    expected = ml.predict(model.eval(), x, class_axis=-1)[1]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(plain, run / "particle_1").eval()
    found = ml.predict(adapted, x, class_axis=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method, classes", [("ibdr", "vocabulary"), ("svgd", "answers")])
def test_a_stopped_run_resumes_to_the_same_numbers(folder, arc_data, tmp_path, method, classes):
    settings = recommended(
        "arc_easy",
        method,
        str(arc_data),
        model=str(folder),
        classes=classes,
        steps=7,
        particles=2,
        split="tune",
    )

    def interrupt(step, steps, stats):
        if step == 5:
            raise KeyboardInterrupt

    training.train(settings, tmp_path / "whole", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=3, on_step=interrupt)
    training.train(settings, tmp_path / "run", save_every=3, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "run")["num_examples"] == 8


def test_long_prompts_are_reported(folder, arc_data):
    said = []
    options = commonsense.Options(
        task="arc_easy", data=str(arc_data), model=str(folder), max_length=20
    )
    task = commonsense.make(options, 0, said.append)
    assert said == ["52 of 52 prompts have more than 20 tokens and lose their beginning"]
    assert {len(row) for row in task.train.ids} == {20}
    # The model has 128 positions.
    records = [BOOLQ | {"passage": "Snow is white. " * 40}] * 5
    write_lines(arc_data / "boolq.jsonl", records)
    options = commonsense.Options(
        task="boolq", data=str(arc_data / "boolq.jsonl"), model=str(folder)
    )
    task = commonsense.make(options, 0, said.append)
    assert {len(row) for row in task.train.ids} == {128} and "more than 128 tokens" in said[1]


def test_a_configuration_without_weights(folder, arc_data):
    options = commonsense.Options(
        task="arc_easy", data=str(arc_data), model=str(folder), pretrained=False
    )
    bases = [commonsense.make(options, seed).base for seed in (0, 0, 1)]
    weights = [base.lm_head.weight for base in bases]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model", "{tmp}/none"], "could not load"),
        (["--data", "{tmp}/none"], "none does not exist"),
        (["--targets", "qkv"], "choose targets among ['down_proj'"),
        (["--classes", "answers", "--augment"], "augment = True is for"),
        (["--task", "boolq"], "train.jsonl exists"),
    ],
)
def test_train_says_what_is_wrong(folder, arc_data, tmp_path, capsys, more, message):
    more = [text.replace("{tmp}", str(tmp_path)) for text in more]
    assert cli.main(command(folder, arc_data, tmp_path / "run", *more)) == 1
    assert message in capsys.readouterr().err
