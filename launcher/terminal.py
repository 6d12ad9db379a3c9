"""Lines on their way to a terminal or a pipe, which may stop reading: Ctrl-S, a `less` that nobody scrolls.

A thread writes them, so that whoever has lines to show never waits for the reader: the launcher has beats to
send. Lines of ranks wait for a slow reader a little, and are left out, and counted, when it has stopped: they
are in the ranks' files too. What the launcher says itself is never left out.

Knows nothing of ranks.
"""

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from typing import IO, Self

_MOST_WAITING = 1000  # lines
_PATIENCE_SECONDS = 1.0  # with a reader that is slow


class Terminal:
    """Standard output and error, in one order, from `with` to its end, which waits for the reader."""

    def __init__(self) -> None:
        self._lines: queue.Queue[tuple[IO[str], str] | None] = queue.Queue()
        self._has_stopped = False  # the reader
        self._num_left_out = 0
        self._thread = threading.Thread(target=self._write_all, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._tell_left_out()
        self._lines.put(None)
        self._thread.join()

    async def show(self, line: str) -> None:
        """A line of a rank, to standard output."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._is_full() and not self._has_stopped:
            self._has_stopped = time.monotonic() > deadline
            await asyncio.sleep(0.01)
        self._has_stopped = self._is_full()
        if self._has_stopped:
            self._num_left_out += 1
        else:
            self._tell_left_out()
            self._lines.put((sys.stdout, line))

    def say(self, line: str) -> None:
        """A line of the launcher's own, to standard error."""
        self._tell_left_out()
        self._lines.put((sys.stderr, line))

    def _is_full(self) -> bool:
        return self._lines.qsize() >= _MOST_WAITING

    def _tell_left_out(self) -> None:
        if self._num_left_out:
            self._lines.put((sys.stderr, f"{self._num_left_out} lines left out here; the logs have them"))
        self._num_left_out = 0

    def _write_all(self) -> None:
        while (item := self._lines.get()) is not None:
            with contextlib.suppress(UnicodeEncodeError):  # of a letter that the reader has no code for
                _write(*item)


def _write(stream: IO[str], line: str) -> None:
    """Where the reader is gone, it and all that follows goes nowhere, and the job goes on."""
    try:
        stream.write(line + "\n")
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
