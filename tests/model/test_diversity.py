"""How different particles are: Vendi scores, overlaps, cosines of ΔW, and what they explain."""

import itertools
import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

import multilora as ml
from multilora import diversity
from oracles import delta_weights

ORDERS = [0, 0.1, 0.5, 1, 1 + 1e-6, 2, 7.5, math.inf]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def blocks(*sizes):
    return torch.block_diag(*(torch.ones(n, n) for n in sizes))


# --- the Vendi score -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("K", [1, 2, 7])
def test_the_vendi_score_counts_groups(K, q, dtype):
    score = pytest.approx
    assert ml.metrics.vendi(torch.eye(K, dtype=dtype), q) == score(K, rel=1e-6)
    assert ml.metrics.vendi(torch.ones(K, K, dtype=dtype), q) == score(1, rel=1e-6)
    # Groups of equal size, in any order.
    order = torch.randperm(3 * K)
    matrix = blocks(K, K, K).to(dtype)[order][:, order]
    assert ml.metrics.vendi(matrix, q) == score(3, rel=1e-6)


def test_the_vendi_score_of_unequal_groups():
    # λ = .5, .25, .25.
    matrix = blocks(2, 1, 1).double()
    expected = {0: 3, 0.5: (2 * 0.5 + math.sqrt(0.5)) ** 2, 1: 2**1.5, 2: 8 / 3, math.inf: 2}
    for q, value in expected.items():
        assert ml.metrics.vendi(matrix, q) == pytest.approx(value, rel=1e-12)


def test_the_vendi_score_falls_with_its_order():
    for K in (3, 8):
        vectors = nn.functional.normalize(torch.randn(K, 4, dtype=torch.float64), dim=1)
        scores = [ml.metrics.vendi(vectors @ vectors.mT, q) for q in ORDERS]
        assert all(a > b - 1e-12 for a, b in itertools.pairwise(scores))
        assert scores[0] == pytest.approx(min(K, 4)) and scores[-1] >= 1
        # It is continuous at q = 1, where the formula is another one.
        assert scores[3] == pytest.approx(scores[4], abs=1e-4)
        assert scores[2] > scores[3] + 1e-3 and scores[4] > scores[5] + 1e-3


@pytest.mark.parametrize(
    "matrix, q, message",
    [
        (torch.ones(3), 1, r"\(K, K\); got \(3,\)"),
        (torch.ones(3, 2), 1, r"\(K, K\); got \(3, 2\)"),
        (torch.ones(0, 0), 1, r"\(K, K\); got \(0, 0\)"),
        (2 * torch.eye(2), 1, r"ones on its diagonal; got \[\[2.0, 0.0\], \[0.0, 2.0\]\]"),
        (torch.tensor([[1, 0.5], [0.2, 1]]), 1, "symmetric"),
        (torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 1, "positive semidefinite"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), 1, "symmetric"),
        (torch.eye(9) * 2, 1, r"got \(9, 9\)"),
        (torch.eye(2), -0.5, "q must be a finite number >= 0; got -0.5"),
        (torch.eye(2), math.nan, "q must be"),
    ],
)
def test_what_the_vendi_score_refuses(matrix, q, message):
    with pytest.raises(ValueError, match=message):
        ml.metrics.vendi(matrix, q)


# --- predictions ---------------------------------------------------------------------------------


@dtypes
def test_the_overlap_of_predictions(dtype):
    # More rows than are taken at once.
    log_p = torch.randn(3, 5000, 4, dtype=dtype).log_softmax(-1)
    p = log_p.double().exp().numpy()
    expected = np.array([[np.sqrt(a * b).sum(-1).mean() for b in p] for a in p])
    got = ml.metrics.similarity(log_p)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, 1e-12 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(got.diagonal(), torch.ones(3, dtype=dtype), rtol=1e-6, atol=0)


def test_the_overlap_by_hand():
    log_p = torch.tensor([[[1.0, 0, 0]], [[0.25, 0.75, 0]], [[0, 0, 1]]]).log()
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(ml.metrics.similarity(log_p), expected)
    with pytest.raises(ValueError, match=r"log-probabilities \(K, N, C\); got \(3, 1\)"):
        ml.metrics.similarity(log_p[..., 0])
    with pytest.raises(ValueError, match=r"got \(3, 1, 3\) with rows .* do not sum to one"):
        ml.metrics.similarity(log_p.exp())


def test_the_effective_number_of_predictions():
    # Two particles agree, and the third puts everything elsewhere: two groups of 2 and 1.
    logits = torch.tensor([[[60.0, 0, 0]] * 4] * 2 + [[[0, 60.0, 0]] * 4], dtype=torch.float64)
    got = ml.metrics.evaluate(logits, torch.zeros(4, dtype=torch.int64))["vendi_prediction"]
    assert got == pytest.approx(math.exp(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3))


def test_disagreement_by_hand():
    # Of the three pairs, all agree on the first example, one on the second, none on the third.
    choices = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 2, 0]])
    members = nn.functional.one_hot(choices, 3).double().log_softmax(-1)
    assert diversity.disagreement(members) == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert math.isnan(diversity.disagreement(members[:1]))


@pytest.mark.parametrize("K", [1, 2, 6])
def test_ambiguity_is_what_averaging_takes_off_the_brier_score(K):
    logits, y = 2 * torch.randn(K, 83, 5, dtype=torch.float64), torch.randint(5, (83,))
    own = [ml.metrics.evaluate(one[None], y) for one in logits]
    got = ml.metrics.evaluate(logits, y)
    mean_brier = sum(one["brier"] for one in own) / K
    assert got["brier"] + got["ambiguity"] == pytest.approx(mean_brier, rel=1e-13)
    mean_nll = sum(one["nll"] for one in own) / K
    assert got["nll"] + got["jensen_gap"] == pytest.approx(mean_nll, rel=1e-13)
    assert (got["ambiguity"] > 0.1 and got["jensen_gap"] > 0.1) == (K > 1)
    # Both are of the mean probabilities, however the predictive combines.
    other = ml.metrics.evaluate(logits, y, "logit")
    assert all(other[name] == got[name] for name in ("ambiguity", "jensen_gap"))


def test_the_jensen_gap_is_never_negative():
    logits, y = torch.randn(1, 400, 10), torch.randint(10, (400,))
    for gap in (0, 1e-7, 1e-5, 1):
        close = logits + gap * torch.randn(5, 400, 10)
        assert 0 <= ml.metrics.evaluate(close, y)["jensen_gap"] < 4 * gap**2 + 1e-6


def test_pairwise_divergences_by_hand():
    log_p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]], [[1, 0]]], dtype=torch.float64).log()
    got = ml.metrics.evaluate(log_p, torch.tensor([0]), full=True)["kl_pairwise"]
    first = math.log(0.5 / 0.25) / 2 + math.log(0.5 / 0.75) / 2
    second = math.log(0.25 / 0.5) / 4 + math.log(0.75 / 0.5) * 3 / 4
    expected = [
        [0, first, math.inf],
        [second, 0, math.inf],
        [math.log(2), math.log(4), 0],
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


# --- weights -------------------------------------------------------------------------------------


def particle_model(dtype=torch.float64, K=4):
    """Two adapted layers of different shapes and scalings."""
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)
    config = peft.LoraConfig(
        r=2, target_modules=["0", "2"], alpha_pattern={"^0$": 6}, init_lora_weights=True
    )
    return ml.get_particle_model(base, config, K)


def fill(model):
    for adapter in model.adapters():
        with torch.no_grad():
            adapter.lora_A.copy_(torch.randn_like(adapter.lora_A) + torch.randn(1))
            adapter.lora_B.copy_(torch.randn_like(adapter.lora_B) + torch.randn(1))


@dtypes
def test_cosines_of_dense_updates(dtype):
    model = particle_model(dtype)
    fill(model)
    dense = [delta_weights(a.lora_A, a.lora_B, a.scaling).flatten(1) for a in model.adapters()]
    assert {a.scaling for a in model.adapters()} == {3, 4}

    def expected(updates):
        unit = nn.functional.normalize(updates, dim=1)
        return (unit @ unit.mT).to(particle_dtype)

    particle_dtype = model.adapters()[0].lora_A.dtype
    tolerance = {"rtol": 0, "atol": 1e-14 if particle_dtype == torch.float64 else 1e-6}
    got = model.cosines()
    assert not got.requires_grad
    torch.testing.assert_close(got, expected(torch.cat(dense, 1)), **tolerance)
    each = model.cosines(per_layer=True)
    torch.testing.assert_close(each, torch.stack([expected(d) for d in dense]), **tolerance)
    # They are not all alike: an index or a scaling that is wrong would show.
    assert (each[0] - each[1]).abs().max() > 0.1 and (got - got.mT).abs().max() < 1e-6
    with model.particles(1, 3):
        torch.testing.assert_close(model.cosines(), got[1:3, 1:3], **tolerance)
    assert 1 < ml.metrics.vendi(got) < 4


def test_cosines_of_updates_that_are_zero():
    model = particle_model()
    # At the start all are zero, and so equal.
    assert torch.equal(model.cosines(), torch.ones(4, 4, dtype=model.cosines().dtype))
    assert ml.metrics.vendi(model.cosines()) == pytest.approx(1)
    fill(model)
    with torch.no_grad():
        for adapter in model.adapters():
            adapter.lora_B[1:3] = 0
    got = model.cosines()
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    assert torch.equal(got[1:3, 1:3].float(), one)
    assert torch.equal(got[[0, 3]][:, 1:3].float(), zero)
    assert 0 < abs(got[0, 3]) < 1 and got.diagonal().sub(1).abs().max() < 1e-6
    assert 2 < ml.metrics.vendi(got) < 3


def test_a_particle_alone_has_the_cosine_one():
    model = particle_model(K=1)
    fill(model)
    torch.testing.assert_close(model.cosines().double(), torch.ones(1, 1).double())
