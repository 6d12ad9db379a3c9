"""Who am I among how many, and how do we agree.

One process is the size-1 case of the same code: without a launcher's variables a group of one is made.
`World` is the frozen answer to "which rank, how many, on which device"; the functions below are the few
collective calls the rest of the program needs, and every rank must make them in the same order.

The only place of the package that reads or sets the process environment. Knows nothing of models or data.
"""

import atexit
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from prefix_ds.errors import ConfigError, DeviceLost, PeerLost, PrefixError, Stopped, Teller
from prefix_ds.faults import device_may_fail

if TYPE_CHECKING:
    import torch

Answer = TypeVar("Answer")

# What gloo and NCCL say of a rank that no longer answers; they raise plain RuntimeErrors.
_PEER_IS_GONE = (
    "closed by peer",
    "reset by peer",
    "Timed out waiting",
    "remote process exit",
    "remote peer",
    "ncclRemoteError",
    "ncclSystemError",  # of a socket or a network card
    "communicator was aborted",
    "Broken pipe",
    "gloo/transport",
    "likely closed",
    "timed out",
)
# oneDNN compiles a product for its shape and keeps a thousand, and torch a thousand in front of these, half a
# megabyte each. Documents have so many shapes that half of the one and none of the other is less work too.
_FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "1"}
_GPUS = "PREFIX_DS_GPUS"  # how many a launcher counts on, on this machine


@dataclass(frozen=True)
class World:
    """This process among the ranks of the job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: "torch.device"

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """The first rank of its node: the one that prepares what a node shares."""
        return self.local_rank == 0


def rank_of_environment() -> int:
    """The rank a launcher gave this process; 0 without one. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


def tells(teller: Teller) -> bool:
    """Whether this rank is the one to tell. Needs no process group."""
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    return teller == "rank" or rank_of_environment() == 0 or (teller == "machine" and is_first_here)


def environment_with(**variables: str) -> dict[str, str]:
    """This process's environment and these variables, for a child process."""
    return os.environ | variables


def set_default_environment(**variables: str) -> None:
    """Sets variables that the user has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def has_gpu() -> bool:
    """Whether ranks run on GPUs. DeepSpeed, which looks for the answer at its import, is told it before."""
    import torch

    if torch.cuda.is_available():
        return True
    set_default_environment(DS_ACCELERATOR="cpu")
    return False


@contextlib.contextmanager
def joined_world(timeout_minutes: float = 30, patience_minutes: float = 720) -> Iterator[World]:
    """The world, with a process group for as long as the block lasts. Every rank calls this.

    A rank that is later than `timeout_minutes` at a sum is lost. Where one has not started yet, or prepares
    what all need (it loads from a hub, tokenises, reads a checkpoint), the others wait `patience_minutes`, or
    until it dies. Raises PeerLost.
    """
    import torch
    import torch.distributed as group

    env = os.environ
    size, rank = int(env.get("WORLD_SIZE", "1")), rank_of_environment()
    local_rank = int(env.get("LOCAL_RANK", "0"))
    local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)  # torchrun's; DeepSpeed's
    on_gpu = has_gpu()
    _check_gpus(local_size)
    torch.set_num_threads(_threads(local_size))  # on GPUs for what is read, quantised and packed
    if not on_gpu:
        set_default_environment(**_FEW_KERNELS)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    set_default_environment(  # DeepSpeed reads them even where torch needs none
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
    )
    timeout, patience = timedelta(minutes=timeout_minutes), timedelta(minutes=patience_minutes)
    with peers_may_die():  # the first rank can be taken away while the others arrive
        store = _store_of_all(rank, size, patience)
        store.set_timeout(timeout)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        group.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        if size > 1:
            _patient[:] = [group.new_group(backend="gloo", timeout=patience)]
    try:
        with device_may_fail(f"rank {rank} ({device} of {socket.gethostname()})"):
            _check_alike(device)
            yield World(rank, size, local_rank, local_size, device)
    finally:
        # After an error a peer may never say farewell; on a device that broke NCCL's fails, of one rank too.
        ended_by = sys.exc_info()[0]
        if ended_by in (None, Stopped) or (size == 1 and ended_by is not DeviceLost):
            group.destroy_process_group()


_patient: list[Any] = []  # the group of those that wait for one of them


def _store_of_all(rank: int, size: int, patience: timedelta) -> Any:
    """Torch's store, once all ranks have come to it. Every rank calls this."""
    import torch.distributed as group
    from torch.distributed.rendezvous import rendezvous

    if size == 1:
        return group.HashStore()  # type: ignore[attr-defined]
    try:
        store, _, _ = next(rendezvous("env://", timeout=patience))
    except group.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            port = f"port {os.environ['MASTER_PORT']} of {socket.gethostname()}"
            how = "is in use, and ranks were to meet there: start again, or give another with --port"
            raise PeerLost(f"{port} {how}") from error
        raise
    store.set(f"prefix_ds/came/{rank}", "")  # a rank that comes twice, in a new pod, counts once
    store.wait([f"prefix_ds/came/{other}" for other in range(size)], patience)
    return store


def _check_gpus(local_size: int) -> None:
    """Raises ConfigError where the ranks here, or their launcher, count on GPUs that torch cannot use."""
    import torch

    usable, wanted = torch.cuda.device_count(), int(os.environ.get(_GPUS, "0"))
    if wanted > usable or (usable and local_size > usable):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"{socket.gethostname()}: {max(wanted, local_size)} GPUs are counted on, and torch"
            f" {torch.__version__} can use {usable} (CUDA_VISIBLE_DEVICES: {seen}): is it built for CUDA, and"
            " is the driver new enough?"
        )


def _check_alike(device: "torch.device") -> None:
    """Raises ConfigError on all ranks where some run on GPUs and others do not. Every rank calls this."""
    kinds = gathered((device.type, socket.gethostname()))
    if len({kind for kind, _ in kinds}) > 1:
        hosts = ", ".join(sorted({host for kind, host in kinds if kind == "cpu"}))
        raise _told_by(
            "first rank", ConfigError(f"{hosts}: torch finds no GPU there, on other machines it does")
        )


def _told_by(teller: Teller, mistake: PrefixError) -> PrefixError:
    mistake.teller = teller
    return mistake


def lasting_world() -> World:
    """The world of a process that is alone and stays: joined once, for whoever asks, and never left."""
    if not _lasting:
        joined = joined_world()
        _lasting.append((joined.__enter__(), joined))
    return _lasting[0][0]


_lasting: list[tuple[World, "contextlib.AbstractContextManager[World]"]] = []


def end_process(code: int) -> NoReturn:
    """Ends the process with this exit code, whatever becomes of its peers meanwhile.

    Where ranks have met there are threads of gloo and of torch's store. When their objects are torn down at
    the end of Python while a peer leaves, about one process in twelve dies of SIGABRT, and its exit code says
    nothing. So what Python would do at its end is done, and nothing is torn down.
    """
    if "torch.distributed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _threads(local_size: int) -> int:
    """CPU threads of a rank: its share of the cores, unless OMP_NUM_THREADS says otherwise.

    torchrun sets OMP_NUM_THREADS=1 where nobody set it, which wastes cores; it cannot be told from a user's
    wish, so a user who wants one thread sets PREFIX_DS_THREADS.
    """
    wish = os.environ.get("PREFIX_DS_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(wish) if wish else max(1, cores // max(1, local_size))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def summed(values: "torch.Tensor") -> "torch.Tensor":
    """The element-wise sum over all ranks, in place. Every rank calls this."""
    import torch.distributed as group

    with peers_may_die():
        if group.get_world_size() > 1:
            group.all_reduce(values)
    return values


def largest(value: float) -> float:
    """The largest of all ranks' values, on every rank; devices need not wait. Every rank calls this."""
    import torch
    import torch.distributed as group

    box = torch.tensor([value], dtype=torch.float64)
    with peers_may_die():
        if group.get_world_size() > 1:
            group.all_reduce(box, group.ReduceOp.MAX)
    return float(box)


def on_all(*flags: bool) -> list[bool]:
    """Which of them hold on every rank, so that all go one way where each has rounded for itself.

    Every rank calls this; a process without a group is alone.
    """
    import torch
    import torch.distributed as group

    votes = torch.tensor(flags, dtype=torch.int32)
    with peers_may_die():
        if group.is_initialized() and group.get_world_size() > 1:
            group.all_reduce(votes, group.ReduceOp.MIN)
    return [bool(vote) for vote in votes]


def from_first(value: Answer) -> Answer:
    """Rank 0's value, on every rank (a small picklable one). Every rank calls this."""
    import torch.distributed as group

    box = [value]
    with peers_may_die():
        if group.get_world_size() > 1:
            group.broadcast_object_list(box, group=_patient[0])
    return box[0]


def gathered(value: Answer) -> list[Answer]:
    """The values of all ranks, in order of rank, on every rank. Every rank calls this."""
    import torch.distributed as group

    boxes: list[Answer] = [value] * group.get_world_size()
    with peers_may_die():
        if group.get_world_size() > 1:
            group.all_gather_object(boxes, value, group=_patient[0])
    return boxes


def check_same(value: object, mistake: Callable[[str, str], PrefixError]) -> None:
    """Raises, on all ranks, a mistake made of the hosts that have another value than rank 0, and of its host.

    Every rank calls this with a small picklable value.
    """
    found = gathered((socket.gethostname(), value))
    first_host, first = found[0]
    if others := sorted({host for host, theirs in found if theirs != first}):
        raise _told_by("first rank", mistake(", ".join(others), first_host))


def together(work: Callable[[], Answer]) -> Answer:
    """Runs `work` on every rank; a user's mistake on one is raised on all, so none waits for a dead peer.

    Every rank calls this. `work` must make no collective call of its own after it may have failed.
    """
    answer, mistake = None, None
    try:
        answer = work()
    except PrefixError as error:
        mistake = error
    first = next((e for e in gathered(mistake) if e is not None), None)
    if first is not None:
        raise _told_by("first rank", first)
    return answer  # type: ignore[return-value]


def on_first(world: World, work: Callable[[], Answer]) -> Answer:
    """What rank 0 makes of `work`, on every rank; so is its mistake. Every rank calls this."""
    return from_first(together(work if world.is_first else lambda: None))  # type: ignore[return-value]


def first_here_first(world: World, work: Callable[[], Answer]) -> Answer:
    """Runs `work` on the first rank of each node, then on the others, which find what it cached.

    Every rank calls this.
    """
    answer = together(work if world.is_first_here else lambda: None)
    rest = together((lambda: None) if world.is_first_here else work)
    return answer if world.is_first_here else rest  # type: ignore[return-value]


def numbers_in_turn(name: str) -> Iterator[int]:
    """0, 1, 2 and so on, each for one rank: whoever is free takes the next, and nobody waits.

    Every rank calls this with the same name, a new one for each piece of work.
    """
    import torch.distributed as group

    store = group.distributed_c10d._get_default_store()
    while True:
        with peers_may_die():
            number = store.add(f"prefix_ds/{name}", 1) - 1
        yield number


def wait_for_all() -> None:
    """Returns when every rank has called it."""
    import torch.distributed as group

    with peers_may_die():
        if group.get_world_size() > 1:
            group.barrier()


@contextlib.contextmanager
def peers_may_die() -> Iterator[None]:
    """Tells a collective call that failed because another rank is gone from every other error: PeerLost."""
    from torch.distributed import DistNetworkError, DistStoreError

    try:
        yield
    except RuntimeError as error:
        is_of_the_store = isinstance(error, DistNetworkError | DistStoreError)
        if is_of_the_store or any(sign in str(error) for sign in _PEER_IS_GONE):
            said = "; ".join(
                line.strip() for line in str(error).splitlines() if line.strip()
            )  # NCCL's reason is last
            raise PeerLost(f"another rank is gone or hangs: {said}") from error
        raise
