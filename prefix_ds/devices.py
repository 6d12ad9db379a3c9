"""What a device can do, from its maker's data sheet.

Knows nothing of models; imports no torch.
"""

import difflib
from dataclasses import dataclass
from math import inf

from prefix_ds.errors import ConfigError

USED_PART = 0.9  # of a memory: allocators waste some, and a plan may be off by as much


@dataclass(frozen=True)
class Device:
    """One of the devices of a job. Rates are peaks, in one direction."""

    name: str
    memory_gib: float  # as the driver tells it, without what it keeps for itself
    tflops: float  # dense, bfloat16
    node_gbs: float  # GB/s between devices of a node
    network_gbs: float  # GB/s of a device's share of its node's network
    host_gbs: float  # GB/s from the memory of the host
    memory_gbs: float  # GB/s of its own memory
    kind: str = "cuda"

    @property
    def usable_bytes(self) -> int:
        """Of its memory, what a run may be planned to fill."""
        return round(self.memory_gib * 2**30 * USED_PART)


_SHEETS = (
    Device("a100-40gb", 39.4, 312, 300, 25, 32, 1555),
    Device("a100-80gb", 79.2, 312, 300, 25, 32, 2039),
    Device("b200-180gb", 178.0, 2250, 900, 50, 64, 8000),
    Device("h100-80gb", 79.2, 989, 450, 50, 64, 3350),
    Device("h200-141gb", 139.8, 989, 450, 50, 64, 4800),
    Device("l4-24gb", 22.0, 121, 32, 12.5, 32, 300),
    Device("l40s-48gb", 44.4, 362, 32, 25, 32, 864),
    Device("mi300x-192gb", 191.5, 1307, 448, 50, 64, 5300),
    Device("rtx4090-24gb", 23.5, 165, 32, 12.5, 32, 1008),
)
DEVICES = {device.name: device for device in _SHEETS}
_DEFAULT = "h100-80gb"


def device_named(
    name: str | None,
    memory_gib: float | None,
    tflops: float | None,
    link_gbps: float | None,
    *,
    is_alone: bool = False,
) -> Device:
    """A device of the list, or one of one's own, of which the link is in Gbit/s. Raises ConfigError.

    One that `is_alone` in its job needs no link.
    """
    own = {"--memory-gib": memory_gib, "--tflops": tflops, "--link-gbps": link_gbps}
    given = {option: value for option, value in own.items() if value is not None}
    if name is None and given:
        return _own_device(own, given, is_alone)
    if given:
        raise ConfigError(f"--gpu: {name}: has its own figures; leave out {', '.join(own)}")
    if (name or _DEFAULT) not in DEVICES:
        near = difflib.get_close_matches(str(name), DEVICES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--gpu: {name}: expected one of {', '.join(DEVICES)}{meant}")
    return DEVICES[name or _DEFAULT]


def _own_device(own: dict[str, float | None], given: dict[str, float], is_alone: bool) -> Device:
    needed = [option for option in own if not (is_alone and option == "--link-gbps")]
    if missing := [option for option in needed if option not in given]:
        raise ConfigError(
            f"{' and '.join(missing)}: missing; a device of your own needs all of {', '.join(needed)}"
        )
    for option, value in given.items():
        if not 0 < value < inf:
            raise ConfigError(f"{option}: {value:g}: expected a number above 0")
    rate = given.get("--link-gbps", inf) / 8
    return Device("your device", given["--memory-gib"], given["--tflops"], rate, rate, rate, memory_gbs=inf)
