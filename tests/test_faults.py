"""What a device that gives up leads to: memory that is out, a fault of its own, GPUs that are not there.

No GPU is here: its errors are made as torch makes them.
"""

import os
import socket
import time

import pytest
import torch

from prefix_ds.config import config_text
from prefix_ds.dist import first_here_first, joined_world, peers_may_die, tells
from prefix_ds.errors import EXIT_DEVICE, EXIT_PEER, EXIT_USER, ConfigError, DeviceLost, ModelError, PeerLost
from prefix_ds.faults import device_may_fail
from tests.ranks import command, on_ranks
from tests.workshop import run_config

CUDA_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has 79 GiB in all\nSee documentation"


def of_a_device(code):
    error = torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"
    )
    error.error_code = code
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_MEMORY),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_is_out_is_the_users_to_mend(error):
    with pytest.raises(ModelError) as caught, device_may_fail("rank 3 (cuda:3 of node-2)"):
        raise error
    (line,) = str(caught.value).splitlines()
    assert line.startswith("rank 3 (cuda:3 of node-2): ")
    assert "model.recompute=auto" in line
    assert caught.value.teller == "rank", "the others do not know"


def test_a_fault_of_the_device_is_told_from_one_of_the_program():
    told = "cuda:3: the device failed: CUDA error: uncorrectable ECC"
    with pytest.raises(DeviceLost, match=told), device_may_fail("cuda:3"):
        raise of_a_device(214)
    with pytest.raises(torch.AcceleratorError), device_may_fail("cuda:3"):
        raise of_a_device(710)  # an assertion in a kernel


def alone_with_a_fault():
    """What is told where NCCL, which the group of one rank has too, fails on the device as all else does."""

    def refused():
        raise RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error")

    torch.distributed.destroy_process_group = refused
    try:
        with joined_world():
            raise of_a_device(214)
    except RuntimeError as error:
        return repr(error)
    except DeviceLost as lost:
        return str(lost)


def test_a_fault_of_a_lone_ranks_device_is_told_whatever_becomes_of_its_group():
    (told,) = on_ranks(1, alone_with_a_fault)
    assert "the device failed: CUDA error: uncorrectable ECC" in told


def second_rank_out_of_memory(rank):
    second_rank_fails(rank, torch.OutOfMemoryError(CUDA_MEMORY))


def second_rank_with_a_fault(rank):
    second_rank_fails(rank, of_a_device(214))


def second_rank_fails(rank, error):
    from prefix_ds.engine.prefix_engine import PrefixEngine

    def step(*_):
        raise error

    if rank == 1:
        PrefixEngine.step = step


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        (second_rank_out_of_memory, EXIT_USER, "error: rank 1 (cpu of"),
        (second_rank_with_a_fault, EXIT_DEVICE, "rank 1 (cpu of"),
    ],
)
def test_the_rank_that_knows_says_so(tmp_path, before, code, said):
    (tmp_path / "run.yaml").write_text(config_text(run_config(tmp_path)))
    first, second = command("train", tmp_path / "run.yaml", size=2, before=before)
    assert (first.code, second.code) == (EXIT_PEER, code)
    assert said in second.err
    assert "Traceback" not in second.err
    assert "rank 0: another rank is gone" in first.err


def test_a_mistake_is_told_by_whoever_makes_it(monkeypatch):
    told = {}
    for rank, local in ((0, 0), (1, 1), (8, 0), (9, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        told[rank] = [who for who in ("first rank", "machine", "rank") if tells(who)]
    assert told == {0: ["first rank", "machine", "rank"], 1: ["rank"], 8: ["machine", "rank"], 9: ["rank"]}


def test_gpus_that_torch_cannot_use_are_refused(monkeypatch):
    monkeypatch.setenv("PREFIX_DS_GPUS", "8")
    with pytest.raises(ConfigError, match=f"{socket.gethostname()}: 8 GPUs are counted on, and torch .* 0"):
        joined_world().__enter__()


def ranks_here_as_deepspeed_says_it():
    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_SIZE"] = "1"
    with joined_world() as world:
        return world.local_size


def test_deepspeeds_own_launcher_says_how_many_ranks_a_machine_has():
    """Else those of all machines would be looked for here."""
    assert on_ranks(2, ranks_here_as_deepspeed_says_it) == [1, 1]


def join_with(kinds):
    """As if this rank's device were of that kind."""
    from prefix_ds import dist

    kind = kinds[int(os.environ["RANK"])]
    with joined_world():
        dist._check_alike(torch.device(kind))


def late_preparation():
    with joined_world(timeout_minutes=1 / 30) as world:
        return first_here_first(world, lambda: time.sleep(4) or world.rank)


def test_those_that_wait_for_a_rank_to_prepare_something_are_patient():
    """Its work takes twice as long as a sum may be waited for."""
    assert on_ranks(2, late_preparation) == [0, 1]


def test_ranks_on_gpus_and_on_cpus_do_not_start_together():
    on_ranks(2, join_with, ["cpu", "cpu"])
    with pytest.raises(ConfigError, match=f"{socket.gethostname()}: torch finds no GPU there"):
        on_ranks(2, join_with, ["cuda", "cpu"])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "NCCL error in: x.cpp:1, remote process exited or network error\nLast error:\nsocket: gone",
            PeerLost,
        ),
        (
            "NCCL error in: x.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected: rank 0 and 1",
            RuntimeError,
        ),
    ],
)
def test_what_nccl_says_of_a_peer_is_told_from_a_wrong_use(said, kind):
    with pytest.raises(kind) as caught, peers_may_die():
        raise RuntimeError(said)
    assert type(caught.value) is kind
    assert said.splitlines()[-1] in str(caught.value)
