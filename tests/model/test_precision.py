"""Particles in bfloat16, under autocast and in other dtypes, as exact as PEFT."""

import copy

import peft
import pytest
import torch

import multilora as ml
from models import FAMILIES, load_peft, logits_of, particle_tensors, particles_of, peft_tensors
from oracles import relative_error

K = 3

# PEFT asks transformers' models for a property that they are about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# The luck of one rounding of bfloat16.
ROUNDING = 2**-8


def assert_as_exact_as_peft(name, path, half_base, autocast):
    """Errors of logits and gradients against float64: at most twice those of PEFT.

    PEFT too keeps its adapters in the base's dtype here (`autocast_adapter_dtype=False`), which
    is what particles compute in; their masters alone are float32.
    """
    family = FAMILIES[name]
    dtype = torch.bfloat16 if half_base else torch.float32
    base, inputs = family.build(torch.float32).to(dtype), family.inputs(batch=4, dtype=dtype)
    # The reference starts from the same rounded numbers.
    exact_base = copy.deepcopy(base).double()
    exact_inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    model = particles_of(base, family.config(), K)
    model.save_pretrained(path)

    def run(net, inputs, cotangent, reduced):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and reduced):
            logits = logits_of(net(**inputs))
        (logits * cotangent).sum().backward()
        return logits.detach().double()

    with torch.no_grad():
        shape = logits_of(model(**inputs)).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    logits = {"ours": run(model, inputs, cotangent, True), "peft": [], "exact": []}
    gradients = {"ours": [], "peft": [], "exact": []}
    for k in range(K):
        folder = str(path / f"particle_{k}")
        exact = load_peft(exact_base, folder)
        logits["exact"].append(run(exact, exact_inputs, cotangent[k].double(), False))
        single = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), folder, is_trainable=True, autocast_adapter_dtype=False
        ).eval()
        logits["peft"].append(run(single, inputs, cotangent[k], True))
        ours, theirs = particle_tensors(model), peft_tensors(single)
        for key, parameter in peft_tensors(exact).items():
            gradients["exact"].append(parameter.grad.flatten())
            gradients["peft"].append(theirs[key].grad.flatten())
            gradients["ours"].append(ours[key].grad[k].flatten())
    exact_logits, exact_gradients = torch.stack(logits["exact"]), torch.cat(gradients["exact"])
    error = relative_error(logits["ours"], exact_logits)
    assert error <= 2 * relative_error(torch.stack(logits["peft"]), exact_logits) + ROUNDING
    # The reduced precision was at work.
    assert error > 1e-4
    error = relative_error(torch.cat(gradients["ours"]), exact_gradients)
    assert error <= 2 * relative_error(torch.cat(gradients["peft"]), exact_gradients) + ROUNDING
    for parameter in model.particle_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_is_as_exact_as_peft(name, tmp_path):
    assert_as_exact_as_peft(name, tmp_path, half_base=False, autocast=True)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_base_has_float32_masters(name, autocast, tmp_path):
    assert_as_exact_as_peft(name, tmp_path, half_base=True, autocast=autocast)


def test_half_precision_embeddings():
    # The masters are float32; what the next layer reads must be the model's dtype.
    family = FAMILIES["llama"]
    base = family.build(torch.bfloat16)
    inputs = family.inputs()
    expected = base(**inputs).logits
    config = family.config(modules_to_save=["embed_tokens", "lm_head"])
    logits = ml.get_particle_model(base, config, K).eval()(**inputs).logits
    assert logits.dtype == torch.bfloat16
    # The starts are the base model; a GEMM of other shape may round each of two layers otherwise.
    assert relative_error(logits, expected.expand_as(logits)) < 4 * ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 8 * ROUNDING), (torch.float64, 1e-5)]
)
def test_to_dtype(name, dtype, error):
    # bfloat16: some layers of one rounding each; float64: float32's own error.
    family = FAMILIES[name]
    model = particles_of(family.build(torch.float32), family.config(), K)
    before = logits_of(model(**family.inputs(dtype=torch.float32)))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = logits_of(model(**family.inputs(dtype=dtype)))
    assert after.dtype == dtype
    after.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.particle_parameters())
    assert relative_error(after, before) < error
