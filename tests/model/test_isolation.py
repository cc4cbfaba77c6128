"""The isolation check lets sound models pass; what it says, costs and leaves behind."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multilora as ml
from couplings import DTYPES, MODES, PARTICLES, Net, batch_mean, built, config, particles, rows_of
from models import load_peft

# --- sound models --------------------------------------------------------------------------------


class Deep(nn.Module):
    """24 layers with residuals and without: rounding piles up."""

    def __init__(self, residual: bool):
        super().__init__()
        self.residual = residual
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(24))
        for block in self.blocks:
            nn.init.normal_(block.weight, std=1.2 / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = h + 0.3 * torch.relu(block(h)) if self.residual else torch.tanh(block(h))
        return self.last(h)


class Routed(nn.Module):
    """Every row goes through its two best of eight experts."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)
        self.router = nn.Linear(12, 8)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        weights, chosen = self.router(h).softmax(-1).topk(2)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, rows, weights[rows, place, None] * expert(h[rows]))
        return self.last(h + y)


class Rotary(nn.Module):
    """x (B, 6) as three tokens of two numbers, turned by angles that it caches."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)
        self.angles: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(len(x), 6, 2)
        if 6 not in self.angles:
            self.angles[6] = torch.arange(6.0)[:, None].to(h)
        cos, sin = self.angles[6].cos(), self.angles[6].sin()
        a, b = h.chunk(2, -1)
        return self.last(torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(1))


class Tokens(nn.Module):
    """Attention in every row, over x (B, 6) as three tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.view(len(x), 3, 2))
        return self.last(h + self.attention(h, h, h)[0]).mean(1)


def _sorted_and_back(mix, h):
    order = h.float().norm(dim=1).argsort()
    return torch.tanh(h[order])[order.argsort()]


def _quantised_rows(mix, h):
    scale = h.abs().amax(1, keepdim=True) / 127
    return (h / scale).round() * scale


def _numpy_mask(mix, h):
    if mix.training:
        return h * torch.from_numpy(np.random.rand(*h.shape) > 0.3).to(h)
    return h


def _counted(mix, h):
    mix.calls += 1
    mix.state[0] += 1
    return h


def _drop_path(mix, h):
    keep = torch.rand(len(h), 1) > 0.2
    return h + torch.relu(h) * keep.to(h) if mix.training else h + torch.relu(h)


def _best_of_row(mix, h):
    return h * (h >= h.topk(4, dim=1).values[:, -1:])


def _hard_choice(mix, h):
    return nn.functional.one_hot(h.argmax(1), h.shape[1]).to(h) + 0.5 * h


def _invalid_rows(mix, h):
    return torch.where(h[:, :1] > 0.2, float("nan"), torch.where(h[:, :1] < -0.3, h / 0, h))


SOUND: dict[str, Callable[[], nn.Module]] = {
    "deep": lambda: Deep(residual=False),
    "deep-residual": lambda: Deep(residual=True),
    "routed": Routed,
    "rotary-cache": Rotary,
    "attention-in-rows": Tokens,
    "dropout": lambda: Net(lambda mix, h: mix.drop(h)),
    "functional-dropout": lambda: Net(
        lambda mix, h: nn.functional.dropout(h, 0.3, training=mix.training)
    ),
    "drop-path": lambda: Net(_drop_path),
    "noise-in-training": lambda: Net(
        lambda mix, h: h + 0.3 * torch.randn_like(h) if mix.training else h
    ),
    "numpy-mask": lambda: Net(_numpy_mask),
    "sorted-and-back": lambda: Net(_sorted_and_back),
    "norm-of-rows": lambda: Net(lambda mix, h: nn.functional.layer_norm(h, h.shape[1:])),
    "unit-rows": lambda: Net(lambda mix, h: h / h.norm(dim=1, keepdim=True)),
    "quantised-rows": lambda: Net(_quantised_rows),
    "counted": lambda: Net(_counted),
    "best-of-row": lambda: Net(_best_of_row),
    "hard-choice": lambda: Net(_hard_choice),
    "small-numbers": lambda: Net(lambda mix, h: 1e-6 * h),
    "large-numbers": lambda: Net(lambda mix, h: 1e4 * h),
    "nearly-cancelling": lambda: Net(lambda mix, h: (100 + h) - 100),
    "not-a-number": lambda: Net(_invalid_rows),
    "zeros": lambda: Net(lambda mix, h: torch.relu(h - 2)),
}


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_model_passes(name: str, dtype: torch.dtype) -> None:
    base = built(SOUND[name], dtype)
    for trained in (False, True):
        for batch in (1, 6, 40):
            model = particles(base, trained)
            for training in MODES.values():
                y = model.train(training)(rows_of(batch, dtype, seed=batch + training))
                assert y.shape == (PARTICLES, batch, 4)


# --- what it says, costs and leaves behind -------------------------------------------------------


def test_error_names_module_shapes_and_remedies() -> None:
    model = particles(built(lambda: Net(batch_mean)))
    with pytest.raises(ml.ParticleIsolationError) as caught:
        model(rows_of(6))
    message = str(caught.value)
    assert "mix" in message and "last" not in message
    # The rows of all particles, and those of one.
    assert "(24, 12)" in message and "(6, 12)" in message
    for remedy in ('fold="loop"', "batch_axes", "check_isolation=False"):
        assert remedy in message
    assert isinstance(caught.value, ValueError)


def _counting(model: ml.ParticleModel) -> list[int]:
    counts: list[int] = []
    model.base.mix.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("batch", [1, 6, 30])
def test_cost(batch: int, trained: bool, training: bool) -> None:
    """The first forward of a mode runs about one particle more, the next ones nothing."""
    model = particles(built(lambda: Net(lambda mix, h: mix.drop(h))), trained, training)
    counts = _counting(model)
    model(rows_of(batch))
    more = sum(counts) - PARTICLES * batch
    assert more > 0
    # Four particles and one of them alone, twice, on a few rows, where one alone would not tell.
    few = 6 * min(batch, max(2, batch // 6))
    assert more <= (batch if trained else 0) + (few if training or not trained else 0)
    counts.clear()
    # One example is another form of inputs than several.
    longer = batch if batch == 1 else batch + 1
    model(rows_of(batch))
    model(rows_of(longer))
    assert counts == [PARTICLES * batch, PARTICLES * longer]
    model.train(not training)(rows_of(batch))
    assert len(counts) > 3


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_cost_of_drawn_numbers(trained: bool) -> None:
    """Numbers other than dropout's: about three forwards of one particle."""
    model = particles(built(lambda: Net(_drop_path)), trained, training=True)
    counts = _counting(model)
    model(rows_of(30))
    assert 30 < sum(counts) - PARTICLES * 30 <= 3.5 * 30
    counts.clear()
    model(rows_of(30))
    assert counts == [PARTICLES * 30]


def test_no_check_on_request() -> None:
    model = particles(built(lambda: Net(batch_mean)), check_isolation=False)
    counts = _counting(model)
    with torch.no_grad():
        y = model(rows_of(6))
    assert y.shape == (PARTICLES, 6, 4)
    assert counts == [PARTICLES * 6]


@pytest.mark.parametrize("chunk", [1, 2])
def test_no_check_in_a_loop(chunk: int) -> None:
    model = particles(built(lambda: Net(batch_mean)), fold="loop")
    counts = _counting(model)
    with torch.no_grad():
        model(rows_of(6))
    assert counts == [6] * PARTICLES


def test_one_particle_is_not_checked() -> None:
    base = built(lambda: Net(batch_mean))
    model = ml.get_particle_model(base, config(), 1)
    counts = _counting(model)
    with torch.no_grad():
        assert model(rows_of(6)).shape == (1, 6, 4)
    assert counts == [6]


def test_other_form_of_inputs_is_checked_too() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if mask is None else y - y[mask].mean(0)

    model = particles(built(lambda: Masked(lambda mix, h: h)))
    model(rows_of(6))
    with pytest.raises(ml.ParticleIsolationError):
        model(rows_of(6), torch.tensor([True, False, True, True, False, True]))


def test_inputs_of_their_own_are_checked() -> None:
    base = built(lambda: Net(batch_mean))
    x = rows_of(PARTICLES * 6).view(PARTICLES, 6, 6)
    for trained in (False, True):
        with pytest.raises(ml.ParticleIsolationError):
            particles(base, trained)(x, per_particle=True)
    sound = particles(built(lambda: Net(lambda mix, h: h)))
    assert sound(x, per_particle=True).shape == (PARTICLES, 6, 4)


def test_some_particles_are_checked() -> None:
    model = particles(built(lambda: Net(batch_mean)))
    with model.particles(1, 3), pytest.raises(ml.ParticleIsolationError):
        model(rows_of(6))


def test_is_raised_again() -> None:
    """A training loop that goes on after the error must not get wrong numbers."""
    model = particles(built(lambda: Net(batch_mean)))
    for _ in range(3):
        with pytest.raises(ml.ParticleIsolationError):
            model(rows_of(6))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_check_leaves_nothing_behind(trained: bool) -> None:
    """Outputs, random numbers, buffers and gradients are those of a model without the check."""
    base = built(lambda: Net(lambda mix, h: _counted(mix, mix.drop(h))))
    results = []
    for check in (True, False):
        model = particles(base, trained, training=True, check_isolation=check)
        torch.manual_seed(2)
        np.random.seed(2)
        y = model(rows_of(6))
        y.square().sum().backward()
        grads = [p.grad for p in model.particle_parameters()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules())
        buffers = [b.clone() for b in model.buffers()]
        results.append([y, *grads, *buffers, torch.get_rng_state(), torch.tensor(hooks)])
        results[-1].append(torch.tensor(np.random.rand()))
    for with_check, without in zip(*results, strict=True):
        torch.testing.assert_close(with_check, without, rtol=0, atol=0)


def test_compiled_forward_is_not_checked() -> None:
    model = particles(built(lambda: Net(batch_mean)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(rows_of(6)).shape == (PARTICLES, 6, 4)


class _Writes(Net):
    def __init__(self):
        super().__init__(lambda mix, h: h)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_model_that_writes_into_its_input(tmp_path: Any) -> None:
    base = built(_Writes).double()
    model = particles(base)
    model.save_pretrained(tmp_path)
    y = model(rows_of(6, torch.float64))
    for k in range(PARTICLES):
        expected = load_peft(base, tmp_path / f"particle_{k}")(rows_of(6, torch.float64))
        torch.testing.assert_close(y[k], expected, rtol=1e-12, atol=1e-12)


def test_loop_refuses_a_model_that_writes_into_its_input() -> None:
    """The next particle would read what the one before it has written."""
    with pytest.raises(ml.ParticleIsolationError, match="writes into its input"):
        particles(built(_Writes), fold="loop")(rows_of(6))


@contextlib.contextmanager
def _threads(count: int, run: Callable[[int], None]) -> Iterator[None]:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("fold", ["batch", "loop"])
def test_two_threads_call_one_model(fold: str) -> None:
    """Batches of different sizes at once, from the first forward on."""
    base = built(lambda: Net(lambda mix, h: h + 0.1 * h.square()))
    expected = {}
    alone = particles(base, fold=fold)
    for number in range(2):
        x = rows_of(3 + 2 * number, seed=number)
        y = alone(x)
        grads = torch.autograd.grad(y.square().sum(), alone.particle_parameters())
        expected[number] = (x, y.detach(), grads)
    for _ in range(5):
        model = particles(base, fold=fold)
        start = threading.Barrier(2)

        def run(number: int, model=model, start=start) -> None:
            x, y, grads = expected[number]
            start.wait(30)
            for _ in range(20):
                got = model(x)
                torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-6)
                ours = torch.autograd.grad(got.square().sum(), model.particle_parameters())
                for a, b in zip(ours, grads, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

        with _threads(2, run):
            pass


def test_two_threads_find_a_coupling() -> None:
    model = particles(built(lambda: Net(batch_mean)))

    def run(number: int) -> None:
        with pytest.raises(ml.ParticleIsolationError):
            model(rows_of(3 + number))

    with _threads(2, run):
        pass
