"""One rank's part of every global batch: order, packing and collating put together.

A `Stream` is for training: share(step) is a pure function of its arguments and needs no other rank. All ranks
plan the whole global batch (a few milliseconds for a thousand examples) and collate only their own part. A
`Sweep` is for validation: all examples once, in the order of their files. The union of the ranks' shares
holds the same examples at any world size, so sums over it are the same.

Knows nothing of models, and of time only the number of a step.
"""

from collections.abc import Iterator

import numpy as np

from prefix_ds.config import TrainKeys
from prefix_ds.data.batch import Share
from prefix_ds.data.collate import collate
from prefix_ds.data.examples import Examples, Ints
from prefix_ds.data.order import Order
from prefix_ds.data.packing import Limits, MicroBatch, plan
from prefix_ds.dist import World

# Micro-batches a rank gets at once in a sweep: more waste less on the last one, and take more memory.
_SWEEP_MICRO_BATCHES = 8


class Stream:
    """The training batches of one rank."""

    def __init__(self, examples: Examples, limits: Limits, train: TrainKeys, world: World) -> None:
        """Nothing is read until a share is asked for. `train` says what is in a batch."""
        self.examples, self.limits, self.world = examples, limits, world
        self.order = Order(len(examples), train)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.order.num_steps

    def share(self, step: int) -> Share:
        """This rank's micro-batches of a step, 0 being the first."""
        return _share(self.examples, self.order.batch(step), self.limits, self.world)


class Sweep:
    """All examples once, as the shares of one rank; every rank gets as many."""

    def __init__(self, examples: Examples, limits: Limits, world: World) -> None:
        """Nothing is read until a share is asked for."""
        self.examples, self.limits, self.world = examples, limits, world
        self._chunks = self._cut()

    def __iter__(self) -> Iterator[Share]:
        return map(self.share, range(len(self)))

    def __len__(self) -> int:
        return len(self._chunks)

    def share(self, number: int) -> Share:
        """This rank's part of a chunk of the examples, 0 being the first."""
        return _share(self.examples, self._chunks[number], self.limits, self.world)

    def examples_of(self, number: int) -> list[list[int]]:
        """For each micro-batch of `share(number)` its examples, in the order of its documents."""
        chunk = self._chunks[number]
        own = _planned(self.examples, chunk, self.limits, self.world)
        return [[int(chunk[document]) for row in rows for document in row] for rows in own]

    def _cut(self) -> list[Ints]:
        """Neighbouring examples with about as many tokens as all ranks take in a few micro-batches."""
        budget = self.world.size * self.limits.micro_batch_tokens * _SWEEP_MICRO_BATCHES
        chunk_of = (np.cumsum(self.examples.lengths) - 1) // budget
        borders = np.flatnonzero(np.diff(chunk_of)) + 1
        return np.split(np.arange(len(self.examples)), borders)


def _share(examples: Examples, batch: Ints, limits: Limits, world: World) -> Share:
    lengths, num_targets = examples.lengths[batch], examples.num_targets[batch]
    own = _planned(examples, batch, limits, world)
    wanted = [document for rows in own for row in rows for document in row]
    ids = dict(zip(wanted, examples.ids(batch[wanted]), strict=True)) if wanted else {}
    return Share(
        micro_batches=tuple(collate(rows, ids, num_targets) for rows in own),
        global_targets=int(num_targets.sum()),
        global_tokens=int(lengths.sum()),
        global_squares=int((lengths**2).sum()),
    )


def _planned(examples: Examples, batch: Ints, limits: Limits, world: World) -> list[MicroBatch]:
    """This rank's micro-batches, of places in `batch`."""
    return plan(examples.lengths[batch].tolist(), limits, world.size)[world.rank]
