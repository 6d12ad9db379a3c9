"""Whether attention is being computed, for whoever counts products with weights and not those of attention.

Knows nothing of either.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_depth = [0]


@contextmanager
def attending() -> Iterator[None]:
    """What is computed inside belongs to attention."""
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1


def is_attending() -> bool:
    """Whether a product that is computed now belongs to attention."""
    return _depth[0] > 0
