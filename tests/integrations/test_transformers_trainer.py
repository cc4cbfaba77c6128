"""Particles trained by transformers' Trainer."""

import os

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import multilora as ml
from documents import block
from models import VOCABULARY
from multilora.integrations.transformers import ParticleTrainer
from processes import run_in_processes
from trainers import (
    METHODS,
    NAMES,
    K,
    arguments,
    assert_equal,
    particles,
    rows,
    train_lines,
    trainer_of,
    values,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate", "quick_collections"),
]


@pytest.mark.cover
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


def test_a_learnt_sigma_is_trained_and_not_decayed(tmp_path):
    grads, left = [], []

    class Remember(TrainerCallback):
        def on_step_begin(self, *_, **__):
            left.append(trainer.method.parameters()[0].grad)

        def on_pre_optimizer_step(self, *_, **__):
            grads.append(trainer.method.parameters()[0].grad.clone())

    trainer = trainer_of(
        "bert", "learnt", tmp_path, learning_rate=1e-3, weight_decay=100.0, optim="sgd",
        lr_scheduler_type="constant", options={"callbacks": [Remember()]},
    )  # fmt: skip
    start = trainer.method.parameters()[0].detach().clone()
    trainer.train()
    assert left == [None] * 6
    # Plain descent along its gradients.
    torch.testing.assert_close(trainer.method.parameters()[0], start - 1e-3 * sum(grads))
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


@pytest.mark.slow
@pytest.mark.processes
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
    # The block as shown, except for settings that suit a random base and a test.
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
