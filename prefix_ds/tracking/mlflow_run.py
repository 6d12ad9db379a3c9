"""A run folder's counterpart in MLflow: made or found again, and told what it has not got yet.

Everything may be repeated: metrics go by what the server confirmed (`state`), the run itself is found by its
uid before one is made, files go when they changed. So a timeout, a killed mirror or a lost server costs a
repetition, never a duplicate.

Errors of the server pass through; what is refused for good (a value the server will not take) is told and
left out, since it would hold up everything behind it.

Knows nothing of processes or retries.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from prefix_ds.tracking.evaluated import evaluation_tags
from prefix_ds.tracking.facts import cut, read_facts
from prefix_ds.tracking.masking import masked
from prefix_ds.tracking.metrics import FILE as METRICS_FILE
from prefix_ds.tracking.metrics import MetricsReader, Record, read_metrics
from prefix_ds.tracking.mlflow_terms import (
    FILES_TAG,
    METRICS_A_REQUEST,
    PARAMETER_LENGTH,
    TAG_LENGTH,
    dataset_input,
    is_refusal,
    live_run,
    milliseconds,
    plain_key,
)
from prefix_ds.tracking.state import read_state, write_state
from prefix_ds.tracking.summary import best_by, histories_of, result_bytes, summary

log = logging.getLogger(__name__)

UID_TAG = "prefix_ds.uid"
_TEXTS = ("run.yaml", "deepspeed.json", "facts.json", METRICS_FILE)  # sent masked


class MlflowRun:
    """One run on one server."""

    def __init__(self, run: Path, uri: str) -> None:
        """Asks the server nothing yet. Raises RunError if this is not a run folder."""
        self._folder, self._uri = run, uri
        self._facts = read_facts(run)
        self._client = MlflowClient(tracking_uri=uri)
        self._state = read_state(run)
        self._reader = MetricsReader(run)
        self._unsent: list[Record] = []
        self._is_open = False

    @property
    def run_id(self) -> str:
        """MLflow's name of the run; empty before `open`."""
        return self._state.run_id

    @property
    def address(self) -> str:
        """Where to look at the run: a page of the server, or the database's URI."""
        state = self._state
        page = f"#/experiments/{state.experiment_id}/runs/{state.run_id}"
        return f"{state.uri.rstrip('/')}/{page}" if state.uri.startswith("http") else state.uri

    def open(self) -> None:
        """Finds the run on the server or makes it, and tells it what it is. Does nothing when open."""
        if self._is_open:
            return
        self._state.uri = masked(self._uri, self._uri)
        self._save()
        found = self._known_run() or self._run_of_uid()
        if found is None or found.info.run_id != self._state.run_id:
            self._forget()
        found = found or self._new_run()
        self._state.run_id, self._state.experiment_id = found.info.run_id, found.info.experiment_id
        self._save()
        self._describe(found)
        self._is_open = True

    def num_waiting(self) -> int:
        """Records that have something the server has not confirmed."""
        self._unsent += [r for r in self._reader.new_records() if self._not_sent([r])]
        return len(self._unsent)

    def send_metrics(self) -> Iterator[int]:
        """Sends what is new in metrics.jsonl; yields the number of records after each confirmed request."""
        self.num_waiting()
        while self._unsent:
            records = self._unsent[:METRICS_A_REQUEST]
            metrics = self._not_sent(records)
            for first in range(0, len(metrics), METRICS_A_REQUEST):
                self._send(metrics[first : first + METRICS_A_REQUEST])
            self._save()
            del self._unsent[: len(records)]
            yield len(records)

    def send_summary(self) -> None:
        """Sends what the run came to, so that MLflow's table of runs can be sorted by it; and of its
        evaluations, what they were of."""
        self._tell_tags(evaluation_tags(self._folder))
        records = read_metrics(self._folder)
        if not records:
            return
        by = best_by(self._facts.params)
        values = summary(histories_of(records), result_bytes(self._folder), by)
        named = {f"summary/{name}": value for name, value in values.items()}
        step = max(record.step for record in records)  # an evaluation may be of an earlier one
        if metrics := self._not_sent([Record(step, time.time(), named)]):
            self._send(metrics)
            self._save()

    def send_sample(self, values: dict[str, float]) -> None:
        """Sends one sample of the machine's state. Not repeated when it fails."""
        step, now = self._state.system_samples, milliseconds(time.time())
        metrics = [Metric(plain_key(f"system/{name}"), float(v), now, step) for name, v in values.items()]
        self._client.log_batch(self.run_id, metrics)
        self._state.system_samples += 1

    def send_files(self, is_last: bool) -> None:
        """Sends the files that changed: those of the prefix, and at the end metrics.jsonl too."""
        prefix = self._folder / "prefix"
        files = [self._folder / name for name in _TEXTS if is_last or name != METRICS_FILE]
        files += sorted(p for p in prefix.glob("*") if not p.name.startswith(".") and p.is_file())
        for path in filter(Path.is_file, files):
            name = path.relative_to(self._folder).as_posix()
            facts = path.stat()
            version = [facts.st_size, facts.st_mtime_ns]
            if self._state.files.get(name) != version:
                self._send_file(path, name)
                self._state.files[name] = version
                self._save()
        if is_last:
            self._tell_tags({FILES_TAG: "sent"})

    def send_status(self, otherwise: str) -> None:
        """Tells the server how the run ended: as its facts say, or `otherwise` if they do not."""
        facts = read_facts(self._folder)
        ended = facts.ended or (self._folder / METRICS_FILE).stat().st_mtime
        self._client.set_terminated(self.run_id, facts.status or otherwise, milliseconds(ended))

    def _known_run(self) -> Run | None:
        if not self._state.run_id:
            return None
        found = live_run(self._client, self._state.run_id)
        if found is None:
            log.warning("MLflow no longer has the run %s: making a new one", self._state.run_id)
        return found

    def _run_of_uid(self) -> Run | None:
        """The run that an earlier request made without our hearing of it."""
        experiment = self._client.get_experiment_by_name(self._facts.experiment)
        if experiment is None:
            return None
        query = f"tags.`{UID_TAG}` = '{self._facts.uid}'"
        found = self._client.search_runs([experiment.experiment_id], query, max_results=1)
        return found[0] if found else None

    def _new_run(self) -> Run:
        facts = self._facts
        tags = {UID_TAG: facts.uid}
        return self._client.create_run(
            self._experiment_id(), milliseconds(facts.started), tags, run_name=facts.name
        )

    def _experiment_id(self) -> str:
        name = self._facts.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name))
        if found.lifecycle_stage != "active":
            log.warning("the experiment %s was deleted in MLflow: bringing it back", name)
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _describe(self, found: Run) -> None:
        """Parameters cannot change in MLflow: those that did since the run began become tags."""
        told = found.data.params
        wanted = {plain_key(name): cut(value, PARAMETER_LENGTH) for name, value in self._facts.params.items()}
        new = [Param(name, value) for name, value in wanted.items() if name not in told]
        tags = found.data.tags
        changed = {
            tag: value
            for name, value in wanted.items()
            if name in told and tags.get(tag := f"now.{name}", told[name]) != value
        }
        self._tell("parameters", params=new)
        self._tell_tags(self._facts.tags | changed)
        if self._facts.datasets and not found.inputs.dataset_inputs:
            self._tell("data sets", datasets=[dataset_input(d) for d in self._facts.datasets])
        if found.info.status != "RUNNING":  # it goes on
            self._client.update_run(self.run_id, status="RUNNING")

    def _tell_tags(self, tags: Mapping[str, str]) -> None:
        self._tell("tags", tags=[RunTag(plain_key(n), cut(value, TAG_LENGTH)) for n, value in tags.items()])

    def _tell(
        self, what: str, datasets: Sequence[DatasetInput] = (), **batch: Sequence[Param | RunTag]
    ) -> None:
        try:
            if datasets:
                self._client.log_inputs(self.run_id, datasets)
            else:
                self._client.log_batch(self.run_id, **batch)
        except Exception as error:
            if not is_refusal(error):
                raise
            log.warning("MLflow refuses the %s of this run: %s", what, error)

    def _not_sent(self, records: Iterable[Record]) -> list[Metric]:
        """The values of records that the server has not confirmed."""
        return [
            Metric(name, float(value), milliseconds(record.time), record.step)
            for record in records
            for name, value in record.values.items()
            if self._state.is_news(name, record.step, milliseconds(record.time), float(value))
        ]

    def _send(self, metrics: Sequence[Metric]) -> None:
        plain = [Metric(plain_key(m.key), m.value, m.timestamp, m.step) for m in metrics]
        try:
            self._client.log_batch(self.run_id, plain)
        except Exception as error:
            if not is_refusal(error):
                raise
            if live_run(self._client, self.run_id) is None:
                self._is_open = False  # deleted meanwhile: `open` makes another
                self._forget()
                raise
            self._send_one_by_one(plain)
        for m in metrics:
            self._state.confirm(m.key, m.step, m.timestamp, m.value)

    def _send_one_by_one(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            try:
                self._client.log_batch(self.run_id, [metric])
            except Exception as error:
                if not is_refusal(error):
                    raise
                log.warning("MLflow refuses %s of step %d: %s", metric.key, metric.step, error)

    def _send_file(self, path: Path, name: str) -> None:
        folder, _, _ = name.rpartition("/")
        if folder:
            self._client.log_artifact(self.run_id, str(path), folder)
        else:
            text = path.read_text(encoding="utf-8", errors="replace")
            self._client.log_text(self.run_id, masked(text, self._uri), name)

    def _forget(self) -> None:
        """Another server or a new run: everything is to be sent again."""
        self._state.run_id = ""
        self._state.sent, self._state.files = {}, {}
        self._state.system_samples = 0
        self._reader.rewind()
        self._unsent.clear()

    def _save(self) -> None:
        write_state(self._folder, self._state)
