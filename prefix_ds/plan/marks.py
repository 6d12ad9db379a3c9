"""What a rehearsal notes down: bytes alive, and the moments between which it looks.

Knows nothing of tensors.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Alive(NamedTuple):
    """Bytes that are allocated at a time; `logits` are those with a vocabulary as their last dimension."""

    total: int = 0
    logits: int = 0

    def raised(self, more: int) -> "Alive":
        """The same on top of `more` bytes."""
        return Alive(self.total + more, self.logits)


class Moment(NamedTuple):
    """The parameters of a module are needed, or are let go."""

    module: str
    is_fetch: bool
    is_forward: bool
    is_repeated: bool  # a forward pass within the backward pass


@dataclass(frozen=True)
class Mark:
    """A moment, and what was seen around it."""

    moment: Moment
    before: Alive
    highest: Alive  # from here to the next mark
    flops: int  # from here to the next mark
