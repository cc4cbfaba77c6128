"""The generators that a forward may draw from: PyTorch's, NumPy's and Python's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RandomState:
    """The states of PyTorch's generators for the CPU and for `devices`, of NumPy's and of Python's.

    `restore` puts them back, so that code that runs again draws the same numbers. Two states are
    equal if nothing was drawn in between. A generator that a module made for itself is not covered.
    """

    def __init__(self, devices: Iterable[torch.device] = ()):
        self._torch = [(torch.device("cpu"), torch.get_rng_state())]
        for device in devices:
            if device.type not in ("cpu", "meta"):
                state = torch.get_device_module(device).get_rng_state(device)
                self._torch.append((device, state))
        self._python = random.getstate()
        # A program that has not imported NumPy cannot have drawn from it.
        numpy = sys.modules.get("numpy")
        self._numpy: Any = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        for device, state in self._torch:
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or len(self._torch) != len(other._torch):
            return NotImplemented
        return (
            self._python == other._python
            and all(torch.equal(a, b) for (_, a), (_, b) in zip(self._torch, other._torch))
            and _same_numpy(self._numpy, other._numpy)
        )

    # Equality is that of states that change.
    __hash__ = None  # type: ignore[assignment]


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(bool((x == y).all()) if hasattr(x, "all") else x == y for x, y in zip(a, b))


# The constant in place of the random numbers of each function.
_CONSTANTS = {
    **{"rand": 0.5, "rand_like": 0.5, "uniform_": 0.5, "bernoulli": 1.0, "bernoulli_": 1.0},
    **{"randn": 0.0, "randn_like": 0.0, "normal_": 0.0},
}


class WithoutRandomness(TorchFunctionMode):
    """Inside, PyTorch's dropout keeps everything, and its random numbers are constants."""

    def __init__(self):
        super().__init__()
        #: Whether constants took the place of random numbers other than dropout's.
        self.guessed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name.removesuffix("_").rstrip("123d").endswith("dropout"):
            return kwargs["input"] if "input" in kwargs else args[0]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
        elif name == "multi_head_attention_forward":
            kwargs["training"] = False
        elif name in _CONSTANTS:
            self.guessed = True
            if name.endswith("_"):
                return args[0].fill_(_CONSTANTS[name])
            if name in ("rand_like", "randn_like", "bernoulli"):
                return torch.full_like(args[0], _CONSTANTS[name])
            size = args[0] if args and not isinstance(args[0], int) else args
            kwargs.pop("generator", None)
            return torch.full(kwargs.pop("size", size), _CONSTANTS[name], **kwargs)
        return function(*args, **kwargs)
