"""What became of the time of a step, and of the memory of a rank.

Shares of waiting are the first rank's own: another that is late shows there as waiting for ranks. Memory is
the most that any rank has had since it started: allocated on its GPU or, on a CPU, resident of the process.

Knows nothing of what a step is for.
"""

import resource
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from prefix_ds.data.batch import Share
from prefix_ds.dist import largest
from prefix_ds.speed.cost import Cost
from prefix_ds.tracking import Record

_TOLD = {
    "time/tokens_per_second": "{:,.0f} tokens/s",
    "time/mfu": "MFU {:.1%}",
    "time/waiting_for_data_share": "{:.2%} of the time waiting for data",
    "time/waiting_for_ranks_share": "{:.1%} for ranks",
    "memory/peak_gib": "at most {:.2f} GiB a rank",
}


class Gauge:
    """Measures against what the devices could do."""

    def __init__(self, cost: Cost, peak_flops: float, device: torch.device) -> None:
        """`peak_flops` are operations a second of all devices together."""
        self._cost, self._peak, self._device = cost, peak_flops, device

    def of_step(
        self, share: Share, seconds: float, for_data: float, for_ranks: float | None
    ) -> dict[str, float]:
        """The metrics of a step that took so many seconds, waiting included (None: not known)."""
        values = {
            "time/step_seconds": seconds,
            "time/tokens_per_second": share.global_tokens / seconds,
            "time/mfu": self._cost.of(share) / (seconds * self._peak),
            "time/waiting_for_data_share": for_data / seconds,
        }
        return values if for_ranks is None else values | {"time/waiting_for_ranks_share": for_ranks / seconds}

    def of_memory(self) -> dict[str, float]:
        """The metric of the memory of the rank that has had most. Every rank calls this."""
        return {"memory/peak_gib": largest(_highest_bytes(self._device)) / 2**30}


def medians(records: Sequence[Record]) -> str:
    """The medians of what was logged, in words; empty if nothing was."""
    found = {name: [r.values[name] for r in records if name in r.values] for name in _TOLD}
    return ", ".join(_TOLD[name].format(statistics.median(seen)) for name, seen in found.items() if seen)


def _highest_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    lines = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    if line := next(lines, None):  # gVisor has none; after a fork this is ours, and getrusage's is not
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
