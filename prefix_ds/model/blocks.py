"""Work on few places at a time: on a CPU so few that what is made on the way stays in the cache."""

from collections.abc import Callable

from torch import Tensor

from prefix_ds.model.standing import device_type

_CACHED_NUMBERS = 2**18  # 1 MiB in float32

Work = Callable[..., tuple[Tensor, ...]]


def by_blocks(work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What is made of tensors [..., D], where `work` makes it of some places of them [C, D].

    On a GPU that is all at once.
    """
    rows = [tensor.flatten(0, -2) for tensor in tensors]
    num_places = len(rows[0])
    is_cached = device_type(rows[0]) == "cpu"
    size = max(1, _CACHED_NUMBERS // rows[0].shape[1]) if is_cached else num_places
    made = list(work(*(row[:size] for row in rows)))
    if size < num_places:
        firsts, made = made, [each.new_empty(num_places, each.shape[-1]) for each in made]
        for whole, first in zip(made, firsts, strict=True):
            whole[:size] = first
        for start in range(size, num_places, size):
            found = work(*(row[start : start + size] for row in rows))
            for whole, part in zip(made, found, strict=True):
                whole[start : start + size] = part
    return tuple(each.view(*tensors[0].shape[:-1], each.shape[-1]) for each in made)
