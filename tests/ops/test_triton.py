"""The Triton backend beyond the operators' own tests: sizes, paths, repeatability, the choice of
configurations, what is the default, and the machine code."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_lora_linear import SHAPES

import multilora as ml
import oracles
from multilora.ops import dispatch, lora_add, records
from multilora.ops.records import proven_backends
from multilora.ops.triton import common, configs
from multilora.ops.triton.common import A100, H200, Chip, precision
from oracles import double_gradients, gradients, relative_error

CHIPS = [A100, H200, Chip(75, 40), Chip(89, 128), Chip(103, 160), Chip(121, 48)]


@pytest.fixture(autouse=True)
def triton(poison):
    with ml.use_backend("triton"):
        yield


def problem(K, T, d_in, d_out, rank, dtype=torch.float32, shared=False):
    x = torch.randn(1 if shared else K, T, d_in).to(dtype)
    weight = (torch.randn(d_out, d_in) * d_in**-0.5).to(dtype)
    lora_A = torch.randn(K, rank, d_in) * d_in**-0.5
    lora_B = torch.randn(K, d_out, rank) * rank**-0.5
    return x, weight, lora_A, lora_B, torch.randn(d_out).to(dtype)


def everything(x, weight, lora_A, lora_B, bias, upstream=None):
    """y and the gradients of x, lora_A, lora_B."""
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    y = ml.lora_linear(leaves[0], weight, leaves[1], leaves[2], bias, 0.7)
    upstream = torch.randn_like(y) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def check_against_oracle(tensors, tolerance):
    x, weight, lora_A, lora_B, bias = tensors

    def of(function):
        return lambda x, A, B: function(x, weight, A, B, bias, 0.7)

    y = ml.lora_linear(*tensors, 0.7)
    assert relative_error(y, oracles.lora_linear(*tensors, 0.7)) < tolerance
    upstream = torch.randn_like(y)
    got = gradients(of(ml.lora_linear), [x, lora_A, lora_B], upstream)
    expected = double_gradients(of(oracles.lora_linear), [x, lora_A, lora_B], upstream)
    for value, oracle in zip(got, expected):
        assert relative_error(value, oracle) < tolerance


# float32 as in test_lora_linear. float16: x, W and their products' factors are exact there; S, dS,
# the cast factors and the result are rounded, at 5e-4 each.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
RANKS = [1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 80]


@pytest.fixture
def own_gemm(monkeypatch):
    """Our GEMM, also where the rule leaves the product to the vendor's."""
    rule = configs.lora_gemm

    def forced(*args):
        config = rule(*args)
        if config.path == "accumulate":
            return dataclasses.replace(config, path="shrink first")
        return config

    monkeypatch.setattr(configs, "lora_gemm", forced)


@pytest.mark.slow
@pytest.mark.usefixtures("own_gemm")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, shared):
    K, lead, d_in, d_out, rank = shape
    tensors = problem(K, math.prod(lead), d_in, d_out, rank, shared=shared)
    check_against_oracle(tensors, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.usefixtures("own_gemm")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_ranks(rank, dtype, shared):
    # More rows than a block; columns that are on 16-byte boundaries or not, in turns.
    d_in, d_out = ((40, 72), (41, 67))[(RANKS.index(rank) + shared) % 2]
    check_against_oracle(problem(2, 133, d_in, d_out, rank, dtype, shared), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.usefixtures("own_gemm")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", range(1, 9))
def test_particles(K, dtype, shared):
    check_against_oracle(problem(K, 37, 24, 40, 5, dtype, shared), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shrink inside", "shrink first", "accumulate"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_paths(path, dtype, monkeypatch):
    rule = configs.lora_gemm

    def forced(*args):
        config = rule(*args)
        # The kernel of the backward does not shrink inside.
        usable = path != "shrink inside" or args[-1] is not True
        return dataclasses.replace(config, path=path) if usable else config

    monkeypatch.setattr(configs, "lora_gemm", forced)
    # Tiles beside and above each other, a long loop, and more than one partial sum.
    sizes = (300, 200, 520) if dtype == torch.float16 else (70, 40, 72)
    tensors = problem(3, *sizes, 6, dtype)
    check_against_oracle(tensors, TOLERANCE[dtype])
    check_against_oracle([*tensors[:-1], None], TOLERANCE[dtype])


@pytest.mark.usefixtures("own_gemm")
@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 1, 8), (3, 1, 8)], ids=str)
def test_axes_of_length_one_with_any_stride(shape):
    # They are contiguous to PyTorch, and no strides for a descriptor.
    K, T, d_in = shape
    _, weight, lora_A, lora_B, bias = problem(K, T, d_in, 16, 2, torch.float16)
    strides = (12 if K == 1 else d_in, 30 if T == 1 else d_in, 1)
    x = torch.randn(100).half().as_strided(shape, strides)
    assert x.is_contiguous()
    check_against_oracle([x, weight, lora_A, lora_B, bias], TOLERANCE[torch.float16])


@pytest.mark.parametrize("rank", [16, 64])
def test_wide_factors_have_a_pass_each(rank, monkeypatch):
    asked = []
    rule = configs.lora_pass_together
    monkeypatch.setattr(
        configs, "lora_pass_together", lambda *args: asked.append(rule(*args)) or asked[-1]
    )
    everything(*problem(2, 40, 24, 40, rank, torch.float16))
    assert asked == [rank == 16]


def test_tf32_where_pytorch_takes_it(monkeypatch):
    assert precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision(torch.float32) == "tf32"
    assert precision(torch.bfloat16) == precision(torch.float64) == "ieee"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_repeats_bit_for_bit(shared):
    tensors = problem(3, 300, 40, 72, 5, torch.float16, shared)
    upstream = torch.randn(3, 300, 72).half()
    first, second = everything(*tensors, upstream), everything(*tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.slow
@pytest.mark.usefixtures("own_gemm")
@pytest.mark.parametrize("d_in, d_out", [(40, 72), (41, 67)])
def test_a_broken_particle_does_not_spread(d_in, d_out):
    tensors = problem(3, 70, d_in, d_out, 5)
    upstream = torch.randn(3, 70, d_out)
    right = everything(*tensors, upstream)
    for broken in (tensors[0], tensors[2], tensors[3], upstream):
        before = broken[1].clone()
        broken[1] = torch.nan
        for value, expected in zip(everything(*tensors, upstream), right):
            assert torch.equal(value[0], expected[0]) and torch.equal(value[2], expected[2])
        broken[1] = before


def test_only_what_is_needed(own_gemm, monkeypatch):
    kernels = []

    def spy(launch, *tensors):
        name = launch.kernel.__name__
        kernels.append(name.removeprefix("_lora_linear_").removesuffix("_kernel"))
        run(launch, *tensors)

    run = common.Launch.__call__
    monkeypatch.setattr(common.Launch, "__call__", spy)
    x, weight, lora_A, lora_B, _ = problem(2, 5, 8, 8, 2)
    y, shrunk = torch.ops.multilora.lora_linear(x, weight, lora_A, lora_B, None, 1.0)
    expected = {
        (True, True, True): ["pass", "pass", "reduce", "gemm"],
        (False, True, True): ["pass", "pass", "reduce"],
        (True, False, False): ["pass", "gemm"],
        (False, True, False): ["pass", "pass", "reduce"],
        (False, False, True): ["pass", "reduce"],
        (False, False, False): [],
    }
    for needs, launched in expected.items():
        kernels.clear()
        grads = torch.ops.multilora.lora_linear_backward(
            y, x, weight, lora_A, lora_B, shrunk, 1.0, list(needs)
        )
        assert kernels == launched, needs
        assert [g.numel() > 0 for g in grads] == list(needs)
    # Onto what a base layer has computed: the rest is the vendor's.
    kernels.clear()
    shrunk = torch.ops.multilora.lora_add_(y, x, lora_A, lora_B, 1.0)
    torch.ops.multilora.lora_linear_backward(
        y, x, None, lora_A, lora_B, shrunk, 1.0, [True, True, True]
    )
    assert kernels == ["pass", "pass", "pass", "reduce"]


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_there_is_a_configuration_for_everything(chip):
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype in dtypes:
        for rows, rank, width in ((1, 1, 1), (7, 100, 13), (10**9, 64, 2**20)):
            for shared in ("", "out", "in"):
                for backward in (False, True):
                    config = configs.lora_gemm(
                        3, rows, width, width, rank, dtype, chip, shared, backward
                    )
                    inside = config.path == "shrink inside"
                    assert not inside or (rank <= config.block_r and not shared and not backward)
                    assert not (shared and config.path == "accumulate")
                    m, n, k = config.block_m, config.block_n, config.block_k
                    tiles = config.stages * (m + n) * k + m * n
                    # The limit of a thread block; consumer chips have 99 KB.
                    limit = {75: 64, 80: 163}.get(chip.capability, 227)
                    limit = 99 if chip.capability in (89, 121) else limit
                    assert tiles * dtype.itemsize <= limit * 1024
            for shrink, outer in ((True, True), (True, False), (False, True)):
                config = configs.lora_pass(3, rows, width, rank, dtype, chip, shrink, outer)
                assert config.rows_each % config.block_m == 0 and config.rows_each > 0
                # The matrices of groups may be float32 masters.
                for rule, widest in ((configs.grouped_rows, 4), (configs.grouped_outer, 2)):
                    config = rule(3, rows, width, rank, dtype, chip)
                    m, n, k = config.block_m, config.block_n, config.block_k
                    assert min(m, n, k) >= 16
                    tiles = (m * dtype.itemsize + n * max(widest, dtype.itemsize)) * k
                    assert config.stages * tiles <= limit * 1024
        for K in (1, 2, 3, 8, 31, 32):
            assert configs.geometry(K, (1, 64), (3, 10**6, 5, 7), dtype, chip)
            for C in (2, 3, 33, 152_000):
                for backward in (False, True):
                    assert configs.volume(K, 10**6, C, dtype, False, chip, backward).block_k >= K


def test_the_table_holds_measurements_only():
    for entry in configs.table().values():
        assert entry["record"] and entry["us"] > 0


def test_an_absent_table_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "TABLE", tmp_path / "table.json")
    read = configs.table.__wrapped__
    assert read() == {}
    sizes = {"particles": 4, "rows": 1000, "depth": 768, "cols": 768, "rank": 16}
    entry = {"op": "lora_gemm", "capability": 90, "dtype": "bfloat16", "sizes": sizes}
    configs.TABLE.write_text(json.dumps([entry]))
    assert read() == {configs._key("lora_gemm", H200, torch.bfloat16, **sizes): entry}


@pytest.fixture
def measured(monkeypatch):
    """A table in which one size of lora_linear's forward was measured, and was ahead."""
    sizes = {"particles": 4, "rows": 1000, "depth": 768, "cols": 768, "rank": 16}
    sizes |= {"shared": "", "backward": False}
    key = configs._key("lora_gemm", H200, torch.bfloat16, **sizes)
    entry = {"config": {"group": 3}, "record": "a record", "ahead": True}
    monkeypatch.setattr(configs, "table", lambda: {key: entry})
    configs.lora_gemm.cache_clear()
    configs.proven_backend.cache_clear()
    yield entry
    configs.lora_gemm.cache_clear()
    configs.proven_backend.cache_clear()


def test_the_table_goes_before_the_rule(measured):
    def group(rows, dtype=torch.bfloat16, chip=H200, **others):
        return configs.lora_gemm(4, rows, 768, 768, 16, dtype, chip, **others).group

    # All row counts up to the same power of two.
    assert group(1000) == group(1024) == group(513) == 3
    assert 3 not in (group(512), group(1025), group(1000, torch.float16), group(1000, chip=A100))
    assert 3 not in (group(1000, backward=True), group(1000, shared="out"))


def test_proven_where_it_was_measured_only(measured):
    def backend(particles, rows, depth, cols, rank, *others, dtype=torch.bfloat16, chip=H200):
        arguments = (particles, rows, depth, cols, rank, dtype, chip, *others)
        return configs.proven_backend(configs.lora_gemm, arguments)

    assert backend(4, 1000, 768, 768, 16) == backend(4, 600, 768, 768, 16) == "triton"
    assert backend(4, 5000, 768, 768, 16) is None and backend(4, 1000, 767, 768, 16) is None
    assert backend(4, 0, 768, 768, 16) is None and backend(4, 1000, 768, 768, 16, "out") is None
    assert backend(4, 1000, 768, 768, 16, dtype=torch.float16) is None
    assert backend(4, 1000, 768, 768, 16, chip=A100) is None
    for change in ({"ahead": False}, {"ahead": True, "record": None}):
        configs.proven_backend.cache_clear()
        measured.update(change)
        assert backend(4, 1000, 768, 768, 16) is None
    configs.proven_backend.cache_clear()
    measured.update(record="a record", backend="cuda")
    assert backend(4, 1000, 768, 768, 16) == "cuda"


def shape(rows, depth, ahead=True, right=True, particles=4, shared=""):
    sizes = {"particles": particles, "rows": rows, "depth": depth, "cols": 768, "rank": 16}
    return records.Measured(sizes, {"shared": shared, "backward": False}, right, ahead)


def promoted(*shapes):
    return records.promotions_of("lora_linear", "cuda", H200, "bfloat16", shapes, "a record")


def test_a_range_starts_where_all_that_is_larger_was_ahead():
    shapes = [shape(100, 768, ahead=False), shape(1000, 768), shape(5000, 768), shape(1000, 3072)]
    (found,) = promoted(*shapes)
    assert found.shapes == 3 and found.record == "a record"
    assert found.sizes["rows"] == [1000, None] and found.sizes["depth"] == [768, 3072]
    assert found.sizes["particles"] == [4, 4]
    # One shape in the middle that was behind: what is left is too little.
    assert promoted(*shapes, shape(2000, 1000, ahead=False)) == []
    # One particle more, over there: the range goes on.
    (wider,) = promoted(*shapes, shape(1000, 3072, particles=8))
    assert wider.shapes == 4 and wider.sizes["particles"] == [4, 8]


def test_nothing_is_promoted_that_was_wrong_once_or_has_no_record():
    shapes = [shape(rows, 768) for rows in (100, 200, 300)]
    assert len(promoted(*shapes)) == 1
    assert promoted(*shapes, shape(50, 768, ahead=False, right=False)) == []
    assert promoted(*shapes[:2]) == promoted() == []
    (found,) = promoted(*shapes)
    for change in ({"record": ""}, {"shapes": 2}, {"backend": "reference"}):
        with pytest.raises(ValueError, match="needs a record"):
            dataclasses.replace(found, **change)


def test_switches_have_ranges_of_their_own():
    shapes = [shape(rows, 768, shared=s, ahead=not s) for s in ("", "out") for rows in (1, 2, 3)]
    (found,) = promoted(*shapes)
    assert found.switches == {"shared": "", "backward": False}


def ask(rows, depth=768, chip=H200, dtype=torch.bfloat16, shared=""):
    arguments = (4, rows, depth, 768, 16, dtype, chip, shared, False)
    return records._proven("lora_linear", configs.lora_gemm, arguments, None)


@pytest.fixture
def promotions(monkeypatch, tmp_path):
    """Writes promotions.json, and lets it be read."""

    def write(found):
        (tmp_path / "promotions.json").write_text(records.to_json(found))
        monkeypatch.setattr(records, "PROMOTIONS", tmp_path / "promotions.json")
        for cached in (records.promotions, records._proven):
            cached.cache_clear()

    yield write
    monkeypatch.undo()
    for cached in (records.promotions, records._proven):
        cached.cache_clear()


def test_what_a_promotion_covers(promotions):
    promotions(promoted(shape(1000, 768), shape(5000, 768), shape(1000, 3072)))
    assert ask(1000) == ask(10**6) == ask(1001, 1024) == ("cuda",)
    assert ask(999) == ask(1000, 767) == ask(1000, 3073) == ask(1000, shared="out") == ()
    assert ask(1000, dtype=torch.float16) == ask(1000, chip=A100) == ()
    assert ask(1000, chip=Chip(90, 114)) == ()
    arguments = (4, 1000, 768, 768, 16, torch.bfloat16, H200, "", False)
    assert records._proven("lora_linear_backward", configs.lora_gemm, arguments, None) == ()


def test_what_was_measured_there_goes_before_a_range(measured, promotions):
    promotions(promoted(shape(1000, 768), shape(5000, 768), shape(1000, 3072)))
    assert ask(1000) == ("triton", "cuda") and ask(5000) == ("cuda",)


def test_ranges_of_lists_of_layers():
    arguments = (8, (4, 16), (768, 768, 3072, 768), torch.float32, H200)
    question = records.question_of(configs.geometry, arguments)
    assert question.sizes == {"particles": 8, "layers": 2, "rank": 16, "width": 5376}
    assert question.switches == {} and question.dtype == "float32"
    arguments = (4, 64, 100, torch.bfloat16, True, H200)
    question = records.question_of(configs.volume, arguments, "det")
    assert question.switches == {"aligned": True, "backward": False, "kind": "det"}


def test_no_range_ships_without_a_record_in_the_repository():
    assert records.to_json([]) == "[]\n"
    for promotion in records.promotions():
        assert (configs.TABLE.parents[3] / f"bench/results/{promotion.record}.json").exists()


def test_nothing_is_the_default_without_a_record(monkeypatch):
    # Every operator, and its backward, with the arguments that it really gets.
    asked = []
    module_of = dispatch.module_of

    def spy(op, args):
        asked.append(op)
        assert proven_backends(op, args) == ()
        return module_of(op, args)

    monkeypatch.setattr(dispatch, "module_of", spy)
    x, weight, lora_A, lora_B, bias = problem(3, 5, 8, 8, 2)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    logits, targets = torch.randn(3, 5, 4, requires_grad=True), torch.randint(4, (5,))
    loss = ml.lora_linear(leaves[0], weight, leaves[1], leaves[2], bias).sum()
    loss = loss + lora_add(loss.expand(3, 5, 8), *leaves).sum()
    loss = loss + ml.lora_gram(lora_A, lora_B).sum() + ml.pairwise_frobenius(lora_A, lora_B).sum()
    loss = loss + ml.gram_volume(logits, targets).sum() + ml.particle_loss(logits, targets)[1]
    loss.backward()
    assert len(set(asked)) == 10


@pytest.mark.parametrize(
    "found, expected", [((), "reference"), (("triton",), "triton"), (("cuda", "triton"), "triton")]
)
def test_what_is_proven_is_the_default_on_a_gpu(found, expected, monkeypatch):
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(dispatch, "first_tensor", lambda args: on_gpu)
    factors = ([torch.ones(2, 1, 3)], [torch.ones(2, 3, 1)], [1.0])
    monkeypatch.setattr("multilora.ops.records.proven_backends", lambda op, args: found)
    # Backend "cuda" was not built here.
    monkeypatch.setattr(dispatch, "missing_reason", lambda name: "no" if name == "cuda" else None)
    with dispatch.as_requested(None):
        assert dispatch.backend_of("lora_gram", factors) == expected
    with ml.use_backend("reference"):
        assert dispatch.backend_of("lora_gram", factors) == "reference"


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    with pytest.raises(ml.BackendUnavailableError, match=r"lora_gram.*CPU.*GPU"):
        ml.lora_gram(torch.randn(2, 1, 3), torch.randn(2, 3, 1))


# --- machine code --------------------------------------------------------------------------------


_MAIN = "import sys; from multilora.app.cli import main; sys.exit(main())"


def compile_kernels(*args, **environment):
    """`multilora kernels` in a new process."""
    return subprocess.run(
        [sys.executable, "-c", _MAIN, "kernels", *args],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_gemm_uses_tensor_cores_and_the_copy_engine(tmp_path):
    name = "lora_linear 768→768 K4 T12608 r16 bfloat16"
    done = compile_kernels("--target", "sm_90", "--only", name, "--out", str(tmp_path / "k.json"))
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "k.json").read_text())["kernels"]
    gemms = [k for k in kernels if k["kernel"] == "_lora_linear_gemm_kernel"]
    assert len(gemms) == 2  # y and dX
    for gemm in gemms:
        assert gemm["wgmma"] >= 5 and gemm["bulk_copies"] >= 3
        assert gemm["spills"] == 0 and not gemm["serialized"]


def test_bad_code_is_refused():
    from multilora.tools.kernels.compile import TARGETS
    from multilora.tools.kernels.machine_code import Report

    good = Report("k", "p", "c", 100, 0, 1000, 4, 0, 4, False)
    assert good.failure(TARGETS["sm_90"][1]) is None
    assert "spills 8 bytes" in dataclasses.replace(good, spills=8).failure(10**6)
    assert "the chip has 999" in good.failure(999)
    assert "serialised" in dataclasses.replace(good, serialized=True).failure(10**6)


@pytest.mark.slow
def test_kernels_command_says_what_is_wrong():
    done = compile_kernels(TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr
    done = compile_kernels("--only", "nonsense")
    assert done.returncode == 1 and "nonsense" in done.stderr
