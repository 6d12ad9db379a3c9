"""How far long work has come: a bar on a terminal, a log line now and then elsewhere.

The bar draws on `CONSOLE` (stderr); a log handler that writes to the same console (rich's `RichHandler`)
prints above the bar instead of through it.

Knows nothing of what the work is.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console

log = logging.getLogger(__name__)

CONSOLE = Console(stderr=True)


class Progress(Protocol):
    """Work in progress."""

    def at(self, done: float, **shown: float | str) -> None:
        """`done` of the total is done; `shown` are named values worth seeing, say loss."""
        ...


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, done: int = 0, is_visible: bool = True, log_every_seconds: float = 30
) -> Iterator[Progress]:
    """Shows the progress of the block. Every rank may call this; only where `is_visible` is it shown."""
    if not is_visible:
        yield _Silent()
    elif CONSOLE.is_terminal:
        with _columns() as bars:
            yield _Bar(bars, bars.add_task(title, total=total, completed=done, shown=""))
    else:
        yield _Lines(title, total, done, log_every_seconds)


class _Silent:
    def at(self, done: float, **shown: float | str) -> None:
        pass


class _Bar:
    def __init__(self, bars: rich_progress.Progress, task: rich_progress.TaskID) -> None:
        self._bars, self._task = bars, task

    def at(self, done: float, **shown: float | str) -> None:
        self._bars.update(self._task, completed=done, shown=_told(shown))


class _Lines:
    """At most one line every `log_every_seconds`, and one when the work is done."""

    def __init__(self, title: str, total: int, done: int, log_every_seconds: float) -> None:
        self._title, self._total, self._start = title, total, done
        self._every = log_every_seconds
        self._ended = False
        self._began = time.monotonic()
        self._told = self._began

    def at(self, done: float, **shown: float | str) -> None:
        now = time.monotonic()
        is_end = done >= self._total
        if self._ended or (not is_end and now - self._told < self._every):
            return
        self._ended = is_end
        self._told = now
        left = (now - self._began) / max(done - self._start, 1e-9) * (self._total - done)
        log.info("%s %d/%d  %s  %s left", self._title, done, self._total, _told(shown), _clock(left))


def _columns() -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[shown]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=CONSOLE,
        refresh_per_second=2,
    )


def _told(shown: dict[str, float | str]) -> str:
    words = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in shown.items()}
    return "  ".join(f"{name} {word}" for name, word in words.items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
