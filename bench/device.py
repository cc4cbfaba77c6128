"""The device: whether it still works, and the state of the card beside a measurement."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
import subprocess
from typing import Any

import torch

from bench.check import reason


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, and raise what went wrong on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BrokenDevice(BaseException):
    """The CUDA context no longer works and only a new process helps; no `except Exception` here."""


def check_device(error: Exception, device: torch.device) -> None:
    """Free what the failed peer held, and see whether CUDA still works."""
    error.__traceback__ = None
    try:
        free_memory(device)
        synchronize(device)
    except Exception as broken:
        raise BrokenDevice(reason(error)) from broken


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


#: Name in the record -> nvidia-smi's query.
QUERIES = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "used_mib": "memory.used",
}


class Card:
    """Samples of clocks (MHz), power (W), temperature (°C) and memory (MiB) of the first visible
    GPU; `absent` says why there are none."""

    def __init__(self, device: str):
        self.absent: str | None = None
        self._handle = None
        self.tool = shutil.which("nvidia-smi")
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.index = int(first) if first.isdigit() else 0
        if device != "cuda":
            self.absent = "the device is not a GPU"
        elif importlib.util.find_spec("pynvml") is not None:
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
        if self.absent is None and self._handle is None and self.tool is None:
            self.absent = "neither NVML nor nvidia-smi is there"

    def sample(self) -> dict[str, float] | None:
        """One reading, or None."""
        if self.absent is not None:
            return None
        try:
            return self._by_nvml() if self._handle is not None else self._by_tool()
        except Exception:
            # A driver that does not answer must not end the run.
            return None

    def _by_nvml(self) -> dict[str, float]:
        import pynvml as nvml

        h = self._handle
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM),
            "watts": nvml.nvmlDeviceGetPowerUsage(h) / 1000,
            "celsius": nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
            "used_mib": nvml.nvmlDeviceGetMemoryInfo(h).used / 2**20,
        }

    def _by_tool(self) -> dict[str, float]:
        query = [f"--query-gpu={','.join(QUERIES.values())}", f"--id={self.index}"]
        command = [self.tool, *query, "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        numbers = [float(word) for word in said.strip().split(", ")]
        return dict(zip(QUERIES, numbers))

    def described(self) -> dict[str, Any]:
        """The driver and the card's limits, as nvidia-smi prints them."""
        if self.tool is None or self.absent is not None:
            return {"absent": self.absent or "nvidia-smi is not there"}
        names = (
            "name,driver_version,pstate,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current"
        )
        command = [self.tool, f"--query-gpu={names}", f"--id={self.index}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return dict(zip(names.split(","), said.stdout.strip().split(", ")))
        except (OSError, subprocess.SubprocessError) as error:
            return {"absent": f"{type(error).__name__}: {error}"[:200]}


def spread(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """The least, the middle and the largest value of each number."""
    result = {}
    for name in samples[0] if samples else ():
        values = sorted(s[name] for s in samples if name in s)
        result[name] = [values[0], values[len(values) // 2], values[-1]]
    return result
