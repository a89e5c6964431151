"""Keeping freed memory: a step's tensors are the next step's.

glibc gives every block above 128 KiB a mapping of its own and unmaps it when it is freed, so a training step on the CPU
pays the kernel for the same pages again and again: mapping, faulting in, clearing. Told to serve all sizes from its
heap and never to give the top of it back, the allocator reuses them. The smaller the step, the larger the gain.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER, GROWTH = 2**31 - 1, 1 << 26  # bytes


def keep_freed_memory() -> bool:
    """Tells this process's glibc allocator to keep what is freed; False where there is none (nothing changes)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*pair) == 1 for pair in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, GROWTH)))
