"""What an engine is to the loop: a step, a validation, a memory.

Knows nothing of DeepSpeed; the two engines beside it do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from prefix_ds.data.batch import Share
from prefix_ds.progress import Progress


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw, over all ranks."""

    loss: float  # mean negative log-likelihood of a target token, in nats, before the update
    grad_norm: float  # of the trained tensors, before clipping
    num_tokens: int
    waited_seconds: float | None = None  # this rank's, blocked in collective calls; None: not known


class Engine(Protocol):
    """Trains something. Every rank calls each of these together with all the others."""

    every_rank_saves: bool  # whether `tensors` differ between ranks

    def step(self, share: Share, lr: float) -> StepReport:
        """One optimizer step on this rank's share of the global batch."""
        ...

    def validate(self, shares: Iterable[Share]) -> float:
        """Mean negative log-likelihood of a target token, in nats, over all shares."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that is needed to go on, by name."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        ...

    def write_result(self, folder: Path, progress: Progress) -> None:
        """Writes what the training is for, whole or not at all."""
        ...
