"""Linears whose product is their own, and a net over them.

The stubs are as odd as the real layers are: weights in other shapes and dtypes, separate
backward formulas, outputs that are views.
"""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, BATCH, TOKENS, D_IN, D_OUT = 3, 2, 4, 6, 8


class Int8Linear(nn.Linear):
    """int8 with a scale a row, taken apart in the forward; autograd makes the gradient of x."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        rounded = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        # Its bias is added by F.linear, whose output of 3-D rows is a view.
        return F.linear(x, self.dequantised().to(x.dtype), self.bias.to(x.dtype))


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        y = x.flatten(0, -2) @ layer.dequantised().to(x.dtype).T + layer.bias.to(x.dtype)
        # A view made here: autograd lets nobody change it in place.
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantised().to(grad.dtype), None


class Packed4Bit(nn.Module):
    """Two weights a byte, as a column of bytes; no nn.Linear, and all of it buffers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        levels = ((linear.weight.detach() / 0.06).round() + 8).clamp(0, 15).to(torch.uint8)
        high, low = levels.view(-1, 2).unbind(1)
        self.register_buffer("weight", (high * 16 + low).unsqueeze(1))
        self.register_buffer("bias", linear.bias.detach().clone())

    def dequantised(self) -> Tensor:
        levels = torch.cat([self.weight // 16, self.weight % 16], 1)
        levels = levels.view(self.out_features, self.in_features)
        return (levels.to(self.bias.dtype) - 8) * 0.06

    def forward(self, x: Tensor) -> Tensor:
        return _Unpacked.apply(x, self)


class Sharded(nn.Linear):
    """Column-parallel: `weight` is this rank's half of the features, and the output is gathered."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        mine, theirs = linear.weight.detach().chunk(2)
        self.weight = nn.Parameter(mine, requires_grad=False)
        self.register_buffer("of_another_rank", theirs)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return torch.cat([self.weight, self.of_another_rank])

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, weight.to(x.dtype)) for weight in (self.weight, self.of_another_rank)]
        return torch.cat(parts, -1) + self.bias.to(parts[0].dtype)


STUBS = {"int8": Int8Linear, "packed": Packed4Bit, "sharded": Sharded}
stubs = pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS.keys())


class Net(nn.Module):
    """Foreign layers before and after a plain one, over (B, tokens, d) and over (B, d)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D_IN, D_OUT)
        self.plain = nn.Linear(D_OUT, D_OUT)
        self.last = nn.Linear(D_OUT, D_OUT)
        self.head = nn.Linear(D_OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x)).mean(1)
        x = F.gelu(self.plain(x))
        x = self.last(x)
        x += 1  # what follows may change a layer's output in place
        return self.head(x)


def nets(stub, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """A net over foreign layers, and the net of plain layers with their weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        foreign = Net().to(dtype)
    plain = copy.deepcopy(foreign)
    for name in ("first", "last"):
        layer = stub(getattr(foreign, name))
        setattr(foreign, name, layer)
        with torch.no_grad():
            getattr(plain, name).weight.copy_(layer.dequantised())
    return foreign, plain


def config(**changes) -> peft.LoraConfig:
    targets = {"target_modules": ["first", "plain", "last"], "modules_to_save": ["head"]}
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **targets, **changes})


def inputs(dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, TOKENS, D_IN, generator=generator, dtype=dtype)
    return x, torch.randint(3, (BATCH,), generator=generator)
