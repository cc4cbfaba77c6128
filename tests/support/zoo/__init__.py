"""Tiny random models of many architectures, each with inputs and the LoraConfig that users write.

`ZOO[name].build()` gives the same weights at every call, in float64 unless asked otherwise, without
dropout, so that training mode is as deterministic as evaluation mode. No parameter is left at zero
or one: an addition that a fresh model would hide (LayerScale, biases, position tables) counts.
"""

from zoo.document import CANNOT_SEE, table
from zoo.entry import Entry, call
from zoo.every_model import ZOO

__all__ = ["CANNOT_SEE", "ZOO", "Entry", "call", "table"]
