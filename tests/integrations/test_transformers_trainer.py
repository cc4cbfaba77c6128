"""Particles under transformers' Trainer."""

import gc
import os
import shutil

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

import multilora as ml
from documents import block
from models import FAMILIES, VOCABULARY, particles_of
from multilora.integrations.transformers import ParticleTrainer
from processes import run_in_processes

K = 3
TOKENS = 5
METHODS = {
    "ensemble": ml.Ensemble,
    "svgd": ml.SVGD,
    "ibdr": lambda model: ml.IBDR(model, alpha=0.02),
}
EVERY = METHODS | {"learnt": lambda model: ml.IBDR(model, sigma=5e-2, learn_sigma=True)}
NAMES = ["llama", "gpt2", "bert"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate"),
]


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Trainer collects garbage at every start: half a second for all that tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows(name, number, seed=0):
    """A data set whose labels can be learnt: a label for BERT, answer tokens for the decoders."""
    inputs = FAMILIES[name].make_inputs(number, torch.Generator().manual_seed(seed))
    made = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        if name == "bert":
            labels = ids[0] % 3
        else:
            mask = torch.ones_like(ids)
            ids = torch.cat([ids[:3], ids[:2]])  # the answer repeats the question
            labels = torch.where(torch.arange(TOKENS) >= 3, ids, -100)
            labels[4] = -100 if ids[0] % 2 else labels[4]  # answers differ in length
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def particles(name, number=K, dropout=0.0, **kwargs):
    family = FAMILIES[name]
    config = family.config(lora_dropout=dropout, lora_alpha=16)
    return ml.get_particle_model(family.build(torch.float32), config, number, **kwargs)


def arguments(folder, **changes):
    chosen = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **chosen | changes)


def trainer_of(name, method, folder, model=None, examples=16, options=None, **changes):
    return ParticleTrainer(
        model or particles(name),
        arguments(folder, **changes),
        method=EVERY[method],
        train_dataset=rows(name, examples),
        eval_dataset=rows(name, 7, seed=1),
        **(options or {}),
    )


def values(model):
    return [p.detach().clone() for p in model.particle_parameters()]


def assert_equal(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 0})


def train_lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_every_particles_loss(name, method, tmp_path):
    trainer = trainer_of(name, method, tmp_path, max_steps=20, learning_rate=3e-2, logging_steps=4)
    before = trainer.evaluate(rows(name, 16))["eval_loss"]
    trainer.train()
    after = trainer.evaluate(rows(name, 16))["eval_loss"]
    assert after < 0.99 * before
    lines = train_lines(trainer)
    assert len(lines) == 5  # an epoch each
    for k in range(K):
        assert lines[-1][f"nll_particle_{k}"] < lines[0][f"nll_particle_{k}"]
    extra = {"ensemble": set(), "svgd": {"kernel", "distance"}}
    extra["ibdr"] = {"divergence", "lambda", "cost"}
    for line in lines:
        assert line.keys() >= {"nll", "grad_norm", "learning_rate"} | extra[method]
        each = [line[f"nll_particle_{k}"] for k in range(K)]
        assert line["nll"] == pytest.approx(np.mean(each), rel=1e-5)
        assert line["loss"] == pytest.approx(
            line["nll"] + (0.02 * line["divergence"] if method == "ibdr" else 0), abs=2e-4
        )
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)


def test_only_labelled_positions_reach_the_method(tmp_path):
    class Spy(ml.Ensemble):
        def backward(self, closure, scale=1.0):
            seen.append([tuple(t.shape) for t in closure()])
            return super().backward(closure, scale)

    seen, widths = [], []
    data = rows("llama", 4)
    model = particles("llama")
    model.base.lm_head.register_forward_hook(lambda *args: widths.append(args[-1].shape[1]))
    ParticleTrainer(model, arguments(tmp_path, max_steps=1), method=Spy, train_dataset=data).train()
    answers = sum((row["labels"] != -100).sum().item() for row in data)
    assert seen == [[(K, answers, VOCABULARY), (answers,)]] and answers < 4 * 2
    # The first answer token is predicted at position 2 of 5.
    assert set(widths) == {3}


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_labels_changes_nothing_much(method, tmp_path):
    data = rows("llama", 4)
    silent = [row | {"labels": torch.full_like(row["labels"], -100)} for row in data]
    trainer = trainer_of(
        "llama", method, tmp_path, max_steps=2, optim="sgd", lr_scheduler_type="constant"
    )
    trainer.train_dataset = silent
    before = values(trainer.model)
    trainer.train()
    # SVGD's particles still repel.
    tolerance = {"rtol": 0, "atol": 1e-3 if method == "svgd" else 0}
    assert_equal(values(trainer.model), before, **tolerance)
    assert trainer.evaluate(silent).keys() >= {"eval_loss"}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_ensemble_is_two_runs_of_a_loop(name, tmp_path):
    """Accumulation over 2 micro-batches, an epoch that ends with 1, warm-up, decay and no clip."""
    seeds = [5, 9]
    data = rows(name, 20)
    trainer = ParticleTrainer(
        particles(name, 2, seed=seeds),
        arguments(
            tmp_path, max_steps=9, gradient_accumulation_steps=2, weight_decay=0.1,
            warmup_steps=2, max_grad_norm=0.0,
        ),
        method=ml.Ensemble,
        train_dataset=data,
    )  # fmt: skip
    # The same order of the examples in every epoch, for the loop to follow.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()

    batches = [data[i : i + 4] for i in range(0, 20, 4)]
    steps = [batches[:2], batches[2:4], batches[4:]] * 3
    decayed = {name for name, _ in trainer.model.named_parameters() if "bias" not in name}
    for k, seed in enumerate(seeds):
        model = particles(name, 1, seed=[seed]).train()
        groups = [
            {
                "params": [
                    p for n, p in model.named_parameters() if p.requires_grad and n in decayed
                ]
            },
            {
                "params": [
                    p for n, p in model.named_parameters() if p.requires_grad and n not in decayed
                ],
                "weight_decay": 0.0,
            },
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        factor = [min(1.0, t / 2) if t < 2 else (9 - t) / 7 for t in range(10)]
        for step, micro_batches in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * factor[step]
            labels_of = [row["labels"][1:] if name == "llama" else row["labels"]
                         for batch in micro_batches for row in batch]  # fmt: skip
            number = sum((labels != -100).sum().item() for labels in labels_of)
            for batch in micro_batches:
                inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
                labels = inputs.pop("labels")
                logits = model(**inputs).logits[0]
                if name == "bert" and trainer.model_accepts_loss_kwargs:
                    number = len(batch)  # its loss stays a mean, and Trainer adds them up
                if name == "llama":
                    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                loss = nn.functional.cross_entropy(
                    logits, labels, ignore_index=-100, reduction="sum"
                )
                (loss / number).backward()
            optimizer.step()
            optimizer.zero_grad()
        alone = [p[0] for p in values(model)]
        together = [p[k] for p in values(trainer.model)]
        # GEMMs of other sizes round otherwise; AdamW's first steps amplify small gradients.
        assert_equal(together, alone, rtol=1e-3, atol=2e-5)
        assert any((a - b[0]).abs().max() > 1e-2 for a, b in zip(alone, values(particles(name))))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_evaluation_takes_the_memory_of_a_chunk(name, tmp_path):
    model = particles_of(FAMILIES[name].build(torch.float32), FAMILIES[name].config(), K)
    sizes = []
    embedding = model.base.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, y: sizes.append(len(y)))
    results = []
    for chunk, most in ((None, 7 * K), (2, 7 * 2)):
        trainer = trainer_of(name, "svgd", tmp_path, model)
        trainer._make_method = lambda model, chunk=chunk: ml.SVGD(model, particle_chunk=chunk)
        sizes.clear()
        result = trainer.evaluate()
        assert max(sizes) == most
        results.append({k: v for k, v in result.items() if "second" not in k and "time" not in k})
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_evaluation_is_of_the_averaged_predictive(name, tmp_path):
    model = particles_of(FAMILIES[name].build(torch.float32), FAMILIES[name].config(), K)
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"mine": 1.0, "accuracy": 0.5}

    # 7 examples in batches of 3 and 1: means over batches would differ.
    trainer = trainer_of(
        name, "ensemble", tmp_path, model, options={"compute_metrics": compute},
        per_device_eval_batch_size=3,
    )  # fmt: skip
    result = trainer.evaluate()
    data = rows(name, 7, seed=1)
    inputs = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.double()
    if name == "llama":
        logits, labels = logits[:, :, :-1], labels[:, 1:]
    p = logits.softmax(-1).mean(0)
    valid = labels != -100
    nll = -p[valid].gather(-1, labels[valid][:, None]).log().mean().item()
    assert result["eval_loss"] == pytest.approx(nll, rel=1e-5)

    # A metric of the user's has precedence over ours of the same name.
    assert result["eval_mine"] == 1 and result["eval_accuracy"] == 0.5
    prediction = seen[0]
    where = prediction.label_ids != -100
    assert np.array_equal(prediction.label_ids[where], labels[valid].numpy())
    got = torch.from_numpy(prediction.predictions[where]).double()
    torch.testing.assert_close(got, p[valid].log(), rtol=1e-4, atol=1e-5)
    if name == "llama":
        # Positions of the question before its last token are not there.
        assert prediction.predictions.shape == (7, 3, VOCABULARY)
        assert "eval_brier" not in result
        return
    expected = ml.metrics.evaluate(logits, labels)
    for key in ("nll", "ece", "brier", "mutual_information", "diversity"):
        assert result[f"eval_{key}"] == pytest.approx(expected[key], abs=1e-5)
    for k in range(K):
        assert result[f"eval_nll_particle_{k}"] == pytest.approx(
            expected["member_nll"][k], abs=1e-5
        )
        assert result[f"eval_accuracy_particle_{k}"] == expected["member_accuracy"][k]
    trainer.args.prediction_loss_only = True
    assert "eval_brier" not in trainer.evaluate()


def test_prediction_needs_no_labels(tmp_path):
    for name, shape in (("bert", (7, 3)), ("llama", (7, TOKENS, VOCABULARY))):
        data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(name, 7)]
        output = trainer_of(name, "ensemble", tmp_path).predict(data)
        assert output.predictions.shape == shape and output.label_ids is None
        # Log-probabilities.
        np.testing.assert_allclose(np.exp(output.predictions).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "learnt"), ("gpt2", "svgd"), ("bert", "learnt"), ("bert", "ensemble")],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(name, method, tmp_path):
    """With dropout and noise that are drawn, shuffled data, and in the middle of an epoch."""
    changes = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole = trainer_of(name, method, tmp_path / "whole", particles(name, dropout=0.3), **changes)
    whole.train()
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
    # Particles of other seeds: all numbers must come from the checkpoint.
    resumed = trainer_of(name, method, folder, particles(name, dropout=0.3, seed=8), **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(values(resumed.model), values(whole.model))
    assert_equal(resumed.method.parameters(), whole.method.parameters())
    assert train_lines(resumed)[-1]["nll"] == train_lines(whole)[-1]["nll"]
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_checkpoints_hold_particles_and_no_base(tmp_path):
    trainer = trainer_of("bert", "ibdr", tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert {p.name for p in folder.iterdir()} == {
        "multilora.json", "multilora_method.pt", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json", "training_args.bin", *(f"particle_{k}" for k in range(K)),
    }  # fmt: skip
    loaded = ml.load_particle_model(FAMILIES["bert"].build(torch.float32), folder)
    assert_equal(values(loaded), values(trainer.model))
    state = torch.load(folder / "multilora_method.pt", weights_only=True)
    assert state["method"] == "IBDR" and state["state"]["step"] == 6
    trainer.save_model(str(tmp_path / "final"))
    final = ml.load_particle_model(FAMILIES["bert"].build(torch.float32), tmp_path / "final")
    assert_equal(values(final), values(trainer.model))


def test_the_best_model_comes_back(tmp_path):
    saved = []

    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            saved.append((metrics["eval_loss"], values(model)))

    # Steps so long that the loss goes up again.
    trainer = trainer_of(
        "gpt2", "ensemble", tmp_path, learning_rate=0.5, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, save_total_limit=1, options={"callbacks": [Remember()]},
    )  # fmt: skip
    trainer.train()
    losses = [loss for loss, _ in saved]
    best = losses.index(min(losses))
    assert best < len(losses) - 1
    assert_equal(values(trainer.model), saved[best][1])


def test_a_learnt_sigma_is_trained_and_not_decayed(tmp_path):
    grads, left = [], []

    class Remember(TrainerCallback):
        def on_step_begin(self, *_, **__):
            left.append(trainer.method.sigma.grad)

        def on_pre_optimizer_step(self, *_, **__):
            grads.append(trainer.method.sigma.grad.clone())

    trainer = trainer_of(
        "bert", "learnt", tmp_path, learning_rate=1e-3, weight_decay=100.0, optim="sgd",
        lr_scheduler_type="constant", options={"callbacks": [Remember()]},
    )  # fmt: skip
    start = trainer.method.sigma.detach().clone()
    trainer.train()
    assert left == [None] * 6
    # Plain descent along its gradients.
    torch.testing.assert_close(trainer.method.sigma, start - 1e-3 * sum(grads))
    assert len(grads) == 6 and all(g.abs().max() > 0 for g in grads)
    # A second call goes on with the same method and optimizer.
    trainer.train()
    assert [len(group["params"]) for group in trainer.optimizer.param_groups][2:] == [1]


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name, tmp_path):
    plain, checked = (
        trainer_of(name, "ibdr", tmp_path, gradient_checkpointing=on, max_steps=2)
        for on in (False, True)
    )
    for trainer in (plain, checked):
        trainer.train()
    assert checked.model.base.is_gradient_checkpointing
    assert not plain.model.base.is_gradient_checkpointing
    assert_equal(values(checked.model), values(plain.model), rtol=1e-4, atol=1e-5)
    reentrant = trainer_of(
        name, "ibdr", tmp_path, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    reentrant.model.base.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reentrant.train()


def test_bfloat16(tmp_path):
    ran = []
    exact = trainer_of("llama", "ibdr", tmp_path)
    exact.train()
    trainer = trainer_of("llama", "ibdr", tmp_path, bf16=True)
    layer = trainer.model.base.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: ran.append(output.dtype))
    trainer.train()
    assert set(ran) == {torch.bfloat16}
    got, expected = train_lines(trainer)[-1], train_lines(exact)[-1]
    # 2⁻⁹ is a rounding of bfloat16, and the logits are small.
    assert got["nll"] == pytest.approx(expected["nll"], rel=2**-9)
    assert got["nll"] != expected["nll"]


def test_a_gradient_scaler_takes_part(tmp_path):
    """accelerate makes one on a GPU only; this is what it would be given there."""
    trained = []
    for scaled in (False, True):
        trainer = trainer_of("bert", "ibdr", tmp_path, max_grad_norm=0.0, optim="sgd")
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        trainer.train()
        trained.append(values(trainer.model))
    assert trainer.accelerator.scaler.get_scale() == 2.0**12
    assert_equal(trained[1], trained[0], rtol=1e-4, atol=1e-6)


# Each process has half of every micro-batch. In double precision, for rounding to stay small.
SHARED = {
    "max_steps": 3, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0,
    "logging_steps": 1,
}  # fmt: skip


def train_in_two(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    # accelerate wants them; the processes have met already.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for checkpoint in (None, folder / "checkpoint-1"):
        trainer = trainer_of(
            "gpt2", "ibdr", folder, particles("gpt2").double(), examples=32, **SHARED,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    kinds = [type(trainer.model_wrapped).__name__, trainer.args.world_size]
    return kinds, values(trainer.model), trainer.evaluate()["eval_loss"], train_lines(trainer)


def test_two_processes_train_as_one(tmp_path):
    results = run_in_processes(2, train_in_two, tmp_path)
    trainer = trainer_of(
        "gpt2", "ibdr", tmp_path / "one", particles("gpt2").double(), examples=32, **SHARED,
        per_device_train_batch_size=8,
    )  # fmt: skip
    before = values(trainer.model)
    trainer.train()
    for kinds, parameters, loss, lines in results:
        assert kinds == ["DistributedDataParallel", 2]
        assert_equal(parameters, values(trainer.model), rtol=1e-9, atol=1e-12)
        assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
        for line, expected in zip(lines, train_lines(trainer), strict=True):
            for key in ("loss", "nll", "divergence", "nll_particle_0"):
                assert line[key] == pytest.approx(expected[key], rel=1e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, values(trainer.model)))


def test_a_tokenizers_answers(tmp_path, monkeypatch):
    """The guide's trainer, on questions with one-word answers and a tokenizer made for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    questions = {
        f"{a} {relation} {b} ?": "yes" if (a < b) == (relation == "before") else "no"
        for a in "abcdefgh"
        for b in "abcdefgh"
        for relation in ("before", "after")
        if a != b
    }
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    texts = [f"{q} {a}" for q, a in questions.items()]
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    tokenizer.padding_side = "right"

    def encode(question, answer):
        # Questions of two lengths, so that padding takes part.
        question = question.removesuffix(" ?") if question < "d" else question
        prompt = tokenizer(question)["input_ids"]
        ids = [*prompt, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    train = [encode(q, a) for q, a in questions.items()]
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=16, pad_token_id=0,
            initializer_range=0.3,
        )
    )  # fmt: skip
    scope = {
        "ml": ml, "peft": peft, "base": base, "train": train, "held_out": train[::3],
        "tokenizer": tokenizer,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = block("docs/guides/loops.md", "## With transformers' Trainer", "python")
    shown = """TrainingArguments(
        "out", bf16=torch.cuda.is_available(), learning_rate=1e-3, num_train_epochs=3
    )"""
    assert shown in code
    # As shown, but for what a random base needs and a test does not.
    code = code.replace(
        shown,
        'TrainingArguments("out", learning_rate=3e-2, num_train_epochs=3, use_cpu=True, '
        'report_to=[], disable_tqdm=True, logging_steps=5, save_strategy="no")',
    )
    exec(code, scope)
    trainer = scope["trainer"]
    lines = train_lines(trainer)
    assert lines[-1]["nll"] < 0.5 * lines[0]["nll"]
    assert ml.load_particle_model(fresh(base), tmp_path / "particles").num_particles == 4

    # Padded and answered: only "yes", "no" and [EOS] are predicted where labels are.
    output = trainer.predict(train)
    where = output.label_ids != -100
    assert where.sum() == 2 * len(train)
    chosen = output.predictions[where].argmax(-1)
    assert set(tokenizer.convert_ids_to_tokens(chosen.tolist())) <= {"yes", "no", "[EOS]"}


def fresh(base):
    """A plain model of the configuration of one that has particles by now."""
    return type(base)(base.config)


def test_columns_that_the_base_does_not_take(tmp_path):
    from datasets import Dataset

    data = Dataset.from_list(
        [{k: v.tolist() for k, v in row.items()} | {"text": "no tensor"} for row in rows("bert", 8)]
    )
    trainer = ParticleTrainer(
        particles("bert"), arguments(tmp_path), method=ml.SVGD, train_dataset=data
    )
    trainer.train()
    assert trainer.state.global_step == 6


class TestRefusals:
    def test_models_and_methods(self, tmp_path):
        model = particles("bert")
        with pytest.raises(TypeError, match="ParticleModel; got BertForSequenceClassification"):
            ParticleTrainer(FAMILIES["bert"].build(), method=ml.SVGD)
        with pytest.raises(TypeError, match="callable, model -> Method"):
            ParticleTrainer(model, arguments(tmp_path), method=ml.SVGD(model))
        with pytest.raises(TypeError, match="must return a Method; got Identity"):
            _ = ParticleTrainer(model, arguments(tmp_path), method=nn.Identity).method

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
            ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha=5.0"),
            ({"label_names": ["start_positions"]}, {}, "label_names=.'start_positions'."),
            ({}, {"compute_loss_func": max}, "compute_loss_func="),
        ],
    )
    def test_options_that_would_not_reach_the_method(self, changes, options, message, tmp_path):
        with pytest.raises(ValueError, match=f"does not support {message}"):
            trainer_of("bert", "svgd", tmp_path, options=options, **changes)

    def test_a_mesh(self, tmp_path):
        def refused(rank, folder):
            mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("particle",))
            with pytest.raises(ValueError, match="without a mesh"):
                trainer_of("bert", "svgd", folder, particles("bert", mesh=mesh))

        run_in_processes(1, refused, tmp_path)

    def test_data_parallel(self, tmp_path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(ValueError, match="torchrun"):
            ParticleTrainer(particles("bert"), args, method=ml.SVGD)

    @pytest.mark.parametrize(
        "changes", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}]
    )
    def test_problems_that_are_no_classification(self, changes, tmp_path):
        model = particles("bert")
        for key, value in changes.items():
            setattr(model.base.config, key, value)
        with pytest.raises(ValueError, match="BertForSequenceClassification with problem_type"):
            ParticleTrainer(model, arguments(tmp_path), method=ml.SVGD)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("bert", lambda labels: None, "needs labels; got .'attention_mask', 'input_ids'"),
            ("bert", lambda labels: labels.float(), r"\(B,\) of a classifier; got torch.float32"),
            ("bert", lambda labels: labels.expand(2), r"\(B,\) of a classifier; got .* \(4, 2\)"),
            ("llama", lambda labels: labels[0], r"\(B, T\) of tokens; got .* \(4,\)"),
            (
                "llama",
                lambda labels: labels[:-1],
                r"every token; got \(4, 4\) for input_ids \(4, 5\)",
            ),
        ],
    )
    def test_labels(self, name, change, message, tmp_path):
        data = [row | {"labels": change(row["labels"])} for row in rows(name, 8)]
        data = [{k: v for k, v in row.items() if v is not None} for row in data]
        trainer = ParticleTrainer(
            particles(name), arguments(tmp_path), method=ml.SVGD, train_dataset=data
        )
        with pytest.raises(ValueError, match=message):
            trainer.train()


class TestDamagedCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        trainer_of("bert", "ibdr", tmp_path, save_strategy="steps", save_steps=2).train()
        return tmp_path

    @staticmethod
    def resume(folder, model=None, checkpoint=None):
        trainer = trainer_of("bert", "ibdr", folder, model, max_steps=8)
        trainer.train(resume_from_checkpoint=checkpoint or True)
        return trainer

    def test_one_that_was_not_written_to_its_end_is_passed_over(self, folder):
        state = folder / "checkpoint-6" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
        (folder / "checkpoint-4" / "trainer_state.json").unlink()
        seen = []

        class Remember(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.global_step)

        trainer = trainer_of(
            "bert", "ibdr", folder, max_steps=8, options={"callbacks": [Remember()]}
        )
        trainer.train(resume_from_checkpoint=True)
        assert seen == [3, 4, 5, 6, 7, 8]
        for step in (2, 4, 6):
            shutil.rmtree(folder / f"checkpoint-{step}")
        with pytest.raises(ValueError, match="no checkpoint that was written to its end"):
            self.resume(folder)

    def test_the_methods_file(self, folder):
        file = folder / "checkpoint-6" / "multilora_method.pt"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            self.resume(folder)
        saved = torch.load(folder / "checkpoint-4" / file.name, weights_only=True)
        del saved["state"]["lambda"]
        torch.save(saved, file)
        with pytest.raises(ValueError, match=f"{file} .*needs the keys"):
            self.resume(folder)
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            self.resume(folder)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=str(file)):
            self.resume(folder)

    def test_another_run(self, folder):
        checkpoint = str(folder / "checkpoint-6")
        with pytest.raises(ValueError, match="has 3 particles; the model has 2"):
            self.resume(folder, model=particles("bert", 2), checkpoint=checkpoint)
        config = FAMILIES["bert"].config(lora_alpha=7)
        other = ml.get_particle_model(FAMILIES["bert"].build(torch.float32), config, K)
        with pytest.raises(ValueError, match="lora_alpha = 16; the model has lora_alpha = 7"):
            self.resume(folder, model=other, checkpoint=checkpoint)
        weights = folder / "checkpoint-6" / "particle_1" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(ValueError, match=f"{weights} is damaged"):
            self.resume(folder, checkpoint=checkpoint)


def test_a_method_of_another_kind_is_refused(tmp_path):
    trainer_of("bert", "svgd", tmp_path, save_strategy="steps", save_steps=2).train()
    other = trainer_of("bert", "ensemble", tmp_path, max_steps=8)
    with pytest.raises(ValueError, match=r"multilora_method\.pt .*of the method SVGD"):
        other.train(resume_from_checkpoint=True)
