"""Kernels of our own, compiled on the user's machine at first use; each beside a naive form that it must match."""
