"""The metrics of a run as JSON lines: `metrics.jsonl`, the copy that is always written.

One object a line: {"step": 10, "time": 1730000000.1, "train/loss": 2.31}. NaN and Infinity are written as
Python's json does. Each line is handed to the system at once, so a killed process loses none. A run that goes
on from a checkpoint drops the lines of later steps, which it will write again, and the torn last line a
power cut may have left.

The file is also the spool of the mirror to MLflow, which reads it from another process with `MetricsReader`.

Knows nothing of MLflow.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefix_ds.errors import RunError
from prefix_ds.files import telling_disk_errors, write_text_atomically

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Record:
    """One line: the values after `step`, written at `time` (unix seconds)."""

    step: int
    time: float
    values: dict[str, float]


class Metrics:
    """Appends records to a run's file."""

    def __init__(self, run: Path, resume_step: int | None) -> None:
        """Keeps the records up to `resume_step`; none if that is None. Raises RunError."""
        self._path = run / FILE
        kept = [] if resume_step is None else [r for r in read_metrics(run) if r.step <= resume_step]
        write_text_atomically(self._path, "".join(map(_line, kept)))
        with telling_disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record. Raises RunError if the disk is full."""
        with telling_disk_errors(self._path):
            self._file.write(_line(Record(step, time.time(), dict(values))))
            self._file.flush()

    def close(self) -> None:
        """Ends the writing. What a full disk refused before is given up."""
        with contextlib.suppress(OSError):
            self._file.close()


class MetricsReader:
    """Reads a run's records as they are written, maybe by another process."""

    def __init__(self, run: Path) -> None:
        """The file need not exist yet."""
        self._path = run / FILE
        self._offset = 0  # bytes

    def new_records(self) -> list[Record]:
        """The complete records written since the last call. Raises RunError."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self._path}: cannot be read: {error.strerror}") from error
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [r for line in whole.splitlines() if (r := _record(line, self._path)) is not None]

    def rewind(self) -> None:
        """The next call starts from the first record again."""
        self._offset = 0


def append_record(run: Path, step: int, values: Mapping[str, float]) -> None:
    """Adds one record behind those of a run, whoever else is writing. Raises RunError."""
    path = run / FILE
    with telling_disk_errors(path), path.open("a+b") as file:
        end = "" if _ends_whole(file) else "\n"
        file.write((end + _line(Record(step, time.time(), dict(values)))).encode())


def _ends_whole(file: BinaryIO) -> bool:
    """Whether the last line does; a full disk or a power cut may have left half of one."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_metrics(run: Path) -> list[Record]:
    """All complete records of a run; none if there is no file."""
    return MetricsReader(run).new_records()


def _line(record: Record) -> str:
    return json.dumps({"step": record.step, "time": record.time, **record.values}) + "\n"


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError
    return value


def _record(line: bytes, path: Path) -> Record | None:
    try:
        values = json.loads(line)
        step, moment = int(values.pop("step")), float(values.pop("time"))
        return Record(step, moment, {name: _number(value) for name, value in values.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s: skipping a damaged line: %.60r", path, line)
        return None
