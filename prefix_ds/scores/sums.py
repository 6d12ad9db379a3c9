"""A score as a function of sums over records, and how sure it is.

BLEU and chrF are made of counts that are added up over all records; a mean is one more such sum. So one form
holds every score: statistics [R, S] of R records, and a function of their sums. The interval is the
bootstrap's (Efron 1979): draw R records with replacement, add up what is known of them, and look between
which two values 95 % of the draws lie. No text is scored twice. The draws depend on R and the seed alone, so
all scores of some outputs see the same ones.

Knows nothing of texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
OfSums = Callable[[list[float]], float]

_TAILS = (2.5, 97.5)  # percent of the draws that lie below: 95 % are between
_DIGITS = 9  # behind the point: the same numbers, added up in another order, are the same score


@dataclass(frozen=True, eq=False)
class Sums:
    """The statistics of some records, and what they say: of all, and of one."""

    stats_RS: Floats
    of_all: OfSums
    of_one: OfSums
    signature: str  # all that another program must know to find the same

    def value(self) -> float:
        """The score of all records."""
        return round(self.of_all(self.stats_RS.sum(axis=0).tolist()), _DIGITS)

    def of_each(self) -> list[float]:
        """The score of each record by itself."""
        return [round(self.of_one(stats_S), _DIGITS) for stats_S in self.stats_RS.tolist()]

    def interval(self, draws: int, seed: int) -> tuple[float, float]:
        """Between these two lie 95 % of the scores of records drawn with replacement."""
        found = [self.of_all((counts_R @ self.stats_RS).tolist()) for counts_R in self._drawn(draws, seed)]
        low, high = np.percentile(found, _TAILS)
        return round(float(low), _DIGITS), round(float(high), _DIGITS)

    def _drawn(self, draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
        """How often each record is in each draw; one after the other, as all of them are large."""
        generator, size = np.random.default_rng(seed), len(self.stats_RS)
        for _ in range(draws):
            yield np.bincount(generator.integers(size, size=size), minlength=size)


def mean_of(values: Sequence[float], signature: str) -> Sums:
    """The mean of a value that each record has."""
    stats_RS = np.array(values, dtype=np.float64)[:, None]
    return Sums(stats_RS, lambda sums: sums[0] / len(values), lambda own: own[0], signature)
