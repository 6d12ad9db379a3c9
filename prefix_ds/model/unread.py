"""Masks are made without reading a number off the device.

transformers looks whether a row holds several documents before it makes a mask, and leaves a term out if none
does. To look is to wait until the device has caught up, in every micro-batch. While it is being traced it
does not look and always puts the term in, which gives the same mask.

Knows nothing of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import masking_utils


@contextmanager
def masks_unread() -> Iterator[None]:
    """Inside, transformers takes no look at numbers for the sake of a mask."""
    stock = masking_utils.is_tracing
    masking_utils.is_tracing = lambda _: True
    try:
        yield
    finally:
        masking_utils.is_tracing = stock
