"""ParticleTrainer is transformers' Trainer, K times: steps, tasks, router losses, refusals."""

import tempfile
from pathlib import Path

import numpy as np
import peft
import pytest
import timm.optim
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import multilora as ml
from models import load_peft, particle_tensors, particles_of, peft_tensors, values
from multilora.integrations.transformers import ParticleTrainer
from multilora.optim import EachParticle, separate_parameters

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "quick_collections")


VOCABULARY = 41
TINY = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
BERT = TINY | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 5,
}  # fmt: skip
MIXTURE = TINY | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "output_router_logits": True,
}  # fmt: skip


def gpt2():
    # Layer norms in the model's own precision: float64 all through.
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )
    )  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=VOCABULARY,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
            vocab_size=VOCABULARY, max_position_embeddings=32, decoder_start_token_id=2,
            pad_token_id=1, init_std=0.3,
        )
    )  # fmt: skip


def mixtral(coefficient=0.5, **changes):
    config = transformers.MixtralConfig(
        num_local_experts=4, router_aux_loss_coef=coefficient, **MIXTURE | changes
    )
    return transformers.MixtralForCausalLM(config)


def qwen_moe():
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5, decoder_sparse_step=1,
            moe_intermediate_size=8, shared_expert_intermediate_size=8, **MIXTURE,
        )
    )  # fmt: skip


# (a model, what is adapted, the axes of its labels)
TASKS = {
    # Without padding: transformers 4.51 has no masks of float64.
    "causal": (gpt2, ["c_attn"], "whole tokens"),
    "masked": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        ["query"],
        "tokens",
    ),
    "token classes": (
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT)),
        ["query", "value"],
        "classes of tokens",
    ),
    "classes": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        ["query"],
        "classes",
    ),
    "t5": (t5, ["q", "v"], "answers"),
    "bart": (bart, ["q_proj", "v_proj"], "answers"),
    "mixtral": (mixtral, ["q_proj", "v_proj"], "tokens"),
    "qwen2-moe": (qwen_moe, ["q_proj", "v_proj"], "tokens"),
}


def build(create, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create().to(dtype).eval()


def rows(kind, number=12, seed=0):
    """Examples whose numbers of labels differ, and with padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(number):
        ids = torch.randint(3, VOCABULARY, (8,), generator=generator)
        length = 8 if kind == "whole tokens" else 8 - i % 3
        row = {"input_ids": ids, "attention_mask": (torch.arange(8) < length).long()}
        if kind == "classes":
            row["labels"] = ids[0] % 5
        elif kind == "answers":
            answer = torch.randint(3, VOCABULARY, (5,), generator=generator)
            row["labels"] = torch.where(torch.arange(5) < 1 + i % 5, answer, -100)
        else:
            labels = ids % 5 if kind == "classes of tokens" else ids
            shown = (torch.arange(8) >= (5 * i) % 7 + 1) & (torch.arange(8) < length)
            row["labels"] = torch.where(shown, labels, -100)
        made.append(row)
    return made


def arguments(**changes):
    chosen = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1.0,
    }  # fmt: skip
    return TrainingArguments(tempfile.mkdtemp(), **chosen | changes)


def particles(task, number=3, dtype=torch.float64):
    create, targets, _ = TASKS[task]
    # Grouped products of experts are of float32 at most.
    dtype = torch.float32 if task in ("mixtral", "qwen2-moe") else dtype
    base = build(create, dtype)
    return base, particles_of(base, peft.LoraConfig(r=2, target_modules=targets), number)


def trainer_of(task, model, method=ml.Ensemble, kind=ParticleTrainer, options=None, **changes):
    options = {"method": method} | (options or {}) if kind is not Trainer else options or {}
    return kind(
        model,
        arguments(**changes),
        train_dataset=rows(TASKS[task][2]),
        eval_dataset=rows(TASKS[task][2], 5, seed=1),
        data_collator=default_data_collator,
        **options,
    )


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """transformers' loss of causal models, which rounds logits to float32, in float64."""
    targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def train_alone(task, base, model, options=None, **changes):
    """Trainer and PEFT for every particle -> their tensors, stacked, and their log lines."""
    folder, each, logs = tempfile.mkdtemp(), [], []
    model.save_pretrained(folder)
    for k in range(model.num_particles):
        alone = load_peft(base, f"{folder}/particle_{k}")
        if task == "causal":
            alone.base_model.model.loss_function = exact_loss
        trainer = trainer_of(task, alone, kind=Trainer, options=options, **changes)
        trainer.train()
        each.append({name: t.detach() for name, t in peft_tensors(alone).items()})
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}, logs


def assert_equal_runs(model, expected, before, **tolerance):
    tensors = particle_tensors(model)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.detach(), expected[name], **tolerance)
    moved = max((t - old).abs().max() for t, old in zip(tensors.values(), before, strict=True))
    assert moved > 1e-3


EXACT = {"rtol": 1e-9, "atol": 1e-9}
# transformers computes some losses and norms in float32, whatever the model's dtype.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# The parameters that one step of plain descent changes in these models.
SGD = {"optim": "sgd", "learning_rate": 0.3}


# --- steps ---------------------------------------------------------------------------------------


def test_one_particle_is_trainer_and_peft_step_by_step():
    """Unequal numbers of labels, accumulation, clipping; the lines of the log too."""
    base, model = particles("causal", 1)
    before = values(model)
    changes = SGD | {"max_steps": 6, "max_grad_norm": 4.0}
    expected, ((*lines,),) = train_alone("causal", base, model, **changes)
    trainer = trainer_of("causal", model, **changes)
    trainer.train()
    assert_equal_runs(model, expected, before, **EXACT)
    ours = [line for line in trainer.state.log_history if "loss" in line]
    norms = [line["grad_norm"] for line in lines]
    assert min(norms) < 4 < max(norms)
    for line, other in zip(ours, lines, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            # transformers 4 rounds the loss.
            assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-4 * (name == "loss"))
        assert line["grad_norm_particle_0"] == line["grad_norm"]


OPTIMIZERS = {
    "adamw": {},
    "sgd": SGD,
    "adafactor": {"optim": "adafactor"},
    "lamb": {"options": {"optimizer_cls_and_kwargs": (timm.optim.Lamb, {"lr": 1e-2})}},
    "muon": {"options": {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": 1e-2})}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_particles_are_trainers_and_peft(optimizer):
    """Lamb clips by itself too, the norm of all that it is given."""
    base, model = particles("causal", 4)
    before, changes = values(model), {"max_grad_norm": 0.5} | OPTIMIZERS[optimizer]
    expected, logs = train_alone("causal", base, model, weight_decay=0.1, **changes)
    trainer = trainer_of("causal", model, weight_decay=0.1, **changes)
    trainer.train()
    assert_equal_runs(model, expected, before, **EXACT)
    ours = [line for line in trainer.state.log_history if "loss" in line]
    for step, line in enumerate(ours):
        norms = [lines[step]["grad_norm"] for lines in logs]
        each = [line[f"grad_norm_particle_{k}"] for k in range(4)]
        assert each == pytest.approx(norms, rel=1e-6) and line["grad_norm"] == max(each)
        losses = [lines[step]["loss"] for lines in logs]
        # transformers 4 rounds it.
        assert line["loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)


def test_a_micro_batch_without_labels_takes_no_part():
    calls = []

    class Spy(ml.IBDR):
        def backward(self, closure, scale=1.0):
            calls.append(scale)
            return super().backward(closure, scale)

    _, model = particles("causal", 2)
    trainer = trainer_of("causal", model, Spy, max_steps=1)
    trainer.train_dataset = [
        row | {"labels": row["labels"] * 0 - 100 if i < 2 else row["labels"]}
        for i, row in enumerate(rows("whole tokens", 4))
    ]
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(4))
    trainer.train()
    assert calls == [1.0]
    assert all(p.isfinite().all() for p in values(model))


@pytest.mark.parametrize("method", [ml.SVGD, lambda m: ml.IBDR(m, sigma=0.05, learn_sigma=True)])
def test_a_resumed_run_of_an_optimizer_for_each_particle(method, tmp_path):
    changes = {"optim": "adafactor", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of("causal", particles("causal")[1], method, **changes)
    assert whole.optimizer is None
    whole.train()
    assert isinstance(whole.optimizer.optimizer, EachParticle)
    resumed = trainer_of("causal", particles("causal")[1], method, **changes)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for a, b in zip(values(whole.model), values(resumed.model)):
        assert torch.equal(a, b)
    for a, b in zip(whole.method.parameters(), resumed.method.parameters()):
        assert torch.equal(a, b) and (a != 0.05).all()
    ours, theirs = (t.optimizer.state_dict()["optimizers"] for t in (whole, resumed))
    assert str(ours) == str(theirs) and len(ours) == 3


def test_an_optimizer_that_is_given():
    _, model = particles("causal")
    stacked = torch.optim.Adafactor(model.particle_parameters())
    with pytest.raises(ValueError, match="Adafactor may take a stacked tensor"):
        trainer_of("causal", model, options={"optimizers": (stacked, None)})
    for optimizer in (
        torch.optim.AdamW(model.particle_parameters()),
        torch.optim.Adafactor(separate_parameters(model)),
        EachParticle(model, torch.optim.Adafactor),
    ):
        before = values(model)
        trainer_of("causal", model, options={"optimizers": (optimizer, None)}).train()
        assert all((a != b).any() for a, b in zip(before, values(model)))


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("task", [name for name in TASKS if name != "causal"])
def test_every_task_is_trained_as_trainer_trains_it(task, micro_batches):
    """Over two micro-batches too, whose means Trainer adds up where the model ignores counts."""
    base, model = particles(task, 2)
    before, changes = values(model), SGD | {"gradient_accumulation_steps": micro_batches}
    expected, logs = train_alone(task, base, model, **changes)
    trainer = trainer_of(task, model, **changes)
    trainer.train()
    assert_equal_runs(model, expected, before, **CLOSE)
    ours = [line for line in trainer.state.log_history if "loss" in line]
    for line, *others in zip(ours, *logs, strict=True):
        mean = sum(other["loss"] for other in others) / len(others)
        assert line["loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("token classes", ml.SVGD),
        ("masked", lambda m: ml.IBDR(m, particle_chunk=2)),
        ("t5", ml.IBDR),
        ("bart", ml.SVGD),
    ],
)
def test_methods_that_interact_train_every_task(task, method):
    _, model = particles(task, dtype=torch.float32)
    trainer = trainer_of(task, model, method, max_steps=9, learning_rate=3e-2)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.97 * before


@pytest.mark.parametrize("task", ["masked", "token classes", "t5", "bart"])
def test_evaluation_and_prediction_of_tokens(task):
    base, model = particles(task)
    trainer = trainer_of(task, model, per_device_eval_batch_size=2)
    data = rows(TASKS[task][2], 5, seed=1)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    folder, probabilities = tempfile.mkdtemp(), 0
    model.save_pretrained(folder)
    for k in range(3):
        with torch.no_grad():
            logits = load_peft(base, f"{folder}/particle_{k}")(**batch).logits
        probabilities = probabilities + logits.double().softmax(-1) / 3
    valid = batch["labels"] != -100
    chosen = probabilities[valid].gather(-1, batch["labels"][valid][:, None])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-chosen.log().mean().item(), rel=1e-5)
    output = trainer.predict(data)
    assert np.array_equal(output.label_ids, batch["labels"].numpy())
    np.testing.assert_allclose(output.predictions, probabilities.log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "method"), [("mixtral", "ensemble"), ("mixtral", "ibdr"), ("qwen2-moe", "chunks")]
)
def test_the_routers_loss_counts_for_every_particle(task, method):
    methods = {
        "ensemble": ml.Ensemble,
        "chunks": lambda m: ml.Ensemble(m, particle_chunk=2),
        # Without a climb or a divergence, IBDR is an ensemble.
        "ibdr": lambda m: ml.IBDR(m, alpha=0.0, ascent="step", step_size=1e-12, particle_chunk=2),
    }
    base, model = particles(task)
    # Accumulated: Trainer adds the router's loss once a micro-batch.
    before = values(model)
    expected, logs = train_alone(task, base, model, max_steps=2, **SGD)
    trainer = trainer_of(task, model, methods[method], max_steps=2, **SGD)
    trainer.train()
    assert_equal_runs(model, expected, before, **CLOSE)
    ours = [line for line in trainer.state.log_history if "loss" in line]
    for line, *others in zip(ours, *logs, strict=True):
        mean = sum(other["loss"] for other in others) / len(others)
        assert line["loss"] == pytest.approx(mean, rel=1e-4)
        assert line["router_loss"] > 0.1


def test_without_its_loss_a_router_is_not_asked():
    for create in (lambda: mixtral(0.0), lambda: mixtral(output_router_logits=False)):
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = ml.get_particle_model(build(create, torch.float32), lora, 2)
        trainer = trainer_of("mixtral", model, max_steps=1)
        trainer.train()
        assert "router_loss" not in trainer.state.log_history[0]


# --- refusals ------------------------------------------------------------------------------------


class OwnLoss(ParticleTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        raise AssertionError("never called")


def test_an_overridden_loss_is_refused_when_the_trainer_is_made():
    _, model = particles("causal", 2)
    with pytest.raises(ValueError, match=r"compute_loss is overridden.*loss="):
        trainer_of("causal", model, kind=OwnLoss)
    trainer = trainer_of("causal", model)
    trainer.compute_loss = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="compute_loss is overridden"):
        trainer.train()


def refused_models():
    config = transformers.BertConfig(**BERT)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    small = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24,
    }  # fmt: skip
    clip = transformers.CLIPConfig(
        text_config=small | {"vocab_size": VOCABULARY},
        vision_config=small | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    regression = transformers.BertConfig(**BERT | {"num_labels": 1})
    several = transformers.BertConfig(**BERT, problem_type="multi_label_classification")
    return {
        "BertModel": lambda: transformers.BertModel(config),
        "BertForQuestionAnswering": lambda: transformers.BertForQuestionAnswering(config),
        "BertForPreTraining": lambda: transformers.BertForPreTraining(config),
        "CLIPModel": lambda: transformers.CLIPModel(clip),
        "ViTForMaskedImageModeling": lambda: transformers.ViTForMaskedImageModeling(vit),
        "BertForSequenceClassification with problem_type None and 1": (
            lambda: transformers.BertForSequenceClassification(regression)
        ),
        "BertForSequenceClassification with problem_type 'multi_label_classification'": (
            lambda: transformers.BertForSequenceClassification(several)
        ),
    }


@pytest.mark.parametrize("name", refused_models())
def test_models_with_another_loss_are_refused_when_the_trainer_is_made(name):
    lora = peft.LoraConfig(r=2, target_modules=r".*\.(query|q_proj)")
    model = ml.get_particle_model(build(refused_models()[name]), lora, 2)
    with pytest.raises(ValueError, match=name):
        ParticleTrainer(model, arguments(), method=ml.Ensemble)


def test_a_router_whose_loss_is_not_known(monkeypatch):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = ml.get_particle_model(build(mixtral), lora, 2)
    module = transformers.models.mixtral.modeling_mixtral
    monkeypatch.setattr(module, "load_balancing_loss_func", lambda probabilities, chosen: 0)
    with pytest.raises(ValueError, match="output_router_logits = False"):
        trainer_of("mixtral", model)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw", "galore_adafactor_layerwise"])
def test_optimizers_that_choose_or_step_by_themselves(optim):
    _, model = particles("causal", 2)
    with pytest.raises(ValueError, match=f"does not support optim='{optim}'"):
        trainer_of("causal", model, optim=optim)


@pytest.mark.parametrize(
    "loss",
    [
        lambda loss: 1.1 * loss,
        # Labels where the model does not shift them.
        None,
    ],
)
def test_a_model_whose_own_loss_is_another_is_refused_at_the_first_step(loss):
    class Own(transformers.GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
            if labels is not None and loss is not None:
                output["loss"] = loss(exact_loss(output.logits, labels, VOCABULARY))
            elif labels is not None:
                logits = output.logits.transpose(1, 2)
                output["loss"] = nn.functional.cross_entropy(logits, labels)
            return output

    base = build(lambda: Own(gpt2().config))
    model = particles_of(base, peft.LoraConfig(r=2, target_modules=["c_attn"]), 2)
    before = values(model)
    with pytest.raises(ValueError, match=r"loss of Own itself is .* Give the method"):
        trainer_of("causal", model).train()
    assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
    # With the user's own loss it is for the user to say.

    def own(logits, targets):
        flat = logits.flatten(0, 1), targets.repeat(len(logits))
        nll = nn.functional.cross_entropy(*flat, reduction="none", label_smoothing=0.1)
        return nll.view(len(logits), -1).mean(1)

    trainer_of("causal", model, lambda m: ml.Ensemble(m, loss=own), max_steps=1).train()


def test_the_look_at_the_models_own_loss_draws_no_numbers():
    drawn = []

    class Draw(TrainerCallback):
        def on_step_end(self, *_, **__):
            drawn.append(torch.rand(()).item())

    for look in (True, False):
        torch.manual_seed(0)
        create, targets, _ = TASKS["causal"]
        lora = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.5)
        model = particles_of(build(create), lora, 2).train()
        trainer = trainer_of("causal", model, options={"callbacks": [Draw()]}, max_steps=1)
        trainer._loss_checked = not look
        trainer.train()
    assert drawn[0] == drawn[1]


# --- the hub -------------------------------------------------------------------------------------


def test_a_model_card():
    _, model = particles("classes", 2)
    trainer = trainer_of("classes", model, max_steps=1)
    trainer.train()
    trainer.create_model_card(language="en", dataset="own")
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "generated_from_trainer" in card and "learning_rate: 0.01" in card
    assert trainer.model is model
    trainer.create_model_card()  # with a card there


def test_pushing_uploads_the_particles(monkeypatch):
    import transformers.trainer as module

    uploads = []

    class Api:
        def create_repo(self, name, **kwargs):
            return type("Url", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, *, folder_path, **kwargs):
            files = (p.relative_to(folder_path) for p in Path(folder_path).rglob("*"))
            uploads.append({str(p) for p in files if not str(p).startswith("checkpoint")})
            done = type("Job", (), {"done": lambda self: True, "result": lambda self: None})
            return done()

    if hasattr(module, "hf_api"):
        monkeypatch.setattr(module, "hf_api", Api)
    else:  # transformers 4
        monkeypatch.setattr(module, "create_repo", Api().create_repo)
        monkeypatch.setattr(module, "upload_folder", Api().upload_folder)
    _, model = particles("classes", 2)
    trainer = trainer_of(
        "classes", model, max_steps=1, push_to_hub=True, hub_model_id="mine",
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    weights = [f"particle_{k}/adapter_model.safetensors" for k in range(2)]
    assert len(uploads) >= 2
    for files in uploads:
        assert {*weights, "multilora.json"} <= files
    assert "README.md" in uploads[-1]
