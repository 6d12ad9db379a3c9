"""What tensors without numbers stand for: those on a device that a plan is made for.

How much is computed at a time, and by which kernel, differs between devices, and so does the memory it takes.
A rehearsal on the meta device must do what the device would.

Knows nothing of what is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_standing = ["meta"]


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Tensors on the meta device go the way that those on such a device go."""
    _standing.append(device_type)
    try:
        yield
    finally:
        _standing.pop()


def device_type(tensor: Tensor) -> str:
    """Of the device that a tensor is on, or stands for one on."""
    return _standing[-1] if tensor.is_meta else tensor.device.type
