"""Steps that a CUDA graph can hold: nothing waits for the device, nothing comes from the host."""

import re
from pathlib import Path

import pytest
import torch

import multilora as ml
from host_operations import HostOperations
from models import FAMILIES, particles_of
from multilora.methods.tensors import zero_if_finite
from multilora.ops import reference

RECIPE = Path(__file__).parents[2] / "docs" / "graphs.md"
K = 3
BACKENDS = ["reference", "cpu", "triton"]
METHODS = {
    "ensemble": (ml.Ensemble, {}),
    "ensemble, chunks": (ml.Ensemble, {"particle_chunk": 2}),
    "ensemble, smoothing": (ml.Ensemble, {"loss": "label_smoothing"}),
    "ibdr": (ml.IBDR, {}),
    "ibdr, step": (ml.IBDR, {"ascent": "step", "cost": "output", "loss": "ensemble"}),
    "ibdr, noise": (
        ml.IBDR,
        {"sigma": 0.01, "learn_sigma": True, "beta": 0.1, "ascent": "sam", "noise": "A"},
    ),
    "ibdr, cross": (ml.IBDR, {"divergence": "cross"}),
    "mutual": (ml.MutualLearning, {"start": 0}),
    "svgd": (ml.SVGD, {}),
    "svgd, one bandwidth": (ml.SVGD, {"scope": "global", "bandwidth": 0.5}),
    "svgd, stein": (ml.SVGD, {"drive": "mix", "repulse": "stein"}),
    "map": (ml.Ensemble, {"prior_precision": 0.1}),
    "sgld": (ml.SGLD, {"num_data": 50, "lr": 0.1}),
    "variational": (ml.Variational, {"num_data": 50, "noise": "A"}),
    "variational, climb": (ml.Variational, {"num_data": 50, "rho": 0.05}),
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Code that asks takes the CPU's tensors for a GPU's."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Triton's launches are left out: what the host does around them is what is looked at."""
    with ml.use_backend(request.param):
        if request.param == "triton":
            from multilora.ops.triton import common

            common.compile_only(common.H200, lambda *_: None)
            yield request.param
            common.compile_only(None, None)
        else:
            yield request.param


def problem(particles=K):
    family = FAMILIES["vit"]
    build = family.build(torch.float32)
    # Where launches are left out, nothing is equal to anything.
    model = particles_of(build, family.config(), particles, check_isolation=False).train()
    return model, family.inputs(batch=4, dtype=torch.float32)["x"], torch.arange(4) % 3


def step(model, method, x, y):
    method.backward(lambda: (model(x), y))
    ml.clip_grad_norm_(model, 1.0)


@pytest.mark.heavy
@pytest.mark.cover
@pytest.mark.filterwarnings("ignore:.*start from weights drawn anew")
@pytest.mark.parametrize("name", METHODS)
def test_no_step_but_the_first_waits_or_copies(name, backend, on_a_gpu):
    model, x, y = problem()
    kind, options = METHODS[name]
    method = kind(model, **options, nonfinite="ignore")
    first = HostOperations()
    with first:
        step(model, method, x, y)
    again = []
    for _ in range(2):
        model.zero_grad()
        with HostOperations(known=first) as seen:
            step(model, method, x, y)
        assert not seen.faults
        again.append(seen.operations)
    assert again[0] == again[1] and len(again[0]) > 100


@pytest.mark.filterwarnings("ignore:.*start from weights drawn anew")
@pytest.mark.parametrize(
    ("name", "looks"), [("ensemble", 1), ("svgd", 1), ("mutual", 1), ("ibdr", 2)]
)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_is_not_finite_is_looked_for_once_a_backward(name, looks, nonfinite, on_a_gpu):
    model, x, y = problem()
    kind, options = METHODS[name]
    method = kind(model, **options, nonfinite=nonfinite)
    with ml.use_backend("reference"):
        with HostOperations() as first:
            step(model, method, x, y)
        with HostOperations(known=first) as seen:
            step(model, method, x, y)
        ignoring = kind(model, **options, nonfinite="ignore")
        with HostOperations(known=first) as without:
            step(model, ignoring, x, y)
    assert seen.faults == {"tolist waits for the device, or copies to it": looks}
    assert not without.faults
    # Not many for each of the model's tensors: a view, mostly.
    more = len(seen.operations) - len(without.operations)
    assert more < looks * (len(method.params) + 12)


PLANTED = {
    "item": lambda t: t.sum().item(),
    "branch": lambda t: t if (t > 0).any() else -t,
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "nonzero": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "masked assignment": lambda t: t.clone().index_put_((t > 0,), torch.zeros_like(t).sum()),
    "list": lambda t: t[[0, 1]],
    "new_tensor": lambda t: t.new_tensor([1.0, 2.0]),
    "tensor": lambda t: torch.tensor([1.0], device="cpu"),
    "factory": lambda t: t[:2] + torch.arange(2),
    "equal": lambda t: torch.equal(t, t),
    "eigh": lambda t: torch.linalg.eigh(t[:, None] * t),
    "repeats": lambda t: torch.repeat_interleave(t, t.long()),
    "numpy": lambda t: t.numpy(),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name):
    t = torch.rand(4)
    with HostOperations() as first:
        t + 1
    with HostOperations(known=first) as clean:
        torch.where(t > 0, t, 0) + torch.eye(4, device=t.device)[0]
    assert not clean.faults
    with HostOperations(known=first) as seen:
        PLANTED[name](t)
    assert seen.faults


@pytest.mark.filterwarnings("ignore:.*start from weights drawn anew")
def test_what_a_graph_cannot_hold_is_refused(on_a_gpu, monkeypatch):
    model, x, y = problem()
    chunked = ml.IBDR(model, nonfinite="ignore", particle_chunk=2)
    looks = ml.Ensemble(model, nonfinite="skip")
    noisy = ml.IBDR(model, nonfinite="ignore", sigma=0.01)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r'step of Ensemble, .* needs nonfinite="ignore"'):
        looks.backward(lambda: (model(x), y))
    with pytest.raises(RuntimeError, match="needs particle_chunk=None"):
        chunked.backward(lambda: (model(x), y))
    assert all(p.grad is None for p in model.particle_parameters())
    # A GPU's generator refuses this during a capture.
    noisy._spread.generator = NotRead(noisy._spread.generator)
    noisy.backward(lambda: (model(x), y))


class NotRead(torch.Generator):
    def __new__(cls, _):
        return super().__new__(cls)

    def __init__(self, _):
        pass

    def get_state(self):
        raise AssertionError("read while capturing")


def test_the_references_tables_are_not_made_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shapes = (torch.Size((2, 3, 5, 2, 7, 3)),)
    with pytest.raises(RuntimeError, match="call the operator once with these shapes before"):
        reference._plan(shapes, (0.7,), torch.device("cuda"))


def test_layers_of_mixed_shapes_keep_their_places():
    sizes = [(5, 7), (3, 4), (5, 7), (4, 3), (3, 4)]
    lora_A = [torch.randn(K, 2, d, dtype=torch.float64) for d, _ in sizes]
    lora_B = [torch.randn(K, d, 2, dtype=torch.float64) for _, d in sizes]
    scaling = [1.0, 2.0, 3.0, 4.0, 5.0]
    with ml.use_backend("reference"):
        together = ml.lora_gram(lora_A, lora_B, scaling)
        alone = [ml.lora_gram(A, B, s) for A, B, s in zip(lora_A, lora_B, scaling)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, None])
def test_one_look_at_many_tensors_sees_every_number(dtype, value):
    top = torch.finfo(dtype).max
    tensors = [torch.full((K, 2 + i % 3, 3), (-top, top, 0.0, -0.0)[i % 4], dtype=dtype)
               for i in range(150)]  # fmt: skip
    if value is not None:
        tensors[70][1, 1, 2] = value
    seen = zero_if_finite(tensors)
    assert seen.isfinite().tolist() == [True, value is None, True]


def test_the_cuda_sources_leave_memory_and_waiting_to_the_caller():
    folder = Path(__file__).parents[2] / "csrc" / "cuda"
    sources = [path for path in folder.rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    assert sources
    for path in sources:
        found = re.findall(r"cudaMalloc|cudaMemcpy|cudaFree|Synchronize\(|__device__ .*new ",
                           path.read_text())  # fmt: skip
        assert not found, path


@pytest.mark.filterwarnings("ignore:.*start from weights drawn anew")
@pytest.mark.parametrize("method", ["IBDR", "Ensemble"])
def test_the_documented_recipe_trains(method):
    code = re.search(r"^```python\n(.*?)^```$", RECIPE.read_text(), re.MULTILINE | re.DOTALL)[1]
    if method == "Ensemble":
        code = code.replace('ml.IBDR(model, nonfinite="ignore", sigma=1e-3)', "ml.Ensemble(model)")
        assert "ml.Ensemble(model)" in code
    family = FAMILIES["mlp"]
    x = torch.randn(12, 8, 6)
    y = (x[:, :, 0] > 0).long()
    scope = {
        "base": family.build(torch.float32),
        "config": family.config(),
        "loader": list(zip(x, y)),
    }
    exec(code, scope)
    ours = scope["method"]
    assert ours.step == 12 and scope["stats"]["loss"].isfinite()

    model = ml.get_particle_model(family.build(torch.float32), family.config(), 4).train()
    kind, options = type(ours), {"sigma": 1e-3} if method == "IBDR" else {}
    own = kind(model, nonfinite="ignore", **options)
    optimizer = torch.optim.AdamW([*model.particle_parameters(), *own.parameters()], lr=1e-3)
    for batch in zip(x, y):
        optimizer.zero_grad()
        own.backward(lambda batch=batch: (model(batch[0]), batch[1]))
        ml.clip_grad_norm_(model, 1.0)
        optimizer.step()
    for a, b in zip(ours.params, own.params):
        assert torch.equal(a, b)
