"""Posteriors after training: K particles from the one adapter of an ordinary run."""

from multilora.posthoc.laplace import check_laplace, laplace
from multilora.posthoc.tfb import bayesianize

__all__ = ["bayesianize", "check_laplace", "laplace"]
