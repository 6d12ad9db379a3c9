"""Runs side by side: what differs, which is best, and what must be known before that is believed.

Rows are in the order of the measure that they are judged by. Losses and scores of different data say nothing
about each other, so the best is marked within the rows of one data set, and there is a warning.

Knows nothing of where runs were found or how the comparison is shown.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from prefix_ds.compare import measures
from prefix_ds.compare.letters import (
    BASES,
    SPLITS,
    Basis,
    Letters,
    basis_of,
    data_line,
    letters_of,
    measured_on,
    runs_text,
)
from prefix_ds.compare.rows import Row, computed, rows_over_seeds, run_row
from prefix_ds.compare.seen import DataSet, Reading, Seen
from prefix_ds.compare.untrained import untrained_rows
from prefix_ds.errors import RunError

_WIDEST = 7  # measures in a table


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
    letter_of = letters_of(runs)

    def of_validation(run: Seen) -> str:
        return letter_of(basis_of(measures.DEFAULT), run, run.data.get("valid"))

    rows, singles = [*rows_over_seeds(runs), *untrained_rows(runs, of_validation)], list(map(run_row, runs))
    names = [name for row in (*rows, *singles) for name in row.values]
    known = [*names, *(name for run in runs for name in run.outdated)]
    judged = measures.DEFAULT if by is None else measures.named(by, known)
    keys, results, costs = _differing(runs), measures.results(names, judged), measures.costs(names, judged)
    unjudged = _unjudged_line(judged, rows, [*results, *costs])

    def finished(row: Row) -> Row:
        told = {key: row.members[0].params.get(key, "") for key in keys} if row.is_trained else {}
        run, kind = _teller(row, judged), "" if row.is_trained else row.kind
        return replace(row, keys=told, data=letter_of(basis_of(judged), run, measured_on(run, judged, kind)))

    return Comparison(
        source,
        judged,
        tuple(_ranked(map(finished, _told_apart(rows)), judged)),
        tuple(_ranked(map(finished, _told_apart(singles)), judged)),
        tuple(keys),
        tuple(results),
        tuple(costs),
        (*unjudged, *_warnings(runs, letter_of, {("train", False), *map(basis_of, names)})),
    )


def _differing(runs: Sequence[Seen]) -> list[str]:
    """The keys that have two values, or one and none; not those that only name a run."""
    told = [computed(run.params) for run in runs if run.params]
    names = dict.fromkeys(name for params in told for name in params)
    return [name for name in names if len({params.get(name) for params in told}) > 1]


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Trained rows that share a name, with as much of the ends of their places as they differ in."""
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row.name, []).append(row.members[0].place)
    return [
        replace(row, name=f"{row.name} ({_end(row.members[0].place, places[row.name])})")
        if row.is_trained and len(places[row.name]) > 1
        else row
        for row in rows
    ]


def _end(place: str, places: Sequence[str]) -> str:
    """The fewest last parts of a place that no other ends with."""
    parts = place.split("/")
    ends = ("/".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in places) == 1), place)


def _ranked(rows: Iterable[Row], by: str) -> list[Row]:
    """The best first; those without the measure last. The best of each data set is marked, one that still has
    its result if there is any."""
    in_order = sorted(rows, key=lambda row: (_rank(row, by), not row.is_trained, row.name))
    known = [(index, row) for index, row in enumerate(in_order) if math.isfinite(_rank(row, by))]
    best = {row.data: index for index, row in sorted(known, key=lambda item: (item[1].has_result, -item[0]))}
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

    return next(filter(has_it, row.counted), row.members[0])


def _unjudged_line(judged: str, rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """A line where there is nothing to judge by and something else to judge by."""
    others = [name for name in columns if name not in (judged, "result_bytes")]
    if any(judged in row.values for row in rows) or not others:
        return []
    title = measures.title(judged)
    return [f"no row has a {title}, so none is the best; --by can name {', '.join(others)} instead"]


def _warnings(runs: Sequence[Seen], letter_of: Letters, measured: Collection[Basis]) -> list[str]:
    lines = [data_line(basis, runs, letter_of) for basis in BASES if basis in measured]
    lines += [_written_line(split, runs) for split in SPLITS]
    lines += [f"{run.name}: its result is gone ({run.place})" for run in runs if run.result_is_gone]
    lines += [
        _changed_line(run, *read) for run in runs for read in sorted(run.evaluated.items()) if read[1].changed
    ]
    lines += [_outdated_line(run) for run in runs if run.outdated]
    lines += [line for run in runs for line in run.damaged]
    return [line for line in dict.fromkeys(lines) if line]


def _written_line(split: str, runs: Sequence[Seen]) -> str:
    """A line where outputs that were scored were not all written in one way."""
    ways = [{text for (read, _), text in run.written.items() if read == split} for run in runs]
    counts = Counter(text for texts in ways for text in sorted(texts))
    told = "; ".join(f"{text}, {runs_text(count)}" for text, count in counts.items())
    return f"outputs for {SPLITS[split]} were written differently: {told}" if len(counts) > 1 else ""


def _changed_line(run: Seen, reading: Reading, data: DataSet) -> str:
    where, words = ", ".join(filter(None, reading)), [f"{key}={text or ''}" for key, text in data.changed]
    return f"{run.name}: evaluated ({where}) with {', '.join(words)}, not its own"


def _outdated_line(run: Seen) -> str:
    splits = ", ".join(dict.fromkeys(map(measures.split_of, run.outdated)))
    return (
        f"{run.name}: was trained further after its evaluation ({splits}), which is left out: "
        f"`prefix-ds evaluate RUN` again ({run.place})"
    )
