"""Memory that a training step frees and the next one wants again: kept, instead of given back to the operating system."""

from __future__ import annotations

import ctypes

# mallopt's names, and values that no step reaches, or the most that older versions take; once set, glibc moves them no more.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 2**30, 2**25


def keep_freed_memory() -> bool:
    """Let the C library's allocator keep what this process frees, for all its threads and until it ends.

    On a CPU the activations of a step are fresh pages in every step, and the page faults took 2 to 10 % of it where this was
    measured (docs/decisions.md). The process then holds on to the most memory it ever used, up to 1 GiB in one block.
    `vitfast train` calls this; a loop of your own may, before its first step. The same from outside:
    ``MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824``.

    Returns:
        Whether it could be done: only glibc has these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or an operating system without one to look into
        return False
    return all(any(mallopt(name, most) for most in _BYTES) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
