"""Processes that share the data, the particles or both take the steps of one process."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import multilora as ml
from documents import block
from models import FAMILIES, logits_of, perturb
from multilora.attach import particle_seeds
from one_by_one import trained
from processes import run_in_processes

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
K, B = 4, 8
METHODS = {
    "ensemble": (ml.Ensemble, {}),
    "svgd": (ml.SVGD, {}),
    "svgd-stein": (ml.SVGD, {"drive": "mix", "repulse": "stein", "scope": "global"}),
    "ibdr": (ml.IBDR, {}),
    "ibdr-noise": (ml.IBDR, {"sigma": 0.01, "learn_sigma": True, "beta": 0.1, "cost": "output"}),
    "ibdr-cross": (ml.IBDR, {"divergence": "cross", "alpha": 1.0}),
    "mutual": (ml.MutualLearning, {"start": 0, "beta": 0.0}),
    "mutual-noise": (
        ml.MutualLearning,
        {"start": 0, "beta": 0.0, "sigma": 0.01, "learn_sigma": True, "kl_weight": 0.1},
    ),
    # Features are compared within each process's own examples.
    "mutual-features": (ml.MutualLearning, {"start": 0, "beta": 100.0}),
    "map": (ml.Ensemble, {"prior_precision": 0.1}),
    "sam": (ml.SAM, {}),
    "sgld": (ml.SGLD, {"num_data": 50, "lr": 0.1}),
    "variational": (ml.Variational, {"num_data": 50, "sigma": 0.01, "noise": "A"}),
    "variational-sam": (ml.Variational, {"num_data": 50, "sigma": 0.01, "rho": 0.05}),
}


def methods_of(shape):
    """Those whose step over these processes is the step of one."""
    return [name for name in METHODS if shape[0] == 1 or name != "mutual-features"]


def everything(family, ids, wrap, **options):
    """All particles' model, with inputs and targets of examples `ids`."""
    family = FAMILIES[family]
    # One of the blocks that FSDP shards lies below all adapters.
    lora = {"target_modules": r"blocks\.1\..*(qkv|fc1)"} if wrap.startswith("fsdp") else {}
    model = ml.get_particle_model(family.build(), family.config(**lora), K, **options).train()
    inputs = {key: t[ids] for key, t in family.inputs(batch=B).items()}
    if "input_ids" in inputs:
        # Rows differ in length, so processes have different numbers of targets.
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    else:
        targets = (torch.arange(B) % 3)[ids]
    return model, lambda forward: (logits_of(forward(**inputs)), targets)


def set_particles(model, first):
    """The tensors that `perturb` gives to all K particles, of those that this process has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.particle_parameters():
            noise = torch.randn(K, *p.shape[1:], generator=generator).to(p.dtype)
            p.add_(noise[first : first + len(p)], alpha=0.3)


def step(model, name, closure, forward, **options):
    """A step of a method that is made for it; a method that draws the particles leaves none."""
    before = [p.detach().clone() for p in model.particle_parameters()]
    kind, settings = METHODS[name]
    method = kind(forward if hasattr(forward, "parameters") else model, **settings, **options)
    stats = method.backward(lambda: closure(forward), scale=0.5)
    grads = [p.grad for p in trained(method)]
    model.zero_grad()
    with torch.no_grad():
        torch._foreach_copy_(list(model.particle_parameters()), before)
    return {"grads": grads, "stats": stats, "nll": method.particle_nll}


def share_of(name, tensor, particles):
    """Of a gradient, that of these particles; a posterior has one for all."""
    return tensor[particles] if METHODS[name][0].trains_particles else tensor


def steps_of(rank, folder, shape, family, wrap):
    """One step of every method in this process; `shape`: processes along data and particles."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "particle"))
    data = mesh.get_local_rank("data")
    share = B // shape[0]
    ids = torch.arange(data * share, (data + 1) * share)
    model, closure = everything(family, ids, wrap, mesh=None if wrap == "ddp" else mesh)
    set_particles(model, mesh.get_local_rank("particle") * (K // shape[1]))
    forward = model
    if wrap == "ddp":
        forward = DistributedDataParallel(model)
    if wrap.startswith("fsdp"):
        ignored = set(model.particle_parameters())
        for block in model.base.blocks:
            part = block if wrap == "fsdp" else block.mlp
            fully_shard(part, mesh=mesh["data"], ignored_params=ignored)
        fully_shard(model, mesh=mesh["data"], ignored_params=ignored)
        assert sum(p.numel() for p in ignored) == sum(
            p.numel() for p in model.parameters() if not hasattr(p, "placements")
        )
    results = {}
    for name in methods_of(shape):
        for chunk in (None, 1):
            results[name, chunk] = step(model, name, closure, forward, particle_chunk=chunk)
    return results


@pytest.mark.parametrize(
    ("family", "shape", "wrap"),
    [
        ("vit", (2, 2), "mesh"),
        ("llama", (1, 2), "mesh"),
        ("vit", (2, 1), "fsdp inside a block"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("vit", (2, 1), "mesh"),
                ("vit", (1, 2), "mesh"),
                ("vit", (4, 1), "mesh"),
                ("vit", (1, 4), "mesh"),
                ("llama", (2, 1), "mesh"),
                ("llama", (4, 1), "mesh"),
                ("llama", (2, 2), "mesh"),
                ("llama", (1, 4), "mesh"),
                ("vit", (2, 1), "ddp"),
                ("vit", (2, 1), "fsdp"),
                ("vit", (2, 2), "fsdp"),
            ]
        ),
    ],
)
def test_processes_take_the_step_of_one(tmp_path, family, shape, wrap):
    model, closure = everything(family, torch.arange(B), wrap)
    perturb(model)
    results = run_in_processes(shape[0] * shape[1], steps_of, tmp_path, shape, family, wrap)
    tolerance = max(FAMILIES[family].tolerance, 1e-9)
    for name in methods_of(shape):
        expected = step(model, name, closure, model)
        for rank, result in enumerate(results):
            share = K // shape[1]
            first = rank % shape[1] * share
            for chunk in (None, 1):
                got = result[name, chunk]
                for a, b in zip(got["grads"], expected["grads"], strict=True):
                    b = share_of(name, b, slice(first, first + share))
                    scale = tolerance * expected["grads"][0].abs().max().item()
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=scale)
                torch.testing.assert_close(
                    got["nll"], expected["nll"][first : first + share], rtol=tolerance, atol=1e-9
                )
                torch.testing.assert_close(
                    got["stats"], expected["stats"], rtol=tolerance, atol=1e-9
                )


def broken_at(particle, particles):
    """model -> its forward, whose predictions of one particle are not finite."""
    factor = torch.ones(particles, 1, 1, dtype=torch.float64)
    if particle is not None:
        factor[particle] = torch.nan
    return lambda model: lambda **inputs: model(**inputs) * factor


def skipping(rank, folder, nonfinite):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particle"))
    data, particle = mesh.get_local_rank("data"), mesh.get_local_rank("particle")
    model, closure = everything("vit", torch.arange(data * 4, data * 4 + 4), "mesh", mesh=mesh)
    set_particles(model, particle * 2)
    results, broken = {}, broken_at(0 if particle == 1 else None, 2)
    for name in METHODS:
        try:
            results[name] = step(model, name, closure, broken(model), nonfinite=nonfinite)
        except FloatingPointError as error:
            results[name] = str(error)
    return results


def test_a_broken_particle_is_named_in_all_processes(tmp_path):
    for result in run_in_processes(4, skipping, tmp_path, "raise"):
        for name in METHODS:
            assert "particle 2 (losses [nan]); nothing was changed" in result[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*skipped, the others go on")
def test_all_processes_go_on_without_it(tmp_path):
    model, closure = everything("vit", torch.arange(B), "mesh")
    perturb(model)
    forward = broken_at(2, K)(model)
    results = run_in_processes(4, skipping, tmp_path, "skip")
    for name in methods_of((2, 2)):
        expected = step(model, name, closure, forward, nonfinite="skip")
        for rank, result in enumerate(results):
            first = rank % 2 * 2
            for a, b in zip(result[name]["grads"], expected["grads"], strict=True):
                b = share_of(name, b, slice(first, first + 2))
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(result[name]["stats"], expected["stats"])


def mistakes(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particle"))
    family, said = FAMILIES["vit"], {}

    def trial(name, function):
        try:
            function()
        except (RuntimeError, ValueError, TypeError) as error:
            said[name] = str(error)

    def build(particles=K, mesh=mesh, seed=0):
        return ml.get_particle_model(
            family.build(), family.config(), particles, seed=seed, mesh=mesh
        )

    trial("uneven", lambda: build(particles=3))
    unnamed = init_device_mesh("cpu", (4,))
    trial("unnamed", lambda: build(mesh=unnamed))
    trial("misnamed", lambda: build(mesh=init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))))
    # Processes that should hold the same particles and do not.
    model = build(seed=mesh.get_local_rank("data"))
    trial("different particles", lambda: ml.Ensemble(model))
    model = build()
    x, y = family.inputs(batch=4)["x"], torch.arange(4) % 3 + rank
    for kind in (ml.Ensemble, ml.IBDR):
        method = kind(model)
        trial(kind.__name__, lambda method=method: method.backward(lambda: (model(x), y)))
    copy.deepcopy(model)
    # It would give all processes the particles of the first.
    wrapped = DistributedDataParallel(build())
    trial("wrapped", lambda: ml.Ensemble(wrapped))
    ml.Ensemble(DistributedDataParallel(build(), process_group=mesh["data"].get_group()))
    alone = ml.get_particle_model(family.build(), family.config(modules_to_save=None), 2, mesh=mesh)
    with torch.no_grad():
        for p in alone.particle_parameters():
            p.zero_()
    trial("identical", lambda: ml.SVGD(alone))
    fully_shard(model, mesh=mesh["data"])
    trial("sharded", lambda: ml.Ensemble(model))
    return said


def test_mistakes_are_named_in_all_processes(tmp_path):
    for said in run_in_processes(4, mistakes, tmp_path):
        assert said["uneven"] == "3 particles cannot be shared equally by 2 processes"
        for name, got in (("unnamed", "no names"), ("misnamed", "('dp',)")):
            assert said[name].startswith("mesh needs axes named ('data', 'particle')")
            assert said[name].endswith(f"got {got}")
        assert "start equal" in said["different particles"]
        for name in ("Ensemble", "IBDR"):
            assert "need the same batch: the processes of the particle axis differ" in said[name]
        assert "has given them all the particles of one" in said["wrapped"]
        assert "all 2 particles are identical" in said["identical"]
        assert "ignored_params=set(model.particle_parameters())" in said["sharded"]


def saving(rank, folder):
    """Save from two by two processes; load again as four, each with one particle."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particle"))
    model, _ = everything("vit", torch.arange(B), "mesh", mesh=mesh, seed=5)
    set_particles(model, mesh.get_local_rank("particle") * 2)
    model.save_pretrained(folder / "particles")
    model.soup(folder / "soup")
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("particle",))
    base = FAMILIES["vit"].build()
    loaded = ml.load_particle_model(base, folder / "particles", mesh=mesh)
    ml.checkpoint.load_particles(model, folder / "particles")
    inputs = FAMILIES["vit"].inputs()
    cosines = [m.cosines(per_layer) for m in (loaded, model) for per_layer in (False, True)]
    try:
        model.save_pretrained(folder / "particles" / "multilora.json" / "inside")
        said = "nothing"
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    predictions = ml.predict(loaded, inputs), ml.predict(model, inputs)
    return loaded.num_particles, *predictions, cosines, said


def test_particles_are_saved_and_predict_together(tmp_path):
    model, _ = everything("vit", torch.arange(B), "mesh", seed=5)
    perturb(model)
    expected = ml.predict(model, FAMILIES["vit"].inputs())
    cosines = [model.cosines(per_layer) for per_layer in (False, True)]
    for rank, (k, loaded, kept, angles, said) in enumerate(run_in_processes(4, saving, tmp_path)):
        assert k == 1
        torch.testing.assert_close(loaded, expected)
        torch.testing.assert_close(kept, expected)
        torch.testing.assert_close(angles, cosines * 2)
        assert said.startswith("RuntimeError: the first process could not" if rank else "NotADir")
    alone = ml.load_particle_model(FAMILIES["vit"].build(), tmp_path / "particles")
    assert alone.seeds == model.seeds
    for a, b in zip(alone.particle_parameters(), model.particle_parameters()):
        assert torch.equal(a, b)
    model.soup(tmp_path / "expected")
    soups = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("soup", "expected")]
    assert soups[0].keys() == soups[1].keys()
    for name, tensor in soups[0].items():
        torch.testing.assert_close(tensor, soups[1][name])


@pytest.mark.slow
def test_the_script_that_the_guide_shows(tmp_path):
    script = tmp_path / "train.py"
    code = block("docs/guides/distributed.md", "## On many devices", "python")
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "4", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scope = {}
    exec(code.partition("\ndevice =")[0], scope)  # its data and its base
    base, (x, y) = scope["base"], scope["dataset"].tensors
    model = ml.load_particle_model(base, tmp_path / "particles")
    assert model.num_particles == 4
    assert model.seeds == tuple(particle_seeds(0, 4))
    p = ml.predict(model, x)
    assert (p.mean(0).argmax(-1) == y).float().mean() > 0.7
