"""The exact command and environment of every rank: a pure function of where it stands in the job.

Knows nothing of how processes are started.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Team:
    """The ranks of one node among all of a job."""

    first_rank: int
    num_ranks: int  # on this node
    world_size: int
    master: str  # the first node's name or address, as all nodes reach it
    port: int
    devices: tuple[int, ...] = ()  # numbers of the GPUs to use; none: from the first
    gpus: int = 0  # that the ranks of this node must find; 0: nothing is known of any

    @property
    def is_spread(self) -> bool:
        """Whether other nodes have ranks too."""
        return self.num_ranks < self.world_size

    def ranks(self) -> range:
        """Their numbers."""
        return range(self.first_rank, self.first_rank + self.num_ranks)


def teams(ranks_of_nodes: Sequence[int], master: str, port: int) -> Iterator[Team]:
    """One for each node, in order."""
    first = 0
    for num_ranks in ranks_of_nodes:
        yield Team(first, num_ranks, sum(ranks_of_nodes), master, port)
        first += num_ranks


def rank_environment(team: Team, rank: int) -> dict[str, str]:
    """What torch, DeepSpeed and prefix-ds read to know who they are."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - team.first_rank),
        "WORLD_SIZE": str(team.world_size),
        "LOCAL_WORLD_SIZE": str(team.num_ranks),
        "MASTER_ADDR": team.master,
        "MASTER_PORT": str(team.port),
        "PYTHONUNBUFFERED": "1",
    }
    if team.gpus:
        environment["PREFIX_DS_GPUS"] = str(team.gpus)
    if team.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, team.devices))
    return environment


def rank_command(words: Sequence[str]) -> list[str]:
    """`prefix-ds WORDS` with the Python that runs this, and no module of the working folder (-P)."""
    return [sys.executable, "-P", "-m", "prefix_ds", *words]
