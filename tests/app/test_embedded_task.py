"""What the defaults do on the embedded task: IBDR's bound binds, and SVGD repels within reason."""

import statistics

import pytest
import torch

import multilora as ml
from multilora.app import run as application
from multilora.app.settings import Settings
from multilora.methods.base import Method
from multilora.methods.repulsion import Groups

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1])
def test_ibdrs_bound_binds(tmp_path, monkeypatch, seed):
    seen = []
    backward = Method.backward

    def remember(self, *args, **options):
        seen.append(backward(self, *args, **options))
        return seen[-1]

    monkeypatch.setattr(Method, "backward", remember)
    application.train(Settings(method="ibdr", seed=seed), tmp_path / "run")
    late = seen[-40:]
    assert all(0.05 < stats["lambda"] < 5 for stats in late)
    assert statistics.fmean(stats["cost"].item() for stats in late) == pytest.approx(0.03, rel=0.1)
    # λ fell by 2ρ a step at most at the start, and hardly moves now.
    assert abs(late[0]["lambda"] - late[-1]["lambda"]) < 0.2


def norm_of_factors(groups, phi):
    return torch.stack([phi[p].norm() for p in (*groups.lora_A, *groups.lora_B)]).norm().item()


def test_svgds_repulsion_beside_its_drive(tmp_path, monkeypatch):
    ratios: dict[str, list[float]] = {"layer": [], "global": []}
    directions = Groups.directions

    def measured(self, theta, dense, grad, kernels, mix, weight, repulse):
        D = self.distances(theta, dense)
        for scope in ratios:
            kernels_of = self.kernels(theta, D, scope, "median", 1e-3)
            share = kernels_of[0].sum(-1) / D.shape[-1]
            both = directions(self, theta, dense, grad, kernels_of, share, weight, repulse)
            drive = directions(self, theta, dense, grad, kernels_of, share, 0.0, repulse)
            repulsion = {p: both[p] - drive[p] for p in both}
            ratios[scope].append(norm_of_factors(self, repulsion) / norm_of_factors(self, drive))
        return directions(self, theta, dense, grad, kernels, mix, weight, repulse)

    monkeypatch.setattr(Groups, "directions", measured)
    settings = Settings(method="svgd", particles=ml.methods.METHODS["svgd"].particles, steps=60)
    application.train(settings, tmp_path / "run")
    for of_scope in ratios.values():
        assert max(of_scope[:10]) < 1
    for layer, whole in zip(ratios["layer"][20:], ratios["global"][20:]):
        assert layer > 0.01
        assert 0.1 < whole / layer < 1.1
