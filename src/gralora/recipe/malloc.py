"""The C library's allocator, told to keep what is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, as torch's own allocator does on a GPU.

    glibc gives large blocks back to the system at once and fetches them again page by page: on a CPU up to
    a sixth of a training step goes there. The process stays as large as it ever was.

    Returns:
        Whether the allocator took it; one that is not glibc's is left alone.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    large = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # what older ones allow at most
    return bool(large and mallopt(_M_TRIM_THRESHOLD, -1))
