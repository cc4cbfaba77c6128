"""Which peers are not timed, because their kernels failed their correctness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.case import OURS


def spoilt(results: dict[str, dict[str, Any]]) -> Callable[[str, str, str], str | None]:
    """A function (operator and passes of a case, backend, dtype) -> why it is not
    timed, or None.

    A wrong forward spoils every pass; a wrong backward leaves the forward.
    """
    wrong: dict[tuple[str, str, str], str] = {}
    for name, result in results.items():
        if not name.startswith("smoke: ") or "group" not in result:
            continue
        for why in list(result.get("failures", {}).values())[:1]:
            key = result["group"], result["backend"], result["dtype"]
            wrong.setdefault(key, f"{why} (in {name})")

    def why(group: str, backend: str, dtype: str) -> str | None:
        operator = group.split()[0]
        forward = wrong.get((f"{operator} forward", backend, dtype))
        both = wrong.get((f"{operator} fwd + bwd", backend, dtype))
        both = both or wrong.get((group, backend, dtype))
        if group.endswith("backward"):
            return both
        return forward or (None if group.endswith("forward") else both)

    return why


#: The cases whose correctness a whole step needs.
_OF_STEPS = {
    "IBDR step": [("lora_linear fwd + bwd", "bfloat16"), ("particle_loss fwd + bwd", "bfloat16")],
    "SVGD step": [("lora_linear fwd + bwd", "bfloat16"), ("SVGD update", "float32")],
}


def not_timed(
    group: str, dtype: str, peers: Sequence[str], results: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """The peers of a case that failed their correctness, and why."""
    why = spoilt(results)
    asked = _OF_STEPS.get(group, [(group, dtype)])
    found = {}
    for peer in peers:
        if not peer.startswith(f"{OURS} ("):
            continue
        backend = peer.removeprefix(f"{OURS} (").rstrip(")").split(",")[0]
        reasons = [reason for a, d in asked if (reason := why(a, backend, d)) is not None]
        if reasons:
            found[peer] = f"not timed, its correctness failed: {reasons[0]}"
    return found
