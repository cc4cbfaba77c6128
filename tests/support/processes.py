"""Tests of several processes: they fork, so that they need no second import."""

import os
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist


def run_in_processes(size, function, *args, timeout=timedelta(minutes=5)):
    """function(rank, *args) in `size` forked processes that form a gloo group -> their results.

    args: the first is a folder for what the processes exchange. timeout: the longest that a process
    waits for another one. Forked, because importing everything again takes longer than the tests.
    """
    folder = args[0]
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            warnings.simplefilter("ignore")
            # Accelerate would ask for more threads, whose pool has not survived the fork.
            os.environ["OMP_NUM_THREADS"] = "1"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
            torch.save(function(rank, *args), folder / f"result_{rank}")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            (folder / f"error_{rank}").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    (folder / "rendezvous").unlink(missing_ok=True)
    errors = "\n".join(file.read_text() for file in sorted(folder.glob("error_*")))
    assert not failed, errors or f"{failed} died"
    return [torch.load(folder / f"result_{rank}") for rank in range(size)]
