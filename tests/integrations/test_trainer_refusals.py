"""Settings that ParticleTrainer refuses, and its messages."""

import pytest
import torch
from torch import nn

import multilora as ml
from models import FAMILIES
from multilora.integrations.transformers import ParticleTrainer
from processes import run_in_processes
from trainers import arguments, particles, rows, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate", "quick_collections"),
]


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
