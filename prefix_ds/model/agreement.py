"""How far what is computed here is from what it is to be the same as.

Knows nothing of what is computed.
"""

import math

from torch import Tensor


def error_between(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number; infinite where numbers are none, or shapes or types
    differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    wide = theirs.double()
    error = float((ours.double() - wide).abs().max() / wide.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
