"""The isolation check finds planted couplings of the rows.

What one check cannot see is listed in `CANNOT_SEE`, with the reason, and docs/models.md prints it.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multilora as ml
from couplings import (
    COUPLINGS,
    DRAWN,
    DTYPES,
    MODES,
    ONLY_TRAINED,
    ONLY_TRAINING,
    PARTICLES,
    STATEFUL,
    UNSEEN_IN,
    Net,
    built,
    config,
    particles,
    rows_of,
)
from models import load_peft, perturb
from zoo import CANNOT_SEE


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_coupling_is_found(name: str, dtype: torch.dtype) -> None:
    """In the first forward: fresh particles and trained ones, one example and six, both modes."""
    if (name, dtype) in UNSEEN_IN:
        pytest.skip("see CANNOT_SEE['half precision']")
    base = built(lambda: Net(COUPLINGS[name]), dtype)
    missed = []
    for training in (True,) if name in ONLY_TRAINING else (False, True):
        for trained in (True,) if name in ONLY_TRAINED else (False, True):
            for batch in (1, 6):
                model = particles(base, trained, training)
                try:
                    model(rows_of(batch, dtype, seed=6))
                except ml.ParticleIsolationError:
                    continue
                missed.append({"training": training, "trained": trained, "batch": batch})
    assert not missed


@pytest.mark.parametrize("name", ["reversed-batch", "pairs-of-rows", "rows-drawn-in-training"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_coupling_of_any_number_of_particles(name: str, count: int) -> None:
    base = built(lambda: Net(COUPLINGS[name]))
    for trained in (False, True):
        model = ml.get_particle_model(copy.deepcopy(base), config(), count)
        if trained:
            perturb(model)
        with pytest.raises(ml.ParticleIsolationError):
            model.train()(rows_of(6))


@pytest.mark.parametrize("name", sorted(ONLY_TRAINING))
def test_mode_without_coupling_passes(name: str) -> None:
    model = particles(built(lambda: Net(COUPLINGS[name])))
    model(rows_of(6))
    with pytest.raises(ml.ParticleIsolationError):
        model.train()(rows_of(6))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COUPLINGS.keys() - STATEFUL - DRAWN))
def test_coupled_model_in_a_loop(name: str, tmp_path: Any) -> None:
    """Particles one after another are right, whatever the model does with its rows."""
    base = built(lambda: Net(COUPLINGS[name])).double()
    x = rows_of(6, torch.float64)
    model = particles(base, fold="loop")
    model.save_pretrained(tmp_path)
    # Dropout's masks differ between the loop and PEFT: this test is not about them.
    for module in [*base.modules(), *model.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for training in MODES.values():
        y = model.train(training)(x)
        for k in range(PARTICLES):
            expected = load_peft(base, tmp_path / f"particle_{k}").train(training)(x)
            torch.testing.assert_close(y[k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_contrastive_output(dtype: torch.dtype) -> None:
    """(B, B) for every particle; folded it would be (K·B, K·B)."""

    class Contrast(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y @ y.T

    base = built(lambda: Contrast(lambda mix, h: h), dtype)
    for training in MODES.values():
        for batch in (1, 6):
            for trained in (False, True):
                with pytest.raises(ml.ParticleIsolationError):
                    particles(base, trained, training)(rows_of(batch, dtype))


class _Outputs(Net):
    """The rows' own output, beside what a test makes of them."""

    def __init__(self, others: Callable[[Tensor], Any]):
        super().__init__(lambda mix, h: h)
        self.others = others

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = super().forward(x)
        return {"logits": y, "others": self.others(y)}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    "others",
    [
        lambda y: y.mean(0),
        lambda y: (y, y - y.mean(0)),
        lambda y: {"sizes": y.norm(dim=1).sort().values},
        lambda y: torch.cat([y, y.sum(0, keepdim=True)]),
    ],
    ids=["mean-without-rows", "nested", "sorted", "a-row-more"],
)
def test_coupling_in_another_output(others: Callable[[Tensor], Any], trained: bool) -> None:
    with pytest.raises(ml.ParticleIsolationError):
        particles(built(lambda: _Outputs(others)), trained)(rows_of(6))


def test_mean_loss_alone_has_no_particles() -> None:
    class Loss(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    base = built(lambda: Loss(lambda mix, h: h))
    with pytest.raises(ml.ParticleIsolationError):
        particles(base)(rows_of(6))
    assert particles(base, fold="loop")(rows_of(6)).shape == (PARTICLES,)


# --- what one check cannot see -------------------------------------------------------------------


def _rare(mix, h):
    return h - h.mean(0) if h.abs().max() > 0.9999999 else h


def _tiny(mix, h):
    return h + 1e-8 * h.mean(0)


def _count_of_equal_rows(mix, h):
    return h / (torch.cdist(h, h) < 1e-4).sum(1, keepdim=True)


def _gradient_only(mix, h):
    mean = h.mean(0)
    return h + mean - mean.detach()


UNSEEN = {
    "other inputs": _rare,
    "less than rounding": _tiny,
    "gradients": _gradient_only,
    "equal particles": _count_of_equal_rows,
}


def test_what_it_cannot_see_is_documented() -> None:
    assert UNSEEN.keys() <= CANNOT_SEE.keys()


@pytest.mark.parametrize("what", UNSEEN)
def test_unseen(what: str) -> None:
    """The limits are as documented: one that is seen after all leaves the list."""
    model = particles(built(lambda: Net(UNSEEN[what])), trained=what != "equal particles")
    assert model(rows_of(6)).shape == (PARTICLES, 6, 4)
