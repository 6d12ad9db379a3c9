"""What a run came to, in a few numbers, and the histories that they are made of.

Whoever asks gets the same numbers: MLflow is told them at the end of a run as `summary/NAME`, so that its
table of runs can be sorted by them, and `compare` takes them from a run folder, or from MLflow's histories
where it was not told (a run that has not ended).

    valid_loss, valid_step       the lowest validation loss, and its step
    first_valid_loss             the first one; before step 1 it is that of the start: of the instruction, or
                                 (train.method: full) of the bare base
    train_loss, steps            of the last step that was logged
    train_seconds                mean seconds of a step times the number of steps: no loading, no validation
    tokens_per_second, mfu       medians
    peak_gib                     the most memory of a rank
    result_bytes                 files of the result

Knows nothing of MLflow or of how a run is trained.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefix_ds.tracking.metrics import Record

RESULTS = ("prefix", "model")  # folders of a run, one of which has what came of it
SOURCES = (
    "valid/loss",
    "train/loss",
    "time/step_seconds",
    "time/tokens_per_second",
    "time/mfu",
    "memory/peak_gib",
)


@dataclass(frozen=True)
class Point:
    """A value of one metric after `step`."""

    step: int
    value: float


Histories = dict[str, list[Point]]  # of each metric, in the order of steps


def histories_of(records: Iterable[Record]) -> Histories:
    """The metrics of a run one by one."""
    found: Histories = {}
    for record in records:
        for name, value in record.values.items():
            found.setdefault(name, []).append(Point(record.step, value))
    return found


def result_bytes(run: Path) -> int | None:
    """The size of what a run produced; None if nothing is there."""
    files = [path for name in RESULTS for path in (run / name).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) if files else None


def summary(histories: Histories, size: float | None) -> dict[str, float]:
    """The numbers by their names, without those that are not known; `size` is that of the result."""
    valid, last = _best(histories.get("valid/loss", [])), _last(histories.get("train/loss", []))
    steps = max((histories[name][-1].step for name in SOURCES if histories.get(name)), default=None)
    found = {
        "valid_loss": valid.value if valid else None,
        "valid_step": valid.step if valid else None,
        "first_valid_loss": _first(histories.get("valid/loss", [])),
        "train_loss": last.value if last else None,
        "steps": steps,
        "train_seconds": _seconds(_values(histories, "time/step_seconds"), last),
        "tokens_per_second": _median(_values(histories, "time/tokens_per_second")),
        "mfu": _median(_values(histories, "time/mfu")),
        "peak_gib": max(_values(histories, "memory/peak_gib"), default=None),
        "result_bytes": size,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _best(history: Sequence[Point]) -> Point | None:
    """The lowest; one that is no number only where there is no other."""
    numbers = [point for point in history if math.isfinite(point.value)]
    return min(numbers, key=lambda point: point.value) if numbers else _last(history)


def _first(history: Sequence[Point]) -> float | None:
    """The validation before the first step; a run that was given none has no such value."""
    return history[0].value if history and history[0].step == 0 else None


def _last(history: Sequence[Point]) -> Point | None:
    return history[-1] if history else None


def _values(histories: Mapping[str, Sequence[Point]], name: str) -> list[float]:
    return [point.value for point in histories.get(name, ()) if math.isfinite(point.value)]


def _seconds(seconds: Sequence[float], last: Point | None) -> float | None:
    return statistics.fmean(seconds) * last.step if seconds and last else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
