"""Runs from their folders.

A run's facts are those that were noted for MLflow (`facts.json`); a folder without them, one that was
imported, has its `run.yaml`. The last line of `metrics.jsonl` may be half written, since a run may be writing
it. Knows nothing of MLflow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prefix_ds.compare.evaluations import read_evaluations
from prefix_ds.compare.seen import DataSet, Seen, Value
from prefix_ds.errors import RunError
from prefix_ds.run_folder import open_run
from prefix_ds.tracking import (
    DatasetFacts,
    Facts,
    Histories,
    best_by,
    flattened,
    has_facts,
    histories_of,
    read_facts,
    read_metrics,
    result_bytes,
    result_mark,
    summary,
    without_secrets,
)

_SPLITS = ("train", "valid", "test")
_NAMED = 3  # folders
_TRACES = ("facts.json", "metrics.jsonl", "prefix", "model")  # what a run leaves, or an import
_DEPTH = 2  # folders below one that is named


class Folders:
    """The runs of some folders: runs themselves, or folders of runs."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises RunError for a folder that is neither."""
        self.name = ", ".join(map(str, paths)) if len(paths) <= _NAMED else f"{len(paths)} folders"
        found = [run for path in paths for run in _runs_in(path)]
        self._runs = list({run.resolve(): run for run in reversed(found)}.values())[::-1]

    def runs(self) -> list[Seen]:
        """All of them, the oldest first, in whatever order they were named. Raises PrefixError."""
        return sorted(map(_seen, self._runs), key=lambda run: (run.started, run.place))

    def gone(self, runs: Sequence[Seen]) -> set[str]:
        """None: `runs` has looked."""
        return set()

    def histories(self, runs: Sequence[Seen], names: Sequence[str]) -> list[Histories]:
        """Of each run the values of some metrics at all steps."""
        return [
            {
                name: history
                for name, history in histories_of(read_metrics(Path(run.place))).items()
                if name in names
            }
            for run in runs
        ]


def data_of(params: dict[str, str], noted: Sequence[DatasetFacts]) -> dict[str, DataSet]:
    """The splits of a run: as the configuration names them, with what was noted of them."""
    found = {split: DataSet(params[f"data.{split}"]) for split in _SPLITS if f"data.{split}" in params}
    for facts in noted:
        if facts.context in found:
            found[facts.context] = replace(
                found[facts.context], digest=facts.digest, examples=facts.examples, targets=facts.targets
            )
    return found


def had_result(status: str, numbers: Mapping[str, float]) -> bool:
    """Whether a run that ended so, with this summary, kept something: of a validation, or of its end."""
    return bool(status) and ("valid_step" in numbers or (status == "FINISHED" and "steps" in numbers))


def _runs_in(path: Path) -> list[Path]:
    found = list(_found(path, _DEPTH))
    if not found:
        raise RunError(f"{path}: is no run folder and has none in it: there is no run.yaml")
    return found


def _found(path: Path, depth: int) -> Iterator[Path]:
    """Itself, or all runs so far below it: a folder with a run.yaml alone may only describe one of them."""
    has_config = (path / "run.yaml").is_file()
    if has_config and any((path / name).exists() for name in _TRACES):
        yield path
        return
    below = [run for folder in sorted(path.glob("*/")) for run in _found(folder, depth - 1)] if depth else []
    yield from below or ([path] if has_config else [])


def _seen(run: Path) -> Seen:
    facts = read_facts(run) if has_facts(run) else _facts_of_config(run)
    size = result_bytes(run)
    numbers = summary(histories_of(read_metrics(run)), size, best_by(facts.params))
    found = read_evaluations(run, result_mark(run, numbers))
    data = data_of(facts.params, facts.datasets)
    return Seen(
        facts.name,
        str(run),
        facts.status or "RUNNING",
        facts.params,
        data,
        {name: Value(number) for name, number in numbers.items()} | found.trained,
        found.untrained,
        found.data(data),
        found.written,
        tuple(found.outdated),
        tuple(found.damaged),
        facts.started,
        result_is_gone=size is None and had_result(facts.status, numbers),
    )


def _facts_of_config(run: Path) -> Facts:
    _, config = open_run(run)
    params = flattened(without_secrets(config.model_dump(mode="json")))
    name = config.mlflow.name or run.resolve().name
    status = "" if result_bytes(run) is None else "FINISHED"  # it may be about to begin
    return Facts(config.mlflow.experiment, name, params, {}, started=0, status=status)
