"""Numbers of few places at a time: on a CPU so few that what is made of them stays in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from prefix_ds.model.standing import device_type

_CACHED_NUMBERS = 2**18  # 1 MiB in float32


def blocks_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [C, D] of some places of all of them [..., D], one after the other; on a GPU of all at once."""
    rows = [tensor.flatten(0, -2) for tensor in tensors]
    size = max(1, _CACHED_NUMBERS // rows[0].shape[1]) if device_type(rows[0]) == "cpu" else len(rows[0])
    return zip(*(torch.split(tensor, max(1, size)) for tensor in rows), strict=True)
