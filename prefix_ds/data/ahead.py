"""The shares of the next steps, made by a thread while the device computes.

Order, packing, reading ids and collating are milliseconds of Python a step, and a copy to a GPU out of
ordinary memory makes the host wait. A thread does all of it a few steps ahead. For a GPU it copies out of
pinned memory, on a stream of its own, and hands a share on when it has arrived.

What is handed on is what `make` gives for its number, in whatever order it is asked for; an error in the
thread is raised where its share is asked for. Nothing is remembered that a checkpoint would need.

The thread pauses before each share, unless somebody waits for it. When a share has been taken, the step is
about to begin, and the two would fight for the interpreter's lock; a moment later the device is busy.

Knows nothing of what is in a share, or of when it is used.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from prefix_ds.data.batch import Share

_AHEAD = 3  # shares
_PAUSE_SECONDS = 0.02


class Ahead:
    """Shares by number, the next ones under way. A context manager: at its end the thread is gone."""

    def __init__(self, make: Callable[[int], Share], num_steps: int, device: torch.device) -> None:
        """`make` gives share 0 <= n < num_steps; it is only ever called in the thread, one at a time."""
        self.num_steps = num_steps
        self._make, self._placed = make, _Copies(device) if device.type == "cuda" else _as_it_is
        self._thread = _thread(device)
        self._coming: dict[int, Future[Share]] = {}
        self._hurry = threading.Event()  # set while a share is waited for

    def share(self, step: int) -> Share:
        """The share of a step, on the device. Waits for it, and raises what `make` raised."""
        asked = self._under_way(step)
        if not asked.done():
            self._hurry.set()
        share = asked.result()
        self._hurry.clear()
        end = min(step + 1 + _AHEAD, self.num_steps)
        self._coming = {n: self._under_way(n) for n in range(step + 1, end)}
        return share

    def __iter__(self) -> Iterator[Share]:
        """All shares in turn."""
        return map(self.share, range(self.num_steps))

    def __enter__(self) -> Self:
        """Itself; the thread begins with the first question."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, which finishes the share it is at."""
        self._hurry.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _under_way(self, step: int) -> Future[Share]:
        return self._coming.get(step) or self._thread.submit(self._made, step)

    def _made(self, step: int) -> Share:
        """In the thread."""
        self._hurry.wait(_PAUSE_SECONDS)
        return self._placed(self._make(step))


def _thread(device: torch.device) -> ThreadPoolExecutor:
    """A thread that works with this device: by itself it would begin with the first GPU, and use it."""
    start = torch.cuda.set_device if device.type == "cuda" else lambda _: None
    return ThreadPoolExecutor(1, "shares ahead", initializer=start, initargs=(device,))


def _as_it_is(share: Share) -> Share:
    return share


class _Copies:
    """To a GPU, beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._user = torch.cuda.current_stream(device)

    def __call__(self, share: Share) -> Share:
        with torch.cuda.stream(self._stream):
            there = tuple(batch.to(self._device) for batch in share.micro_batches)
        self._stream.synchronize()
        for tensor in (t for batch in there for t in batch.tensors().values()):
            tensor.record_stream(self._user)  # or the next copy takes its memory before it is read
        return replace(share, micro_batches=there)
