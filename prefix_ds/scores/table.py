"""The scores there are, by name, and how some outputs are given several of them.

Outputs and references are scored without the space around them: a target often begins with one, which
belongs to the tokens and not to the text.

Knows nothing of where the outputs come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from prefix_ds.config.keys import ScoreName
from prefix_ds.scores.answers import exact_match, f1
from prefix_ds.scores.overlap import bleu, chrf
from prefix_ds.scores.rouge import rouge
from prefix_ds.scores.sums import Sums

_DRAWS = 1000

_TABLE: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Sums]] = {
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "f1": f1,
}
_GROUPS = {"rouge": ("rouge1", "rouge2", "rougeL")}
KNOWN: tuple[str, ...] = get_args(ScoreName)


@dataclass(frozen=True)
class Score:
    """One score of all records, 0 to 100, and the bounds of its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """What some outputs reached."""

    scores: tuple[Score, ...]
    of_records: tuple[dict[str, float], ...]  # by name, in the order of the outputs
    signatures: dict[str, str]  # by name: how each score was made


def names_of(chosen: Sequence[str]) -> tuple[str, ...]:
    """The scores that some names and names of groups stand for, each once."""
    return tuple(dict.fromkeys(name for group in chosen for name in _GROUPS.get(group, (group,))))


def scored(
    names: Sequence[str],
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Scored:
    """The scores of outputs, each beside one reference or several; `draws` make the intervals."""
    sums = _sums(names, outputs, references)
    each = [own.of_each() for own in sums.values()]
    return Scored(
        scores=tuple(Score(name, own.value(), *own.interval(draws, seed)) for name, own in sums.items()),
        of_records=tuple(dict(zip(sums, values, strict=True)) for values in zip(*each, strict=True)),
        signatures={name: own.signature for name, own in sums.items()},
    )


def values_of(
    names: Sequence[str], outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The scores alone: what a run wants to know while it trains."""
    return {name: own.value() for name, own in _sums(names, outputs, references).items()}


def _sums(
    names: Sequence[str], outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Sums]:
    texts = [output.strip() for output in outputs]
    known = [[reference.strip() for reference in own] for own in references]
    return {name: _TABLE[name](texts, known) for name in names}
