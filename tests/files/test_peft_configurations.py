"""PEFT's configurations: what changes no forward is read, all else is refused by name."""

import json
import shutil
import warnings

import peft
import pytest
import torch

import multilora as ml
from adapter_files import CONFIG, IDS, field, llama, refusal, trained_by_peft

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_how_an_adapter_began_does_not_matter(init, tmp_path):
    known = init not in ("eva", "mica")  # which need data, or a later PEFT
    folder, expected = trained_by_peft(tmp_path / "a", init_lora_weights=init if known else True)
    field(init_lora_weights=init)(folder / CONFIG)
    model = ml.load_particle_model(llama(), [folder]).eval()
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-6, rtol=1e-5)
    # It is written as an adapter that PEFT would begin plainly.
    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b/particle_0" / CONFIG).read_text())["init_lora_weights"]
    assert written == (init if init == "gaussian" else True)
    single = peft.PeftModel.from_pretrained(llama(), tmp_path / "b/particle_0").eval()
    torch.testing.assert_close(single(input_ids=IDS).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_another_base_is_refused(init, tmp_path):
    made = init in ("pissa", "olora")
    options = {"init_lora_weights": init if made else True}
    folder, expected = trained_by_peft(tmp_path / "a", **options)
    if made:
        # The base itself with these factors is another function.
        plain = shutil.copytree(folder, tmp_path / "plain")
        field(init_lora_weights=True)(plain / CONFIG)
        other = peft.PeftModel.from_pretrained(llama(), plain)(input_ids=IDS).logits
        assert (other - expected).abs().max() > 2e-5
    field(init_lora_weights=init)(folder / CONFIG)
    message = refusal(ml.load_particle_model, llama(), [folder])
    assert init in message and "base's weights" in message and CONFIG in message


def test_fields_without_effect_are_no_reason(tmp_path):
    folder, expected = trained_by_peft(tmp_path / "a", lora_dropout=0.3)
    field(
        runtime_config={"ephemeral_gpu_offload": True},
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        corda_config={},
        megatron_core="elsewhere",
        qalora_group_size=8,
        rank_pattern=None,
        alpha_pattern=None,
        a_field_of_a_later_peft=None,
    )(folder / CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ml.load_particle_model(llama(), [folder]).eval()
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-6, rtol=1e-5)
    assert model.peft_config.lora_dropout == 0.3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 1}),
        ("a_field_of_a_later_peft", True),
    ],
)
def test_fields_that_change_the_forward_are_refused_by_name(key, value, tmp_path):
    folder, _ = trained_by_peft(tmp_path / "a")
    field(**{key: value})(folder / CONFIG)
    message = refusal(ml.load_particle_model, llama(), [folder], ValueError)
    assert f"{key} = {value!r}" in message and str(folder / CONFIG) in message


def test_differences_without_effect_are_kept_from_the_first(tmp_path):
    made = [trained_by_peft(tmp_path / f"{k}", seed=k) for k in range(2)]
    changes = {"lora_dropout": 0.5, "init_lora_weights": "gaussian", "task_type": None}
    field(**changes, revision="x", base_model_name_or_path="y", inference_mode=False)(
        made[1][0] / CONFIG
    )
    with pytest.warns(
        UserWarning, match=r"lora_dropout.*task_type.*0/adapter_config.json are kept"
    ):
        model = ml.load_particle_model(llama(), [folder for folder, _ in made]).eval()
    assert model.peft_config.lora_dropout == 0 and model.peft_config.task_type == "CAUSAL_LM"
    expected = torch.stack([logits for _, logits in made])
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    field(task_type="SEQ_2_SEQ_LM")(made[1][0] / CONFIG)
    assert "task_type" in refusal(ml.load_particle_model, llama(), [f for f, _ in made])
