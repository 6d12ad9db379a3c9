"""BLEU and chrF, by sacrebleu: the numbers, the statistics behind them and the signature are its own.

Both are scores of a whole corpus. Of a single record BLEU counts only n-grams as long as the text has any
(sacrebleu's effective order), as its command line does for sentences. Records may have different numbers of
references; with several, BLEU takes each n-gram from wherever it occurs most often, chrF the best one, and of
equal ones the first.

The statistics come from methods that sacrebleu names with an underscore. Its own bootstrap is made of them,
but gives half a width around the mean of the draws, which need not hold the score.

Knows nothing of intervals.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefix_ds.scores.sums import OfSums, Sums

_AT_ONCE = 1000  # records: sacrebleu keeps the n-grams of all references that it is given


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """BLEU with sacrebleu's defaults: 13a tokens, mixed case, exponential smoothing."""
    from sacrebleu.metrics import BLEU

    sentence = BLEU(effective_order=True, force=True)
    return _sums(BLEU(force=True), sentence, outputs, references)  # force: no warning about full stops


def chrf(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """chrF2 with sacrebleu's defaults: characters up to six in a row, no words, no spaces."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return _sums(metric, metric, outputs, references)


def _sums(metric: Any, sentence: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    stats: list[list[float]] = []
    counts = set()  # of references a record; -1: they differ
    for first in range(0, len(outputs), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        streams = list(itertools.zip_longest(*references[part]))  # None where a record has fewer
        stats += metric._extract_corpus_statistics(outputs[part], streams)
        counts.add(metric.num_refs)
    metric.num_refs = counts.pop() if len(counts) == 1 else -1
    signature = metric.get_signature().format()
    return Sums(np.array(stats, dtype=np.float64), _of(metric), _of(sentence), signature)


def _of(metric: Any) -> OfSums:
    def of(sums: list[float]) -> float:
        return float(metric._compute_score_from_stats(sums).score)

    return of
