"""How long a rank is blocked in collective calls.

Every wait for one, DeepSpeed's for its gathers as well as ours for a sum, goes through the same method of
torch's handle of a call. For the length of a step that method is exchanged for one that looks at the clock
first. It counts what a rank waits for data that are under way and for ranks that are late alike.

Only where the host itself waits, as with gloo. With NCCL the handle makes a stream of the GPU wait and
returns at once, and DeepSpeed calls it on its own stream for gathers: how long the computing stream then
waits for that one would take events between the two. Not tried, for want of a GPU; nothing is told there.

Knows nothing of what is sent.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Work


@dataclass
class Waited:
    """Time so far."""

    seconds: float | None = 0.0  # None: not known


@contextmanager
def waiting(device: torch.device) -> Iterator[Waited]:
    """Adds up the time this process is blocked in collective calls inside."""
    if device.type != "cpu":
        yield Waited(None)
        return
    waited, wait = Waited(), Work.wait

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return wait(*args, **options)
        finally:
            waited.seconds = (waited.seconds or 0.0) + time.perf_counter() - began

    Work.wait = timed  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        Work.wait = wait  # type: ignore[method-assign]
