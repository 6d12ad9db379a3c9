"""Where a run stands: one frozen value that every room can name.

Together with the engine's tensors it is all a checkpoint holds, because the data of a step is a pure function
of its number and nothing draws random numbers after the start. Knows nothing of how a run gets on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A run after `step` optimizer steps. Losses are means over target tokens, in nats; scores 0 to 100."""

    step: int = 0
    valid_loss: float | None = None  # of this step, where it was validated
    best_loss: float | None = None
    best_step: int | None = None
    judged_step: int | None = None  # the latest at which all was validated and scored that was due
    best_score: float | None = None  # of evaluate.best_by, where that is a score: best_step is its step
