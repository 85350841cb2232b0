"""Freed memory goes back to the system.

glibc learns to keep freed blocks of up to 32 MB for reuse, in one arena for each thread. A fit frees many of 5 to 20 MB, and what is kept
adds up to more than the fit itself needs. With a fixed threshold such blocks are mapped on their own, and unmapped when they are freed.
"""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
BLOCK = 2 << 20  # bytes


def return_freed_blocks() -> None:
    """Set the thresholds where libc has them (glibc), once for the process; elsewhere nothing happens."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, BLOCK)
        libc.mallopt(TRIM_THRESHOLD, BLOCK)
    except (OSError, AttributeError, TypeError):
        return
