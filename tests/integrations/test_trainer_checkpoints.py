"""ParticleTrainer's checkpoints: resumed, the best of them, damaged ones."""

import shutil

import pytest
import torch
from transformers import TrainerCallback

import multilora as ml
from models import FAMILIES
from trainers import K, assert_equal, particles, train_lines, trainer_of, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate", "quick_collections"),
]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "learnt"),
        ("gpt2", "svgd"),
        ("bert", "learnt"),
        ("bert", "ensemble"),
        ("bert", "drawn"),
    ],
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
    with pytest.raises(ValueError, match=r"multilora_method\.pt .*to the method SVGD"):
        other.train(resume_from_checkpoint=True)
