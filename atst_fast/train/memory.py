"""What training does about the C library's allocator."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for the next tensors; False where the C library is not glibc.

    glibc gives blocks of more than 32 MiB back to the system as soon as they are freed, and a step has many: every
    activation of the next step then begins with the kernel clearing its pages one by one. A training process makes the
    same tensors again and again; what keeping them costs is some memory that lies in pieces too small to be used again.
    It cannot be undone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(option, value) == 1 for option, value in [(_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)]
    )
