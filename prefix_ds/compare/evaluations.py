"""What `prefix-ds evaluate` left of a run: `evaluate/SPLIT.json`, the same of the base and the instruction.

    evaluate/test.json               the trained run
    evaluate/test.bare.json          the base without a prefix
    evaluate/test.instruction.json   the prefix before its first step

MLflow has them as metrics `evaluate/test/rougeL`, with `/low` and `/high` behind it, and what they read as
tags `evaluate.test.data`. Either way they become measures `test/rougeL`.

Knows nothing of how a score is made.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefix_ds.compare.seen import DataSet, Reading, Value
from prefix_ds.errors import RunError
from prefix_ds.tracking import source_text, tagged_data

_FOLDER = "evaluate"
_KINDS = {"bare": "base", "instruction": "instruction"}  # by what stands behind the split
_PLAIN = ("loss", "perplexity")
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
    for path in sorted((run / _FOLDER).glob("*.json")):
        name = path.name.removesuffix(".json")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            found.add(name, _scores(told))
            found.add_source(name, source_text(told))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: is no evaluation: {error!r}; evaluate again, or remove it") from None
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


def _scores(told: Mapping[str, Any]) -> dict[str, Value]:
    scores = {name: _value(score) for name, score in told["scores"].items()}
    return {name: Value(float(told[name])) for name in _PLAIN if told.get(name) is not None} | scores


def _value(score: Mapping[str, Any]) -> Value:
    low, high = (None if score.get(bound) is None else float(score[bound]) for bound in _BOUNDS)
    return Value(float(score["value"]), low, high)
