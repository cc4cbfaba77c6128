"""Questions that only a card can answer, put to every backend: streams, threads, graphs, limits,
exactness, special values. docs/gpu.md says what each answer means.

A probe returns what it saw; "failures" names what was wrong, "skipped" what cannot be asked here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import multilora as ml
from bench import repetitions
from bench.check import reason
from bench.device import check_device, synchronize
from bench.repetitions import Layers, LinearSize
from multilora.ops.dispatch import missing_reason

#: Outputs and gradients of one operator, in leaves that it is given.
Operator = tuple[Callable[..., Any], list[Tensor]]


def operators(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Operator]:
    """The differentiable operators on small inputs, as functions of their leaves."""
    linear = LinearSize(256, 320, 100, 4, 16, masters=True).inputs(dtype, device)
    logits = repetitions.logits_inputs(4, 64, 100, dtype, device)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ml.lora_linear(x, linear.weight, A, B, linear.bias, linear.scaling)

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        return ml.particle_loss(z, logits.targets)

    def distances(A: Tensor, B: Tensor) -> Tensor:
        return ml.pairwise_frobenius(A, B, linear.scaling)

    return {
        "lora_linear": (layer, [linear.x, linear.lora_A, linear.lora_B]),
        "particle_loss": (loss, [logits.logits]),
        "pairwise_frobenius": (distances, [linear.lora_A, linear.lora_B]),
    }


def with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    return [t.detach() for t in (*outputs, *grads)]


def on_backend(
    backend: str,
    computations: dict[str, Callable[[], Any]],
    right: Callable[[Any], bool],
    device: torch.device,
) -> dict[str, Any]:
    """The result of each computation on that backend, and the failures. Raises BrokenDevice if the
    device no longer works: later computations would be blamed for it."""
    result: dict[str, Any] = {"failures": {}}
    missing = missing_reason(backend)
    if missing is not None:
        return result | {"skipped": {backend: missing}}
    for name, compute in computations.items():
        try:
            with ml.use_backend(backend):
                result[name] = compute()
            synchronize(device)
            if not right(result[name]):
                result["failures"][name] = str(result[name])
        except ml.BackendUnavailableError as refusal:
            result.setdefault("skipped", {})[name] = str(refusal)
        except Exception as error:
            result["failures"][name] = reason(error)
            check_device(error, device)
    return result


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def _for_each(
    backend: str, device: torch.device, ask: Callable[[Callable[..., Any], list[Tensor]], Any]
) -> dict[str, Any]:
    """ask(function, inputs) must be True for every operator."""
    if device.type != "cuda":
        return {"failures": {}, "skipped": {"": "it is a question to a GPU"}}
    questions = {
        name: lambda function=function, inputs=inputs: ask(function, inputs)
        for name, (function, inputs) in operators(device).items()
    }
    return on_backend(backend, questions, lambda answer: answer is True, device)


def side_stream(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Inputs that a busy stream has yet to write: a launch on another stream reads the old ones."""

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        expected = with_gradients(function, inputs)
        late = [torch.full_like(t, torch.nan) for t in inputs]
        stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for t, value in zip(late, inputs):
                t.copy_(value)
            found = with_gradients(function, late)
        stream.synchronize()
        return _same(expected, found)

    return _for_each(backend, device, ask)


def two_streams(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Two streams in turns: a workspace that the other stream still reads would change results."""

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        other = [t.flip(-1) for t in inputs]
        expected = with_gradients(function, inputs), with_gradients(function, other)
        streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        torch.cuda.synchronize(device)
        right = True
        for _ in range(20):
            found = []
            for stream, leaves in zip(streams, (inputs, other)):
                with torch.cuda.stream(stream):
                    found.append(with_gradients(function, leaves))
            torch.cuda.synchronize(device)
            right &= _same(expected[0], found[0]) and _same(expected[1], found[1])
        return right

    return _for_each(backend, device, ask)


def another_thread(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """The backward started by a Python thread whose current stream is not the forward's: it runs on
    autograd's thread, on the forward's stream."""

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        expected = with_gradients(function, inputs)
        leaves = [t.detach().requires_grad_() for t in inputs]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            outputs = function(*leaves)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.cuda.synchronize(device)
        errors: list[BaseException] = []

        def backward() -> None:
            try:
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        torch.cuda.synchronize(device)
        return _same(expected, [t.detach() for t in outputs] + [t.grad for t in leaves])

    return _for_each(backend, device, ask)


def second_device(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Tensors on a device that is not the current one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return {"failures": {}, "skipped": {"": "there is no second GPU"}}
    # A seed gives the same numbers on each device.
    here, there = operators(device), operators(torch.device("cuda", 1))

    def ask(name: str) -> bool:
        expected, found = with_gradients(*here[name]), with_gradients(*there[name])
        return _same(expected, [t.to(device) for t in found])

    questions = {name: lambda name=name: ask(name) for name in here}
    return on_backend(backend, questions, lambda answer: answer is True, device)


def graph(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Captured once, replayed on other inputs: the bits of eager mode."""

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        static = [t.clone() for t in inputs]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                with_gradients(function, static)
        stream.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            found = with_gradients(function, static)
        right = True
        for values in (inputs, [t.flip(-1) for t in inputs]):
            expected = with_gradients(function, values)
            for t, value in zip(static, values):
                t.copy_(value)
            captured.replay()
            torch.cuda.synchronize(device)
            right &= _same(expected, found)
        return right

    return _for_each(backend, device, ask)


def no_wait(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """After the first call, no operator waits for the device."""

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> bool:
        with_gradients(function, inputs)
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with_gradients(function, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    return _for_each(backend, device, ask)


def no_wait_in_a_step(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """With nonfinite="ignore", no step of a method waits for the device after the first one."""
    if device.type != "cuda":
        return {"failures": {}, "skipped": {"": "it is a question to a GPU"}}

    def step(method: type) -> bool:
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, device=device))
            for shape in ((4, 8, 64), (4, 10, 8))
        ]
        x, y = torch.randn(32, 64, device=device), torch.arange(32, device=device) % 10
        algorithm = method(params, nonfinite="ignore")

        def closure() -> tuple[Tensor, Tensor]:
            return torch.einsum("nd,krd,kcr->knc", x, *params), y

        algorithm.backward(closure)
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            algorithm.backward(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    questions = {m.__name__: lambda m=m: step(m) for m in (ml.Ensemble, ml.SVGD, ml.IBDR)}
    return on_backend(backend, questions, lambda answer: answer is True, device)


def offsets(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Contiguous views at odd storage offsets, whose addresses are not multiples of 16 bytes."""
    if device.type == "cpu" and backend == "cpu":
        return {"failures": {}, "skipped": {"": "it is a question to a GPU"}}

    def moved(t: Tensor) -> Tensor:
        room = t.new_empty(t.numel() + 1)
        room[1:].copy_(t.flatten())
        return room[1:].view(t.shape)

    def ask(function: Callable[..., Any], inputs: list[Tensor]) -> float:
        expected = with_gradients(function, inputs)
        found = with_gradients(function, [moved(t) for t in inputs])
        # Other loads may sum in another order.
        return max(_error(a, b) for a, b in zip(found, expected))

    questions = {
        name: lambda function=function, inputs=inputs: ask(function, inputs)
        for name, (function, inputs) in operators(device).items()
    }
    return on_backend(backend, questions, lambda error: error < 1e-2, device)


def exact_float64(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Integers, whose float64 products and sums are exact in any order: every bit must be right."""

    def ask(rank: int, d_in: int, d_out: int) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-300, 301, shape, generator=generator).double()

        # Every sum is below 2⁵³, so that its order does not matter, and far above 2²⁴.
        A, B = integers(4, rank, d_in), integers(4, d_out, rank)
        inner = torch.einsum("iad,jbd->ijab", A, A)
        outer = torch.einsum("ida,jdb->ijab", B, B)
        expected = (inner * outer).sum((-1, -2))
        return torch.equal(ml.lora_gram(A.to(device), B.to(device), 1.0).cpu(), expected)

    def products() -> bool:
        generator = torch.Generator("cpu").manual_seed(1)

        def small(*shape: int) -> Tensor:
            return torch.randint(-7, 8, shape, generator=generator).double()

        x, W, A, B = small(3, 50, 72), small(88, 72), small(3, 5, 72), small(3, 88, 5)
        expected = x @ W.T + (x @ A.mT) @ B.mT
        moved = (t.to(device) for t in (x, W, A, B))
        return torch.equal(ml.lora_linear(*moved, None, 1.0).cpu(), expected)

    questions = {
        "lora_gram r4": lambda: ask(4, 96, 130),
        "lora_gram r16": lambda: ask(16, 33, 64),
        "lora_linear": products,
    }
    return on_backend(backend, questions, lambda answer: answer is True, device)


def extreme_logits(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Gaps of 30 and 80 between logits, where ex2 is near and below the subnormals; losses and
    gradients against float64."""

    def ask(gap: float, dtype: torch.dtype) -> float:
        generator = torch.Generator("cpu").manual_seed(0)
        z = torch.randn(4, 32, 50, generator=generator)
        z[..., ::7] -= gap
        z[:, ::3, 1] += gap
        z = z.to(dtype)
        y = torch.randint(50, (32,), generator=generator)
        exact = _loss(z.double().to(device), y.to(device), "reference")
        found = _loss(z.to(device), y.to(device), backend)
        return max(_error(a, b) for a, b in zip(found, exact))

    questions: dict[str, Callable[[], float]] = {}
    for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for gap in (0.0, 30.0, 80.0):
            questions[f"gap {gap:g} {word}"] = lambda gap=gap, dtype=dtype: ask(gap, dtype)
    return on_backend(backend, questions, lambda error: error < 2e-2, device)


def _loss(z: Tensor, y: Tensor, backend: str) -> list[Tensor]:
    with ml.use_backend(backend):
        return with_gradients(lambda z: ml.particle_loss(z, y), [z])


def special_values(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """NaN, infinities and −0.0: the outputs must be finite exactly where the reference's are."""

    def patterns(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack([t.isnan(), t.isposinf(), t.isneginf()]) for t in tensors]

    def linear(value: float) -> bool:
        function, inputs = operators(device, torch.float32)["lora_linear"]
        inputs[0][1, 3, 5] = value
        with ml.use_backend("reference"):
            expected = patterns(with_gradients(function, inputs))
        with ml.use_backend(backend):
            return _same(expected, patterns(with_gradients(function, inputs)))

    def loss(value: float) -> bool:
        function, (z,) = operators(device, torch.float32)["particle_loss"]
        z[2, 5, 7] = value
        with ml.use_backend("reference"):
            expected = patterns(with_gradients(function, [z]))
        with ml.use_backend(backend):
            return _same(expected, patterns(with_gradients(function, [z])))

    questions = {}
    for value in (torch.nan, torch.inf, -torch.inf, -0.0):
        questions[f"lora_linear {value}"] = lambda value=value: linear(value)
        questions[f"particle_loss {value}"] = lambda value=value: loss(value)
    return on_backend(backend, questions, lambda answer: answer is True, device)


def launch_limits(backend: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """The widest tiles of every operator: launches must opt in to shared memory above 48 KiB, and
    two programs must fit on a processor."""
    if tiny:
        sizes = [LinearSize(64, 96, 33, 2, 4, masters=True)]
        models = [Layers("small", ((16, 24),), 3, 4)]
    else:
        ranks = (8, 16, 32, 64, 80)
        sizes = [LinearSize(1024, 1024, 1024, 4, r, masters=True) for r in ranks]
        sizes += [LinearSize(1024, 1024, 1024, 4, 64, True, masters=True)]
        models = [Layers("wide", ((1024, 1024),), k, r) for k, r in ((8, 64), (32, 16))]

    def linear(size: LinearSize, dtype: torch.dtype) -> bool:
        i = size.inputs(dtype, device)
        x = i.x.expand(size.particles, -1, -1) if size.shared else i.x

        def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return ml.lora_linear(x, i.weight, A, B, i.bias, i.scaling)

        outputs = with_gradients(layer, [x, i.lora_A, i.lora_B])
        return all(bool(t.isfinite().all()) for t in outputs)

    def geometry(layers: Layers, dtype: torch.dtype) -> bool:
        i = layers.inputs(dtype, device)
        function = lambda *t: ml.pairwise_frobenius([t[0]], [t[1]], 2.0)  # noqa: E731
        outputs = with_gradients(function, [i.lora_A[0], i.lora_B[0]])
        return all(bool(t.isfinite().all()) for t in outputs)

    questions: dict[str, Callable[[], bool]] = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        word = str(dtype).removeprefix("torch.")
        for size in sizes:
            questions[f"lora_linear {size} {word}"] = lambda s=size, d=dtype: linear(s, d)
        for layers in models if dtype != torch.bfloat16 else ():
            questions[f"geometry {layers} {word}"] = lambda m=layers, d=dtype: geometry(m, d)
    return on_backend(backend, questions, lambda answer: answer is True, device)


def _error(found: Tensor, exact: Tensor) -> float:
    """The relative error; NaN if one side alone is not finite."""
    exact = exact.double()
    norm = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found.double() - exact).norm() / norm).item()


PROBES: dict[str, Callable[[str, torch.device, bool], dict[str, Any]]] = {
    "float64 products are exact": exact_float64,
    "gaps of 30 and 80 between logits": extreme_logits,
    "NaN, infinities, -0.0": special_values,
    "odd storage offsets": offsets,
    "launch limits": launch_limits,
    "a side stream": side_stream,
    "two streams in turns": two_streams,
    "autograd's thread": another_thread,
    "a second device": second_device,
    "capture and replay": graph,
    "no operator waits": no_wait,
    "no step waits": no_wait_in_a_step,
}
