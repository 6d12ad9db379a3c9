"""Exact match and token F1 of short answers, with the normalisation of SQuAD (Rajpurkar et al. 2016).

Lower case, no ASCII punctuation, no articles (a, an, the), single spaces. Of several references the best
counts. Where output and reference are both empty after that they agree; where one is, they share nothing
(as in SQuAD 2.0).

Knows nothing of intervals.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from prefix_ds.scores.sums import Sums, mean_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIGNATURE = "normalisation:squad|refs:best"


def exact_match(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """The share of outputs that are a reference, once both are normalised."""
    return _best(outputs, references, lambda output, known: float(output == known))


def f1(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """The mean F measure of the words that output and reference share."""
    return _best(outputs, references, _shared)


def normalised(text: str) -> str:
    """The text as SQuAD compares it."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _best(
    outputs: Sequence[str], references: Sequence[Sequence[str]], measure: Callable[[str, str], float]
) -> Sums:
    values = [
        100 * max(measure(normalised(output), normalised(reference)) for reference in known)
        for output, known in zip(outputs, references, strict=True)
    ]
    return mean_of(values, _SIGNATURE)


def _shared(output: str, reference: str) -> float:
    ours, theirs = output.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))
