"""The rows of a comparison: a run, runs that differ in their seed only, or a way that needs no training.

Two ways need none and come out of the runs themselves: the bare base, which is what `train.method: full`
validates before its first step, and the instruction alone, which is what a prefix made of a text validates
before its own. `evaluate` adds their scores on other splits.

Knows nothing of where runs were found or how rows are shown.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prefix_ds.compare.measures import DEFAULT, is_score, split_of
from prefix_ds.compare.seen import DataSet, Seen, Value, Values

SEED = "train.seed"
_LABELS = {SEED, "run.folder"}  # and all of mlflow: they name a run and change nothing that is computed
_BASE = ("model.name", "model.revision")
_INSTRUCTION = (*_BASE, "model.bits", "prefix.text", "prefix.length", "prefix.layers")
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
        return [run.params[SEED] for run in self.members if SEED in run.params] if self.is_trained else []

    @property
    def is_trained(self) -> bool:
        """Whether it is one run or several, and not a way without training."""
        return self.kind in ("run", "seeds")

    @property
    def notes(self) -> list[str]:
        """What is to be known of its runs: how they ended, what is missing."""
        if not self.is_trained:
            return []
        words = [word for run in self.members for word in _notes_of(run)]
        counted = [_counted(word, words.count(word), len(self.members)) for word in dict.fromkeys(words)]
        return counted + self._partly_scored() + self._scored_apart()

    def _partly_scored(self) -> list[str]:
        """A word where scores are not those of all its runs."""
        counts = [value.count for name, value in self.values.items() if is_score(name)]
        size = len(self.members)
        return [f"scores of {min(counts)} of {size}"] if counts and min(counts) < size else []

    def _scored_apart(self) -> list[str]:
        """A word where its runs have scores of different data, which have no mean."""
        scores = {name for run in self.members for name in run.values if is_score(name)}
        return ["scores of different data"] if scores - self.values.keys() else []


def measured_on(run: Seen, measure: str, kind: str = "") -> DataSet | None:
    """The data behind a measure of a run, or of a `kind` without training; None: there are none, or nobody
    knows. An evaluation may have read others than training has."""
    split = split_of(measure)
    read = run.evaluated.get((split, kind)) if is_score(measure) else None
    return read or run.data.get(split)


def run_row(run: Seen) -> Row:
    """A run by itself."""
    return Row(run.name, "run", (run,), run.values)


def rows_over_seeds(runs: Sequence[Seen]) -> list[Row]:
    """Runs that are equal but for their seed and their names become one row: mean and deviation."""
    groups: dict[frozenset[tuple[str, str]], list[Seen]] = {}
    for run in runs:
        groups.setdefault(frozenset(computed(run.params).items()), []).append(run)
    return [_row_of(group) for group in groups.values()]


def computed(params: Mapping[str, str]) -> dict[str, str]:
    """The keys that say what is computed, but for the seed."""
    return {k: v for k, v in params.items() if k not in _LABELS and not k.startswith("mlflow.")}


def untrained_rows(runs: Sequence[Seen], data: Callable[[Seen], str]) -> list[Row]:
    """The ways without training that the runs tell of, each once; `data` is the letter of a run's data."""
    found: dict[tuple[str, ...], Row] = {}
    for run in runs:
        for kind, values in _untrained(run).items():
            places = _INSTRUCTION if kind == "instruction" else _BASE
            key = (kind, data(run), *(run.params.get(place, "") for place in places))
            before = found.get(key, Row("", kind, (), {}))
            found[key] = Row(_title(kind, run), kind, (*before.members, run), {**values, **before.values})
    return list(found.values())


def _row_of(group: Sequence[Seen]) -> Row:
    if len(group) == 1:
        return run_row(group[0])
    names = [name for name in dict.fromkeys(n for run in group for n in run.values) if _is_one(name, group)]
    values = {name: _over([run.values[name] for run in group if name in run.values]) for name in names}
    return Row(_common_name([run.name for run in group]), "seeds", tuple(group), values)


def _is_one(measure: str, group: Sequence[Seen]) -> bool:
    """Whether scores of some runs are of the same data, and have a mean."""
    read = {measured_on(run, measure) for run in group if measure in run.values}
    return not is_score(measure) or len(read) == 1


def _over(values: Sequence[Value]) -> Value:
    """Mean and deviation (n - 1) over seeds; no number where one is none."""
    if len(values) == 1:
        return values[0]
    numbers = [value.value for value in values]
    if not all(map(math.isfinite, numbers)):
        return Value(math.nan, count=len(numbers))
    return Value(statistics.fmean(numbers), deviation=statistics.stdev(numbers), count=len(numbers))


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with, without the word or letter that announces a seed."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    return re.sub(r"[-_. ]*(seed|s)?[-_. =]*$", "", common) or names[0]


def _untrained(run: Seen) -> dict[str, dict[str, Value]]:
    found = {kind: dict(values) for kind, values in run.untrained.items()}
    first, method = run.values.get("first_valid_loss"), run.params.get("train.method")
    is_text = method == "prefix" and run.params.get("prefix.init") == "text"
    kind = "instruction" if is_text else "base" if method == "full" else ""
    if first is not None and kind:
        found.setdefault(kind, {})["valid_loss"] = first
    for way, values in found.items():
        is_same = measured_on(run, "valid/loss", way) == run.data.get("valid")
        if "valid/loss" in values and is_same:  # evaluated on the data of training: the same number
            values.setdefault(DEFAULT, values["valid/loss"])
    return found


def _title(kind: str, run: Seen) -> str:
    if kind == "base":
        return f"bare base {_short_path(run.params.get('model.name', ''))}".rstrip()
    if kind != "instruction":
        return kind
    text, length = " ".join(run.params.get("prefix.text", "").split()), run.params.get("prefix.length")
    positions = f" ({length} positions)" if length else ""
    return f"instruction alone{positions}: {text}"


def _short_path(name: str) -> str:
    """The end of a folder's path; a hub id as it is."""
    return "/".join(name.rstrip("/").split("/")[-2:]) if name.startswith("/") else name


def _notes_of(run: Seen) -> list[str]:
    words = ["no metrics yet"] if not any(name != "result_bytes" for name in run.values) else []
    words += [_ENDS[run.status]] if run.status in _ENDS else []
    return words + (["result gone"] if run.result_is_gone else [])


def _counted(word: str, count: int, size: int) -> str:
    return word if size == 1 else f"{count} of {size} {word}"
