"""Runs side by side: what differs, which is best, and what must be known before that is believed.

Rows are in the order of the measure that they are judged by. Losses and scores of different data say nothing
about each other, so the best is marked within the rows of one data set, and there is a warning.

Knows nothing of where runs were found or how the comparison is shown.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from prefix_ds.compare import measures
from prefix_ds.compare.rows import Row, computed, measured_on, rows_over_seeds, run_row, untrained_rows
from prefix_ds.compare.seen import DataSet, Seen
from prefix_ds.errors import RunError

_WIDEST = 7  # measures in a table
_Letters = Callable[[str, Seen, DataSet | None], str]
_SPLITS = {"train": "training data", "valid": "validation data", "test": "test data"}


@dataclass(frozen=True)
class Columns:
    """The measures of one table; the first has all rows and all that is said of them beside their numbers."""

    title: str
    measures: tuple[str, ...]
    is_first: bool

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Those that have something to show here."""
        return [row for row in rows if self.is_first or not row.values.keys().isdisjoint(self.measures)]


@dataclass(frozen=True)
class Comparison:
    """What is said of some runs."""

    source: str  # where they were found
    by: str  # the measure that rows are judged by
    rows: tuple[Row, ...]  # the best first; runs that differ in their seed only are one
    runs: tuple[Row, ...]  # each by itself
    keys: tuple[str, ...]  # those that differ
    results: tuple[str, ...]  # measures of what runs are worth, in the order of columns
    costs: tuple[str, ...]  # and of what they took
    warnings: tuple[str, ...]

    @property
    def has_seeds(self) -> bool:
        """Whether some rows stand for several runs."""
        return any(row.kind == "seeds" for row in self.rows)

    @property
    def tables(self) -> list[Columns]:
        """What goes into which table: all into one where it is not too wide."""
        together = Columns("Results", (*self.results, *self.costs), True)
        if len(together.measures) <= _WIDEST or not self.costs:
            return [together]
        return [Columns("Results", self.results, True), Columns("What it took", self.costs, False)]

    @property
    def less_is_better(self) -> bool:
        """Of the measure that rows are judged by."""
        return measures.less_is_better(self.by)


def compared(source: str, runs: Sequence[Seen], by: str | None = None) -> Comparison:
    """The comparison of some runs. Raises RunError: there are none, or none that has what `by` means."""
    if not runs:
        raise RunError(f"{source}: there are no runs")
    letter_of = _letters(runs)

    def of_validation(run: Seen) -> str:
        return letter_of("valid", run, run.data.get("valid"))

    rows = [*rows_over_seeds(runs), *untrained_rows(runs, of_validation)]
    names = [name for row in rows for name in row.values]
    judged = measures.DEFAULT if by is None else measures.named(by, names)
    keys = _differing(runs)
    split = measures.split_of(judged)

    def finished(row: Row) -> Row:
        told = {key: row.members[0].params.get(key, "") for key in keys} if row.is_trained else {}
        run, kind = _teller(row, judged), "" if row.is_trained else row.kind
        return replace(row, keys=told, data=letter_of(split, run, measured_on(run, judged, kind)))

    return Comparison(
        source,
        judged,
        tuple(_ranked(map(finished, rows), judged)),
        tuple(_ranked([finished(run_row(run)) for run in runs], judged)),
        tuple(keys),
        tuple(measures.results(names, judged)),
        tuple(measures.costs(names, judged)),
        tuple(_warnings(runs, letter_of, {"train", *map(measures.split_of, names)})),
    )


def _differing(runs: Sequence[Seen]) -> list[str]:
    """The keys that have two values, or one and none; not those that only name a run."""
    told = [computed(run.params) for run in runs]
    names = dict.fromkeys(name for params in told for name in params)
    return [name for name in names if len({params.get(name) for params in told}) > 1]


def _ranked(rows: Iterable[Row], by: str) -> list[Row]:
    """The best first; those without the measure last. The best of each data set is marked."""
    in_order = sorted(rows, key=lambda row: (_rank(row, by), not row.is_trained, row.name))
    best = {
        row.data: index for index, row in reversed([*enumerate(in_order)]) if math.isfinite(_rank(row, by))
    }
    return [replace(row, is_best=best.get(row.data) == index) for index, row in enumerate(in_order)]


def _rank(row: Row, by: str) -> float:
    """Less is better here, whatever the measure; infinity for no number."""
    value = row.values.get(by)
    if value is None or not math.isfinite(value.value):
        return math.inf
    return value.value if measures.less_is_better(by) else -value.value


def _teller(row: Row, judged: str) -> Seen:
    """The run that a row has its measure from."""

    def has_it(run: Seen) -> bool:
        return judged in (run.values if row.is_trained else run.untrained.get(row.kind, {}))

    return next(filter(has_it, row.members), row.members[0])


def _letters(runs: Sequence[Seen]) -> _Letters:
    """For a split, a run and data of it, the letter of the data; none where all runs have the same."""
    read = {split: [(run, data) for run in runs for data in _readings(split, run)] for split in _SPLITS}
    digested = {split for split in _SPLITS if all(data.digest for _, data in read[split])}

    def identity(split: str, run: Seen, data: DataSet) -> tuple[str, ...]:
        return _identity(split, run, data, split in digested)

    found = {split: list(dict.fromkeys(identity(split, *pair) for pair in read[split])) for split in _SPLITS}

    def letter(split: str, run: Seen, data: DataSet | None) -> str:
        if len(found.get(split, ())) < 2 or data is None or identity(split, run, data) not in found[split]:
            return ""
        return _letter(found[split].index(identity(split, run, data)))

    return letter


def _readings(split: str, run: Seen) -> list[DataSet]:
    """What numbers of a run were measured on: in training, and by its evaluations."""
    found = [run.data[split]] if split in run.data and split != "test" else []
    told = {"": run.values, **dict(sorted(run.untrained.items()))}
    names = [(name, kind) for kind, values in told.items() for name in values]
    found += [
        data
        for name, kind in names
        if measures.split_of(name) == split and (data := measured_on(run, name, kind)) is not None
    ]
    return list(dict.fromkeys(found))


def _identity(split: str, run: Seen, data: DataSet, has_digests: bool) -> tuple[str, ...]:
    """What makes two splits one: their content where all have a digest, else their names; the targets."""
    target = run.params.get("data.target", "")
    if split != "train":
        target = run.params.get("data.references", target)
    return data.digest if has_digests else data.source, target


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"{_letter(index // 26 - 1)}{_letter(index % 26)}"


def _warnings(runs: Sequence[Seen], letter_of: _Letters, measured: Collection[str]) -> list[str]:
    lines = [_data_line(split, runs, letter_of) for split in _SPLITS if split in measured]
    lines += [f"{run.name}: its result is gone ({run.place})" for run in runs if run.result_is_gone]
    return [line for line in lines if line]


def _data_line(split: str, runs: Sequence[Seen], letter_of: _Letters) -> str:
    groups: dict[str, list[DataSet]] = {}
    for run in runs:
        for letter, data in {letter_of(split, run, data): data for data in _readings(split, run)}.items():
            groups.setdefault(letter, []).append(data)
    if len(groups) < 2:
        return ""
    parts = [f"{letter}: {_told_data(group)}" for letter, group in groups.items()]
    end = "" if split == "train" else "; numbers of one letter can be compared"
    return f"{_SPLITS[split]} differ: {'; '.join(parts)}{end}"


def _told_data(group: Sequence[DataSet]) -> str:
    """`group`: one of each run."""
    data, count = group[0], len(group)
    digest = f" ({data.digest[:8]})" if data.digest else ""
    return f"{data.source}{digest}, {count} {'run' if count == 1 else 'runs'}"
