"""What `multilora kernels` needs: sizes, calls of the operators, their machine code."""
