"""Numbers that are found when a run has ended: one more line of metrics.jsonl, and MLflow is told.

Whatever happens to MLflow, the line is there, and `prefix-ds sync` sends it; a mirror that is still following
the run takes it from the file. Knows nothing of what the numbers are.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from prefix_ds.errors import PrefixError
from prefix_ds.tracking.metrics import FILE, append_record
from prefix_ds.tracking.state import has_state
from prefix_ds.tracking.sync import sync_run

log = logging.getLogger(__name__)


def add_metrics(
    run: Path, step: int, values: Mapping[str, float], *, uri: str | None, is_mirrored: bool
) -> None:
    """Adds values to a run that has metrics, and to its counterpart in MLflow if there is one.

    Never raises; not `is_mirrored`, or a run that MLflow never had: metrics.jsonl only. `uri` None: the
    server that the run went to, without a password. Rank 0 calls this.
    """
    if not (run / FILE).exists():
        return
    try:
        append_record(run, step, values)
        if is_mirrored and has_state(run):
            sync_run(run, uri)
    except (PrefixError, OSError) as error:
        log.warning("MLflow has not got this evaluation: %s; `prefix-ds sync %s` sends it", error, run)
