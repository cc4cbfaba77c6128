"""Greedy soups and WiSE-FT on scores that are known, and the error of a truncated soup."""

import math

import pytest
import torch

import multilora as ml
from models import FAMILIES, load_peft, logits_of, particles_of

pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save")


def made(name, particles=3):
    family = FAMILIES[name]
    return particles_of(family.build(), family.config(), particles)


class Table:
    """Scores by the set of particles in a soup; it notes the weights of every call."""

    def __init__(self, **scores):
        self.scores, self.calls = scores, []

    def __call__(self, weights):
        self.calls.append(weights.clone())
        names = ["".join("abcd"[k] for k in row.nonzero().flatten()) for row in weights]
        for row in weights:
            kept = row[row != 0]
            assert torch.equal(kept, torch.full_like(kept, 1 / len(kept)))
        return torch.tensor([self.scores[name] for name in names])


def test_a_greedy_soup_by_hand():
    # b is the best alone. c comes next and does not help. a does, by a tie.
    score = Table(a=0.5, b=0.8, c=0.7, bc=0.75, ab=0.8)
    weights = ml.soups.greedy(made("mlp"), score)
    assert weights.tolist() == [0.5, 0.5, 0] and weights.dtype == torch.float64
    first, second = score.calls
    assert torch.equal(first, torch.eye(3, dtype=torch.float64))
    assert second.tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]  # c and then a, in one call


def test_a_particle_that_was_left_out_is_not_tried_again():
    # With c in the soup a would help, but a came before c and was rejected.
    score = Table(a=0.7, b=0.8, c=0.6, d=0.1, ab=0.7, bc=0.9, bd=0.0, bcd=0.95, abc=1.0)
    assert ml.soups.greedy(made("mlp", 4), score).tolist() == [0, 1 / 3, 1 / 3, 1 / 3]
    assert [len(call) for call in score.calls] == [4, 3, 1]


def test_a_particle_without_a_score_joins_no_soup():
    nan = math.nan
    score = Table(a=nan, b=0.2, c=0.1, bc=nan, ab=nan)
    assert ml.soups.greedy(made("mlp"), score).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="none of the 3 soups has a score that is a number"):
        ml.soups.greedy(made("mlp"), Table(a=nan, b=nan, c=nan))
    assert ml.soups.greedy(made("mlp", 1), Table(a=0.0)).tolist() == [1]


def test_a_score_of_another_shape_is_refused():
    for choose in (ml.soups.greedy, ml.soups.wise):
        with pytest.raises(ValueError, match=r"score must return \((3|11),\).*got \(2,\)"):
            choose(made("llama"), lambda weights: torch.zeros(2))


def labelled(family, model):
    """Batches whose labels are mostly what the particles' mean says."""
    with torch.no_grad():
        batches = []
        for seed in range(3):
            x = family.inputs(batch=16, seed=seed)["input"]
            mean = ml.predict(model, x).mean(0)
            y = mean.argmax(-1)
            y[::5] = 0
            batches.append((x, y))
    return batches


def test_a_greedy_soup_never_scores_below_the_best_particle():
    family, better = FAMILIES["mlp"], 0
    for seed in range(5):
        model = particles_of(family.build(), family.config(), 4, seed=seed)
        score = ml.soups.accuracy(model, labelled(family, model))
        own = score(torch.eye(4, dtype=torch.float64))
        [found] = score(ml.soups.greedy(model, score)[None]).tolist()
        assert found >= own.max()
        better += found > own.max()
    assert better > 0


def test_accuracy_is_that_of_each_soup():
    family = FAMILIES["mlp"]
    model = made("mlp")
    batches = labelled(family, model)
    batches[0][1][:2] = -100
    weights = torch.tensor([[0.2, 0.3, 0.5], [1, 0, 0]], dtype=torch.float64)
    x, y = (torch.cat(part) for part in zip(*batches))
    logits = ml.soups.evaluate(model, weights, lambda: model(x))
    expected = [(z.argmax(-1) == y)[y != -100].double().mean().item() for z in logits]
    for chunk in (None, 1):
        found = ml.soups.accuracy(model, batches, chunk)(weights)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_wise_tries_all_alphas_at_once_and_takes_the_best():
    calls = []

    def score(weights):
        calls.append(weights)
        return -(weights.sum(1) - 0.42).abs()

    weights = ml.soups.wise(made("llama"), score)
    assert weights.tolist() == pytest.approx([0.4 / 3] * 3, abs=1e-12)
    [tried] = calls
    assert tried.sum(1).tolist() == pytest.approx([i / 10 for i in range(11)])
    own = ml.soups.wise(made("llama"), score, [0.5, 0.45, 2.0])
    assert own.sum().item() == pytest.approx(0.45)
    for alphas in ([], [[0.1]], [math.nan]):
        with pytest.raises(ValueError, match="alphas must be a list of finite numbers"):
            ml.soups.wise(made("llama"), score, alphas)


def test_wise_at_zero_is_the_base_and_at_one_the_mean(tmp_path):
    family = FAMILIES["llama"]
    base, model, inputs = family.build(), made("llama"), family.inputs()
    ends = [ml.soups.wise(model, lambda w: torch.zeros(len(w)), [alpha]) for alpha in (0, 1)]
    with torch.no_grad(), model.mixtures(torch.stack(ends)):
        at_zero, at_one = model(**inputs).logits
    torch.testing.assert_close(at_zero, base(**inputs).logits, rtol=1e-6, atol=1e-6)
    model.soup(tmp_path / "mean")
    mean = logits_of(load_peft(base, tmp_path / "mean")(**inputs))
    torch.testing.assert_close(at_one, mean, rtol=1e-6, atol=1e-6)
    model.soup(tmp_path / "base", weights=ends[0])
    of_file = logits_of(load_peft(base, tmp_path / "base")(**inputs))
    torch.testing.assert_close(of_file, base(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_wise_warns_of_new_heads():
    with pytest.warns(UserWarning, match="below the mean of head, which the base did not have"):
        ml.soups.wise(made("vit"), lambda w: w.sum(1))


def test_the_error_of_a_truncated_soup(tmp_path):
    model = made("vit")
    weights = torch.tensor([0.5, 0.25, -1], dtype=torch.float64)
    lost = model.soup(tmp_path / "svd", "svd", weights)["relative_error"]
    exact = model.soup(tmp_path / "exact", "exact", weights)["relative_error"]
    assert list(lost) == list(exact) == [name for name, _ in model.lora_layers()]
    truncated = ml.load_particle_model(FAMILIES["vit"].build(), [tmp_path / "svd"])
    for (name, layer), (_, small) in zip(model.lora_layers(), truncated.lora_layers()):
        whole = layer.scaling * torch.einsum("k,kor,kri->oi", weights, layer.lora_B, layer.lora_A)
        apart = small.scaling * small.lora_B[0] @ small.lora_A[0] - whole
        assert lost[name] == pytest.approx((apart.norm() / whole.norm()).item(), rel=1e-6)
        assert 0.05 < lost[name] < 1 and exact[name] == 0
    none = model.soup(tmp_path / "none", "svd", torch.zeros(3))["relative_error"]
    assert set(none.values()) == {0.0}
    one = model.soup(tmp_path / "one", "svd", torch.tensor([0, 2.0, 0]))["relative_error"]
    assert max(one.values()) < 1e-12


def test_the_rank_of_a_file_counts_the_particles_of_the_soup(tmp_path):
    model = made("vit")
    model.soup(tmp_path, weights=torch.tensor([0.5, 0, 0.5]))
    assert ml.load_particle_model(FAMILIES["vit"].build(), [tmp_path]).peft_config.r == 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(4), r"soup needs floating weights \(3,\); got torch.float32 \(4,\)"),
        (torch.ones(1, 3), r"got torch.float32 \(1, 3\)"),
        (torch.ones(3).long(), r"got torch.int64 \(3,\)"),
        (torch.tensor([1, math.inf, 0]), "soup needs finite weights"),
    ],
)
def test_wrong_weights_of_a_file(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made("mlp").soup(tmp_path / "soup", weights=weights)
    assert not (tmp_path / "soup").exists()
