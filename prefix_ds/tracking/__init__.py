"""Where numbers go: JSON lines, MLflow, a progress bar."""

from prefix_ds.tracking.afterwards import add_metrics
from prefix_ds.tracking.evaluated import Told, tagged_evaluations, told_of
from prefix_ds.tracking.facts import (
    DatasetFacts,
    Facts,
    flattened,
    has_facts,
    process_tags,
    read_facts,
    without_secrets,
)
from prefix_ds.tracking.masking import masked
from prefix_ds.tracking.metrics import Record, read_metrics
from prefix_ds.tracking.models import log_model
from prefix_ds.tracking.progress import CONSOLE, Progress, progress_bar
from prefix_ds.tracking.state import resolved_uri
from prefix_ds.tracking.summary import (
    SOURCES,
    Histories,
    Point,
    best_by,
    histories_of,
    result_bytes,
    result_mark,
    summary,
    told_mark,
)
from prefix_ds.tracking.sync import sync_run
from prefix_ds.tracking.tracker import SilentTracker, Status, Tracker, open_tracker

__all__ = [
    "CONSOLE",
    "SOURCES",
    "DatasetFacts",
    "Facts",
    "Histories",
    "Point",
    "Progress",
    "Record",
    "SilentTracker",
    "Status",
    "Told",
    "Tracker",
    "add_metrics",
    "best_by",
    "flattened",
    "has_facts",
    "histories_of",
    "log_model",
    "masked",
    "open_tracker",
    "process_tags",
    "progress_bar",
    "read_facts",
    "read_metrics",
    "resolved_uri",
    "result_bytes",
    "result_mark",
    "summary",
    "sync_run",
    "tagged_evaluations",
    "told_mark",
    "told_of",
    "without_secrets",
]
