"""How many operations a second the devices of a job could do, at most.

GPUs that are on the list have their maker's figure, for dense products in bfloat16. Every other device (a
CPU, a GPU cut in parts or built for another bus, products in float32) multiplies two large matrices for a
moment, and the fastest round counts. Ranks on a CPU share its cores, so the first of a node does it alone,
with the threads of all.

Knows nothing of models.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prefix_ds.devices import DEVICES
from prefix_ds.dist import World, summed

_SECONDS, _SIZE = 0.4, {"cpu": 2048, "cuda": 8192}
_OTHER_BUILDS = {"d", "laptop", "mig", "nvl", "pcie"}  # of a GPU on the list, slower than what is there


def peak_flops(world: World, dtype: torch.dtype) -> float:
    """Operations a second of all devices together. Every rank calls this."""
    return float(summed(torch.tensor(_own(world, dtype), dtype=torch.float64)))


def _own(world: World, dtype: torch.dtype) -> float:
    """What this rank adds: its GPU's, or its node's if it is the first there."""
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        known = tflops_of(name) if dtype == torch.bfloat16 else None
        return known * 1e12 if known else _measured(world.device, dtype)
    if not world.is_first_here:
        return 0.0
    with _threads(torch.get_num_threads() * world.local_size):
        return _measured(world.device, dtype)


def tflops_of(gpu: str) -> float | None:
    """Of a GPU by its driver's name ("NVIDIA H100 80GB HBM3"); None if it is not on the list."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower().replace("rtx ", "rtx")))
    if words & _OTHER_BUILDS:
        return None
    return next((d.tflops for d in DEVICES.values() if d.name.split("-")[0] in words), None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """Of the fastest of some products, the first of which warms up."""
    size = _SIZE[device.type]
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    rounds = [_seconds(one, other)]
    while len(rounds) < 3 or sum(rounds) < _SECONDS:
        rounds.append(_seconds(one, other))
    return float(2 * size**3 / min(rounds))


def _seconds(one: torch.Tensor, other: torch.Tensor) -> float:
    began = time.perf_counter()
    one @ other
    if one.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
