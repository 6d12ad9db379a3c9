"""Memory of the host that a GPU copies from by itself, in pieces of the size that is asked for.

torch rounds every piece up to a power of two and keeps what it has rounded: shards of 35 MB would take 67. So
blocks are asked for whose size is one, and cut. Nothing is given back before the end.

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
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of `size` numbers."""
        num_bytes = size * dtype.itemsize
        if self._used + num_bytes > len(self._block):
            wanted = max(num_bytes, min(self._left, _BLOCK_BYTES))
            self._block, self._used = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pin), 0
        piece = self._block[self._used : self._used + num_bytes].view(dtype)
        self._used += -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self._left -= num_bytes
        return piece
