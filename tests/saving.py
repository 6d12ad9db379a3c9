"""What tests of saving share: tensors that tell their step, facts of a prefix, a writer that is killed.

Knows nothing of what is saved.
"""

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefix_ds.checkpoint import PrefixFacts

FORK = multiprocessing.get_context("fork")
FACTS = PrefixFacts("acme/tiny", "main", "llama", "ab12", 3, 40, 1.25, "0.1.0")


@dataclass(frozen=True)
class Shape:
    name: str
    num_heads: int
    key_dim: int
    value_dim: int


def tensors_of(step: int) -> dict[str, Tensor]:
    """Tensors whose every number tells their step."""
    return {
        "table": torch.full((7, 9), float(step)),
        "half": torch.full((3,), step % 100, dtype=torch.bfloat16),
        "rng": torch.full((64,), step % 251, dtype=torch.uint8),
        "count": torch.tensor(step),
        "none": torch.empty(0, 4),
    }


def killed_soon(work: Callable[[], None], after_seconds: float) -> None:
    """Runs `work` in a process of its own, and kills it with SIGKILL."""
    has_begun = FORK.Event()

    def begin_and_work() -> None:
        has_begun.set()
        work()

    process = FORK.Process(target=begin_and_work, daemon=True)
    process.start()
    has_begun.wait()
    time.sleep(after_seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def damaged_ways(file: Path, every: int) -> Iterator[bytes]:
    """The file cut at every n-th byte, and with bits flipped."""
    whole = file.read_bytes()
    for length in range(0, len(whole), every):
        yield whole[:length]
    chance = random.Random(0)
    for _ in range(60):
        place = chance.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        yield bytes(flipped)
