"""What a run came to, in a few numbers, and the histories that they are made of.

Whoever asks gets the same numbers: MLflow is told them at the end of a run as `summary/NAME`, so that its
table of runs can be sorted by them, and `compare` takes them from a run folder, or from MLflow's histories
where it was not told (a run that has not ended).

    valid_step                   of the result that is kept: the step of the lowest validation loss, or of the
                                 highest score that `evaluate.best_by` names
    valid_loss, valid_chrf       the validation loss and that score of this step
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
from prefix_ds.verdicts import Mark, prefix_mark

RESULTS = ("prefix", "model")  # folders of a run, one of which has what came of it
SOURCES = (
    "valid/loss",
    "train/loss",
    "time/step_seconds",
    "time/tokens_per_second",
    "time/mfu",
    "memory/peak_gib",
)


LOSS = "loss"  # what the best is best by, if nothing else is named


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
    sizes = [
        size for name in RESULTS for path in (run / name).rglob("*") if (size := _size(path)) is not None
    ]
    return sum(sizes) if sizes else None


def _size(path: Path) -> int | None:
    """Of a file that is finished; it may be renamed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() and not path.name.startswith(".") else None
    except FileNotFoundError:
        return None


def best_by(params: Mapping[str, str]) -> str:
    """What the best result of a run with these keys is best by: `loss`, or the name of a score."""
    return params.get("evaluate.best_by", LOSS)


def summary(histories: Histories, size: float | None, by: str) -> dict[str, float]:
    """The numbers by their names, without those that are not known; `size` is that of the result, `by` what
    the best is best by."""
    best, last = _best(histories, by), _last(histories.get("train/loss", []))
    steps = max((histories[name][-1].step for name in SOURCES if histories.get(name)), default=None)
    found = {
        **{
            f"valid_{name}": _at(histories.get(f"valid/{name}", []), best)
            for name in dict.fromkeys((LOSS, by))
        },
        "valid_step": best,
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


def result_mark(run: Path, numbers: Mapping[str, float]) -> Mark:
    """The mark of what a run folder holds: a prefix says it itself, of a model the summary tells the step."""
    return prefix_mark(run) or told_mark(numbers)


def told_mark(numbers: Mapping[str, float]) -> Mark:
    """The mark of a result as far as a run's summary tells it; without validation it is that of the end."""
    step = numbers.get("valid_step", numbers.get("steps"))
    return Mark(None if step is None or not math.isfinite(step) else int(step))


def _best(histories: Histories, by: str) -> int | None:
    """The step of the lowest loss or the highest score, the first of equals; one that is no number only where
    there is no other."""
    history = histories.get(f"valid/{by}", [])
    numbers = [point for point in history if math.isfinite(point.value)]
    if not numbers:
        return history[-1].step if history else None
    sign = 1 if by == LOSS else -1
    return min(numbers, key=lambda point: sign * point.value).step


def _at(history: Sequence[Point], step: int | None) -> float | None:
    return next((point.value for point in reversed(history) if point.step == step), None)


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
