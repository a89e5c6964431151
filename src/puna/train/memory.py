"""Keeping freed memory: a step's tensors are the next step's.

glibc gives every block above 128 KiB a mapping of its own and unmaps it when it is freed, so a training step on the CPU
pays the kernel for the same pages again and again: mapping, faulting in, clearing. Told to serve all sizes from its
heap and never to give the top of it back, the allocator reuses them. The smaller the step, the larger the gain. All
threads share that heap: one of their own holds 64 MiB at most (train/workers.py).

The heap still grows for hundreds of steps, as long as batches of ever new shapes leave holes in it, and on a virtual
machine a first touch costs up to 40 us a page. `grow_heap` takes those faults at once, with huge pages: 512 pages each.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
NEVER, GROWTH = -1, 1 << 26  # bytes; -1 becomes the largest size there is
MADV_HUGEPAGE, HUGE = 14, 1 << 21  # linux/mman.h; bytes
_grown = 0  # bytes the heap has been grown by: the stages of one life share it


def keep_freed_memory() -> bool:
    """Tells this process's glibc allocator to keep what is freed; False where there is none (nothing changes)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, GROWTH), (M_ARENA_MAX, 1))
    return all(mallopt(*pair) == 1 for pair in wanted)


def grow_heap(size: int) -> bool:
    """Maps `size` more bytes of the calling thread's heap, in huge pages where the kernel has them, and frees them to
    the allocator; once a process, unless more is asked for. Only after `keep_freed_memory` do they stay. False where
    they can't be had (nothing changes).
    """
    global _grown
    if platform.libc_ver()[0] != "glibc":
        return False
    if size <= _grown:
        return True
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return False
    first = -(-block // HUGE) * HUGE
    length = (block + size - first) // HUGE * HUGE
    if length > 0:
        libc.madvise(first, length, MADV_HUGEPAGE)  # a wish: small pages do as well
    ctypes.memset(block, 0, size)
    libc.free(block)
    _grown = size
    return True
