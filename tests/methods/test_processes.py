"""Processes that disagree say so, all of them and at once; means are over the data of all."""

import time
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import multilora as ml
from multilora import losses
from multilora.parallel import Processes
from processes import run_in_processes

pytestmark = pytest.mark.processes

K, B, C = 4, 8, 5
AXES = ("data", "particle")


def in_processes(size, function, folder):
    # Nothing here takes long: a process that waits for 20 s waits for ever.
    timeout = timedelta(seconds=20)
    return run_in_processes(size, lambda rank, _: function(rank), folder, timeout=timeout)


def make(mesh, particles=K, seed=0):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    return ml.get_particle_model(
        base.double(), config, particles, mesh=mesh, seed=seed, head_init="reset"
    )


def mutual(model, **options):
    return ml.MutualLearning(model, beta=0.0, start=0, **options)


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, 6, generator=generator).double(), torch.arange(B) % C


def said(function):
    """The error, by its kind and message, and how long it took to come."""
    begin = time.monotonic()
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "nothing", time.monotonic() - begin


# The arguments of each of two processes, and the words that the error must contain.
SETTINGS = {
    "rho": ("data", lambda r, m: ml.IBDR(make(m), rho=0.03 * (1 + r)), "rho (0.03 / 0.06)"),
    "noise seed": ("data", lambda r, m: ml.IBDR(make(m), sigma=0.1, seed=r), "seed (0 / 1)"),
    "method": ("data", lambda r, m: (ml.IBDR, ml.SVGD)[r](make(m)), "method ("),
    "gamma": ("particle", lambda r, m: ml.SVGD(make(m), gamma=1.0 + r), "gamma (1.0 / 2.0)"),
    "nonfinite": (
        "data",
        lambda r, m: ml.Ensemble(make(m), nonfinite=("skip", "raise")[r]),
        "nonfinite ('skip' / 'raise')",
    ),
    "chunk": (
        "data",
        lambda r, m: ml.Ensemble(make(m), particle_chunk=1 + r),
        "particle_chunk (1 / 2)",
    ),
    "loss": (
        "data",
        lambda r, m: ml.Ensemble(make(m), loss=losses.CrossEntropy(r / 4)),
        "multilora.losses.CrossEntropy(0.25, None)",
    ),
    "weights": (
        "data",
        lambda r, m: ml.Ensemble(make(m), loss=losses.CrossEntropy(weight=torch.ones(C) * (1 + r))),
        "loss (",
    ),
    "number": ("data", lambda r, m: ml.IBDR(make(m, 2 + r)), "number of particles (2 / 3)"),
    "share": (
        "particle",
        lambda r, m: ml.IBDR(make(m, 2 + 2 * r)),
        "number of particles (2 / 4)",
    ),
    "seeds": ("particle", lambda r, m: ml.Ensemble(make(m, seed=r)), "seeds of the particles ("),
    "start": ("data", lambda r, m: ml.Ensemble(make(m, seed=r)), "the particles must start equal"),
}


def made_differently(rank):
    results = {}
    meshes = {axis: init_device_mesh("cpu", (2,), mesh_dim_names=(axis,)) for axis in AXES}
    for name, (axis, build, _) in SETTINGS.items():
        results[name] = said(lambda build=build, axis=axis: build(rank, meshes[axis]))
        # In step again before the next.
        dist.barrier()
    # And those that agree are made, a loss of one's own too.
    for mesh in meshes.values():
        ml.IBDR(make(mesh), loss=nn.Flatten(), alpha=0.0)
    return results


def test_settings_are_compared_when_a_method_is_made(tmp_path):
    for result in in_processes(2, made_differently, tmp_path):
        for name, (_, _, message) in SETTINGS.items():
            error, seconds = result[name]
            assert error.startswith("RuntimeError") and message in error, (name, error)
            assert seconds < 10, name


def other_batches(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES)
    # One process of four has another batch, from the second step on.
    odd = rank == 3
    x, y = batch()
    short = B // 2 if odd else B
    changes = {
        "targets": lambda: (x, y.roll(int(odd))),
        "one target": lambda: (x, y.index_fill(0, torch.tensor([2]), 4) if odd else y),
        "fewer": lambda: (x[:short], y[:short]),
    }
    results = {}
    for kind in (ml.Ensemble, ml.SVGD, ml.IBDR, mutual):
        extra = {"inputs": lambda: (x + int(odd), y)} if kind in (ml.IBDR, mutual) else {}
        for name, change in (changes | extra).items():
            model = make(mesh)
            method = kind(model)
            method.backward(lambda model=model: (model(x), y))
            before = [p.grad.clone() for p in method.params]

            def closure(model=model, change=change):
                inputs, targets = change()
                return model(inputs), targets

            error = said(lambda method=method, closure=closure: method.backward(closure))
            kept = all(torch.equal(p.grad, g) for p, g in zip(method.params, before))
            results[kind.__name__, name] = error, kept and method.step == 1
            dist.barrier()
    return results


def test_batches_of_one_data_are_compared_in_every_step(tmp_path):
    for result in in_processes(4, other_batches, tmp_path):
        assert len(result) == 14
        for name, ((error, seconds), kept) in result.items():
            assert error.startswith("RuntimeError: processes that share the data need"), name
            assert kept and seconds < 10, name


def batches_of_their_own(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("particle",))
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(2, B, 6, generator=generator).double(), torch.arange(2 * B).view(2, B) % C
    shared = torch.arange(B) % C
    done = []
    for kind in (ml.Ensemble, ml.IBDR):
        model = make(mesh)
        method = kind(model)
        # Inputs, and inputs and targets, that each particle has for itself.
        method.backward(lambda model=model: (model(x, per_particle=True), shared))
        method.backward(lambda model=model: (model(x, per_particle=True), (y + rank) % C))
        done.append(method.step)
    # Independent augmentation is nobody's business where predictions do not interact.
    model = make(mesh)
    ml.SVGD(model).backward(lambda: (model(x[0]), shared))
    # Batches may be left uncompared.
    model = make(mesh)
    method = ml.Ensemble(model)
    method.compare_batches = 2
    for step in range(3):
        targets = (shared + rank) % C if step == 1 else shared
        method.backward(lambda targets=targets: (model(x[0]), targets))
    return done


def test_what_may_differ_may_differ(tmp_path):
    assert in_processes(2, batches_of_their_own, tmp_path) == [[2, 2], [2, 2]]


LOSSES = {
    "particle": "particle",
    "weights": losses.CrossEntropy(weight=torch.tensor([0.1, 0.7, 0.05, 0.02, 0.4])),
    "smoothing": losses.CrossEntropy(0.2, torch.tensor([0.1, 0.7, 0.05, 0.02, 0.4])),
    "soft": "soft_targets",
    "bce": "bce",
    "gaussian": losses.GaussianNLL(variance=2.0),
}


def targets_of(name):
    y = batch()[1].clone()
    y[[1, 6, 7]] = -100
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(B, C, generator=generator).double()
    return {"soft": z.softmax(-1), "bce": (z > 0).double(), "gaussian": z}.get(name, y)


NO_CLASSES = {"alpha": 0.0, "cost": "parameter", "rho": 1e-3}


def step_of(name, mesh, rows):
    x, t = batch()[0], targets_of(name)
    results = []
    kinds = [(mutual, {})] if name in ("particle", "weights", "smoothing", "soft") else []
    for kind, options in (
        *kinds,
        (ml.Ensemble, {}),
        (ml.IBDR, {} if name in ("particle", "weights", "smoothing", "soft") else NO_CLASSES),
    ):
        model = make(mesh)
        method = kind(model, loss=LOSSES[name], **options)
        stats = method.backward(lambda model=model: (model(x[rows]), t[rows]))
        results.append([*(p.grad for p in method.params), *stats.values(), method.particle_nll])
    return results


def unequal_shares(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    rows = slice(0, 3) if rank == 0 else slice(3, B)
    return {name: step_of(name, mesh, rows) for name in LOSSES}


def test_means_are_over_the_data_of_all_processes(tmp_path):
    results = in_processes(2, unequal_shares, tmp_path)
    for name in LOSSES:
        expected = step_of(name, None, slice(0, B))
        for result in results:
            torch.testing.assert_close(
                result[name],
                expected,
                rtol=1e-9,
                atol=1e-11,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def broken_batches(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES)
    x, y = batch()
    if mesh.get_local_rank("data") == 1:
        # One example of the batch of one process.
        x = x.index_fill(0, torch.tensor([2]), torch.nan)
    results = {}
    for kind, options in (
        (ml.Ensemble, {}),
        (ml.SVGD, {}),
        (ml.IBDR, {"sigma": 0.1}),
        (mutual, {"sigma": 0.1}),
        (ml.SGLD, {"num_data": 9, "lr": 0.1}),
        (ml.Variational, {"num_data": 9, "rho": 0.1}),
    ):
        for chunk in (None, 1):
            model = make(mesh)
            method = kind(model, nonfinite="skip", particle_chunk=chunk, **options)
            state = method.state_dict()
            stats = method.backward(lambda model=model: (model(x), y))
            kept = all(p.grad is None for p in method.params) and method.step == 1
            for key, value in method.state_dict().items():
                kept &= key == "step" or torch.equal(value, state[key])
            results[kind.__name__, chunk] = kept and bool(stats["loss"].isnan())
    return results


def test_a_broken_batch_is_skipped_in_all_processes(tmp_path):
    for result in in_processes(4, broken_batches, tmp_path):
        assert len(result) == 12 and all(result.values()), result


def test_a_digest_tells_tensors_apart():
    from multilora.parallel import _digest

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        t = (torch.arange(12) % 2).to(dtype)
        digest = _digest(t)
        assert torch.equal(digest, _digest(t.clone().view(3, 4).t().contiguous().t()))
        for other in (t.roll(1), 1 - t.int(), torch.cat([t, t[1:2]]), t[:0]):
            assert not torch.equal(digest, _digest(other.to(dtype)))
    both = torch.complex(torch.ones(3), torch.zeros(3))
    assert not torch.equal(_digest(both), _digest(1j * both))
    # The sum of permuted numbers is one; of many permutations none may have the same digest.
    t = torch.randn(20)
    digests = {_digest(t[torch.randperm(20)]).item() for _ in range(500)}
    assert len(digests) == 500
    Processes().require_equal([t], "data", t.device, "alone")


def test_the_old_name_of_a_models_processes_still_works():
    model = ml.get_particle_model(
        torch.nn.Sequential(torch.nn.Linear(3, 2)),
        peft.LoraConfig(r=1, target_modules=["0"]),
        num_particles=2,
    )
    assert model.ranks is model.processes
