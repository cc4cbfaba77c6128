"""Evaluation and prediction by ParticleTrainer are the averaged predictive's."""

import numpy as np
import pytest
import torch

import multilora as ml
from models import FAMILIES, VOCABULARY, particles_of
from trainers import TOKENS, K, rows, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_accelerate", "quick_collections"),
]


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
