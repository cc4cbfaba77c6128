"""Modules of one's own, whose rows and axes are less usual."""

import functools

import torch
from torch import Tensor, nn

from zoo.entry import (
    BATCH,
    TOKENS,
    Models,
    targets_and_heads,
)

MODELS = Models()
add = MODELS.add


class GraphNetwork(nn.Module):
    """Nodes x (N, d) and edges (2, E) -> (N, 3). The edges number the nodes from zero."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2):
            h = layer(x)
            x = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return self.head(x)


_GRAPH_LORA = targets_and_heads("fc1 fc2")
add(
    "graph-network",
    GraphNetwork,
    lambda: (torch.randn(7, 5), torch.randint(0, 7, (2, 20))),
    _GRAPH_LORA,
    fold="loop",
    why="Edge indices refer to the nodes of a single graph.",
)
# As many edges as nodes, and a declaration that the edges are the same for all particles.
add(
    "graph-network-named",
    GraphNetwork,
    lambda: (torch.randn(2, 5), torch.tensor([[0, 1, 1], [1, 0, 1]])),
    _GRAPH_LORA,
    axes={"batch_axes": {"x": 0, "edges": None}},
    fold="loop",
    why="Edge indices refer to the nodes of a single graph.",
)


class TimeFirst(nn.Module):
    """x (T, B, d) -> (T, B, 3), through PyTorch's own encoder."""

    def __init__(self, batch_first: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


add(
    "time-first",
    TimeFirst,
    lambda: (torch.randn(TOKENS, BATCH, 8),),
    targets_and_heads("linear1 linear2"),
    fold="loop",
    why="Its layers see (time, batch, width).",
)


class TimeFirstOutside(TimeFirst):
    """x (T, B, d) -> (T, B, 3), with the batch first for the layers inside."""

    def __init__(self):
        super().__init__(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


add(
    "time-first-outside",
    TimeFirstOutside,
    lambda: (torch.randn(TOKENS, BATCH, 8),),
    targets_and_heads("linear1 linear2"),
    axes={"batch_axes": {"x": 1}, "output_axes": 1},
)
# In evaluation mode the layer has a fast path that reads the weights of its linears.
add(
    "encoder-fast-path",
    functools.partial(TimeFirst, batch_first=True),
    lambda: (torch.randn(BATCH, TOKENS, 8),),
    targets_and_heads("linear1 linear2"),
)


class TextTable(nn.Module):
    """Images x (B, d) against a table of text features that is projected with them -> (B, rows)."""

    def __init__(self, rows: int):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.register_buffer("table", torch.randn(rows, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.table).T


# Numbers of texts: that of examples, that of the rows of K = 3 particles, neither.
for _rows in (BATCH, 3 * BATCH, 7):
    add(
        f"text-table-{_rows}",
        functools.partial(TextTable, _rows),
        lambda: (torch.randn(BATCH, 6),),
        "image text",
        fold="loop",
        why="The table has no batch axis: rows are shared, features differ per particle.",
    )


class Prototypes(nn.Module):
    """x (B, d) -> the logits (B, 6) and the six prototypes themselves, (6, 8)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.prototypes = nn.Parameter(torch.randn(3 * BATCH, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x) @ self.prototypes.T, "prototypes": self.prototypes}


for _name, _axes in (
    ("prototypes", {}),
    ("prototypes-named", {"output_axes": {"logits": 0, "prototypes": None}}),
):
    add(
        _name,
        Prototypes,
        lambda: (torch.randn(BATCH, 6),),
        "body",
        axes=_axes,
        shared=frozenset({"['prototypes']"}),
    )


class RoutedExperts(nn.Module):
    """x (B, T, d) -> (B, T, d): every token goes to the expert that its router likes best."""

    def __init__(self):
        super().__init__()
        self.body, self.router = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x.flatten(0, 1))
        weight, choice = self.router(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            y[chosen] = weight[chosen, None] * expert(tokens[chosen])
        return y.view_as(x)


add(
    "routed-experts",
    RoutedExperts,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    {"target_modules": r"body|experts\.\d"},
    fold="loop",
    why="Each expert receives a different number of tokens per particle.",
)
add(
    "routed-experts-router",
    RoutedExperts,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    "body router",
)


class SharedPositions(nn.Module):
    """Positions (1, T, d), projected and added to all rows: x (B, T, d) -> (B, T, d)."""

    def __init__(self):
        super().__init__()
        self.content, self.position = nn.Linear(6, 8), nn.Linear(4, 8)
        self.register_buffer("table", torch.randn(1, TOKENS, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.content(x) + self.position(self.table))


add(
    "shared-positions",
    SharedPositions,
    lambda: (torch.randn(BATCH, TOKENS, 6),),
    "content position",
)


class DictInput(nn.Module):
    """One argument that holds two tensors: {"image" (B, d), "text" (B, T, d)} -> {"score" (B,)}."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        text = self.text(batch["text"]).mean(1)
        return {"score": (self.image(batch["image"]) * text).sum(1)}


add(
    "dict-input",
    DictInput,
    lambda: ({"image": torch.randn(BATCH, 6), "text": torch.randn(BATCH, TOKENS, 5)},),
    "image text",
)


class Recurrent(nn.Module):
    """x (B, T, d) -> the classes (B, 3) and the last state (1, B, d), whose batch is axis 1."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Linear(5, 6), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(self.embed(x))
        return self.head(y[:, -1]), state


add(
    "recurrent-with-state",
    Recurrent,
    lambda: (torch.randn(BATCH, TOKENS, 5),),
    targets_and_heads("embed"),
)
