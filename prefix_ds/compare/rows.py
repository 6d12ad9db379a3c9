"""The rows of a comparison: a run, or runs that differ in their seed only (`untrained` has those of no run).

A mean over seeds is over the newest run of each that finished, and there is none where the runs' data, or the
ways their outputs were written, are known to differ.

Knows nothing of where runs were found or how rows are shown.
"""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefix_ds.compare.letters import measured_on
from prefix_ds.compare.measures import is_of_outputs, is_score, split_of
from prefix_ds.compare.seen import Seen, Value, Values

SEED = "train.seed"
_LABELS = {SEED, "run.folder"}  # and all of mlflow: they name a run and change nothing that is computed
_ENDS = {"RUNNING": "not ended", "KILLED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class Row:
    """What is shown on one line; `data` and `is_best` are known when it is among others."""

    name: str
    kind: str  # run, seeds, base or instruction
    members: tuple[Seen, ...]  # the runs it stands for, or was found in
    values: Values
    keys: Mapping[str, str] = field(default_factory=dict)  # those that differ between the rows
    data: str = ""  # a letter for each data set, where there are several
    is_best: bool = False

    @property
    def seeds(self) -> list[str]:
        """The seeds of its runs."""
        runs = (self.counted or self.members) if self.is_trained else ()
        seeds = dict.fromkeys(run.params[SEED] for run in runs if SEED in run.params)
        return sorted(seeds, key=lambda seed: (len(seed), seed))

    @property
    def counted(self) -> Sequence[Seen]:
        """The runs that its values are of: over seeds not all of them."""
        return _counting(self.members) if self.kind == "seeds" else self.members

    @property
    def is_trained(self) -> bool:
        """Whether it is one run or several, and not a way without training."""
        return self.kind in ("run", "seeds")

    @property
    def has_result(self) -> bool:
        """Whether what its values are of is still there, of one of its runs at least."""
        return not self.is_trained or not all(run.result_is_gone for run in self.counted or self.members)

    @property
    def notes(self) -> list[str]:
        """What is to be known of its runs: how they ended, what is missing."""
        if not self.is_trained:
            return []
        words = [word for run in self.members for word in _notes_of(run)]
        told = [_counted(word, words.count(word), len(self.members)) for word in dict.fromkeys(words)]
        return told + self._partly_counted() + self._partly_scored() + self._scored_apart()

    def _partly_counted(self) -> list[str]:
        """A word where the mean is not over all its runs."""
        size, count = len(self.members), len(self.counted)
        return [f"mean of {count} of {size} runs" if count else "no run finished"] if count < size else []

    def _partly_scored(self) -> list[str]:
        """Words where losses or scores are not those of all its runs, by what they are of."""
        counts: dict[str, int] = {}
        for name, value in self.values.items():
            if is_score(name) or name == "valid_loss":
                what = f"{split_of(name)} scores" if is_score(name) else "validation loss"
                counts[what] = min(value.count, counts.get(what, value.count))
        size = len(self.counted)
        return [f"{what} of {count} of {size}" for what, count in counts.items() if count < size]

    def _scored_apart(self) -> list[str]:
        """A word where its runs have scores that have no mean."""
        names = dict.fromkeys(name for run in self.counted for name in run.values)
        return list(dict.fromkeys(f"scores {word}" for name in names if (word := _apart(name, self.counted))))


def run_row(run: Seen) -> Row:
    """A run by itself."""
    return Row(run.name, "run", (run,), run.values)


def rows_over_seeds(runs: Sequence[Seen]) -> list[Row]:
    """Runs that are equal but for their seed and their names become one row: mean and deviation over the
    seeds, of each the newest run that finished."""
    groups: dict[frozenset[tuple[str, str]], list[Seen]] = {}
    for run in runs:
        same = computed(run.params).items() if SEED in run.params else {("place", run.place)}
        groups.setdefault(frozenset(same), []).append(run)
    return [_row_of(group) for group in groups.values()]


def computed(params: Mapping[str, str]) -> dict[str, str]:
    """The keys that say what is computed, but for the seed."""
    return {k: v for k, v in params.items() if k not in _LABELS and not k.startswith("mlflow.")}


def _row_of(group: Sequence[Seen]) -> Row:
    if len(group) == 1:
        return run_row(group[0])
    counted = _counting(group)
    names = [n for n in dict.fromkeys(n for run in counted for n in run.values) if not _apart(n, counted)]
    values = {name: _over([run.values[name] for run in counted if name in run.values]) for name in names}
    return Row(_common_name([run.name for run in group]), "seeds", tuple(group), values)


def _counting(runs: Sequence[Seen]) -> list[Seen]:
    """Of each seed the newest run that finished: a try that failed, or was stopped, says nothing of it."""
    finished = sorted((run for run in runs if run.status == "FINISHED"), key=lambda run: run.started)
    newest = {run.params.get(SEED): run.place for run in finished}
    return [run for run in runs if newest.get(run.params.get(SEED)) == run.place]


def _apart(measure: str, runs: Sequence[Seen]) -> str:
    """Why a measure has no mean over some runs; empty: it has one."""
    split = split_of(measure)
    if split == "train":
        return ""
    having = [run for run in runs if measure in run.values]
    read = {data for run in having if (data := measured_on(run, measure)) is not None}
    if len({data.changed for data in read}) > 1:
        return "with different keys"
    if not all(one.may_be(other) for one in read for other in read):
        return "of different data"
    written = {text for run in having if (text := run.written.get((split, "")))}
    is_written = is_score(measure) and is_of_outputs(measure)
    return "of outputs that were written differently" if is_written and len(written) > 1 else ""


def _over(values: Sequence[Value]) -> Value:
    """Mean and deviation (n - 1) over seeds; no number where one is none."""
    if len(values) == 1:
        return values[0]
    numbers = [value.value for value in values]
    if not all(map(math.isfinite, numbers)):
        return Value(math.nan, count=len(numbers))
    return Value(statistics.fmean(numbers), deviation=statistics.stdev(numbers), count=len(numbers))


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with, without half a number, and the word or letter that announces a seed."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    if any(name[len(common) :][:1].isdigit() for name in names):  # of 41 and 42
        common = common.rstrip("0123456789")
    return re.sub(r"([-_. ]*seed|[-_. ]+s)?[-_. =]*$", "", common) or names[0]


def _notes_of(run: Seen) -> list[str]:
    words = ["no metrics yet"] if not any(name != "result_bytes" for name in run.values) else []
    words += [_ENDS[run.status]] if run.status in _ENDS else []
    words += ["evaluated earlier"] if run.outdated else []
    words += ["evaluation damaged"] if run.damaged else []
    return words + (["result gone"] if run.result_is_gone else [])


def _counted(word: str, count: int, size: int) -> str:
    return word if size == 1 else f"{count} of {size} {word}"
