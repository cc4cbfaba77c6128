"""python -m bench.sanitized BACKEND: small problems of every kernel, for compute-sanitizer."""

from __future__ import annotations

import sys

from bench import smoke
from bench.device import default_device, synchronize
from bench.jobs import Context


def main(backend: str) -> int:
    context = Context(default_device(), True, ".", "sanitized")
    wrong = 0
    for group in smoke.groups([backend], tiny=True):
        # Two of each group: everything takes ten times as long here.
        for job in group.jobs[:2]:
            result = job.run(context)
            print(job.name, result["failures"], result["skipped"], flush=True)
            wrong += bool(result["failures"])
    synchronize(context.device)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
