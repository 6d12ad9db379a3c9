"""Memory of the host that a GPU copies from by itself, in pieces of the size that is asked for.

torch rounds every piece up to a power of two and keeps what it has rounded: shards of 35 MB would take 67. So
blocks are asked for whose size is one, and cut; a piece goes into the fullest that has room for it. Nothing
is given back before the end.

Knows nothing of what lies in the pieces.
"""

import torch
from torch import Tensor

_BLOCK_BYTES = 2**30
_ALIGNED_BYTES = 64


class PinnedBlocks:
    """Pieces of at most `total` bytes together."""

    def __init__(self, total: int, *, pin: bool = True) -> None:
        """Without `pin` it is ordinary memory."""
        self._left, self._pin = total, pin
        self._rests: list[Tensor] = []  # of the blocks, what is left of each

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of `size` numbers."""
        num_bytes = size * dtype.itemsize
        taken = -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        rest = min((r for r in self._rests if len(r) >= num_bytes), key=len, default=None)
        if rest is None:
            wanted = max(num_bytes, min(self._left, _BLOCK_BYTES))
            rest = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pin)
        self._rests = [r for r in self._rests if r is not rest] + [rest[taken:]]
        self._left -= num_bytes
        return rest[:num_bytes].view(dtype)
