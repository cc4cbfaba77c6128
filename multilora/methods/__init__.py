"""Training methods: one file each, readable beside its paper's algorithm box."""

from multilora.methods.base import Method
from multilora.methods.dverge import DVERGE
from multilora.methods.ensemble import Ensemble
from multilora.methods.ibdr import IBDR
from multilora.methods.independent import Independent
from multilora.methods.mutual import MutualLearning
from multilora.methods.registry import METHODS, Entry
from multilora.methods.sam import SAM
from multilora.methods.sgld import SGLD
from multilora.methods.svgd import SVGD
from multilora.methods.variational import BLoB, Variational

__all__ = [
    "DVERGE",
    "IBDR",
    "METHODS",
    "SAM",
    "SGLD",
    "SVGD",
    "BLoB",
    "Ensemble",
    "Entry",
    "Independent",
    "Method",
    "MutualLearning",
    "Variational",
]
