"""Deals the examples of a global batch to ranks, and a rank's examples to rows and micro-batches.

Three greedy steps, all of them deterministic:

1. *Deal*: longest first, each example to the rank that has the fewest tokens (LPT, Graham 1969). The most
   and the least loaded rank differ by one example at most.
2. *Pack*: a rank's examples into rows of at most `row_tokens`, best fit decreasing (Johnson 1974) to learn
   how few rows are enough, and then LPT into that many rows, kept if it fits: rows of equal length, which
   need no padding. Where attention costs the square of a row, rows are as long as an example may be; where
   each document attends alone, a row is a micro-batch, and there is nothing to pad.
3. *Group*: rows, longest first, into micro-batches of at most `micro_batch_tokens` tokens, padded to the
   longest (and by a thirty-second beyond it, `collate`). The ranks' largest micro-batches so run at the same
   time.

Dealing whole rows (packing for all ranks first) was rejected: a row is a coarse coin. With 64 examples of
about 100 tokens on 32 ranks and rows of 1024, it costs 3.4 times as much; with many examples a rank, both are
equal.

Knows nothing of ids and tensors; an example is its length.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

Row = list[int]  # examples side by side
MicroBatch = list[Row]


@dataclass(frozen=True)
class Limits:
    """What bounds rows and micro-batches, in tokens."""

    row_tokens: int | None  # None: a row an example
    micro_batch_tokens: int


def plan(lengths: Sequence[int], limits: Limits, num_ranks: int) -> list[list[MicroBatch]]:
    """For each rank its micro-batches, as many on all of them; examples are indices into `lengths`.

    A micro-batch without rows is one that a rank runs only to keep the others company.
    """
    shares = [
        _micro_batches(_rows(lengths, share, limits), lengths, limits)
        for share in spread(lengths, range(len(lengths)), num_ranks)
    ]
    most = max(len(share) for share in shares)
    return [share + [[] for _ in range(most - len(share))] for share in shares]


def spread(lengths: Sequence[int], examples: Sequence[int], num_bins: int) -> list[list[int]]:
    """The examples in bins of nearly equal load: longest first, each to the least loaded bin (LPT)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, b) for b in range(num_bins)]
    for example in _longest_first(lengths, examples):
        load, b = loads[0]
        bins[b].append(example)
        heapq.heapreplace(loads, (load + lengths[example], b))
    return bins


def best_fit(lengths: Sequence[int], examples: Sequence[int], capacity: int) -> list[Row]:
    """The examples in rows of at most `capacity`: longest first, each to the fullest row it fits in."""
    rows: list[Row] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in _longest_first(lengths, examples):
        length = lengths[example]
        at = bisect.bisect_left(free, (length, -1))
        left, row = free.pop(at) if at < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(free, (left - length, row))
    return rows


def _rows(lengths: Sequence[int], examples: Sequence[int], limits: Limits) -> list[Row]:
    most = limits.row_tokens
    if most is None:
        return [[example] for example in examples]
    rows = best_fit(lengths, examples, most)
    even = spread(lengths, examples, len(rows)) if rows else []
    return even if all(_length(row, lengths) <= most for row in even) else rows


def _micro_batches(rows: list[Row], lengths: Sequence[int], limits: Limits) -> list[MicroBatch]:
    """Rows in order of length, grouped while rows x longest stays within the limit."""
    batches: list[MicroBatch] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -_length(row, lengths)):
        if not batches or (len(batches[-1]) + 1) * longest > limits.micro_batch_tokens:
            batches.append([])
            longest = _length(row, lengths)
        batches[-1].append(row)
    return batches


def _longest_first(lengths: Sequence[int], examples: Sequence[int]) -> list[int]:
    return sorted(examples, key=lambda example: -lengths[example])  # stable: equal ones stay in order


def _length(row: Row, lengths: Sequence[int]) -> int:
    return sum(lengths[example] for example in row)
