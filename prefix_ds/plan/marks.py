"""What a rehearsal notes down: bytes alive, and the moments between which it looks.

Knows nothing of tensors.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alive:
    """Bytes that are allocated at a time; `logits` are those with a vocabulary as their last dimension."""

    total: int = 0
    logits: int = 0

    def raised(self, more: int) -> "Alive":
        """The same on top of `more` bytes."""
        return Alive(self.total + more, self.logits)


@dataclass(frozen=True)
class Mark:
    """The parameters of a module are needed, or are let go."""

    module: str
    is_fetch: bool
    is_forward: bool
    is_repeated: bool  # a forward pass within the backward pass
    before: Alive
    highest: Alive  # from here to the next mark
    flops: int  # from here to the next mark

    def moved(self, module: str, before: Alive, highest: Alive, flops: int) -> "Mark":
        """The same moment of another module, with other numbers. (`replace` takes three times as long.)"""
        return Mark(module, self.is_fetch, self.is_forward, self.is_repeated, before, highest, flops)
