"""What a user sees of a mistake: one line, exit code 2, nothing half-written."""

import re
from pathlib import Path

from prefix_ds.errors import EXIT_USER
from tests.ranks import command

CONFIGURATION = {"run.yaml", "deepspeed.json", ".lock"}  # all that a start that failed may leave


def refusal(*words, size=1, run=None, after_log=False, before=None):
    """The line that ends `prefix-ds WORDS`, without its `error: `; from rank 0 alone.

    `run` is the folder that must not hold more than a configuration. With `after_log` other lines may come
    before it.
    """
    first, *others = command(*words, size=size, before=before)
    assert (first.code, [o.code for o in others]) == (EXIT_USER, [EXIT_USER] * (size - 1)), first.err
    assert not any(other.err for other in others), "said twice"
    *log, line = first.err.splitlines() or [""]
    assert line.startswith("error: "), first.err
    assert after_log or not log, first.err
    assert "Traceback" not in first.err
    assert not re.search(r"%\||it/s|examples/s", first.err), "a progress bar in a log"
    if run is not None:
        assert contents(run) <= CONFIGURATION
    return line.removeprefix("error: ")


def contents(folder):
    return {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()
