"""Filling Triton's cache: what a problem would launch is compiled, and nothing is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.floors import Calls
from bench.measure import Unavailable, reason


def compile_calls(
    calls: Sequence[Calls], beat: Callable[[str], None] = lambda peer: None
) -> dict[str, Any]:
    """Compile all launches of these calls for the current device, one after another. A launch that
    does not compile is recorded; the others go on."""
    from multilora.ops.dispatch import missing_reason

    missing = missing_reason("triton")
    if missing is not None:
        return {"failures": {}, "skipped": {"triton": missing}}
    from multilora.ops.triton import common
    from multilora.tools.kernels.compile import as_on_a_gpu

    if common.INTERPRETED.value:
        raise Unavailable("Triton's interpreter compiles nothing")
    chip = common.chip(torch.device("cuda", torch.cuda.current_device()))
    result: dict[str, Any] = {"failures": {}, "launches": 0}
    codes = set()

    def compile_launch(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        beat(kernel.__name__)
        result["launches"] += 1
        try:
            codes.add(kernel.warmup(*as_on_a_gpu(args), grid=grid, **meta).hash)
        except Exception as error:
            result["failures"].setdefault(kernel.__name__, reason(error))

    begun = time.time()
    common.compile_only(chip, compile_launch)
    try:
        for one in calls:
            one.run()
    finally:
        common.compile_only(None, None)
    return result | {"codes": len(codes), "seconds": time.time() - begun}
