"""Adapters over linears whose product is their own: quantised, packed, sharded, hooked ones."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import multilora as ml
from models import particles_of
from multilora.forward_state import ForwardState
from multilora.layers import LoraLinear, LoraOpaqueLinear, has_own_forward
from opaque_layers import (
    BATCH,
    D_IN,
    D_OUT,
    TOKENS,
    Int8Linear,
    K,
    Net,
    Packed4Bit,
    config,
    inputs,
    nets,
    stubs,
)
from oracles import relative_error
from processes import run_in_processes


def pair(stub, dtype=torch.float64, **changes) -> tuple[ml.ParticleModel, ml.ParticleModel]:
    """K particles over foreign layers and over plain ones, with the same adapters."""
    foreign, plain = (particles_of(net, config(**changes), K) for net in nets(stub, dtype))
    with torch.no_grad():
        for mine, theirs in zip(plain.particle_parameters(), foreign.particle_parameters()):
            mine.copy_(theirs)
    return foreign, plain


def gradients(model, x: Tensor, weights: Tensor, forward=None) -> list[Tensor]:
    """Gradients of x and all trainable tensors; `forward` runs the model where it is given."""
    leaves = [x, *model.particle_parameters()]
    output = model(x) if forward is None else forward(x)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def assert_same_gradients(got, expected, tolerance) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine, theirs) < tolerance


# --- values and gradients ------------------------------------------------------------------------


@stubs
def test_outputs_and_gradients_are_those_of_the_dequantised_weights(stub):
    foreign, plain = pair(stub)
    kinds = {name: type(layer) for name, layer in foreign.lora_layers()}
    assert kinds == {"first": LoraOpaqueLinear, "plain": LoraLinear, "last": LoraOpaqueLinear}
    x, _ = inputs()
    assert relative_error(foreign(x), plain(x)) < 1e-14
    x.requires_grad_()
    weights = torch.randn(K, BATCH, 3, dtype=torch.float64)
    assert_same_gradients(gradients(foreign, x, weights), gradients(plain, x, weights), 1e-13)


@stubs
def test_masters_are_float32_on_the_device_of_the_layer(stub):
    model = particles_of(nets(stub, torch.bfloat16)[0], config(), K)
    for adapter in model.adapters():
        assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
        assert adapter.lora_A.device.type == "cpu"
    assert model.adapters()[0].lora_A.shape == (K, 2, D_IN)
    assert model.adapters()[0].lora_B.shape == (K, D_OUT, 2)
    x = inputs(torch.bfloat16)[0]
    assert model(x).dtype == torch.bfloat16


@stubs
@pytest.mark.parametrize("method", [ml.Ensemble, ml.IBDR, ml.SVGD], ids=lambda m: m.__name__)
def test_training_steps(stub, method):
    results = []
    for model in pair(stub):
        optimizer = torch.optim.SGD(model.particle_parameters(), lr=0.1)
        trainer = method(model)
        for step in range(2):
            x, y = inputs(seed=step)
            trainer.backward(lambda model=model, x=x, y=y: (model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        results.append(model(inputs(seed=9)[0]))
    assert relative_error(*results) < 1e-12


@stubs
def test_autocast(stub):
    foreign, plain = pair(stub, torch.float32)
    x = inputs(torch.float32)[0].requires_grad_()
    weights = torch.randn(K, BATCH, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert foreign(x).dtype == torch.bfloat16
        got = gradients(foreign, x, weights)
    expected = gradients(plain, x, weights)
    assert all(g.dtype == torch.float32 for g in got)
    assert_same_gradients(got, expected, 0.05)


@pytest.mark.slow
@stubs
def test_compiled(stub):
    foreign, _ = pair(stub)
    x = inputs()[0].requires_grad_()
    weights = torch.randn(K, BATCH, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(foreign, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), foreign(x)) < 1e-14
    got = gradients(foreign, x, weights, compiled)
    assert_same_gradients(got, gradients(foreign, x, weights), 1e-13)


def test_exported():
    foreign, _ = pair(Packed4Bit)
    x = inputs()[0]
    with torch.no_grad():
        exported = torch.export.export(foreign, (x,))
        assert relative_error(exported.module()(x), foreign(x)) < 1e-14


@pytest.mark.parametrize("training", [True, False])
def test_dropout_lies_before_A_only(training):
    model = particles_of(nets(Int8Linear)[0], config(lora_dropout=0.5), K).train(training)
    layer = model.base.first
    x = torch.randn(K * BATCH, TOKENS, D_IN, dtype=torch.float64)
    torch.manual_seed(5)
    with ForwardState(model, K, len(x)).active():
        y = layer(x)
    torch.manual_seed(5)
    rows = F.dropout(x.view(K, -1, D_IN), 0.5, training)
    delta = layer.scaling * rows @ layer.lora_A.mT.double() @ layer.lora_B.mT.double()
    assert relative_error(y, layer.base_layer(x) + delta.view_as(y)) < 1e-14


def test_gradient_checkpointing():
    foreign, _ = pair(Packed4Bit)
    x = inputs()[0].requires_grad_()
    weights = torch.randn(K, BATCH, 3, dtype=torch.float64)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(foreign, x, use_reentrant=False)

    got = gradients(foreign, x, weights, checkpointed)
    assert_same_gradients(got, gradients(foreign, x, weights), 1e-13)


# --- one call, in place --------------------------------------------------------------------------


@stubs
@pytest.mark.parametrize("grad", [True, False])
def test_the_base_is_called_once_and_its_output_becomes_the_result(stub, grad, monkeypatch):
    model = particles_of(nets(stub)[0], config(), K)
    calls, results = [], []
    forward = stub.forward

    def recorded(layer, x):
        y = forward(layer, x)
        calls.append((x.shape, y.data_ptr()))
        return y

    monkeypatch.setattr(stub, "forward", recorded)
    for name in ("first", "last"):
        layer = model.base.get_submodule(name)
        layer.register_forward_hook(lambda module, args, y: results.append(y.data_ptr()))
    model(inputs()[0])  # with the isolation check
    calls.clear(), results.clear()
    with torch.set_grad_enabled(grad):
        output = model(inputs()[0])
    assert output.requires_grad == grad
    assert [shape for shape, _ in calls] == [(K * BATCH, TOKENS, D_IN), (K * BATCH, D_OUT)]
    assert [memory for _, memory in calls] == results


class Held(nn.Linear):
    """A linear that somebody can look into after it has run."""

    def __init__(self, linear: nn.Linear, how: str):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.how = how
        self.register_buffer("workspace", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "attribute":
            self.last_output = y
        elif self.how == "buffer":
            self.workspace = y.detach()
        elif self.how == "view of x":
            y = x.view_as(x)
        elif self.how == "x":
            y = x
        return y


@pytest.mark.parametrize("how", ["attribute", "buffer", "view of x", "x", "hook"])
def test_memory_that_may_be_read_again_is_not_taken(how):
    base = nn.Sequential(Held(nn.Linear(D_OUT, D_OUT), how))
    seen = []
    if how == "hook":
        base[0].register_forward_hook(lambda module, args, y: seen.append(y))
    model = particles_of(base, peft.LoraConfig(r=2, target_modules=["0"]), K)
    layer = model.base[0]
    x = torch.randn(K * BATCH, TOKENS, D_OUT)
    before = x.clone()
    expected = layer.base_layer(x).detach().clone()
    with ForwardState(model, K, len(x)).active():
        y = layer(x)
    assert not torch.equal(y, expected) and torch.equal(x, before)
    held = {
        "attribute": lambda: layer.base_layer.last_output,
        "buffer": lambda: layer.base_layer.workspace,
        "hook": lambda: seen[-1],
    }.get(how, lambda: x)()
    assert torch.equal(held, expected)


class Saving(nn.Linear):
    """Its backward reads its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


def test_a_saved_output_raises_instead_of_a_wrong_gradient():
    model = particles_of(
        nn.Sequential(nn.Linear(D_IN, D_IN), Saving(D_IN, D_OUT)),
        peft.LoraConfig(r=2, target_modules=["0", "1"]),
        K,
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(BATCH, D_IN)).sum().backward()


# --- what is a foreign linear --------------------------------------------------------------------


def test_hooks_and_assigned_forwards_run():
    plain, hooked, assigned = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assigned.forward = lambda x: 3 * F.linear(x, assigned.weight, assigned.bias)
    assert [has_own_forward(layer) for layer in (plain, hooked, assigned)] == [False, True, True]
    base = nn.Sequential(hooked, assigned)
    x = torch.randn(BATCH, 4)
    expected = base(x)
    # Their B is zero: the particles are the base.
    model = ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]), K)
    for particle in model(x):
        assert relative_error(particle, expected) < 1e-6


def test_the_attention_that_reads_its_weight_is_no_target():
    attention = nn.MultiheadAttention(8, 2)
    assert not has_own_forward(attention.out_proj)


def tensor_parallel(rank, folder):
    """Run in a new process, because backward passes of DTensors start threads."""
    mesh, column = DeviceMesh("cpu", [0]), ColwiseParallel(output_layouts=Replicate())
    base, plain = Net(), Net()
    plain.load_state_dict(base.state_dict())
    parallelize_module(base, mesh, {"first": column, "last": column})
    assert isinstance(base.first.weight, DTensor)
    model = ml.get_particle_model(base, config(), K)
    assert type(model.base.first) is LoraOpaqueLinear
    twin = ml.get_particle_model(plain, config(), K)
    with torch.no_grad():
        for mine, theirs in zip(model.particle_parameters(), twin.particle_parameters()):
            theirs.copy_(mine.add_(0.1 * torch.randn_like(mine)))
    x = inputs(torch.float32)[0].requires_grad_()
    weights = torch.randn(K, BATCH, 3)
    assert_same_gradients(gradients(model, x, weights), gradients(twin, x, weights), 1e-5)


def test_tensor_parallel(tmp_path):
    run_in_processes(1, tensor_parallel, tmp_path)


# --- refusals ------------------------------------------------------------------------------------


def layer_of(forward, sizes=(D_IN, D_OUT)) -> LoraOpaqueLinear:
    """A layer of one particle over a linear with this forward."""
    linear = nn.Linear(*sizes)
    linear.forward = forward
    return LoraOpaqueLinear(linear.requires_grad_(False), 1, 2, 1.0, 0.0)


@pytest.mark.parametrize(
    "forward, error, message",
    [
        (lambda x: (x.new_zeros(6, D_OUT), None), TypeError, "plain tensor.*tuple"),
        (lambda x: x.new_zeros(6, D_OUT // 2), ValueError, r"\(6, 8\).*\(6, 4\).*gather"),
        (lambda x: x.new_zeros(6, D_OUT), RuntimeError, "Linear gives no gradient"),
    ],
)
def test_outputs_that_cannot_work(forward, error, message):
    x = torch.randn(6, D_IN, requires_grad=True)
    with pytest.raises(error, match=message):
        layer_of(forward)(x)


def test_an_input_without_gradient_needs_none():
    y = layer_of(lambda x: x.new_zeros(6, D_OUT))(torch.randn(6, D_IN))
    assert y.requires_grad


class Bare(nn.Module):
    in_features, out_features = D_IN, D_OUT


class Nested(nn.Module):
    in_features, out_features = D_IN, D_OUT

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D_IN, D_OUT)


class Sizeless(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D_OUT, D_IN))


@pytest.mark.parametrize(
    "layer, error, message",
    [
        (Bare(), TypeError, "'0' is a Bare without parameters and buffers"),
        (Nested(), ValueError, "Nested"),
        (Sizeless(), ValueError, "Sizeless"),
    ],
)
def test_targets_that_cannot_work(layer, error, message):
    base = nn.Sequential(layer, nn.Linear(D_OUT, 3))
    with pytest.raises(error, match=message):
        ml.get_particle_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]), K)
    assert base[0] is layer and base[1].weight.requires_grad


@pytest.mark.parametrize("stub", [Int8Linear, Packed4Bit])
def test_a_packed_layer_cannot_be_saved_as_a_trainable_copy(stub):
    base = nets(stub)[0]
    with pytest.raises(TypeError, match=f"modules_to_save 'last' contains a {stub.__name__}"):
        ml.get_particle_model(base, config(target_modules=["plain"], modules_to_save=["last"]), K)
