"""Triton kernels for packed 2:4 matrices on NVIDIA GPUs; imported only where Triton is."""
