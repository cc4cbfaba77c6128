"""The PTX instructions, by families."""

from ptx.instructions import access, arithmetic, control, copies, products, warps  # noqa: F401
from ptx.instructions.registry import decode

__all__ = ["decode"]
