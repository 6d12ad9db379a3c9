"""What `prefix-ds evaluate` left of a run and of its untrained base, as measures `test/rougeL`.

A run folder has them as files (`verdicts`); MLflow as metrics `evaluate/test/rougeL`, with `/low` and `/high`
behind it, and what they were of as tags `evaluate.test.data`. Where the run went on afterwards they are those
of another result than it has now, and no measures of it.

Knows nothing of how a score is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefix_ds.compare.seen import DataSet, Reading, Value
from prefix_ds.errors import RunError
from prefix_ds.tracking import Told, tagged_evaluations, told_of
from prefix_ds.verdicts import Mark, Verdict, read_verdict, verdict_files

_FOLDER = "evaluate"
_KINDS = {"bare": "base", "instruction": "instruction"}  # by what stands behind the split
_BOUNDS = ("low", "high")
_ALWAYS = ("loss", "perplexity")  # what every evaluation finds


@dataclass
class Evaluations:
    """All evaluations of one run, what each was of, and the measures that are not of its present result."""

    trained: dict[str, Value] = field(default_factory=dict)
    untrained: dict[str, dict[str, Value]] = field(default_factory=dict)
    told: dict[Reading, Told] = field(default_factory=dict)
    outdated: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # what is wrong with those that cannot be read

    def add(self, name: str, scores: Mapping[str, Value], told: Told, *, is_outdated: bool) -> None:
        """The scores of a file, or a group of metrics, of that name: a split, maybe with a kind behind it."""
        split, kind = _reading(name)
        values = {f"{split}/{score}": value for score, value in scores.items()}
        if is_outdated and not kind:
            self.outdated += values
            return
        target = self.untrained.setdefault(kind, {}) if kind else self.trained
        target |= values
        self.told[split, kind] = told

    def data(self, known: Mapping[str, DataSet]) -> dict[Reading, DataSet]:
        """What they read, where that was told; with the digest of the training's data where it may be it."""
        return {
            reading: _data(told, known.get(reading[0])) for reading, told in self.told.items() if told.data
        }

    @property
    def written(self) -> dict[Reading, str]:
        """How the outputs were written that were scored."""
        return {reading: told.generate for reading, told in self.told.items() if told.generate}


def _reading(name: str) -> Reading:
    split, _, kind = name.partition(".")
    return split, _KINDS.get(kind, kind)


def _data(told: Told, known: DataSet | None) -> DataSet:
    data = DataSet(told.data, records=told.records, targets=told.targets)
    if known is not None and known.source == told.data and known.may_be(data):
        data = replace(known, records=told.records, targets=told.targets or known.targets)
    return replace(data, changed=tuple(sorted(told.changed.items())))


def read_evaluations(run: Path, now: Mark) -> Evaluations:
    """Those of a run folder, whose result is `now`."""
    found = Evaluations()
    for name, path in verdict_files(run).items():
        try:
            verdict = read_verdict(path)
        except RunError as error:
            found.damaged.append(str(error))
            continue
        is_outdated = verdict.mark.is_other_than(now)
        found.add(name, _values(verdict), told_of(verdict), is_outdated=is_outdated)
    return found


def told_evaluations(metrics: Mapping[str, float], tags: Mapping[str, str], now: Mark) -> Evaluations:
    """Those among the metrics of a run in MLflow, whose result is `now`, and what its tags say of them."""
    scores: dict[str, dict[str, Value]] = {}
    for name, value in metrics.items():
        folder, _, rest = name.partition("/")
        split, _, score = rest.partition("/")
        if folder == _FOLDER and score and score.rpartition("/")[2] not in _BOUNDS:
            low, high = (metrics.get(f"{name}/{bound}") for bound in _BOUNDS)
            scores.setdefault(split, {})[score] = Value(value, low, high)
    found, tagged = Evaluations(), tagged_evaluations(tags)
    for name, values in scores.items():
        told = tagged.get(name, Told())
        made = values if told.scores is None else {*_ALWAYS, *told.scores.split()}
        latest = {score: value for score, value in values.items() if score in made}
        found.add(name, latest, told, is_outdated=told.mark.is_other_than(now))
    return found


def _values(verdict: Verdict) -> dict[str, Value]:
    scores = {name: Value(score.value, score.low, score.high) for name, score in verdict.scores.items()}
    return {"loss": Value(verdict.loss), "perplexity": Value(verdict.perplexity)} | scores
