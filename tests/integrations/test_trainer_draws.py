"""ParticleTrainer with a method whose particles are draws of a posterior."""

import copy

import pytest
import torch
from transformers import TrainerCallback

import multilora as ml
from models import FAMILIES
from trainers import assert_equal, trainer_of, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate", "quick_collections"),
]


class Remember(TrainerCallback):
    """The particles, the posterior and the loss at each evaluation."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        posterior = [t.detach().clone() for t in self.trainer.method.parameters()]
        self.seen.append((values(model), posterior, metrics["eval_loss"]))


def remembering(method, folder, **changes):
    remember = Remember()
    trainer = trainer_of("bert", method, folder, options={"callbacks": [remember]}, **changes)
    remember.trainer = trainer
    return trainer, remember.seen


def test_it_draws_before_each_evaluation_which_does_not_change_the_training(tmp_path):
    trainer, seen = remembering("drawn", tmp_path, eval_strategy="steps", eval_steps=1)
    start = trainer.method.mean[0].detach().clone()
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 7
    drawn = [particles[0] for particles, _, _ in seen]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    # The last two are of one posterior: only the draws differ.
    assert_equal(seen[-1][1], seen[-2][1])
    assert not torch.equal(trainer.method.mean[0], start)
    assert all(p.grad is None for p in trainer.model.particle_parameters())
    silent = trainer_of("bert", "drawn", tmp_path)
    silent.train()
    assert_equal(silent.method.parameters(), trainer.method.parameters())


def test_a_saved_folder_holds_new_draws_and_their_posterior(tmp_path):
    trainer = trainer_of("bert", "drawn", tmp_path)
    trainer.train()
    before = values(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    assert not torch.equal(before[0], values(trainer.model)[0])
    loaded = ml.load_particle_model(FAMILIES["bert"].build(torch.float32), tmp_path / "final")
    assert_equal(values(loaded), values(trainer.model))
    state = torch.load(tmp_path / "final" / "multilora_method.pt", weights_only=True)["state"]
    method = ml.Variational(loaded, num_data=16)
    method.load_state_dict(state)
    assert_equal(method.parameters(), trainer.method.parameters())


def test_the_best_posterior_comes_back(tmp_path):
    trainer, seen = remembering(
        "drawn", tmp_path, learning_rate=0.5, lr_scheduler_type="constant", eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    losses = [loss for _, _, loss in seen]
    best = losses.index(min(losses))
    assert best < len(losses) - 1
    assert_equal(trainer.method.parameters(), seen[best][1])


def test_clipping_is_of_the_posterior(tmp_path):
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    trainer = trainer_of("bert", "drawn", tmp_path, max_steps=1, max_grad_norm=1e-3, **options)
    before = copy.deepcopy(trainer.method.parameters())
    trainer.train()
    moved = torch.stack(
        [(a - b).square().sum() for a, b in zip(trainer.method.parameters(), before)]
    )
    assert moved.sum().sqrt().item() == pytest.approx(1e-3, rel=1e-2)


def test_an_optimizer_that_looks_at_whole_tensors_is_of_the_posterior(tmp_path):
    trainer = trainer_of("bert", "drawn", tmp_path, optim="adafactor", max_steps=2)
    before = copy.deepcopy(trainer.method.parameters())
    trainer.train()
    for a, b in zip(trainer.method.parameters(), before, strict=True):
        assert not torch.equal(a, b)


def test_chains_step_by_plain_sgd_only(tmp_path):
    plain = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0}
    for change in ({"optim": "adamw_torch"}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}):
        trainer = trainer_of("bert", "chains", tmp_path, **plain | change)
        with pytest.raises(ValueError, match=r"SGLD needs plain SGD.*max_grad_norm=0; got"):
            trainer.train()
    trainer_of("bert", "chains", tmp_path, **plain).train()
