"""Memory as a process that has run for a while has it."""

import ctypes


def keep_freed_memory() -> None:
    """Freed memory stays with the process from now on, where the C library is glibc. Else glibc gives large blocks back to the
    system and takes them anew, page by page, until its own threshold has grown: whoever runs first pays."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
