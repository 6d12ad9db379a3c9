"""Runs from an experiment of MLflow.

One request gives parameters, tags and the last values of all metrics of up to a thousand runs. A run that
ended told its summary; of the others (they are running, or were logged by something else) the summary is made
from their histories. Whether a prefix is still there takes two requests a run, and so is asked for the best
ones only; whole models are not sent to MLflow.

Knows nothing of run folders, and of MLflow only what `tracking` gives.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_ds.compare.evaluations import told_evaluations
from prefix_ds.compare.folders import data_of, had_result
from prefix_ds.compare.seen import Seen, Value
from prefix_ds.tracking import SOURCES, Histories, best_by, summary, told_mark

if TYPE_CHECKING:
    from prefix_ds.tracking.experiment import Experiment, ToldRun

_SUMMARY = "summary/"
_SIZE = f"{_SUMMARY}result_bytes"


class MlflowRuns:
    """The runs of one experiment."""

    def __init__(self, experiment: "Experiment") -> None:
        """Reads nothing yet."""
        self._experiment = experiment
        self.name = f"experiment {experiment.name} at {experiment.address}"
        self._had_files: set[str] = set()

    def runs(self) -> list[Seen]:
        """All of them. Raises RunError."""
        told = self._experiment.runs()
        self._had_files = {run.run_id for run in told if run.had_files}
        summaries = self._summaries(told)
        return [_seen(run, summaries[run.run_id]) for run in told]

    def gone(self, runs: Sequence[Seen]) -> set[str]:
        """The places of runs whose prefix MLflow was sent and no longer has."""
        had = [run for run in runs if run.place in self._had_files]  # others wait for theirs, or for a store
        sent = [run.place for run in had if _is_prefix(run) and "result_bytes" in run.values]
        there = self._experiment.has_files(sent, "prefix")
        return {place for place, has in zip(sent, there, strict=True) if not has}

    def histories(self, runs: Sequence[Seen], names: Sequence[str]) -> list[Histories]:
        """Of each run the values of some metrics at all steps. Raises RunError."""
        return self._experiment.histories([run.place for run in runs], names)

    def _summaries(self, told: "Sequence[ToldRun]") -> dict[str, dict[str, float]]:
        found = {run.run_id: _told_summary(run) for run in told}
        untold = [run for run in told if not found[run.run_id] and set(SOURCES) & set(run.metrics)]
        scores = {f"valid/{best_by(run.params)}" for run in untold}
        names = list(dict.fromkeys([*SOURCES, *sorted(scores)]))
        histories = self._experiment.histories([run.run_id for run in untold], names)
        return found | {
            run.run_id: summary(history, run.metrics.get(_SIZE), best_by(run.params))
            for run, history in zip(untold, histories, strict=True)
        }


def _is_prefix(run: Seen) -> bool:
    return run.params.get("train.method") == "prefix"


def _told_summary(run: "ToldRun") -> dict[str, float]:
    return {
        name.removeprefix(_SUMMARY): value
        for name, value in run.metrics.items()
        if name.startswith(_SUMMARY) and run.status != "RUNNING"
    }


def _seen(run: "ToldRun", numbers: dict[str, float]) -> Seen:
    found, told = told_evaluations(run.metrics, run.tags, told_mark(numbers)), _told_summary(run)
    data = data_of(run.params, run.datasets)
    return Seen(
        run.name,
        run.run_id,
        run.status,
        run.params,
        data,
        {name: Value(number) for name, number in numbers.items()} | found.trained,
        found.untrained,
        found.data(data),
        found.written,
        tuple(found.outdated),
        tuple(found.damaged),
        run.started,
        result_is_gone=_SIZE not in run.metrics and had_result(run.status, told),  # when that was sent
    )
