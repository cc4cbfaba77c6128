"""The output of `multilora info`: versions, devices and backends."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from multilora._version import __version__
from multilora.ops import dispatch


def show() -> None:
    """Print versions, devices and backends."""
    print(f"multilora {__version__}, Python {platform.python_version()}")
    for package in _PACKAGES:
        print(f"{package} {_version(package) or 'not installed'}")
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        print("cuda: no device")
    print("backends:")
    for name in dispatch.BACKENDS:
        reason = dispatch.missing_reason(name)
        print(f"  {name}: {'available' if reason is None else f'missing: {reason}'}")
    for module in ("_C", "_C_cuda"):
        print(f"multilora.{module}: {_built(module)}")
    print(f"used by default: {_default(dispatch)}")
    _print_kernels()
    _print_operators(dispatch.left_to_reference())
    print("CUDA C++ kernels: experimental, never run on a GPU; none is a default")
    print(
        "backend cuda: lora_linear's thin products are Triton's passes, or PyTorch's "
        "where Triton is missing"
    )


def environment(device: str) -> dict[str, str]:
    """What numbers depend on beside the settings: versions, the commit and the processor."""
    found = {"multilora": __version__, "commit": _commit(), "python": platform.python_version()}
    found |= {package: version for package in _PACKAGES if (version := _version(package))}
    is_gpu = torch.device(device).type == "cuda"
    return found | {"device": torch.cuda.get_device_name(device) if is_gpu else _processor()}


_PACKAGES = ("torch", "triton", "peft", "timm", "transformers", "torchmetrics")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the source that is imported; "none" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "none"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "none"


def _processor() -> str:
    """The CPU's name, and how many cores this process may use."""
    cores = f"{len(os.sched_getaffinity(0))} cores"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()}, {cores}"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {cores}"


def _print_operators(table: dict[str, dict[str, str | None]]) -> None:
    """Print which operators each backend computes when the user chooses it by name."""
    width, names = max(map(len, table)), next(iter(table.values()))
    print("".join((f"{'operator':{width}}", *(f"{name:>11}" for name in names))))
    left: dict[tuple[str, str], list[str]] = {}
    for op, reasons in table.items():
        cells = ("kernel" if reason is None else "reference" for reason in reasons.values())
        print("".join((f"{op:{width}}", *(f"{cell:>11}" for cell in cells))))
        for name, reason in reasons.items():
            if reason is not None:
                left.setdefault((name, reason), []).append(op)
    for (name, reason), ops in left.items():
        print(f"backend {name} leaves {', '.join(ops)} to the reference: {reason}")


def _built(module: str) -> str:
    """A line on how a native module was built."""
    try:
        native = import_module(f"multilora.{module}")
    except ImportError as error:
        return f"missing ({error})"
    about = ", ".join(native.build_info().values())
    return f"{about}, level {native.level()}" if module == "_C" else about


def _default(dispatch: Any) -> str:
    """The backend that runs on each kind of device unless the user chooses one."""
    if os.environ.get("MULTILORA_BACKEND"):
        return f"{dispatch.current_backend()} (MULTILORA_BACKEND)"
    of = dispatch.current_backend
    return f"{of('cpu')} on a CPU, {of('cuda')} on a GPU"


def _print_kernels() -> None:
    """Print whether the GPU kernels have run on a GPU, and whether they were faster there."""
    if find_spec("triton") is None:
        return
    from multilora.ops import records
    from multilora.ops.triton import configs

    measured = [entry for entry in configs.table().values() if entry["record"] is not None]
    if not measured:
        print("Triton kernels: experimental, never run on a GPU; none is a default")
    for capability in sorted({entry["capability"] for entry in measured}):
        here = [entry for entry in measured if entry["capability"] == capability]
        ahead = sum(entry["ahead"] for entry in here)
        print(
            f"Triton kernels on sm_{capability}: measured at {len(here)} sizes, ahead of the "
            f"reference and the default at {ahead}"
        )
    for promotion in records.promotions():
        print(
            f"{promotion.op} in {promotion.dtype} on sm_{promotion.capability}: "
            f"{promotion.backend} is the default at {promotion.sizes}, ahead at all "
            f"{promotion.shapes} measured ({promotion.record})"
        )
