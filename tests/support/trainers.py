"""Small particle models and data sets under ParticleTrainer."""

import torch
from transformers import TrainingArguments

import multilora as ml
from models import FAMILIES
from multilora.integrations.transformers import ParticleTrainer

K = 3
TOKENS = 5
METHODS = {
    "ensemble": ml.Ensemble,
    "svgd": ml.SVGD,
    "ibdr": lambda model: ml.IBDR(model, alpha=0.02),
}
EVERY = METHODS | {
    "learnt": lambda model: ml.IBDR(model, sigma=5e-2, learn_sigma=True),
    "chains": lambda model: ml.SGLD(model, num_data=16, lr=1e-2),
    "drawn": lambda model: ml.Variational(model, num_data=16, sigma=5e-2),
}
NAMES = ["llama", "gpt2", "bert"]


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
