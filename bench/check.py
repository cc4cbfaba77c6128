"""Correctness: the outputs of every peer against the oracle's, in float64."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import Case, Repetition, is_ours
from multilora import BackendUnavailableError


@dataclass(frozen=True)
class Check:
    """errors: peer -> output -> ‖output − oracle‖ / ‖oracle‖; failures: peer -> why."""

    errors: dict[str, dict[str, float]]
    failures: dict[str, str]


def check(
    case: Case, runs: dict[str, Repetition], dtype: torch.dtype, device: torch.device
) -> Check:
    """Every peer's outputs against the oracle's, on the same numbers.

    multilora may err twice as much as plain PyTorch in this dtype, plus rounding: four units in
    the last place. The plain peers set that scale, so all that is asked of them is half of the
    dtype's digits, which is also what every single element of multilora's must have. A peer that
    raises has failed; only a backend's refusal of these sizes is raised again.
    """
    make_oracle = next(iter(case.peers.values()))
    oracle = outputs_of(make_oracle(case.inputs(torch.float64, device)))
    eps = torch.finfo(dtype).eps
    errors, largest, failures = {}, {}, {}
    # Keep one peer's outputs at a time: those of a large case fill gigabytes.
    for name, run in runs.items():
        try:
            outputs = outputs_of(run, poisoned=is_ours(name))
            errors[name] = _errors(outputs, oracle, _norm)
            largest[name] = _errors(outputs, oracle, _largest)
        except BackendUnavailableError:
            raise
        except Exception as error:
            failures[name] = reason(error)
        outputs = None
    plain = [errors[name] for name in errors if not is_ours(name) and name not in case.asides]
    for name in errors:
        for output in oracle:
            budget = eps**0.5
            if is_ours(name) and plain:
                budget = min(2 * max(error[output] for error in plain) + 4 * eps, budget)
            # Written so that NaN fails.
            if not (errors[name][output] <= budget and largest[name][output] <= eps**0.5):
                failures[name] = (
                    f"{output}: error {errors[name][output]:.1e}, budget {budget:.1e}; "
                    f"largest element {largest[name][output]:.1e}, budget {eps**0.5:.1e}"
                )
    return Check(errors, failures)


def reason(error: BaseException) -> str:
    """The error in one line that is short enough for a record."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def outputs_of(run: Repetition, poisoned: bool = True) -> dict[str, Tensor]:
    """The outputs of a repetition, each as one tensor."""
    with _poisoned_memory() if poisoned else contextlib.nullcontext():
        outputs = run()
    return {
        name: _joined(t) if isinstance(t, (list, tuple)) else t.detach().clone()
        for name, t in outputs.items()
    }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Particles or layers of one shape stacked; of several shapes, as one long vector."""
    if len({t.shape for t in tensors}) == 1:
        return torch.stack(list(tensors)).detach()
    return torch.cat([t.detach().flatten() for t in tensors])


def _errors(
    outputs: dict[str, Tensor], oracle: dict[str, Tensor], size: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """size(output − oracle) / size(oracle) of every output."""
    shapes, expected = ({n: tuple(t.shape) for n, t in o.items()} for o in (outputs, oracle))
    if shapes != expected:
        raise ValueError(f"outputs {shapes} are not the oracle's {expected}")
    tiny = torch.finfo(torch.float64).tiny
    return {
        name: (size(outputs[name].double() - exact) / size(exact).clamp_min(tiny)).item()
        for name, exact in oracle.items()
    }


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t)


def _largest(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, torch.inf)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, which shows an element that nobody writes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
