"""Rows of ways that need no training: the bare base, and the instruction alone.

Both come out of the runs themselves: the bare base is what `train.method: full` validates before its first
step, the instruction alone what a prefix made of a text validates before its own. `evaluate` adds scores on
other splits, maybe with keys that it was told. Runs tell of one such way where all keys are equal that reach
its numbers, and what its evaluations read and wrote; what tells several apart stands in their titles.

Knows nothing of where runs were found or how rows are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prefix_ds.compare.letters import measured_on
from prefix_ds.compare.measures import DEFAULT, is_score, split_of
from prefix_ds.compare.rows import Row
from prefix_ds.compare.seen import DataSet, Seen, Value, Values
from prefix_ds.verdicts import keys_read

_TITLED = {"base": {"model.name"}, "instruction": {"prefix.text", "prefix.length"}}  # stand in titles anyhow


def untrained_rows(runs: Sequence[Seen], data: Callable[[Seen], str]) -> list[Row]:
    """The ways without training that the runs tell of, each once; `data` is the letter of a run's data."""
    groups: dict[tuple[str, str, frozenset[tuple[str, str]]], list[_Start]] = {}
    for run in runs:
        for kind, values in _untrained(run).items():
            for start in _starts(run, kind, values):
                groups.setdefault((kind, data(run), frozenset(start.keys.items())), []).append(start)
    ways = [way for group in groups.values() for way in _ways(group)]
    kinds = {way[0].kind for way in ways}
    apart = {kind: _differing([way[0] for way in ways if way[0].kind == kind]) for kind in kinds}
    return [_untrained_row(way, apart[way[0].kind]) for way in ways]


@dataclass(frozen=True)
class _Start:
    """What a run tells of a way without training."""

    run: Seen
    kind: str
    values: Values
    params: Mapping[str, str]  # of the run, as they were there

    @property
    def keys(self) -> dict[str, str]:
        """All that reach its numbers, but for the data."""
        return keys_read(self.params, self.kind)

    @property
    def told(self) -> dict[str, str]:
        """The same, and what its evaluations were of, for people."""
        found = self.keys
        for split, (data, written) in self.readings.items():
            found |= {f"{split} data": data.source if data else "", f"{split} outputs": written}
        return found

    @property
    def readings(self) -> dict[str, tuple[DataSet | None, str]]:
        """Of each split that was evaluated, what was read, and how outputs were written."""
        names = {split_of(name): name for name in self.values if is_score(name)}
        read = {split: measured_on(self.run, name, self.kind) for split, name in names.items()}
        return {
            split: (data and replace(data, changed=()), self.run.written.get((split, self.kind), ""))
            for split, data in read.items()
        }


def _starts(run: Seen, kind: str, values: Values) -> list[_Start]:
    """What a run tells of a kind, apart where its evaluations had other keys."""
    read = {name: measured_on(run, name, kind) for name in values}
    ways = dict.fromkeys(data.changed if data else () for data in read.values())
    return [
        _Start(
            run,
            kind,
            {name: values[name] for name, data in read.items() if (data.changed if data else ()) == changed},
            run.params_for(DataSet("", changed=changed)),
        )
        for changed in ways
    ]


def _ways(group: Sequence[_Start]) -> list[list[_Start]]:
    """Those of one configuration, apart where evaluations of one split are of different data or outputs."""
    told: dict[str, set[tuple[DataSet | None, str]]] = {}
    for start in group:
        for split, reading in start.readings.items():
            told.setdefault(split, set()).add(reading)
    several = [s for s, found in told.items() if not all(_may_be(a, b) for a in found for b in found)]
    ways: dict[object, list[_Start]] = {}
    for start in group:
        ways.setdefault(tuple(start.readings.get(split) for split in several), []).append(start)
    return list(ways.values())


def _may_be(one: tuple[DataSet | None, str], other: tuple[DataSet | None, str]) -> bool:
    (data, written), (its_data, its_written) = one, other
    is_same = data is None or its_data is None or data.may_be(its_data)
    return is_same and (not written or not its_written or written == its_written)


def _differing(starts: Sequence[_Start]) -> set[str]:
    """What tells ways of one kind apart, beside what their titles say anyhow."""
    told = [start.told for start in starts]
    names = {name for facts in told for name in facts}
    apart = {name for name in names if len({facts.get(name) for facts in told}) > 1}
    return apart - _TITLED.get(starts[0].kind, set())


def _untrained_row(way: Sequence[_Start], apart: set[str]) -> Row:
    first = way[0]
    facts = [f"{name}: {value}" for name, value in first.told.items() if name in apart and value]
    end = f" ({', '.join(facts)})" if facts else ""
    values = {name: value for start in reversed(way) for name, value in start.values.items()}
    return Row(_title(first.kind, first.params) + end, first.kind, tuple(start.run for start in way), values)


def _untrained(run: Seen) -> dict[str, dict[str, Value]]:
    found = {kind: dict(values) for kind, values in run.untrained.items()}
    first, method = run.values.get("first_valid_loss"), run.params.get("train.method")
    is_text = method == "prefix" and run.params.get("prefix.init") == "text"
    kind = "instruction" if is_text else "base" if method == "full" else ""
    if first is not None and kind:
        found.setdefault(kind, {})["valid_loss"] = first
    for way, values in found.items():
        read, trained = measured_on(run, "valid/loss", way), run.data.get("valid")
        is_same = read == trained or (read is not None and trained is not None and read.may_be(trained))
        if "valid/loss" in values and is_same:  # evaluated on the data of training: the same number
            values.setdefault(DEFAULT, values["valid/loss"])
    return found


def _title(kind: str, params: Mapping[str, str]) -> str:
    if kind == "base":
        return f"bare base {_short_path(params.get('model.name', ''))}".rstrip()
    if kind != "instruction":
        return kind
    text, length = " ".join(params.get("prefix.text", "").split()), params.get("prefix.length")
    positions = f" ({length} positions)" if length else ""
    return f"instruction alone{positions}: {text}"


def _short_path(name: str) -> str:
    """The end of a folder's path; a hub id as it is."""
    return "/".join(name.rstrip("/").split("/")[-2:]) if name.startswith("/") else name
