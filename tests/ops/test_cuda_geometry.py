"""The CUDA kernels of the adapters' geometry, executed from nvcc's PTX, against float64."""

import pytest
import test_svgd_update as svgd
import torch

import multilora as ml
import oracles
from oracles import double_gradients, gradients, relative_error
from ptx import native
from tiers import sampled

pytestmark = pytest.mark.usefixtures("executed_ptx")

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Sums are in float64; the result is rounded once.
TOLERANCE = {F32: 1e-6, F64: 1e-12}

GRAM, DISTANCE = (
    (getattr(ml, name), getattr(oracles, name)) for name in ("lora_gram", "pairwise_frobenius")
)
# K, d_in, d_out, r: tiles are 32 of the K·r rows by 32 features.
TRACES = [
    (GRAM, (3, 13, 17, 2), F32, "late"),
    (DISTANCE, (3, 13, 17, 2), F64, "random"),
    (DISTANCE, (2, 32, 8, 4), F32, "threads"),
    # Two tiles of rows, aligned and not.
    (DISTANCE, (3, 40, 8, 12), F32, "late"),
    (GRAM, (2, 37, 33, 17), F64, "late"),
    # Features in parts.
    (GRAM, (2, 300, 24, 3), F32, "late"),
]
# d_in, d_out, r of the layers.
LAYERS = [(33, 8, 16), (5, 40, 1), (17, 9, 3)]
UPDATES = [(dtype, dtype in (F32, F16), "late") for dtype in (F32, F64, F16, BF16)]
UPDATES += [(F32, False, "random"), (BF16, True, "threads")]


archs = pytest.mark.parametrize("arch", native.ARCHS)


@archs
@pytest.mark.parametrize("functions, size, dtype, mode", sampled(TRACES, 9))
def test_traces(functions, size, dtype, mode, arch):
    K, d_in, d_out, rank = size
    factors = [torch.randn(K, rank, d_in, dtype=dtype), torch.randn(K, d_out, rank, dtype=dtype)]
    upstream = torch.randn(K, K, dtype=dtype)
    run, oracle = (lambda A, B, f=f: f(A, B, 0.5) for f in functions)
    with native.launches.running(mode=mode, arch=arch):
        value, got = run(*factors), gradients(run, factors, upstream)
    assert relative_error(value, oracle(*factors)) < TOLERANCE[dtype]
    for g, expected in zip(got, double_gradients(oracle, factors, upstream)):
        assert g.dtype == dtype
        assert relative_error(g, expected) < TOLERANCE[dtype]


@pytest.mark.slow
@archs
@pytest.mark.parametrize("dtype, full, mode", UPDATES, ids=str)
def test_updates(dtype, full, mode, arch):
    layers = LAYERS[1:] if mode == "threads" else LAYERS
    args = svgd.problem(2, layers, dtype, full)
    with native.launches.running(mode=mode, arch=arch):
        got = svgd.flat(svgd.svgd_update(*args))
    for g, expected in zip(got, svgd.flat(svgd.oracle(*args))):
        assert relative_error(g, expected) < svgd.TOLERANCE[dtype]


@pytest.mark.slow
def test_more_layers_than_fit_in_one_launch():
    # A launch's description of the layers has 4 KB, enough for 56 of them in the traces.
    K, layers = 2, 58
    lora_A = [torch.randn(K, 1, 3 + layer % 3) for layer in range(layers)]
    lora_B = [torch.randn(K, 2, 1) for _ in range(layers)]
    got = ml.pairwise_frobenius(lora_A, lora_B, 0.5)
    expected = [oracles.pairwise_frobenius(A, B, 0.5) for A, B in zip(lora_A, lora_B)]
    assert relative_error(got, torch.stack(expected)) < TOLERANCE[F32]
    # 63 factors in the last stage.
    args = svgd.problem(2, [(3, 2, 1)] * 33, F32)
    for g, e in zip(svgd.flat(svgd.svgd_update(*args)), svgd.flat(svgd.oracle(*args))):
        assert relative_error(g, e) < svgd.TOLERANCE[F32]


@pytest.mark.slow
def test_every_kernel_was_executed(pytestconfig):
    native.launches.check_executed(r"lora_gram_\w+_kernel", pytestconfig)
