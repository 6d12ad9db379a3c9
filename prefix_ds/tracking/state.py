"""What MLflow has of a run: `RUN/mlflow.json`.

For every metric the last step the server has confirmed, with its time and value. A run that goes on from a
checkpoint writes some steps again, with the same values to the last bit; they are not sent twice, since
MLflow would show both. (After a change that alters the numbers, say another micro-batch size, MLflow keeps
the first version of those steps, metrics.jsonl the last.) Only the last step may be said again with another
value: a second evaluation of the same prefix.

One process at a time writes the file: the holder of `only_writer`.

Knows nothing of MLflow's client.
"""

import contextlib
import fcntl
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefix_ds.errors import RunError
from prefix_ds.files import telling_disk_errors, write_text_atomically

_FILE = "mlflow.json"
_SQLITE = "sqlite:///"


@dataclass
class State:
    """Which run on which server, and what it has got."""

    uri: str = ""  # without credentials
    experiment_id: str = ""
    run_id: str = ""
    sent: dict[str, list[float]] = field(default_factory=dict)  # metric: last step, its time and value
    files: dict[str, list[int]] = field(default_factory=dict)  # path in the run folder: size, mtime in ns
    system_samples: int = 0

    def is_news(self, name: str, step: int, milliseconds: int, value: float) -> bool:
        """Whether the server has not confirmed this value."""
        last_step, last_milliseconds, last_value = self.sent.get(name, (-1, 0, 0.0))
        if step != last_step:
            return step > last_step
        is_other = value != last_value and not (math.isnan(value) and math.isnan(last_value))
        return is_other and milliseconds > last_milliseconds

    def confirm(self, name: str, step: int, milliseconds: int, value: float) -> None:
        """The server has it."""
        self.sent[name] = [step, milliseconds, value]


def has_state(run: Path) -> bool:
    """Whether MLflow was ever told of a run."""
    return (run / _FILE).exists()


def read_state(run: Path) -> State:
    """The state of a run; an empty one if there is none, or none that can be read."""
    try:
        return State(**json.loads((run / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return State()


def write_state(run: Path, state: State) -> None:
    """Keeps the state. Raises RunError."""
    write_text_atomically(run / _FILE, json.dumps(asdict(state), indent=1) + "\n")


def forget_state(run: Path) -> None:
    """The run starts anew, and so will be a new one on the server."""
    (run / _FILE).unlink(missing_ok=True)


def resolved_uri(uri: str | None, run: Path) -> str:
    """The URI to use: a database path that is relative means the folder the run was started in.

    None means the server the run went to before. Raises RunError if there was none.
    """
    known = read_state(run).uri
    if uri is None and not known:
        raise RunError(f"{run}: has no mlflow.json that names a server; give its URI (--uri)")
    if uri is None or (_is_relative(uri) and known.startswith(_SQLITE)):
        return known
    return absolute_uri(uri)


def absolute_uri(uri: str) -> str:
    """The URI with a relative database path taken from the working directory."""
    return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}" if _is_relative(uri) else uri


def _is_relative(uri: str) -> bool:
    return uri.startswith(_SQLITE) and not uri.startswith((f"{_SQLITE}/", f"{_SQLITE}:memory:"))


@contextlib.contextmanager
def only_writer(run: Path, patience_seconds: float) -> Iterator[None]:
    """Makes this process the only one that sends this run. Raises RunError if another stays too long."""
    deadline = time.monotonic() + patience_seconds
    with telling_disk_errors(run):
        file = (run / ".mlflow.lock").open("w")
    with file:
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise RunError(f"{run}: another process is sending this run to MLflow; wait for its end")
            time.sleep(0.2)
        yield


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks: go on without
        return True
    return True
