"""Kernels for CUDA devices, in Triton: chains of block-diagonal products, and delta rules in chunks. See docs/gpu.md."""
