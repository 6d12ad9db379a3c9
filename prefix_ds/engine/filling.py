"""Promised parameters become shards of ZeRO-3, each rank reading what it will hold.

DeepSpeed's own way builds every parameter whole and keeps a part. Here a parameter is told its shape by a
tensor of one repeated number, gets its shard (uneven sizes are padded, as DeepSpeed does), and the shard is
read from the checkpoint in pieces. Each rank reads for itself; now and then they agree that all went well,
so a file that one of them cannot read stops all of them soon. These are internals of DeepSpeed 0.19
(`zero.Init`); `tests/test_loading.py` holds them.

Knows nothing of files.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefix_ds.dist import together
from prefix_ds.engine.disk import check_space, with_own_folder
from prefix_ds.engine.pinned import PinnedBlocks
from prefix_ds.engine.settings import Settings
from prefix_ds.engine.sharding import start_deepspeed
from prefix_ds.engine.sizing import sized, sizes_of
from prefix_ds.errors import ConfigError
from prefix_ds.promise import read
from prefix_ds.tracking import Progress, progress_bar

log = logging.getLogger(__name__)

_PIECE_NUMBERS = 2**24
_AGREE_EVERY_BYTES = 2**28  # of a rank's shards
_QUICK_BYTES = 2**28


def in_shards(base: nn.Module, settings: Settings) -> nn.Module:
    """The base, every promised parameter of which is now a filled shard, with its buffers on the device.

    Raises ModelError. Every rank calls this.
    """
    began = time.perf_counter()
    deepspeed = start_deepspeed()
    mine = together(lambda: with_own_folder(sized(settings, sizes_of(base))))
    init = deepspeed.zero.Init(config_dict_or_path=mine)
    holders = _holders(base)
    total = sum(_shard_bytes(p, init) for p in holders)
    if init.param_swapper is not None:
        together(lambda: _check_buffers(holders, init))
        check_space(Path(init.param_swapper.swap_folder), total)
    takes_a_while = total > _QUICK_BYTES
    with progress_bar("loading, MiB", total >> 20, is_visible=takes_a_while and init.rank == 0) as bar:
        _fill(holders, init, _room(init, total), bar)
    _place_buffers(base, init.local_device)
    if takes_a_while:
        seconds = time.perf_counter() - began
        log.info("loaded %s MiB a rank in %.1f s", f"{total / 2**20:,.0f}", seconds)
    return base


def _place_buffers(base: nn.Module, device: torch.device) -> None:
    """Puts them where the base runs: DeepSpeed moves no module that has shards."""
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


Room = Callable[[int, torch.dtype], Tensor]  # an empty shard of so many numbers


def _room(init: Any, total: int) -> Room:
    """Where shards lie that are not on a disk, `total` bytes at most."""
    if init.remote_device == init.local_device:
        return lambda size, dtype: torch.empty(size, dtype=dtype, device=init.local_device)
    if init.pin_memory and torch.cuda.is_available():
        return PinnedBlocks(total).empty
    return lambda size, dtype: torch.empty(size, dtype=dtype)


def _check_buffers(holders: "Holders", init: Any) -> None:
    size, most = init.param_swapper.elements_per_buffer, max(_shard_numbers(p, init) for p in holders)
    if most > size:
        raise ConfigError(
            f"engine.deepspeed: zero_optimization.offload_param.buffer_size: {size:,}: expected at least "
            f"{most:,}, the numbers of a shard; or use more ranks"
        )


Holders = dict[Tensor, list[tuple[nn.Module, str]]]


def _holders(base: nn.Module) -> Holders:
    """Each parameter, with every module that has it and its name there."""
    holders: Holders = {}
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, name))
    return holders


def _fill(holders: Holders, init: Any, room: Room, bar: Progress) -> None:
    """Exchanges and fills all parameters. Every rank calls this."""
    done = 0
    for group in _groups(holders, init):
        done = together(partial(_fill_group, group, holders, init, room, bar, done))


def _groups(holders: Holders, init: Any) -> Iterator[list[Tensor]]:
    """The parameters in turn, so many at a time that a rank reads a stated number of bytes."""
    group: list[Tensor] = []
    num_bytes = 0
    for parameter in holders:
        group.append(parameter)
        num_bytes += _shard_bytes(parameter, init)
        if num_bytes >= _AGREE_EVERY_BYTES:
            yield group
            group, num_bytes = [], 0
    yield group


def _shard_bytes(parameter: Tensor, init: Any) -> int:
    return _shard_numbers(parameter, init) * parameter.element_size()


def _shard_numbers(parameter: Tensor, init: Any) -> int:
    return -(-parameter.numel() // int(init.dp_world_size))


def _fill_group(
    group: list[Tensor], holders: Holders, init: Any, room: Room, bar: Progress, done: int
) -> int:
    """Exchanges and fills one parameter after the other; the bytes that are done now."""
    for promised in group:
        parameter = _sharded(promised, init, room)
        for module, name in holders[promised]:
            module._parameters[name] = parameter
        for count in _read_shard(promised, parameter, init):
            done += count
            bar.at(done >> 20)
    return done


def _sharded(promised: Tensor, init: Any, room: Room) -> Any:
    """A parameter whose shard is there, but not its numbers."""
    shape_only = torch.empty(1, dtype=promised.dtype, device=init.local_device).expand(promised.shape)
    parameter: Any = nn.Parameter(shape_only, requires_grad=promised.requires_grad)
    init._convert_to_deepspeed_param(parameter)
    size = init._aligned_size(parameter) // init.dp_world_size
    parameter.ds_tensor = _empty_shard(parameter, size, init, room)
    parameter.ds_tensor.ds_numel = size
    parameter.ds_numel_aligned = size * init.dp_world_size
    parameter.data = torch.empty(0, dtype=promised.dtype, device=init.local_device)
    parameter.ds_status = type(parameter.ds_status).NOT_AVAILABLE
    return parameter


def _empty_shard(parameter: Any, size: int, init: Any, room: Room) -> Any:
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    swapper = init.param_swapper
    on_disk = (
        swapper is not None and parameter.dtype == swapper.dtype and swapper.swappable_tensor(numel=size)
    )
    if on_disk:
        buffer = swapper.get_buffer(parameter, size)
        shard: Any = torch.empty(0, dtype=parameter.dtype, device=buffer.device)
        shard.data = buffer.data
    else:
        shard = room(size, parameter.dtype)
    shard.status = PartitionedParamStatus.AVAILABLE
    shard.final_location = OffloadDeviceEnum.nvme if on_disk else None
    return shard


def _read_shard(promised: Tensor, parameter: Any, init: Any) -> Iterator[int]:
    """Fills the shard piece by piece; yields the bytes of each. What is beyond the tensor's end is zero."""
    shard = parameter.ds_tensor
    first = init.rank * shard.ds_numel
    length = max(0, min(shard.ds_numel, promised.numel() - first))
    shard[length:].zero_()
    for start in range(0, length, _PIECE_NUMBERS):
        stop = min(length, start + _PIECE_NUMBERS)
        shard[start:stop].copy_(read(promised, first + start, first + stop))
        yield (stop - start) * shard.element_size()
    if shard.final_location is not None:
        init.param_swapper.swap_out_and_release([parameter])
