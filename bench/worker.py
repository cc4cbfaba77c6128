"""python -m bench.worker: the process of one group. Its task is on stdin, its events on stdout.

The supervisor (bench.supervise) starts it. It ends with BROKEN where the CUDA context no longer
works.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

from bench.processes import Reports

BROKEN = 3


def main() -> int:
    report = Reports()
    task = json.load(sys.stdin)
    # Imported here: PyTorch prints, which must go to stderr, and takes seconds.
    import torch

    from bench import compare
    from bench.device import BrokenDevice, free_memory
    from bench.jobs import Context

    device = torch.device(task["device"])
    if device.type == "cuda":
        # A graph cannot be captured on the default stream, and a backward runs on its forward's.
        torch.cuda.set_stream(torch.cuda.Stream())
        # Convolutions use TF32 by default, whose errors would hide others in float32 checks.
        torch.backends.cudnn.allow_tf32 = False
    plan = importlib.import_module(task["plan"])
    stages = plan.stages(device.type, task["tiny"], **task["options"])
    (group,) = (g for s in stages for g in s.every_group() if g.name == task["group"])
    context = Context(device, task["tiny"], task["folder"], task["name"], until=task["until"])
    context.beat = lambda peer: report(event="beat", peer=peer)
    report(event="beat", peer="")

    try:
        measured: dict[str, Any] = {}
        if group.ceilings:
            measured = ceilings(device, task["tiny"])
            context.ceilings = compare.ceilings_of(measured)
        for job in group.jobs:
            if job.name not in task["jobs"] or time.time() + 0.5 * job.seconds > task["until"]:
                continue
            report(event="begin", job=job.name)
            context.without = task["without"].get(job.name, {})
            context.note = lambda peer, job=job: report(event="at", job=job.name, peer=peer)
            started = time.time()
            result = run(job, context)
            result["seconds_spent"] = time.time() - started
            if group.ceilings:
                result["ceilings"] = measured
            report(event="done", job=job.name, result=result)
            free_memory(device)
    except BrokenDevice as error:
        print(error, file=sys.stderr, flush=True)
        # Exit at once: the destructors of a broken context can hang.
        os._exit(BROKEN)
    return 0


def run(job: Any, context: Any) -> dict[str, Any]:
    """The job's result; if it cannot run here or fails, the reason."""
    from bench.case import Unavailable
    from bench.check import reason
    from bench.device import check_device

    missing = lack_of_memory(job.memory, context.device)
    waited = time.time()
    # Groups that run at the same time free their memory.
    while missing is not None and time.time() - waited < 20:
        time.sleep(1.0)
        context.beat("")
        missing = lack_of_memory(job.memory, context.device)
    if missing is not None:
        return {"failures": {}, "skipped": {"": missing}}
    try:
        return job.run(context)
    except Unavailable as error:
        return {"failures": {}, "skipped": {"": str(error)}}
    except Exception as error:
        result = {"failures": {"": reason(error)}}
        check_device(error, context.device)
        return result


def ceilings(device: Any, tiny: bool) -> dict[str, Any]:
    """The machine's ceilings, measured by the process that divides by them, or the failure."""
    from bench import compare
    from bench.check import reason
    from bench.device import check_device, free_memory

    try:
        return compare.measure_ceilings(device, tiny, seconds=1.0)
    except Exception as error:
        check_device(error, device)
        return {"failure": reason(error)}
    finally:
        free_memory(device)


def lack_of_memory(needed: float, device: Any) -> str | None:
    """A sentence about the memory if it does not suffice, else None."""
    import torch

    if device.type != "cuda" or not needed:
        return None
    free, total = torch.cuda.mem_get_info(device)
    if needed <= free:
        return None
    return f"it needs {needed / 2**30:.0f} GiB; {free / 2**30:.0f} of {total / 2**30:.0f} are free"


if __name__ == "__main__":
    sys.exit(main())
