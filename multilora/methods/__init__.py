"""Training methods: one file each, readable beside its paper's algorithm box."""

from multilora.methods.base import Method
from multilora.methods.dverge import DVERGE
from multilora.methods.ensemble import Ensemble
from multilora.methods.ibdr import IBDR
from multilora.methods.mutual import MutualLearning
from multilora.methods.registry import METHODS, Entry
from multilora.methods.svgd import SVGD

__all__ = ["DVERGE", "IBDR", "METHODS", "SVGD", "Ensemble", "Entry", "Method", "MutualLearning"]
