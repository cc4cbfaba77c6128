"""Support for `multilora kernels`: sizes, calls of the operators, their machine code."""
