"""The memory that a rank of this machine has, before a base is loaded, or what is left of it after.

On a GPU, all of the device's: a rank has one to itself. On CPUs, this rank's part of what the machine, or the
control group that the job runs in, has left: files that the kernel keeps in memory count as left, as they
go when something else needs room.

Knows nothing of plans.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from prefix_ds.devices import USED_PART, Device
from prefix_ds.dist import World

_GROUPS = Path("/sys/fs/cgroup")
# Of version 1 and 2 of the control groups: where memory's are, a limit, what is used, and how much of it is
# files that nobody has used for long.
_VERSIONS = (
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("", "memory.max", "memory.current", "inactive_file"),
)


def memory_here(world: World) -> int:
    """Bytes that this rank has to itself."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    return _left_on_host(world)


def memory_left(world: World) -> int:
    """Bytes that this rank may fill beside what it holds already."""
    if world.device.type != "cuda":
        return round(_left_on_host(world) * USED_PART)
    free, _ = torch.cuda.mem_get_info(world.device)
    kept = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    return round((free + kept) * USED_PART)


def _left_on_host(world: World) -> int:
    left = min([psutil.virtual_memory().available, *left_in_groups()])
    return left // world.local_size


def device_here(world: World, memory_bytes: int) -> Device:
    """This rank's device; what is known of it is its kind, and its memory. Rates are of no consequence."""
    return Device("this device", memory_bytes / 2**30, 1, 1, 1, 1, 1, kind=world.device.type)


def left_in_groups(root: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left in each control group that limits this process."""
    paths = [line.split(":", 2)[2] for line in _text(own).splitlines()]
    for folder, *names in _VERSIONS:
        top = root / folder
        inside = {top / path.strip("/") for path in paths}
        for group in {top, *inside, *(above for path in inside for above in path.parents)}:
            if group == top or top in group.parents:
                yield from _left(group, *names)


def _left(group: Path, limit_name: str, used_name: str, files_name: str) -> Iterator[int]:
    limit, used = _text(group / limit_name).strip(), _text(group / used_name).strip()
    if limit.isdigit() and used.isdigit():  # "max" is none
        lines = (line.split() for line in _text(group / "memory.stat").splitlines())
        files = next((int(words[1]) for words in lines if words[0] == files_name), 0)
        yield max(0, int(limit) - int(used) + files)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
