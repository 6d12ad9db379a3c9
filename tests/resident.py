"""Memory of this process as the kernel counts it, in MiB.

Freed memory goes back at once (`settle`), so that what is resident is what is used.
"""

import ctypes
import gc
from pathlib import Path

MIB = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's mallopt


def settle():
    """From now on glibc keeps nothing of what is freed."""
    ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 65536)
    ctypes.CDLL("libc.so.6").mallopt(_ARENA_MAX, 1)


def relax():
    """From now on glibc keeps what it comes to keep by itself in a process that frees large blocks."""
    ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 32 * MIB)
    ctypes.CDLL("libc.so.6").mallopt(_TRIM_THRESHOLD, 64 * MIB)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MIB


def highest():
    """Since `forget_highest`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def forget_highest():
    Path("/proc/self/clear_refs").write_text("5")


def give_back_what_is_free():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
