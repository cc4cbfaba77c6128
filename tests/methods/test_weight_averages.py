"""Copies and averages of a particle model's weights."""

import copy
import io

import pytest
import torch
import torch.optim.swa_utils as swa
from timm.utils import ModelEmaV3

import multilora as ml
from models import FAMILIES, particle_tensors, values
from multilora.optim import separate_parameters
from separate_runs import CLOSE, K, data, one_backward, start


def averages(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": torch.load(file, weights_only=False),
        "AveragedModel": swa.AveragedModel(model).module,
        "ModelEmaV3": ModelEmaV3(model).module,
    }


@pytest.mark.parametrize("family", ["mlp", "vit", "llama"])
def test_copies_are_models_of_their_own(family):
    model = start(family)
    inputs = FAMILIES[family].inputs(batch=3)
    expected = ml.predict(model, inputs, class_axis=-1)
    copies = averages(model)
    with torch.no_grad():
        for p in model.particle_parameters():
            p.zero_()
    assert not torch.allclose(ml.predict(model, inputs, class_axis=-1), expected, atol=1e-3)
    for other in copies.values():
        torch.testing.assert_close(ml.predict(other, inputs, class_axis=-1), expected, **CLOSE)


def test_a_copied_model_trains_with_a_separate_optimizer():
    model = start()
    twins = [model, *averages(model).values()]
    for twin in twins:
        for p in twin.parameters():
            p.requires_grad_(any(p is q for _, q in trainable(twin)))
        optimizer = torch.optim.Adafactor(separate_parameters(twin), lr=1e-2)
        for _ in range(3):
            one_backward(twin)
            optimizer.step()
            optimizer.zero_grad()
    for twin in twins[1:]:
        for a, b in zip(values(model), values(twin)):
            torch.testing.assert_close(a, b, **CLOSE)


def trainable(model):
    """Averaged models come frozen."""
    return particle_tensors(model).items()


def test_weight_averages_are_each_particles():
    model = start()
    average = swa.AveragedModel(model)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.5)
    first, seen = values(model), []
    for (x, y), *_ in data(3):
        ml.Ensemble(model).backward(lambda x=x, y=y: (model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        ema.update(model)
        seen.append(values(model))
    for i, p in enumerate(values(average.module)):
        torch.testing.assert_close(p, sum(s[i] for s in seen) / 3, **CLOSE)
    for i, p in enumerate(values(ema.module)):
        expected = first[i]
        for s in seen:
            expected = 0.9 * expected + 0.1 * s[i]
        torch.testing.assert_close(p, expected, **CLOSE)
    # The average of every particle's weights is a model that predicts by them.
    x = data()[0][0][0]
    torch.testing.assert_close(average(x), average.module(x), **CLOSE)
    assert average(x).shape == (K, 8, 4)


def test_update_bn_does_not_touch_frozen_statistics():
    model = start("cnn")
    average = swa.AveragedModel(model)
    inputs = FAMILIES["cnn"].inputs(batch=4)["x"]
    expected = ml.predict(average.module, inputs)
    # It resets what the base then never measures anew.
    with pytest.raises(RuntimeError, match="frozen"):
        swa.update_bn([inputs], average)
    torch.testing.assert_close(ml.predict(average.module, inputs), expected, **CLOSE)
    # Without BatchNorm there is nothing to measure.
    swa.update_bn([data()[0][0][0]], swa.AveragedModel(start()))
