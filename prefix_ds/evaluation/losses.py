"""How likely a model finds what people wrote, record by record.

A split is swept as in validation: packed rows, dealt to the ranks. Each micro-batch gives the negative
log-likelihood of every target, in the order of its documents; cut by their numbers of targets these are the
examples', and a record's are those of all its references. Their sums give the validation loss.

Knows nothing of text.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_ds.data.ahead import Ahead
from prefix_ds.data.batch import Share
from prefix_ds.data.examples import Examples, Ints
from prefix_ds.data.packing import Limits
from prefix_ds.data.stream import Sweep
from prefix_ds.dist import World, summed
from prefix_ds.model.unread import masks_unread
from prefix_ds.tracking import progress_bar
from prefix_ds.writing import Writer

_LARGEST_EXPONENT = 709.0  # of a float64


@dataclass(frozen=True, eq=False)
class RecordLosses:
    """Sums over the targets of each record, all its references together."""

    nll_R: NDArray[np.float64]  # nats
    num_targets_R: Ints  # 0 where all of a record's examples were dropped

    @property
    def num_targets(self) -> int:
        """Of all records."""
        return int(self.num_targets_R.sum())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a target token, in nats."""
        return float(self.nll_R.sum()) / self.num_targets

    @property
    def perplexity(self) -> float:
        """Of a target token."""
        return math.exp(min(self.loss, _LARGEST_EXPONENT))


def record_losses(writer: Writer, examples: Examples, limits: Limits, world: World) -> RecordLosses:
    """The losses of every record of a split. Every rank calls this."""
    sweep = Sweep(examples, limits, world)
    nll_E = np.zeros(len(examples))
    shares = Ahead(sweep.share, len(sweep), world.device)
    with masks_unread(), shares, progress_bar("reading", len(sweep), is_visible=world.is_first) as bar:
        for number, share in enumerate(shares):
            _read(writer, share, sweep.examples_of(number), examples.num_targets, nll_E)
            bar.at(number + 1)
    writer.lm.detach()
    return _by_record(summed(torch.from_numpy(nll_E)).numpy(), examples)


def _read(
    writer: Writer, share: Share, examples: list[list[int]], num_targets_E: Ints, nll_E: NDArray[np.float64]
) -> None:
    """Puts the losses of a share, whose micro-batches hold these examples, where they belong."""
    for batch, numbers in zip(share.micro_batches, examples, strict=True):
        nll_M = writer.lm.nll_of_each(batch, writer.table_PD, writer.slots).cpu().numpy()
        ends = np.cumsum(num_targets_E[numbers])
        for example, end in zip(numbers, ends.tolist(), strict=True):
            nll_E[example] = nll_M[end - int(num_targets_E[example]) : end].sum()


def _by_record(nll_E: NDArray[np.float64], examples: Examples) -> RecordLosses:
    num_records = len(examples.records)
    nll_R = np.bincount(examples.record_of, nll_E, num_records).astype(np.float64)
    num_targets_R = np.bincount(examples.record_of, examples.num_targets, num_records)
    return RecordLosses(nll_R, num_targets_R.astype(np.int64))
