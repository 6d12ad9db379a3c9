"""`prefix-ds links`: how fast the ranks of a job reach each other, before hours are booked on it.

What ZeRO-3 asks of a network is all-gathers; a run that trains all weights adds sums. A message from the
first rank to each other one and back tells which of them is behind a slow link.

Knows nothing of training.
"""

import json
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as group

from prefix_ds.dist import World, joined_world, peers_may_die

_NUMBERS, _ROUNDS = 2**22, 3  # 16 MiB of float32


def links() -> None:
    """Prints one line of JSON from the first rank: MB/s. Every rank calls this. Raises PeerLost."""
    with joined_world(timeout_minutes=2, patience_minutes=2) as world, peers_may_die():
        found = _measured(world)
    if world.is_first:
        print(json.dumps(found), flush=True)  # noqa: T201


def _measured(world: World) -> dict[str, object]:
    mine = torch.ones(_NUMBERS, device=world.device)
    whole = torch.empty(_NUMBERS * world.size, device=world.device)
    others = (world.size - 1) / world.size
    return {
        "ranks": world.size,
        "device": world.device.type,
        "all_gather_mbs": _rate(lambda: group.all_gather_single(whole, mine), whole, others),
        "all_reduce_mbs": _rate(lambda: group.all_reduce(mine), mine, 2 * others),
        "from_first_mbs": [
            _rate(partial(_there_and_back, mine, world, other), mine, 2) for other in range(1, world.size)
        ],
    }


def _there_and_back(numbers: torch.Tensor, world: World, other: int) -> None:
    if world.rank == 0:
        group.send(numbers, other)
        group.recv(numbers, other)
    elif world.rank == other:
        group.recv(numbers, 0)
        group.send(numbers, 0)


def _rate(work: Callable[[], object], numbers: torch.Tensor, part: float) -> float:
    """MB/s that a rank receives (or sends) of `part` of the numbers, the best of some rounds."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        group.barrier()
        began = time.perf_counter()
        work()
        if numbers.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return round(numbers.numel() * numbers.element_size() * part / min(seconds[1:]) / 1e6, 1)
