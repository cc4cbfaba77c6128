"""torch.compile(mode="reduce-overhead"): CUDA graphs of both directions give eager mode's bits.

On a CPU, where there are no graphs, the default mode only rehearses the tests.
"""

import pytest
import torch

import multilora as ml
from multilora.ops.dispatch import backends_of

DEVICE = torch.get_default_device()
ON_GPU = DEVICE.type == "cuda"
# On a CPU, backend "cuda" executes its kernels' PTX, which is slow.
CASES = [
    (operator, backend)
    for operator in ("lora_linear", "particle_loss", "pairwise_frobenius")
    for backend in backends_of(operator, DEVICE.type)
    if ON_GPU or backend != "cuda"
]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def with_gradients(function, inputs):
    torch.compiler.cudagraph_mark_step_begin()
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    # The next replay writes over a graph's outputs.
    return [t.detach().clone() for t in (*outputs, *grads)]


def problem(operator):
    """A function of its leaves, and the leaves."""
    rows, d_in, d_out, rank = (197, 768, 768, 8) if ON_GPU else (33, 64, 96, 8)
    A = torch.randn(4, rank, d_in) * d_in**-0.5
    B = torch.randn(4, d_out, rank) * 0.1
    if operator == "lora_linear":
        x = torch.randn(4, rows, d_in).bfloat16()
        weight = (torch.randn(d_out, d_in) * d_in**-0.5).bfloat16()
        bias = torch.randn(d_out).bfloat16()
        return lambda x, A, B: ml.lora_linear(x, weight, A, B, bias, 2.0), [x, A, B]
    if operator == "particle_loss":
        targets = torch.randint(100, (64,))
        logits = torch.randn(4, 64, 100).bfloat16()
        return lambda z: ml.particle_loss(z, targets), [logits]
    return lambda A, B: ml.pairwise_frobenius(A, B, 2.0), [A, B]


@pytest.mark.parametrize("operator, backend", CASES)
def test_replays_give_the_bits_of_eager_mode(operator, backend):
    if (operator, backend) == ("lora_linear", "cuda") and torch.cuda.get_device_capability()[
        0
    ] != 9:
        pytest.skip("the GEMM is one for compute capability 9.0 (Hopper)")
    function, inputs = problem(operator)
    with ml.use_backend(backend):
        eager = with_gradients(function, inputs)
        torch.compiler.reset()
        mode = "reduce-overhead" if ON_GPU else None
        compiled = torch.compile(function, mode=mode, fullgraph=True)
        # The first calls compile and record, the last one replays.
        for _ in range(4):
            found = with_gradients(compiled, inputs)
    assert all(torch.equal(a, b) for a, b in zip(eager, found))
