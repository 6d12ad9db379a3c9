"""Which numbers may be compared: a letter for each data set that they were measured on.

A loss is a mean over the tokens of a split, and so depends on the tokenizer and the longest example; a score
of outputs depends on the records alone. So the two have letters of their own: two bases may be compared by
their outputs and not by their losses.

Knows nothing of rows.
"""

from collections.abc import Callable, Sequence

from prefix_ds.compare import measures
from prefix_ds.compare.seen import DataSet, Seen

Basis = tuple[str, bool]  # what a number is of: a split, and whether it scores outputs or is a loss of it
Letters = Callable[[Basis, Seen, DataSet | None], str]
SPLITS = {"train": "training data", "valid": "validation data", "test": "test data"}
BASES = [(split, is_of_outputs) for split in SPLITS for is_of_outputs in (False, True)]
_IN_TRAINING = {("train", False), ("valid", False)}


def measured_on(run: Seen, measure: str, kind: str = "") -> DataSet | None:
    """The data behind a measure of a run, or of a `kind` without training; None: there are none, or nobody
    knows. An evaluation may have read others than training has."""
    split = measures.split_of(measure)
    read = run.evaluated.get((split, kind)) if measures.is_score(measure) else None
    return read or run.data.get(split)


def basis_of(measure: str) -> Basis:
    """What a measure is of."""
    return measures.split_of(measure), measures.is_of_outputs(measure)


def letters_of(runs: Sequence[Seen]) -> Letters:
    """For a basis, a run and data of it, the letter of the data; none where all runs have the same."""
    identity = {basis: _identity(basis, runs) for basis in BASES}
    found = {
        basis: list(
            dict.fromkeys(identity[basis](run, data) for run in runs for data in _readings(basis, run))
        )
        for basis in BASES
    }

    def letter(basis: Basis, run: Seen, data: DataSet | None) -> str:
        if len(found.get(basis, ())) < 2 or data is None:
            return ""
        its = identity[basis](run, data)
        return _letter(found[basis].index(its)) if its in found[basis] else ""

    return letter


def _readings(basis: Basis, run: Seen) -> list[DataSet]:
    """What numbers of a run were measured on: in training, and by its evaluations."""
    split, _ = basis
    names = {"": run.values, **dict(sorted(run.untrained.items()))}
    found = [run.data[split]] if basis in _IN_TRAINING and split in run.data else []
    found += [
        data
        for kind, values in names.items()
        for name in values
        if basis_of(name) == basis and (data := measured_on(run, name, kind)) is not None
    ]
    return list(dict.fromkeys(found))


def _identity(basis: Basis, runs: Sequence[Seen]) -> Callable[[Seen, DataSet], tuple[object, ...]]:
    """What makes two splits one: their content where all have a digest, else their names; the templates; and
    where all have told it, of losses what became of the records, of scores of outputs how many there were."""
    split, is_of_outputs = basis
    read = [data for run in runs for data in _readings(basis, run)]
    sizes = ("records",) if is_of_outputs else ("examples", "targets")
    told = ["digest" if all(data.digest for data in read) else "source"]
    told += [name for name in sizes if all(getattr(data, name) for data in read)]

    def identity(run: Seen, data: DataSet) -> tuple[object, ...]:
        params = run.params_for(data)
        target = params.get("data.target", "")
        if split != "train":
            target = params.get("data.references", target)
        return target, params.get("data.messages"), *(getattr(data, name) for name in told)

    return identity


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"{_letter(index // 26 - 1)}{_letter(index % 26)}"


def data_line(basis: Basis, runs: Sequence[Seen], letter_of: Letters) -> str:
    """What stands behind the letters of a basis; empty where there is one data set, or none."""
    split, _ = basis
    groups: dict[str, list[DataSet]] = {}
    for run in runs:
        for letter, data in {letter_of(basis, run, d): d for d in _readings(basis, run)}.items():
            groups.setdefault(letter, []).append(data)
    if len(groups) < 2:
        return ""
    contents = {(group[0].source, group[0].digest) for group in groups.values()}
    parts = [
        f"{letter}: {_told_data(group, has_sizes=len(contents) < len(groups))}"
        for letter, group in sorted(groups.items(), key=lambda item: (len(item[0]), item[0]))
    ]
    end = "" if split == "train" else "; numbers of one letter can be compared"
    return f"{SPLITS[split]} differ: {'; '.join(parts)}{end}"


def _told_data(group: Sequence[DataSet], *, has_sizes: bool) -> str:
    """`group`: one of each run."""
    data, count = group[0], len(group)
    digest = f" ({data.digest[:8]})" if data.digest else ""
    names = [name for name in ("records", "examples", "targets") if has_sizes and getattr(data, name)]
    sizes = "".join(f", {getattr(data, name):,} {name}" for name in names)
    return f"{data.source}{digest}{sizes}, {runs_text(count)}"


def runs_text(count: int) -> str:
    """So many runs, in words."""
    return f"{count} {'run' if count == 1 else 'runs'}"
