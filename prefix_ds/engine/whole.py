"""A base in shards lies whole on every rank for a while: gathered once, let go of at the end.

Writing a token takes a forward pass, and under ZeRO-3 each of them gathers the whole base, layer by layer.
Where a device can hold all of it, once is enough. Parameters are gathered one after the other, each straight
into the memory it stays in (a call for several would hold them twice), and DeepSpeed's hooks are taken off
the modules: they would let go of a parameter behind its first use, and cost time at every module. A rank can
then run as often as it likes, without the others. Afterwards the hooks are back, in their order, and every
parameter is a shard again. A rank that is alone holds the shards whole already: nothing is copied.

Rejected: `deepspeed.zero.GatheredParameters`, which gathers a list into one buffer and copies it from there,
and leaves the hooks on.

These are internals of DeepSpeed 0.19; `tests/test_writing.py` holds them. Knows nothing of what runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prefix_ds.dist import peers_may_die
from prefix_ds.engine.sharding import Sharded


@contextmanager
def whole(base: Sharded) -> Iterator[None]:
    """Inside, each rank has the whole base and runs it for itself. Every rank calls this, and leaves it.

    The base must not lie on a disk, and nothing may be trained meanwhile.
    """
    assert not base.bytes_on_disk()
    optimizer = base.engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    parameters = [p for p in base.module.parameters() if hasattr(p, "ds_tensor")]
    offload.partition_all_parameters()  # also what was gathered ahead, and what stays whole: all begin alike
    with _without([*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]):
        try:
            with peers_may_die():
                for parameter in parameters:
                    _gather(parameter)
            yield
        finally:
            for parameter in parameters:
                _let_go(parameter)


def bytes_to_gather(base: Sharded, device: torch.device) -> int:
    """The bytes of a device that `whole` takes, beside what the shards have already."""
    return sum(_bytes_to_gather(p, device) for p in base.module.parameters() if hasattr(p, "ds_tensor"))


def _bytes_to_gather(parameter: Any, device: torch.device) -> int:
    shard = parameter.ds_tensor
    is_here = shard.ds_numel >= parameter.ds_numel and shard.device.type == device.type
    return 0 if is_here else int(parameter.ds_numel * parameter.element_size())


def _gather(parameter: Any) -> None:
    parameter.all_gather_coalesced([parameter]).wait()


def _let_go(parameter: Any) -> None:
    if parameter.ds_status.name == "AVAILABLE":  # not where a peer died on the way
        parameter.partition()


@contextmanager
def _without(handles: Sequence[Any]) -> Iterator[None]:
    """The hooks of these handles are off, and on again afterwards, behind whatever else is on."""
    places = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
    taken = [(hooks, number, hooks.pop(number)) for hooks, number in places if number in (hooks or ())]
    try:
        yield
    finally:
        for hooks, number, hook in taken:
            hooks[number] = hook
