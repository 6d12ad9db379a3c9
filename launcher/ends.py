"""How ranks end, and which of them is to blame.

When one rank dies the others lose it in the middle of a step and end too, often before it has finished
dying. So the first that ended for a reason of its own is the culprit; one that lost a peer, or was ended by
us, is not. With NCCL it is torch's watchdog that ends those who lost a peer, by SIGABRT: such an end is the
culprit only beside ends that are no reason. A run that is refused is refused by all ranks, and the first of
them says why.

Knows nothing of processes.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from prefix_ds.errors import (
    EXIT_BUG,
    EXIT_DEVICE,
    EXIT_DONE,
    EXIT_PEER,
    EXIT_STOPPED,
    EXIT_USER,
    printable,
)

LIFT = 200
SETTLE_SECONDS = 5.0  # after one rank's end, for the others to say why they end
_BY_SIGNAL = 128  # shells' way to tell a signal in an exit code


@dataclass(frozen=True)
class End:
    """Of one rank, or (rank None) of a whole node."""

    host: str
    rank: int | None
    code: int  # negative: the signal that killed it
    tail: tuple[str, ...] = ()  # its last lines
    by_us: bool = False  # it was killed because another had ended
    reason: str = ""  # where the code does not say it

    @property
    def place(self) -> str:
        """For people."""
        return self.host if self.rank is None else f"{self.host}, rank {self.rank}"

    @property
    def exit_code(self) -> int:
        """As a process says it."""
        return self.code if self.code >= 0 else _BY_SIGNAL - self.code

    @property
    def ends_others(self) -> bool:
        """Whether the other ranks cannot go on; one that stopped on request leaves them to do so too."""
        return self.code not in (EXIT_DONE, EXIT_STOPPED)

    def told(self) -> str:
        """One line."""
        return printable(f"{self.place}: {self.reason or _meaning(self.code, self.by_us)}")


def _meaning(code: int, by_us: bool) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = "; was the machine out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by {name}{' from its agent' if by_us else memory}"
    known = {
        EXIT_DONE: "done",
        EXIT_BUG: "ended with an error",
        EXIT_USER: "the run was refused",
        EXIT_STOPPED: "stopped on request, checkpoint written",
        EXIT_PEER: "another rank was lost, or could not be met",
        EXIT_DEVICE: "its device broke down",
    }
    return known.get(code, f"ended with exit code {code}")


def lifted(code: int) -> int:
    """With the two that end a job for good above all others, for a scheduler that looks at the highest."""
    return code + LIFT if code in (EXIT_BUG, EXIT_USER) else code


def culprit(ends: Sequence[End]) -> End | None:
    """Of ends in the order of time, the one that tells how the job ended; None: all is done."""
    bad = [end for end in ends if end.code != EXIT_DONE and not end.by_us]
    refused = sorted((end for end in bad if end.code == EXIT_USER), key=lambda end: end.rank or 0)
    own = [end for end in bad if end.code not in (EXIT_PEER, EXIT_STOPPED, EXIT_USER)]
    own.sort(key=lambda end: end.code == -signal.SIGABRT)
    lost = [end for end in bad if end.code == EXIT_PEER]
    killed = [end for end in ends if end.by_us]
    return next(iter([*refused, *own, *lost, *bad, *killed]), None)
