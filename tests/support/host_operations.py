"""The host's work in a step, seen without a GPU: the CPU's tensors stand in for a GPU's.

Everything that a step does to a tensor is recorded, from Python and from C++. Noted as faults are
operations that make the host wait for the device and data that comes from the host: what a CUDA
graph cannot hold. On a CPU two things do not show: an operator whose CUDA kernel alone waits (of
those, the ones that PyTorch's sources name are listed here), and which of two factories without a
device was meant for which; the latter all count as faults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results' shape or value is known to the host only when the device has computed it; linear
# algebra without `_ex` looks whether it failed.
WAITS = frozenset(
    "_local_scalar_dense is_nonzero nonzero masked_select equal bincount histc _unique unique_dim "
    "_unique2 unique_consecutive repeat_interleave.Tensor _linalg_eigh _linalg_check_errors "
    "linalg_eig _linalg_svd linalg_lstsq linalg_householder_product".split()
)
# From Python, and not always through the dispatcher.
READS = frozenset(
    "tolist cpu numpy item __array__ __bool__ __int__ __float__ __index__ __contains__ cuda "
    "pin_memory as_tensor from_numpy frombuffer".split()
)


class HostOperations(TorchDispatchMode):
    """Inside, records `operations`, by name and in order, and `faults`.

    known: another one, whose tensors exist before this one begins. Without it nothing that comes
    from the host is a fault: a first call makes its tables.
    """

    def __init__(self, known: HostOperations | None = None):
        super().__init__()
        self.operations: list[str] = []
        self.faults: Counter[str] = Counter()
        self._learns = known is None
        # The key is the address; tensors are kept, so that no address comes twice.
        self._storages: dict[int, Any] = {} if known is None else dict(known._storages)
        self._python = _FromPython(self.faults)

    def __enter__(self) -> HostOperations:
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._python.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        self.operations.append(str(func))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not self._learns:
            self._look(func, name, args, inputs)
        if func.namespace == "multilora":
            # The calls inside the operator are recorded too.
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        else:
            out = func(*args, **kwargs)
        for t in (*inputs, *tree_leaves(out)):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                self._storages[storage._cdata] = storage
        return out

    def _look(self, func: Any, name: str, args: tuple, inputs: list[Tensor]) -> None:
        if name in WAITS or f"{name}.{func._overloadname}" in WAITS:
            self.faults[f"{func} waits for the device"] += 1
        if name == "lift_fresh":
            self.faults["a tensor is made of the host's numbers"] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.faults[f"{func} by a mask waits for the device"] += 1
        for t in inputs:
            # A number without axes is an argument of the kernel.
            if t.ndim and t.untyped_storage()._cdata not in self._storages:
                self.faults[f"{func} reads data of the host"] += 1


class _FromPython(TorchFunctionMode):
    def __init__(self, faults: Counter[str]):
        super().__init__()
        self.faults = faults

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS:
            self.faults[f"{name} waits for the device, or copies to it"] += 1
        # A torch.device is that of another tensor; a device's name is none of those.
        if name == "to" and any(isinstance(a, str) for a in (*args[1:], *kwargs.values())):
            self.faults["to(device) copies"] += 1
        if func in _device_constructors() and "device" not in kwargs:
            self.faults[f"{name} without a device is on the host"] += 1
        return func(*args, **kwargs)
