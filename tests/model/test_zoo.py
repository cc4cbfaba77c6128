"""Every model of the zoo against PEFT: outputs, gradients, the fold that it runs in, the check."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import multilora as ml
from models import load_peft, particle_tensors, peft_tensors, perturb
from tiers import sampled
from zoo import ZOO, Entry, call, table

pytestmark = [
    # PEFT asks transformers' models for a property that they are about to lose.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]
PARTICLES = 3
IN_BATCH = [name for name, entry in ZOO.items() if entry.fold == "batch"]
IN_LOOP = [name for name, entry in ZOO.items() if entry.fold == "loop"]


def particles(entry: Entry, base: nn.Module, fold: str, trained: bool = True) -> ml.ParticleModel:
    # Axes are a matter of the batch.
    axes = entry.axes if fold == "batch" else {}
    model = ml.get_particle_model(
        copy.deepcopy(base), entry.config(), PARTICLES, head_init="reset", fold=fold, **axes
    )
    if trained:
        perturb(model)
    return model


def built(entry: Entry, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The base; skips where it does not run by itself: bfloat16, or an older transformers."""
    try:
        base = entry.build(dtype)
        with torch.no_grad():
            call(base, entry.inputs(dtype))
    except Exception as error:
        if dtype is not torch.bfloat16 and transformers.__version__ >= "5":
            raise
        pytest.skip(f"the model itself does not run: {type(error).__name__}: {error}")
    return base


def outputs(model: Any, entry: Entry) -> dict[str, Tensor]:
    """All tensors of the output by their places in it, from the same random state every time.

    In a batch a number, such as an auxiliary loss, is one over all particles; it is left out.
    """
    torch.manual_seed(3)
    found = places(call(model, entry.inputs()))
    return {n: t for n, t in found.items() if entry.fold == "loop" or t.ndim}


def places(tree: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {name: tree}
    if isinstance(tree, Mapping):
        parts = tree.items()
    else:
        parts = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: t for key, part in parts for k, t in places(part, f"{name}[{key!r}]").items()}


def scalar(tensors: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Tensor:
    return sum((t * cotangents[n]).sum() for n, t in tensors.items() if t.requires_grad)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    # Against the largest number of the tensor: sums cancel.
    atol = tolerance * max(1.0, theirs.detach().abs().max().item()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_equals_peft(
    model: ml.ParticleModel, singles: list[nn.Module], entry: Entry, training: bool
) -> None:
    """Every tensor of the output, and its gradient under random cotangents in every parameter."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    ours = outputs(model, entry)
    generator = torch.Generator().manual_seed(7)
    cotangents = {
        name: torch.randn(t.shape, dtype=t.dtype, generator=generator)
        for name, t in ours.items()
        if t.requires_grad
    }
    scalar(ours, cotangents).backward()
    gradients = particle_tensors(model)
    assert len(gradients) == len(model.particle_parameters())
    spread = 0.0
    for k, single in enumerate(singles):
        single.train(training)
        # Particles keep the base's statistics.
        for module in single.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        single.zero_grad(set_to_none=True)
        theirs = outputs(single, entry)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            shared = name in entry.shared
            got = ours[name] if shared else ours[name][k]
            assert_close(got, expected, entry.tolerance, f"output {name} of particle {k}")
            if not shared and expected.is_floating_point():
                other = ours[name][(k + 1) % PARTICLES]
                spread = max(spread, (other - expected).abs().max().item())
        scalar(theirs, {name: c[k] for name, c in cotangents.items()}).backward()
        for name, parameter in peft_tensors(single).items():
            ours_of_k, what = gradients[name].grad, f"gradient of {name} in particle {k}"
            if parameter.grad is None:
                assert ours_of_k is None or not ours_of_k[k].any(), what
                continue
            assert ours_of_k is not None, what
            got = ours_of_k[k].reshape(parameter.shape)
            assert_close(got, parameter.grad, entry.tolerance, what)
    # Particles that agree would hide that they are swapped.
    assert spread > 1e-3


@pytest.mark.parametrize("name", sampled(ZOO, 12))
def test_equals_peft(name: str, tmp_path: Path) -> None:
    """In the fold that the table gives, in evaluation and in training mode, with the check on."""
    entry = ZOO[name]
    base = built(entry)
    model = particles(entry, base, entry.fold)
    model.save_pretrained(tmp_path)
    singles = [load_peft(base, tmp_path / f"particle_{k}") for k in range(PARTICLES)]
    for training in (False, True):
        assert_equals_peft(model, singles, entry, training)
    if entry.fold == "batch":
        with torch.no_grad():
            batch = outputs(model, entry)
            loop = outputs(particles(entry, base, "loop").train(), entry)
        assert batch.keys() <= loop.keys()
        for output, expected in batch.items():
            got = loop[output][0] if output in entry.shared else loop[output]
            assert_close(got, expected, entry.tolerance, f"output {output} in a loop")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", sampled(IN_LOOP, 12))
def test_is_refused_in_a_batch(name: str, training: bool) -> None:
    """Fresh particles, whose adapters do nothing yet, and trained ones."""
    entry = ZOO[name]
    base = built(entry)
    for trained in (False, True):
        model = particles(entry, base, "batch", trained).train(training)
        with pytest.raises(ValueError, match='fold="loop"'):
            call(model, entry.inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", sampled(IN_BATCH, 12))
def test_check_lets_pass(name: str, dtype: torch.dtype) -> None:
    entry = ZOO[name]
    base, inputs = built(entry, dtype), entry.inputs(dtype)
    with torch.no_grad():
        for trained, modes in ((False, [True]), (True, [False, True])):
            model = particles(entry, base, "batch", trained)
            for training in modes:
                call(model.train(training), inputs)


@pytest.mark.skipif(
    ZOO["llava-one-image"].fold == "batch", reason="the page is about the newest transformers"
)
def test_documented_table() -> None:
    """docs/models.md is what `python -m zoo` writes."""
    document = Path(__file__).parents[2] / "docs" / "models.md"
    assert document.read_text() == table()
