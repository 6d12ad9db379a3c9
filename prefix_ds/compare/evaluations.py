"""What `prefix-ds evaluate` left of a run and of its untrained base, as measures `test/rougeL`.

A run folder has them as files (`verdicts`); MLflow as metrics `evaluate/test/rougeL`, with `/low` and `/high`
behind it, and what they read as tags `evaluate.test.data`.

Knows nothing of how a score is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefix_ds.compare.seen import DataSet, Reading, Value
from prefix_ds.tracking import source_text, tagged_data
from prefix_ds.verdicts import Verdict, read_verdicts

_FOLDER = "evaluate"
_KINDS = {"bare": "base", "instruction": "instruction"}  # by what stands behind the split
_BOUNDS = ("low", "high")


@dataclass
class Evaluations:
    """All evaluations of one run; `sources` are the data that each read."""

    trained: dict[str, Value] = field(default_factory=dict)
    untrained: dict[str, dict[str, Value]] = field(default_factory=dict)
    sources: dict[Reading, str] = field(default_factory=dict)

    def add(self, name: str, scores: Mapping[str, Value]) -> None:
        """The scores of a file, or a group of metrics, of that name: a split, maybe with a kind behind it."""
        split, kind = _reading(name)
        target = self.untrained.setdefault(kind, {}) if kind else self.trained
        target |= {f"{split}/{score}": value for score, value in scores.items()}

    def add_source(self, name: str, source: str) -> None:
        """What the evaluation of that name read; empty: it is not known."""
        if source:
            self.sources[_reading(name)] = source

    def data(self, known: Mapping[str, DataSet]) -> dict[Reading, DataSet]:
        """What they read; the training's data, with their digest, where they name the same."""
        return {
            (split, kind): known[split]
            if split in known and known[split].source == source
            else DataSet(source)
            for (split, kind), source in self.sources.items()
        }


def _reading(name: str) -> Reading:
    split, _, kind = name.partition(".")
    return split, _KINDS.get(kind, kind)


def read_evaluations(run: Path) -> Evaluations:
    """Those of a run folder. Raises RunError for a file that is none."""
    found = Evaluations()
    for name, verdict in read_verdicts(run).items():
        found.add(name, _values(verdict))
        found.add_source(name, source_text(verdict))
    return found


def told_evaluations(metrics: Mapping[str, float], tags: Mapping[str, str]) -> Evaluations:
    """Those among the metrics of a run in MLflow, and what its tags say of them."""
    found = Evaluations()
    for name, value in metrics.items():
        folder, _, rest = name.partition("/")
        split, _, score = rest.partition("/")
        if folder == _FOLDER and score and score.rpartition("/")[2] not in _BOUNDS:
            low, high = (metrics.get(f"{name}/{bound}") for bound in _BOUNDS)
            found.add(split, {score: Value(value, low, high)})
    for name, source in tagged_data(tags).items():
        found.add_source(name, source)
    return found


def _values(verdict: Verdict) -> dict[str, Value]:
    scores = {name: Value(score.value, score.low, score.high) for name, score in verdict.scores.items()}
    return {"loss": Value(verdict.loss), "perplexity": Value(verdict.perplexity)} | scores
