"""Stopping is agreed: a signal on one rank becomes the decision of all, at the border of a step.

SIGTERM (a scheduler, a launcher) and SIGINT (Ctrl-C) only leave a note; the loop asks between two steps
whether any rank has one. A second Ctrl-C ends the process at once, for those who do not want to wait for the
checkpoint.

Knows nothing of what is stopped.
"""

import signal
from types import FrameType

import torch

from prefix_ds.dist import summed


class StopRequest:
    """Notes SIGTERM and SIGINT from its creation on."""

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked_by = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank calls this."""
        return bool(summed(torch.tensor([self.asked_by is not None], dtype=torch.int32)).item())
