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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from prefix_ds.dist import World, peers_may_die
from prefix_ds.engine.sharding import Sharded


@contextmanager
def whole(base: Sharded) -> Iterator[None]:
    """Inside, each rank has the whole base and runs it for itself. Every rank calls this, and leaves it.

    The base must not lie on a disk, and none of its weights may be trained meanwhile. Inside another, nothing
    is done.
    """
    assert not base.bytes_on_disk()
    offload = _offload(base)
    if not _is_on(offload.fwd_pre_hook):
        yield
        return
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


def whole_if_alone(base: Sharded, world: World) -> AbstractContextManager[None]:
    """The same for a frozen base that this rank, the only one, has on its device; else nothing is done."""
    is_frozen = _offload(base) is base.engine.optimizer
    has_all = world.size == 1 and not base.bytes_on_disk() and not bytes_to_gather(base, world.device)
    return whole(base) if is_frozen and has_all else nullcontext()


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


def _offload(base: Sharded) -> Any:
    """DeepSpeed's object that has the hooks; of a frozen base it stands in for an optimizer."""
    optimizer = base.engine.optimizer
    return getattr(optimizer, "parameter_offload", optimizer)


def _is_on(handle: Any) -> bool:
    return handle.id in (handle.hooks_dict_ref() or ())


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
