"""The process that copies a run's metrics to MLflow: `python -m prefix_ds.tracking.mirror RUN`.

Started by the tracker, it follows metrics.jsonl and tells the server what is new, once a second. A server
that is away is asked again after 1, 2, 4 .. 60 seconds, and told everything when it is back. The process
ignores the signals that stop a job, since it still has to tell how the job ended, and never outlives the
trainer by more than its patience: a thread of its own sees to that, whatever a hanging request does. Patience
begins when this process is ready to ask: on a busy machine a short run is over before MLflow is imported.

The trainer's end is the end of stdin, or another parent process (a forked worker may hold stdin open). The
status is what the trainer said before; FAILED if it said nothing, as when it was killed.

Knows nothing of training.
"""

import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_ds.tracking.masking import masked
from prefix_ds.tracking.state import forget_state, only_writer

if TYPE_CHECKING:
    from prefix_ds.tracking.machine import Machine
    from prefix_ds.tracking.mlflow_run import MlflowRun

log = logging.getLogger("prefix_ds.tracking.mirror")

_POLL_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_FILES_SECONDS = 60.0
_INCOMPLETE = 1  # exit code
_LONGEST_LINE = 300  # characters of what is told


class Trainer:
    """The process at the other end of stdin."""

    def __init__(self) -> None:
        """Reads the first line, which says what to do."""
        self._parent = os.getppid()
        self._buffer = b""
        self.wishes: dict[str, Any] = json.loads(self._line() or "{}")
        self.status = "FAILED"
        self.has_ended = threading.Event()

    def watch(self) -> None:
        """Returns when the trainer has ended."""
        while (line := self._line()) is not None:
            self.status = json.loads(line).get("status", self.status)
        self.has_ended.set()

    def _line(self) -> str | None:
        """The next line from stdin; None when there will be none."""
        while b"\n" not in self._buffer:
            if select.select([0], [], [], 0.5)[0]:
                new = os.read(0, 4096)
                if not new:
                    return None
                self._buffer += new
            elif os.getppid() != self._parent:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


class Mirror:
    """Follows one run until its trainer ends."""

    def __init__(self, run: "MlflowRun", machine: "Machine", trainer: Trainer) -> None:
        """Asks the server nothing yet."""
        self._run, self._machine, self._trainer = run, machine, trainer
        self._failures = 0
        self._told_run = ""
        self._files_failed = False
        self.has_all = False  # the server has everything
        self._next_files = 0.0

    def follow(self) -> None:
        """Returns when the trainer has ended and the server knows how."""
        while not self._trainer.has_ended.is_set():
            self._trainer.has_ended.wait(self._try(self._catch_up))
        while True:
            self._try(self._finish)
            if not self._failures:
                return
            time.sleep(_POLL_SECONDS)

    def _try(self, work: Callable[[], None]) -> float:
        """Does `work`; the seconds to wait after it. Tells when the server goes and when it comes back."""
        try:
            work()
        except Exception as error:  # whatever it is, training goes on and this is tried again
            if not self._failures:
                log.warning("MLflow does not take the metrics, which are kept: %s", _said(error))
            self._failures += 1
            return min(_LONGEST_WAIT_SECONDS, _POLL_SECONDS * 2.0 ** min(self._failures - 1, 10))
        if self._failures:
            log.warning("MLflow is back")
        self._failures = 0
        return _POLL_SECONDS

    def _catch_up(self) -> None:
        self._open()
        for _ in self._run.send_metrics():
            if self._trainer.has_ended.is_set():
                return
        if sample := self._machine.sample():
            self._run.send_sample(sample)
        if time.monotonic() >= self._next_files:
            self._next_files = time.monotonic() + _FILES_SECONDS
            self._send_files(is_last=False)

    def _open(self) -> None:
        self._run.open()
        if self._run.run_id != self._told_run:
            log.info("MLflow: %s", self._run.address)
        self._told_run = self._run.run_id

    def _finish(self) -> None:
        self._open()
        for _ in self._run.send_metrics():
            pass
        self._run.send_summary()
        self._run.send_status(self._trainer.status)
        self.has_all = self._send_files(is_last=True)

    def _send_files(self, is_last: bool) -> bool:
        """A store for files that fails, as one without a password here, keeps no metric waiting."""
        try:
            self._run.send_files(is_last)
        except Exception as error:
            if not self._files_failed:
                log.warning("MLflow takes no files: %s", _said(error))
            self._files_failed = True
            return False
        return True


def main() -> int:
    """The process. Exit code 0 if MLflow has everything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # training comes first, where it uses every core; at 19 the mirror would never get on
    run, trainer = Path(sys.argv[1]), Trainer()
    if "uri" not in trainer.wishes:
        return _INCOMPLETE
    uri, patience = trainer.wishes["uri"], trainer.wishes["patience_seconds"]
    _log_to_stdout(uri)
    is_ready = threading.Event()
    limits = (trainer, is_ready, trainer.wishes["start_seconds"], patience)
    threading.Thread(target=_end_in_time, args=limits, daemon=True).start()
    try:
        with only_writer(run, patience_seconds=patience + 10):  # a killed trainer's mirror may still be there
            if trainer.wishes["is_new"]:
                forget_state(run)
            has_all = _follow(run, uri, trainer, is_ready)
    except Exception as error:
        log.error("MLflow gets nothing more: %s", _said(error))
        return _INCOMPLETE
    return 0 if has_all else _INCOMPLETE


def _follow(run: Path, uri: str, trainer: Trainer, is_ready: threading.Event) -> bool:
    from prefix_ds.tracking.machine import Machine
    from prefix_ds.tracking.mlflow_run import MlflowRun
    from prefix_ds.tracking.mlflow_terms import quiet_mlflow

    quiet_mlflow()
    mirror = Mirror(MlflowRun(run, uri), Machine(uri), trainer)  # a new database has been made by now
    is_ready.set()
    mirror.follow()
    return mirror.has_all


def _end_in_time(
    trainer: Trainer, is_ready: threading.Event, start_seconds: float, patience_seconds: float
) -> None:
    """Ends this process `patience_seconds` after the trainer, or after it is ready if that is later."""
    trainer.watch()
    is_ready.wait(start_seconds)
    time.sleep(patience_seconds)
    os._exit(_INCOMPLETE)


class _MaskingFormatter(logging.Formatter):
    def __init__(self, uri: str) -> None:
        super().__init__("%(levelname)s %(message)s")
        self._uri = uri

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record), self._uri)[:_LONGEST_LINE]


def _log_to_stdout(uri: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_MaskingFormatter(uri))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.raiseExceptions = False  # nobody may be reading any more


def _said(error: Exception) -> str:
    """On one line, in full: it is cut when it has been masked, as half a token is no longer known for one."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
