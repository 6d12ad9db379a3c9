"""What the training loop tells its numbers to: metrics.jsonl at once, MLflow through a process of its own.

The mirror (`prefix_ds.tracking.mirror`) follows metrics.jsonl and speaks to the server, so that a server that
hangs or dies blocks that process and never this one. A thread with a queue was rejected: MLflow's client
holds the interpreter's lock while it packs requests, and a process that ends must wait for its threads.

The mirror is told the URI through its stdin, where neither `ps` nor a file shows it, and learns from the end
of stdin that this process is gone, even when killed.

Knows nothing of training, and of MLflow only that a mirror exists.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Protocol, Self

from prefix_ds.dist import environment_with
from prefix_ds.errors import RunError, Stopped
from prefix_ds.tracking.facts import Facts, write_end, write_facts
from prefix_ds.tracking.masking import masked
from prefix_ds.tracking.metrics import Metrics
from prefix_ds.tracking.state import absolute_uri

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "KILLED", "FAILED"]  # MLflow's words

# A request that hangs is given up some day; a large file may take its time.
_FINITE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_START_SECONDS = 90.0  # the longest that a mirror may take to import MLflow and to make a database
_SILENT = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


class Tracker(Protocol):
    """Takes the numbers of a run. As a context manager it closes with the status that fits the exception."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records values after an optimizer step. For one name the steps must grow."""
        ...

    def close(self, status: Status) -> None:
        """Ends the run; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_tracker(
    run: Path,
    facts: Facts,
    *,
    uri: str | None,
    resume_step: int | None,
    is_first: bool = True,
    patience_seconds: float = 15,
) -> Tracker:
    """The tracker of a run: a silent one where not `is_first`. Raises RunError.

    `uri` is MLflow's, None for metrics.jsonl alone. `resume_step` is the step of the checkpoint the run goes
    on from, None for a run from the start, which becomes a new run in MLflow too. At its end the tracker
    waits at most `patience_seconds` for MLflow, once the mirror has started.
    """
    if not is_first:
        return SilentTracker()
    write_facts(run, facts, goes_on=resume_step is not None)
    metrics = Metrics(run, resume_step)
    mirror = _started_mirror(run, uri, resume_step is None, patience_seconds) if uri else None
    return RunTracker(run, metrics, mirror)


class SilentTracker:
    """The tracker of all ranks but the first."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self, status: Status) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        """The tracker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does nothing."""


class RunTracker:
    """The tracker of the first rank."""

    def __init__(self, run: Path, metrics: Metrics, mirror: "MirrorProcess | None") -> None:
        """Made by `open_tracker`."""
        self._run, self._metrics, self._mirror = run, metrics, mirror
        self._is_open = True

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line. A full disk costs the line, not the run: the next checkpoint tells all ranks."""
        try:
            self._metrics.write(step, values)
        except RunError as error:
            log.error("%s", error)

    def close(self, status: Status) -> None:
        """Ends the run and gives the mirror a last few seconds."""
        if not self._is_open:
            return
        self._is_open = False
        self._metrics.close()
        try:
            write_end(self._run, status)
        except RunError as error:
            log.error("%s", error)
        if self._mirror is not None:
            self._mirror.end(status)

    def __enter__(self) -> Self:
        """The tracker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes: KILLED after a request to stop, FAILED after any other exception."""
        self.close("FINISHED" if error is None else "KILLED" if isinstance(error, Stopped) else "FAILED")


class MirrorProcess:
    """The mirror, seen from the trainer."""

    def __init__(self, process: "subprocess.Popen[str]", run: Path, patience_seconds: float) -> None:
        """Takes over a started process."""
        self._process, self._run, self._patience = process, run, patience_seconds
        assert process.stdout is not None
        threading.Thread(target=_relay, args=(process.stdout,), daemon=True, name="mirror's words").start()

    def tell(self, message: Mapping[str, object]) -> None:
        """One line to the mirror's stdin; a dead mirror is no error."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def end(self, status: Status) -> None:
        """Says how the run ended, waits for the mirror as long as its patience lasts, then stops it."""
        assert self._process.stdin is not None
        self.tell({"status": status})
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(_START_SECONDS + self._patience + 2)  # it gives up by itself
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code != 0:
            log.warning("MLflow has not got everything; `prefix-ds sync %s` sends the rest", self._run)


def _started_mirror(run: Path, uri: str, is_new: bool, patience_seconds: float) -> MirrorProcess | None:
    path = os.pathsep.join(p for p in sys.path if p)  # it must find what this process found
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefix_ds.tracking.mirror", str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment_with(PYTHONPATH=path, **_FINITE, **_SILENT),
        )
    except OSError as error:
        log.warning("MLflow gets nothing for now: its mirror cannot be started: %s", error)
        return None
    mirror = MirrorProcess(process, run, patience_seconds)
    limits = {"start_seconds": _START_SECONDS, "patience_seconds": patience_seconds}
    mirror.tell({"uri": absolute_uri(uri), "is_new": is_new, **limits})
    return mirror


def _relay(lines: IO[str]) -> None:
    """Logs what the mirror says, until it ends."""
    for line in lines:
        level, _, words = line.rstrip().partition(" ")
        known = logging.getLevelNamesMapping().get(level)
        log.log(known or logging.WARNING, "%s", masked(words if known else line.rstrip()))
