"""Laplace: its draws against the Gauss-Newton matrix written out, and their way into particles."""

import builtins
import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import multilora as ml
from models import FAMILIES, load_peft, logits_of, particle_tensors, particles_of, values
from oracles import relative_error

laplace_torch = pytest.importorskip("laplace", reason="the extra laplace is not installed")

TWO = {"r": 2, "target_modules": ["0", "1"], "modules_to_save": ["2"]}


def two_layers() -> nn.Module:
    """Layers of different shapes, whose adapters PEFT trains in the order A, B, A, B, head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 3)).double()


def data(features=3, classes=3, batches=(5, 3)):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(n, features, dtype=torch.float64, generator=generator),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in batches
    ]


def saved(base, config, folder):
    """The folder of one trained particle, and the particle as a model."""
    model = particles_of(base, config, 1, head_init="copy")
    model.save_pretrained(folder)
    return folder / "particle_0", model


def gauss_newton(model, loader, names) -> Tensor:
    """Σ_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n of the named tensors, side by side, by autograd."""
    tensors = particle_tensors(model)
    H = 0
    for x, _ in loader:
        for row in x:
            logits = model(row[None])[0, 0]
            p = logits.detach().softmax(-1)
            J = torch.stack(
                [
                    torch.cat(
                        [
                            g.flatten()
                            for g in torch.autograd.grad(
                                z, [tensors[n] for n in names], retain_graph=True
                            )
                        ]
                    )
                    for z in logits
                ]
            )
            H = H + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return H


def flat(model, names) -> Tensor:
    """(K, P): the named tensors of every particle, side by side."""
    return torch.cat([particle_tensors(model)[n].detach().flatten(1) for n in names], 1)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_draws_have_the_inverse_hessian_for_covariance(subset, structure, tmp_path):
    base, loader, precision, K = two_layers(), data(), 2.0, 6000
    path, one = saved(base, peft.LoraConfig(**TWO), tmp_path)
    names = sorted(particle_tensors(one))  # neither PEFT's order nor ours
    if subset == "last_layer":
        fixed = [n for n in names if not n.startswith("2.")]
        names = [n for n in names if n.startswith("2.")]
    model = ml.posthoc.laplace(
        path, base, loader, K, subset=subset, structure=structure, prior_precision=precision
    )
    H = gauss_newton(one, loader, names)
    H = torch.diag(H.diagonal()) if structure == "diag" else H
    expected = torch.linalg.inv(H + precision * torch.eye(len(H), dtype=H.dtype))
    drawn, mode = flat(model, names), flat(one, names)
    standard = expected.diagonal().sqrt()
    assert ((drawn.mean(0) - mode) / standard).abs().max() < 5 / K**0.5
    covariance = torch.cov(drawn.T) / torch.outer(standard, standard)
    correlation = expected / torch.outer(standard, standard)
    assert (covariance - correlation).abs().max() < 7 / K**0.5
    assert correlation.diagonal().max() / expected.diagonal().min() > 2  # orders would differ
    if subset == "last_layer":
        assert torch.equal(flat(model, fixed), flat(one, fixed).expand(K, -1))


def test_each_tensor_has_its_own_variance_under_kronecker_factors(tmp_path):
    """The factors are of layers; a vector cut in another order would mix their tensors."""
    base, loader, K = two_layers(), data(batches=(8,)), 4000
    path, one = saved(base, peft.LoraConfig(**TWO), tmp_path)
    model = ml.posthoc.laplace(path, base, loader, K, prior_precision=0.5)
    x = torch.cat([x for x, _ in loader])
    p = one(x)[0].softmax(-1).detach()
    G = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).sum(0)
    a = one.base[1](one.base[0](x)).detach()  # the head's inputs; one particle runs by itself
    A = a.T @ a / len(a)
    # Of the head's weight: (G ⊗ A + δ I)⁻¹; of its bias (G + δ I)⁻¹.
    kron = torch.linalg.inv(torch.kron(G, A) + 0.5 * torch.eye(12, dtype=A.dtype))
    bias = torch.linalg.inv(G + 0.5 * torch.eye(3, dtype=G.dtype))
    for name, expected in (("2.weight", kron), ("2.bias", bias)):
        standard = expected.diagonal().sqrt()
        covariance = torch.cov(flat(model, [name]).T) / torch.outer(standard, standard)
        wanted = expected / torch.outer(standard, standard)
        assert (covariance - wanted).abs().max() < 7 / K**0.5


@pytest.mark.parametrize("name", ["vit", "cnn", "bert"])
def test_the_prediction_is_the_loop_over_laplace_torch_s_samples(name, tmp_path):
    family = FAMILIES[name]
    base, x = family.build(torch.float32), family.inputs(4, dtype=torch.float32)
    targets = {"vit": ["qkv"], "cnn": ["stem", "point"], "bert": ["query", "value"]}[name]
    path, _ = saved(base, family.config(target_modules=targets), tmp_path)
    y = torch.tensor([0, 1, 2, 1])
    given = x if name == "bert" else next(iter(x.values()))

    def forward(model, inputs):
        return logits_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))

    network = load_peft(base, path)
    plain = network if name != "bert" else _Logits(network)
    batch = (given, y) if name != "bert" else {**x, "labels": y}
    theirs = laplace_torch.Laplace(
        plain, "classification", subset_of_weights="all", hessian_structure="diag",
        prior_precision=50.0,
    )  # fmt: skip
    loader = _Loader([batch])
    theirs.fit(loader)
    model = ml.posthoc.laplace(
        path,
        base,
        [(given, y)],
        3,
        structure="diag",
        prior_precision=50.0,
        # A transformers classifier's logits are found without help.
        forward=None if name == "bert" else forward,
        seed=7,
    )
    predicted = logits_of(model(**x))
    draws = theirs.sample(3, generator=torch.Generator().manual_seed(7))
    for k in range(3):
        vector_to_parameters(draws[k], theirs.params)
        with torch.no_grad():
            expected = forward(network, given)
        assert relative_error(predicted[k], expected) < 1e-5
    assert relative_error(predicted[0], predicted[1]) > 1e-2


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**{n: t for n, t in batch.items() if n != "labels"}).logits


class _Loader(list):
    dataset = range(4)


def test_a_language_model_s_answers(tmp_path):
    """The posterior is that of the logits which `forward` gives, with the labels among these."""
    family = FAMILIES["llama"]
    base, x = family.build(torch.float32), family.inputs(6, dtype=torch.float32)
    path, one = saved(base, family.config(), tmp_path)
    answers, y = [4, 9, 2], torch.tensor([0, 1, 2, 0, 2, 1])
    calls = []

    def forward(model, inputs):
        calls.append(sorted(inputs))
        return model(**inputs).logits[:, -1, answers]

    model = ml.posthoc.laplace(
        path, base, [(x, y)], 4, prior_precision=1e4, structure="full", forward=forward
    )
    assert all(names == ["attention_mask", "input_ids"] for names in calls)
    tight = logits_of(model(**x))[:, :, -1, answers]
    mode = logits_of(one(**x))[0, :, -1, answers]
    assert tight.shape == (4, 6, 3) and not torch.equal(tight[0], tight[1])
    # The prior alone has sd 0.01 an entry.
    assert relative_error(tight.mean(0), mode) < 0.3


def test_several_batches_are_the_data_set(tmp_path):
    base, loader = two_layers(), data()
    path, _ = saved(base, peft.LoraConfig(**TWO), tmp_path)
    one_batch = [tuple(map(torch.cat, zip(*loader)))]
    drawn = [
        values(ml.posthoc.laplace(path, two_layers(), batches, 2, structure="full"))
        for batches in (loader, one_batch)
    ]
    for a, b in zip(*drawn):
        assert relative_error(a, b) < 1e-6


def test_the_marginal_likelihood_chooses_the_prior(tmp_path):
    """Of the last layer: δ is near the maximum of log p(D|θ*) + ½ P log δ − ½ δ‖θ*‖² − ½ log|P|."""
    base, loader = two_layers(), data(batches=(40,))
    path, one = saved(base, peft.LoraConfig(**TWO), tmp_path)
    names = ["2.weight", "2.bias"]
    H, mode = gauss_newton(one, loader, names), flat(one, names)[0]
    options = {"subset": "last_layer", "structure": "full", "num_particles": 2}
    chosen = ml.posthoc.laplace(path, copy.deepcopy(base), loader, **options)

    def evidence(delta):
        P = H + delta * torch.eye(len(H), dtype=H.dtype)
        return (len(H) * torch.tensor(delta).log() - delta * mode @ mode - P.logdet()) / 2

    deltas = torch.logspace(-3, 3, 1201, dtype=torch.float64).tolist()
    best = max(deltas, key=evidence)
    given = ml.posthoc.laplace(path, base, loader, prior_precision=best, **options)
    assert relative_error(flat(chosen, names), flat(given, names)) < 1e-2
    assert abs(torch.tensor(best).log()) > 0.1  # it is not what the search starts from


def test_draws_depend_on_the_seed_alone(tmp_path):
    path, _ = saved(two_layers(), peft.LoraConfig(**TWO), tmp_path)

    def drawn(seed, K=3):
        torch.manual_seed(seed + K)
        return values(ml.posthoc.laplace(path, two_layers(), data(), K, seed=seed))

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert all(v.shape[0] == 1 for v in drawn(0, 1))


def test_the_result_is_an_ordinary_model(tmp_path):
    base, loader = two_layers(), data()
    path, _ = saved(base, peft.LoraConfig(**TWO), tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ml.posthoc.laplace(path, base, loader, 3)
    assert model.base is base and not model.training and model.num_particles == 3
    model.save_pretrained(tmp_path / "draws")
    loaded = ml.load_particle_model(two_layers(), tmp_path / "draws").eval()
    x = loader[0][0]
    assert torch.equal(loaded(x), model(x))
    assert model.peft_config.r == 2


class TestRefusals:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"subset": "first"}, 'subset must be "all" or "last_layer"; got \'first\''),
            ({"structure": "lowrank"}, 'structure must be "kron", "diag" or "full"'),
            ({"prior_precision": 0.0}, 'unless it is "marglik", must be a finite number > 0'),
            ({"prior_precision": "grid"}, 'unless it is "marglik", must be a finite number > 0'),
            ({"num_particles": 0}, "num_particles must be an integer in"),
            ({"seed": -1}, "seed must be an integer in"),
            ({"loader": []}, "at least one example; it has none"),
            ({"loader": [torch.ones(2, 3)]}, r"batches \(input, labels\); the loader gave Tensor"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_arguments_change_nothing(self, changes, message, tmp_path):
        base = two_layers()
        path, _ = saved(base, peft.LoraConfig(**TWO), tmp_path)
        before, names = copy.deepcopy(base.state_dict()), [n for n, _ in base.named_modules()]
        with pytest.raises(ValueError, match=message):
            ml.posthoc.laplace(**{"path": path, "base": base, "loader": data()} | changes)
        assert [n for n, _ in base.named_modules()] == names
        assert all(torch.equal(base.state_dict()[n], t) for n, t in before.items())

    def test_a_generator_is_read_once_and_refused(self, tmp_path):
        path, _ = saved(two_layers(), peft.LoraConfig(**TWO), tmp_path)
        with pytest.raises(ValueError, match="reads its loader twice; got an iterator"):
            ml.posthoc.laplace(path, two_layers(), (batch for batch in data()))

    def test_last_layer_needs_one_linear_head(self, tmp_path):
        config = peft.LoraConfig(r=2, target_modules=["0"])
        path, _ = saved(two_layers(), config, tmp_path / "none")
        with pytest.raises(ValueError, match="one linear in modules_to_save; got none"):
            ml.posthoc.laplace(path, two_layers(), data(), subset="last_layer")
        config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1", "2"])
        path, _ = saved(two_layers(), config, tmp_path / "two")
        with pytest.raises(ValueError, match=r"got \['model.base_model.model.1', "):
            ml.posthoc.laplace(path, two_layers(), data(), subset="last_layer")

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a PEFT adapter folder"):
            ml.posthoc.laplace(tmp_path / "nowhere", two_layers(), data())

    def test_an_adapter_of_another_base(self, tmp_path):
        path, _ = saved(two_layers(), peft.LoraConfig(**TWO), tmp_path)
        other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(5, 3)).double()
        with pytest.raises(ValueError, match="particle_0 does not fit the base model"):
            ml.posthoc.laplace(path, other, data())
        assert type(other[0]) is nn.Linear

    def test_the_extra_is_named_where_the_package_is_missing(self, tmp_path, monkeypatch):
        path, _ = saved(two_layers(), peft.LoraConfig(**TWO), tmp_path)
        original = builtins.__import__

        def without(name, *args, **kwargs):
            if name == "laplace":
                raise ModuleNotFoundError("No module named 'laplace'", name="laplace")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'multilora\[laplace\]'"):
            ml.posthoc.laplace(path, two_layers(), data())
