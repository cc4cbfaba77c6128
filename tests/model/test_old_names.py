"""Names of version 0.1, which remain for one release."""

import pytest

import multilora as ml


def test_names_of_version_0_1():
    from multilora import attach, checkpoint, layers, model, optim, separate

    assert model.get_particle_model is attach.get_particle_model
    assert model.particle_seeds is attach.particle_seeds
    assert layers.LoraForeignLinear is layers.LoraOpaqueLinear
    assert layers.is_foreign_linear is layers.has_own_forward
    assert checkpoint.save_pretrained is ml.ParticleModel.save_pretrained
    assert checkpoint.soup is ml.ParticleModel.soup
    assert optim.separate_parameters is separate.separate_parameters
    with pytest.raises(AttributeError, match=r"'multilora.model' has no attribute 'particles'"):
        _ = model.particles
