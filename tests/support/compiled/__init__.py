"""Triton kernels compiled as for a GPU and executed from their PTX, in a separate process."""
