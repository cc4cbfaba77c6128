"""A pytest plugin (-p bench.broken_device) that leaves a process whose CUDA context is broken.

An illegal access makes every later test of its process fail. pytest-xdist replaces a worker that
ends, and says in which test it did.
"""

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid, location):
    # Only where a test has used the device.
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"{nodeid} broke the CUDA context: {error}", returncode=3)
