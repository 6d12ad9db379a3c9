"""Where numbers go: JSON lines, MLflow, a progress bar."""

from prefix_ds.tracking.afterwards import add_metrics
from prefix_ds.tracking.facts import DatasetFacts, Facts, flattened, process_tags, without_secrets
from prefix_ds.tracking.masking import masked
from prefix_ds.tracking.metrics import Record, read_metrics
from prefix_ds.tracking.progress import CONSOLE, Progress, progress_bar
from prefix_ds.tracking.sync import sync_run
from prefix_ds.tracking.tracker import SilentTracker, Status, Tracker, open_tracker

__all__ = [
    "CONSOLE",
    "DatasetFacts",
    "Facts",
    "Progress",
    "Record",
    "SilentTracker",
    "Status",
    "Tracker",
    "add_metrics",
    "flattened",
    "masked",
    "open_tracker",
    "process_tags",
    "progress_bar",
    "read_metrics",
    "sync_run",
    "without_secrets",
]
