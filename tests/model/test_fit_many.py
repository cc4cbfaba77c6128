"""fit_many against transformers.Trainer, one PEFT model for each run; and what becomes of runs."""

import copy
import csv
import dataclasses
import json
import multiprocessing
import os
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
)

import multilora as ml
from models import FAMILIES, SIZES
from multilora.many import state
from multilora.many.table import MACHINE
from trainers import arguments, rows

# In float32, as many steps as a run takes: Trainer's own numbers, up to their rounding.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
pytestmark = pytest.mark.usefixtures("fresh_accelerate", "quick_collections")


def base_of(name="llama"):
    return FAMILIES[name].build(torch.float32)


def config(rank=2, name="llama", **changes):
    return FAMILIES[name].config(r=rank, lora_alpha=8, **changes)


#: What each run has of its own: rank, name of its data, and TrainingArguments.
SPECS = [
    (2, (16, 0), {"max_steps": 6, "per_device_train_batch_size": 4}),
    (
        4,
        (13, 2),
        {
            "num_train_epochs": 2,
            "max_steps": -1,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.1,
            "seed": 7,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
    ),
    (
        3,
        (11, 5),
        {
            "max_steps": 40,
            "seed": 3,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            "adam_beta2": 0.99,
        },
    ),
]


def alone(name, folder, spec, start, patience=None):
    """The tensors and the mean loss of a run by Trainer."""
    _, (examples, seed), changes = spec
    model = peft.PeftModel.from_pretrained(base_of(name), start, is_trainable=True)
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows(name, examples, seed=seed),
        eval_dataset=rows(name, 7, seed=1),
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )
    loss = trainer.train().training_loss
    tensors = {
        n.replace(".default", "").replace(".modules_to_save", ""): p.detach()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return tensors, loss, trainer.state.global_step, evaluated


def assert_as_alone(row, expected):
    tensors, loss, steps, evaluated = expected
    assert row.steps == steps and row.adapter.keys() == tensors.keys()
    assert row.train_loss == pytest.approx(loss, rel=1e-5)
    for name, t in tensors.items():
        torch.testing.assert_close(row.adapter[name], t, **CLOSE)
    if evaluated:
        assert row.measures["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-5)


@pytest.mark.parametrize("at_once", [None, 2])
def test_each_run_ends_as_trainer_would(tmp_path, at_once):
    """Own rank, data, batches, accumulation, clipping, decay, schedule, and early stopping."""
    configs = [config(rank) for rank, _, _ in SPECS]
    seeds = [changes.get("seed", 42) for _, _, changes in SPECS]
    ml.get_particle_model(base_of(), configs, seed=seeds).save_pretrained(tmp_path / "start")
    runs = []
    for k, (rank, (examples, seed), changes) in enumerate(SPECS):
        own = arguments(tmp_path, **changes)
        own.early_stopping_patience = 2 if k == 2 else None
        data = rows("llama", examples, seed=seed)
        runs.append(ml.Run(config(rank), data, own, eval_dataset=rows("llama", 7, seed=1)))
    results = ml.fit_many(base_of(), runs, at_once=at_once)
    for k, row in enumerate(results):
        start = tmp_path / "start" / f"particle_{k}"
        assert_as_alone(
            row, alone("llama", tmp_path, SPECS[k], start, patience=2 if k == 2 else None)
        )
    assert [row.status for row in results] == ["finished", "finished", "stopped early"]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("greater", [False, True])
def test_the_last_evaluation_counts(tmp_path, strategy, greater):
    """Of 7 steps, after 4 of which there is an evaluation; as in Trainer, also without a last part
    of the eval_dataset."""
    changes = {"max_steps": 7, "eval_steps": 4, "eval_strategy": strategy}
    changes |= {"metric_for_best_model": "loss", "greater_is_better": greater}
    changes |= {"load_best_model_at_end": True, "save_steps": 4, "save_strategy": strategy}
    changes |= {"per_device_eval_batch_size": 4, "dataloader_drop_last": True}
    ml.get_particle_model(base_of(), [config()], seed=[42]).save_pretrained(tmp_path / "start")
    own, data = arguments(tmp_path, **changes), rows("llama", 16)
    run = ml.Run(config(), data, own, eval_dataset=rows("llama", 7, seed=1))
    (row,) = ml.fit_many(base_of(), [run])
    spec = (2, (16, 0), changes)
    expected = alone("llama", tmp_path, spec, tmp_path / "start" / "particle_0")
    assert_as_alone(row, (*expected[:3], []))
    first, last = expected[3]
    assert last < first and row.best_step == (4 if greater else 7)
    assert row.measures["eval_loss"] == pytest.approx(first if greater else last, rel=1e-5)


def test_a_metric_that_an_evaluation_does_not_have():
    own = ml.RunArguments(max_steps=1, metric_for_best_model="f1")
    data = rows("llama", 8)
    runs = [
        ml.Run(config(), data, own, name, eval_dataset=data, metrics=lambda z, t, m=m: m)
        for name, m in (("typo", {"F1": 0.5}), ("right", {"f1": 0.5}))
    ]
    with pytest.warns(UserWarning, match="run 'typo': the metric eval_f1 is none of"):
        results = ml.fit_many(base_of(), runs, keep=1)
    assert [row.status for row in results] == ["finished"] * 2
    assert results["typo"].metric is None and results["right"].metric == 0.5
    assert all(row.adapter is not None for row in results)  # nothing is lost
    own = ml.RunArguments(max_steps=2, metric_for_best_model="f1", eval_strategy="epoch")
    scheduled = [dataclasses.replace(run, arguments=own) for run in runs]
    results = ml.fit_many(base_of(), scheduled)
    assert [row.status for row in results] == ["failed", "finished"]
    assert "eval_f1 is none of" in results["typo"].error


def test_examples_that_make_no_batch_of_an_evaluation():
    data, few = rows("llama", 8), rows("llama", 7)
    own = {"max_steps": 1, "dataloader_drop_last": True}
    (row,) = ml.fit_many(
        base_of(), [ml.Run(config(), data, ml.RunArguments(**own), eval_dataset=few)]
    )
    assert row.status == "finished" and row.adapter is not None and "eval_loss" in row.measures
    own |= {"eval_strategy": "epoch"}
    with pytest.raises(
        ValueError, match="run 'run_0': the eval_dataset has 7 examples, fewer than"
    ):
        ml.fit_many(base_of(), [ml.Run(config(), data, ml.RunArguments(**own), eval_dataset=few)])


def test_a_classifier_whose_loss_ignores_the_number_of_labels(tmp_path):
    """BERT: Trainer adds up the means of the micro-batches. Its head has a bias without decay."""
    changes = SPECS[1][2] | {"weight_decay": 0.5}
    spec = (2, (13, 2), changes)
    model = ml.get_particle_model(base_of("bert"), [config(2, "bert")], seed=[7], head_init="copy")
    model.save_pretrained(tmp_path / "start")
    run = ml.Run(config(2, "bert"), rows("bert", 13, seed=2), arguments(tmp_path, **changes))
    other = ml.Run(config(4, "bert"), rows("bert", 5), ml.RunArguments(max_steps=3, seed=1))
    row = ml.fit_many(base_of("bert"), [run, other], head_init="copy")[0]
    expected = alone("bert", tmp_path, spec, tmp_path / "start" / "particle_0")
    assert_as_alone(row, (*expected[:3], []))


@pytest.mark.parametrize("first", ["nothing", "infinite"])
def test_a_batch_that_says_nothing_about_the_loss(first):
    """Without labels, or with a loss that is not finite, in front of a run that accumulates."""
    own = ml.RunArguments(max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2)
    data = [{n: t.clamp(max=35) for n, t in r.items()} for r in rows("llama", 16, seed=2)]
    run = ml.Run(config(), data, own, "a")
    (alone,) = ml.fit_many(base_of(), [run])
    base, label = base_of(), -100 if first == "nothing" else 36
    real = base.loss_function
    base.loss_function = lambda logits, labels, *args, **kwargs: (
        real(logits, labels, *args, **kwargs) * (torch.inf if (labels == 36).any() else 1)
    )
    data = [r | {"labels": torch.full_like(r["labels"], label)} for r in rows("llama", 4)]
    odd = ml.Run(config(), data, ml.RunArguments(max_steps=1))
    results = ml.fit_many(base, [odd, run])
    assert results["a"].train_loss == pytest.approx(alone.train_loss, rel=1e-5)
    for name, t in alone.adapter.items():
        torch.testing.assert_close(results["a"].adapter[name], t, **CLOSE)


class Broken(list):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("no more disk")
        return super().__getitem__(i)


class Stream(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def mixed_runs():
    """Runs that finish, stop early and fail, with dropout."""
    A, evaluated = ml.RunArguments, rows("llama", 7, seed=1)

    def run(name, data, rank, loss=None, targets=("q_proj", "v_proj"), **own):
        own = A(**{"learning_rate": 1e-2, "seed": rank} | own)
        adapter = config(rank, lora_dropout=0.1, target_modules=list(targets))
        return ml.Run(adapter, data, own, name, evaluated, loss=loss)

    early = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "targets": ["q_proj", "up_proj"],
    }
    return [
        run("a", rows("llama", 16), 2, max_steps=9, gradient_accumulation_steps=2),
        run("b", rows("llama", 13), 4, max_steps=5, per_device_train_batch_size=3),
        run("broken", Broken(rows("llama", 11)), 3, max_steps=9),
        run("early", rows("llama", 9), 6, max_steps=40, **early),
        run("stream", Stream(rows("llama", 11)), 3, max_steps=4),
        run("ends", iter(rows("llama", 11)), 3, max_steps=9),
        run("foreign", foreign(rows("llama", 8)), 1, max_steps=3),
        run("nan", rows("llama", 8), 1, not_a_number, max_steps=3),
    ]


def foreign(examples):
    """Labels that are not in the vocabulary."""
    return [r | {"labels": torch.full_like(r["labels"], 10**6)} for r in examples]


def not_a_number(logits, targets):
    return logits.sum() * torch.nan


def on_any_machine(results):
    return [{n: v for n, v in row.items() if n not in MACHINE} for row in results.table()]


def test_a_run_that_fails_leaves_the_others_alone(tmp_path):
    results = ml.fit_many(base_of(), mixed_runs(), out=tmp_path, at_once=3, keep=2)
    status = {row.name: row.status for row in results}
    assert status == {
        "a": "finished",
        "b": "finished",
        "broken": "failed",
        "early": "stopped early",
        "stream": "finished",
        "ends": "failed",
        "foreign": "failed",
        "nan": "failed",
    }
    assert results["broken"].error == "OSError: no more disk"
    assert "the data has ended" in results["ends"].error
    assert "(run 'foreign')" in results["foreign"].error
    assert "loss or gradient of step 1 is not finite" in results["nan"].error
    # Without dropout, nobody sees the others at all.
    plain = [r for r in mixed_runs() if r.name in ("a", "broken", "foreign", "nan")]
    for run in plain:
        run.config.lora_dropout = 0.0
    together = ml.fit_many(base_of(), plain)
    by_itself = ml.fit_many(base_of(), plain[:1])
    for name, t in by_itself["a"].adapter.items():
        torch.testing.assert_close(together["a"].adapter[name], t, **CLOSE)

    # The two best are kept, and PEFT loads them.
    ended = [r for r in results if r.metric is not None]
    best = sorted(ended, key=lambda r: r.metric)[:2]
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {row.name for row in best} == {r.folder for r in results} - {None}
    for row in best:
        loaded = peft.PeftModel.from_pretrained(base_of(), tmp_path / row.name)
        ranks = {run.name: run.config.r for run in mixed_runs()}
        assert loaded.peft_config["default"].r == ranks[row.name]
    table = json.loads((tmp_path / "table.json").read_text())
    assert table == json.loads(json.dumps(results.table()))
    with open(tmp_path / "table.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [row.name for row in results]
    assert float(read[0]["train_loss"]) == results[0].train_loss
    assert "OSError: no more disk" in str(results)


def killed_at(number, folder):
    save, calls = state.save, iter(range(1, 1000))

    def saving(*args):
        save(*args)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    state.save = saving
    torch.set_num_threads(1)
    ml.fit_many(base_of(), mixed_runs(), out=folder, at_once=3, save_every=3)


def test_a_sweep_that_is_killed_ends_with_the_same_numbers(tmp_path):
    """To the bit, also in the middle of an accumulation, with dropout, and after replacements."""
    whole = ml.fit_many(base_of(), mixed_runs(), out=tmp_path / "whole", at_once=3, save_every=3)
    fork = multiprocessing.get_context("fork")
    for number in (1, 6):
        folder = tmp_path / str(number)
        process = fork.Process(target=killed_at, args=(number, folder))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        at_once = 3 if number == 1 else None  # that of the checkpoint
        results = ml.fit_many(base_of(), mixed_runs(), out=folder, at_once=at_once, save_every=3)
        assert on_any_machine(results) == on_any_machine(whole)
        for row in results:
            if row.folder is not None:
                file = f"{row.folder}/adapter_model.safetensors"
                mine, theirs = load_file(folder / file), load_file(tmp_path / "whole" / file)
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    # What has ended is not trained again.
    again = ml.fit_many(base_of(), mixed_runs(), out=tmp_path / "whole")
    assert again.table() == whole.table()
    with pytest.raises(ValueError, match="holds a sweep already"):
        ml.fit_many(base_of(), mixed_runs(), out=tmp_path / "whole", at_once=3, resume=False)
    with pytest.raises(ValueError, match="other runs: it has 'a' where there is 'b'"):
        ml.fit_many(base_of(), mixed_runs()[1:], out=tmp_path / "whole", at_once=3)
    with pytest.raises(ValueError, match="at_once=3; got 2"):
        ml.fit_many(base_of(), mixed_runs(), out=tmp_path / "whole", at_once=2)


class Shelf(list):
    """Data that may be gone when the sweep goes on."""

    gone = False

    def __len__(self):
        if self.gone:
            raise OSError("the disk is gone")
        return super().__len__()


def test_a_run_that_cannot_go_on_leaves_the_others_alone(tmp_path, monkeypatch):
    shelf = Shelf(rows("llama", 8))
    data = {"stays": rows("llama", 8), "gone": shelf}
    steps = ml.RunArguments(max_steps=4)
    runs = [ml.Run(config(2), examples, steps, name=name) for name, examples in data.items()]
    with monkeypatch.context() as patch:
        save = state.save

        def saved_and_killed(*args):
            save(*args)
            raise KeyboardInterrupt

        patch.setattr(state, "save", saved_and_killed)
        with pytest.raises(KeyboardInterrupt):
            ml.fit_many(base_of(), runs, out=tmp_path, save_every=2)
    shelf.gone = True
    results = ml.fit_many(base_of(), runs, out=tmp_path)
    assert {row.name: row.status for row in results} == {"stays": "finished", "gone": "failed"}
    assert "the disk is gone" in results["gone"].error
    whole = ml.fit_many(base_of(), runs[:1])
    assert results["stays"].train_loss == pytest.approx(whole["stays"].train_loss, rel=1e-9)


REFUSED = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "optim": {"optim": "adafactor"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "lr_scheduler_type": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
    },
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "eval_strategy": {"eval_strategy": "epoch"},
    "use_seedable_sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "gradient_accumulation_steps": {
        "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}
    },
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_change_a_result_is_refused(tmp_path, field):
    base = base_of()
    own = arguments(tmp_path, **REFUSED[field])
    with pytest.raises(ValueError, match=rf"run 'odd'.*{field}"):
        ml.fit_many(base, [ml.Run(config(), rows("llama", 8), own, name="odd")])
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_bad_runs():
    data, A = rows("llama", 8), ml.RunArguments
    cases = [
        ([], "non-empty list of Run"),
        ([ml.Run(config(), data, name="../up")], "a name has letters"),
        ([ml.Run(config(), data, name="a")] * 2, "two runs have the name 'a'"),
        ([ml.Run(config(), data, name="x" * 201)], "has at most 200 bytes"),
        ([ml.Run({"r": 2}, data, name="a")], "run 'a': config must be"),
        ([ml.Run(config(), data, A(lr_scheduler_type="cosin"), "a")], "run 'a': lr_scheduler_type"),
        ([ml.Run(config(), iter(data), name="a")], "run 'a': a dataset without a length"),
        ([ml.Run(config(), data, name="a", loss="mean")], "run 'a': loss must be"),
        ([ml.Run(config(), data, A(max_steps=1)), ml.Run(config(0), data)], "run 'run_1': .*"),
        ([ml.Run(config(), data, A(metric_for_best_model="f1"), "a")], "'a': .* an eval_dataset"),
        ([ml.Run(config(), data, A(greater_is_better=True), "a")], "'a': .* an eval_dataset"),
        (
            [ml.Run(config(), data, A(metric_for_best_model="acc"), "a", eval_dataset=data)],
            "run 'a': metric_for_best_model must be one of .*; got 'eval_acc'",
        ),
        (
            [ml.Run(config(), data, A(lr_scheduler_kwargs={"slope": 1}), "a")],
            "run 'a': lr_scheduler_type 'linear' with .*slope",
        ),
        (
            [ml.Run(config(), data, A(lr_scheduler_type="polynomial", learning_rate=1e-8), "a")],
            "run 'a': lr_scheduler_type 'polynomial' with .*lr_end",
        ),
    ]
    for runs, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            ml.fit_many(base_of(), runs)
    metrics = [
        ml.Run(config(), data, A(metric_for_best_model=name, max_steps=1), eval_dataset=data)
        for name in ("loss", "accuracy")
    ]
    with pytest.raises(ValueError, match="keep compares runs by one metric"):
        ml.fit_many(base_of(), metrics, keep=1)
    with pytest.raises(ValueError, match="learning_rate"):
        A(learning_rate=-1.0)
    with pytest.raises(ValueError, match="remove_unused_columns must be True or False"):
        A(remove_unused_columns="no")


@pytest.mark.parametrize("name", ["table.json", "table.csv", "Checkpoint.pt", "SWEEP.json"])
def test_names_of_files_are_none_of_runs(tmp_path, name):
    runs = [ml.Run(config(), rows("llama", 8), name=name)]
    with pytest.raises(ValueError, match=f"run '{name}' has the name of a file"):
        ml.fit_many(base_of(), runs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


UNFIT = {
    "field": ({"use_dora": True}, {}, NotImplementedError, "use_dora"),
    "targets": ({"target_modules": ["nowhere"]}, {}, ValueError, "nowhere"),
    "head": ({}, {"heads": {"lm_head": 5}}, ValueError, "lm_head"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_every_adapter_is_checked_before_any_trains(case):
    own, options, error, message = UNFIT[case]
    base, data, seen = base_of(), rows("llama", 8), []

    def collate(examples):
        seen.append(len(examples))

    runs = [
        ml.Run(config(), data, name="good", collate=collate),
        ml.Run(config(**own), data, name="odd", **options),
    ]
    with pytest.raises(error, match=f"run 'odd': .*{message}"):
        ml.fit_many(base, runs, at_once=1)
    assert not seen and not any("lora" in name for name, _ in base.named_parameters())


def unfinished(logits, targets):
    raise NotImplementedError("later")


def test_an_error_of_any_kind_is_that_of_its_run():
    own = ml.RunArguments(max_steps=2)
    runs = [
        ml.Run(config(), rows("llama", 8), own, "good"),
        ml.Run(config(), rows("llama", 8), own, "unfinished", loss=unfinished),
    ]
    results = ml.fit_many(base_of(), runs)
    assert [row.status for row in results] == ["finished", "failed"]
    assert results["unfinished"].error == "NotImplementedError: later"


def test_runs_that_cannot_share_a_pass_say_so_once():
    """A classifier without a token for padding takes one row at a time."""
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(**SIZES | {"pad_token_id": None}, num_labels=3)
    )
    data = [r | {"labels": r["labels"][3] % 3} for r in rows("llama", 4)]
    own = ml.RunArguments(max_steps=3, per_device_train_batch_size=1, learning_rate=1e-2)
    runs = [ml.Run(config(r), data, own, f"r{r}", data[:1]) for r in (2, 3)]
    options = {"head_init": "copy"}
    with pytest.warns(UserWarning, match="runs 'r2', 'r3' cannot share a pass") as seen:
        results = ml.fit_many(copy.deepcopy(base), runs, **options)
    assert len([w for w in seen if "cannot share" in str(w.message)]) == 1
    for run in runs:
        (alone,) = ml.fit_many(copy.deepcopy(base), [run], **options)
        for name, t in alone.adapter.items():
            torch.testing.assert_close(results[run.name].adapter[name], t, **CLOSE)


def test_pairs_losses_measures_and_heads_of_their_own():
    """A base that is not of transformers."""
    base = FAMILIES["vit"].build(torch.float32)
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 8, 8, generator=g), i % 3) for i in range(10)]
    lora = FAMILIES["vit"].config

    def wrong(logits, targets):
        return {"wrong": (logits.argmax(-1) != targets).double().mean().item()}

    own = ml.RunArguments(max_steps=4, learning_rate=1e-3, per_device_train_batch_size=4)
    runs = [
        ml.Run(lora(), data, own, "plain", data, metrics=wrong),
        ml.Run(lora(r=3), data, own, "smooth", data, loss="label_smoothing"),
        ml.Run(lora(), data, own, "three", data, heads={"head": 3}),
    ]
    results = ml.fit_many(copy.deepcopy(base), runs, head_init="copy")
    assert [row.status for row in results] == ["finished"] * 3
    measures = results["plain"].measures
    assert measures["eval_wrong"] == pytest.approx(1 - measures["eval_accuracy"])
    head = "base_model.model.head.weight"
    assert [len(row.adapter[head]) for row in results] == [5, 5, 3]
    odd = [
        ml.Run(lora(), data, own, "empty", [], metrics=wrong),
        ml.Run(lora(), data, own, "measure", data, metrics=lambda *_: {"x": 1 / 0}),
        ml.Run(lora(), data, own, "broken", Broken(data)),
    ]
    both = ml.fit_many(copy.deepcopy(base), [*odd, runs[0]], head_init="copy")
    assert [row.status for row in both] == ["failed"] * 3 + ["finished"]
    errors = ["ValueError: the eval_dataset is empty", "ZeroDivisionError", "OSError"]
    assert all(text in row.error for text, row in zip(errors, both))
    assert both["plain"].measures == pytest.approx(measures, rel=1e-5)
    assert results["smooth"].train_loss > results["plain"].train_loss
