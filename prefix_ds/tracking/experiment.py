"""An experiment of MLflow, read: its runs with all that is known of each, and histories where wanted.

And written to in one way: a report as the artifact of a run of its own, and runs of equal configuration below
a parent, so that MLflow's pages show them nested. Both are found again by a tag, so a second report replaces
the first; such runs are none of those that are read.

Requests for single runs are made by a few threads, since a server answers one in some milliseconds and there
may be hundreds. Knows nothing of run folders or of what is done with the runs.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlflow.entities import DatasetInput, Metric, Run, ViewType
from mlflow.tracking import MlflowClient

from prefix_ds.errors import PrefixError, RunError
from prefix_ds.tracking.facts import DatasetFacts
from prefix_ds.tracking.masking import masked, words_of
from prefix_ds.tracking.mlflow_terms import DATA_COUNTS, FILES_TAG, milliseconds, plain_key, quiet_mlflow
from prefix_ds.tracking.state import absolute_uri
from prefix_ds.tracking.summary import Histories, Point

KIND_TAG = "prefix_ds.kind"  # of runs that were not trained but made to show others
_MADE = f"tags.`{KIND_TAG}` != ''"
_PARENT_TAG = "mlflow.parentRunId"
_NOW = "now."  # a parameter that changed (see mlflow_run)
_THREADS = 8
_PAGE = 1000  # runs a request

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ToldRun:
    """A run as MLflow knows it."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]  # their last values
    tags: dict[str, str]
    datasets: tuple[DatasetFacts, ...]
    started: float  # unix seconds

    @property
    def had_files(self) -> bool:
        """Whether MLflow was sent all of its files."""
        return FILES_TAG in self.tags


@dataclass(frozen=True)
class Family:
    """Runs that are shown below one parent, which has a name and figures of them all."""

    key: str  # the same for the same configuration
    name: str
    run_ids: Sequence[str]
    figures: Mapping[str, float]


class Experiment:
    """One experiment on one server."""

    def __init__(self, uri: str, name: str) -> None:
        """Looks for it. Raises RunError: there is no such server, database or experiment."""
        quiet_mlflow()
        self.name, self.address = name, masked(uri, uri)
        self._uri = absolute_uri(uri)
        _check_is_there(self._uri, self.address)
        with self._telling():
            self._client = MlflowClient(tracking_uri=self._uri)
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise RunError(f"{self.address}: has no experiment {name!r}; it has: {self._others()}")
        self._id = str(found.experiment_id)

    def runs(self) -> list[ToldRun]:
        """All that were trained, the oldest first. Raises RunError."""
        return [_told(run) for run in self._found("") if KIND_TAG not in run.data.tags]

    def histories(self, run_ids: Sequence[str], names: Sequence[str]) -> list[Histories]:
        """Of each run the values of some metrics at all steps. Raises RunError."""
        pairs = [(run_id, name) for run_id in run_ids for name in names]
        lists = iter(self._asked(lambda pair: self._history(*pair), pairs))
        return [{name: history for name in names if (history := next(lists))} for _ in run_ids]

    def has_files(self, run_ids: Sequence[str], folder: str) -> list[bool]:
        """Whether each run has artifacts in `folder`, as far as their store answers."""
        return self._asked(lambda run_id: self._has_files(run_id, folder), run_ids)

    def keep_report(self, name: str, texts: Mapping[str, str]) -> None:
        """Makes texts the artifacts of a run of that name, in place of its earlier ones. Raises RunError."""
        with self._telling():
            run_id = self._made_run("comparison", name, name, self._found(_MADE)).info.run_id
            for file, text in texts.items():
                self._client.log_text(run_id, text, file)
            self._client.set_terminated(run_id)

    def nest(self, families: Sequence[Family]) -> None:
        """Puts runs below a parent each, which shows the family's figures and none of before.

        Where runs hang already they stay, but below a parent of ours that was deleted. Raises RunError.
        """
        with self._telling():
            deleted = {run.info.run_id for run in self._found(_MADE, ViewType.DELETED_ONLY)}
            there = self._found("")
            parents = {run.info.run_id: run.data.tags.get(_PARENT_TAG) for run in there}
            free = {run_id for run_id, parent in parents.items() if parent is None or parent in deleted}
            for family in families:
                parent = self._made_run("seeds", family.key, family.name, there)
                self._nest(family, parent, free.intersection(family.run_ids))

    def _nest(self, family: Family, parent: Run, run_ids: Iterable[str]) -> None:
        now = milliseconds(time.time())
        figures = {plain_key(name): value for name, value in family.figures.items()}
        told = dict.fromkeys(parent.data.metrics, math.nan) | figures  # no metric can be taken back
        self._client.update_run(parent.info.run_id, name=family.name)
        self._client.log_batch(parent.info.run_id, [Metric(n, value, now, 0) for n, value in told.items()])
        for run_id in run_ids:
            self._client.set_tag(run_id, _PARENT_TAG, parent.info.run_id)
        self._client.set_terminated(parent.info.run_id)

    def _made_run(self, kind: str, key: str, name: str, there: Iterable[Run]) -> Run:
        """The run of that kind and key among those that are there, made if there is none."""
        mark = f"{kind} {key}"
        for run in there:
            if run.data.tags.get(KIND_TAG) == mark:
                return run
        return self._client.create_run(self._id, tags={KIND_TAG: mark}, run_name=name)

    def _found(self, query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        found: list[Run] = []
        token: str | None = None
        with self._telling():
            while True:
                page = self._client.search_runs(
                    [self._id],
                    query,
                    view,
                    max_results=_PAGE,
                    order_by=["attributes.start_time"],
                    page_token=token,
                )
                found += page
                token = page.token
                if not token:
                    return found

    def _has_files(self, run_id: str, folder: str) -> bool:
        try:
            return bool(self._client.list_artifacts(run_id, folder))
        except Exception:  # no password for it here, or only its server can reach it
            return True

    def _history(self, run_id: str, name: str) -> list[Point]:
        told = self._client.get_metric_history(run_id, name)
        return [Point(m.step, _number(m.value)) for m in sorted(told, key=lambda m: (m.step, m.timestamp))]

    def _asked(self, ask: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
        with self._telling(), ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(ask, items))

    def _others(self) -> str:
        with self._telling():
            names = [experiment.name for experiment in self._client.search_experiments()]
        return ", ".join(sorted(names)) or "none"

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever MLflow or its store raises becomes one line."""
        try:
            yield
        except PrefixError:
            raise
        except Exception as error:
            words = words_of(error, self._uri)
            raise RunError(f"{self.address}: MLflow does not answer: {words[:300]}") from None


def _check_is_there(uri: str, address: str) -> None:
    """MLflow would make a database, or a folder, that is not there."""
    scheme, _, place = uri.partition(":///") if uri.startswith("sqlite:") else ("", "", uri)
    is_local = bool(scheme) or ("://" not in uri and not uri.startswith(("databricks", "file:")))
    if is_local and not Path(place).exists():
        raise RunError(f"{address}: there is no such database; name run folders, or --uri")


def _told(run: Run) -> ToldRun:
    tags = dict(run.data.tags)
    changed = {name.removeprefix(_NOW): value for name, value in tags.items() if name.startswith(_NOW)}
    return ToldRun(
        run.info.run_id,
        run.info.run_name or run.info.run_id,
        run.info.status,
        dict(run.data.params) | changed,
        {name: _number(value) for name, value in run.data.metrics.items()},
        tags,
        tuple(_dataset(given) for given in (run.inputs.dataset_inputs if run.inputs else ())),
        (run.info.start_time or 0) / 1000,
    )


def _number(value: float) -> float:
    """A database of MLflow keeps the largest number where infinity was meant."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _dataset(given: DatasetInput) -> DatasetFacts:
    tags, dataset = {tag.key: tag.value for tag in given.tags}, given.dataset
    counts = {name: int(tags[name]) for name in DATA_COUNTS if tags.get(name, "").isdecimal()}
    context = tags.get("mlflow.data.context", "")
    return DatasetFacts(dataset.name, dataset.digest, context, dataset.source, **counts)
