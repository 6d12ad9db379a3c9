"""What to ask Slurm for, checked before a job queues.

Knows nothing of scripts.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from prefix_ds.errors import LaunchError

_TIME = re.compile(  # sbatch's: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]
    r"(?P<m>\d+)(:(?P<s>\d+))?|(?P<H>\d+):(?P<M>\d+):(?P<S>\d+)|(?P<d>\d+)-(?P<h>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"
)
_LONG = {"A": "account", "C": "constraint", "G": "gpus", "p": "partition", "q": "qos", "t": "time"}
_SECONDS = {"d": 86400, "H": 3600, "h": 3600, "M": 60, "m": 60, "dm": 60, "S": 1, "s": 1, "ds": 1}


@dataclass(frozen=True)
class Resources:
    """What a job asks for. None, or 0 GPUs: what the partition gives by itself."""

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 0
    cpus_per_task: int | None = None  # of a node's one task, so for all its ranks; None: one a rank
    memory: str | None = None  # of a node


@dataclass(frozen=True)
class SlurmOptions:
    """Resources, and a job's habits."""

    folder: Path  # where the ranks run: relative paths of the run start here
    logs: Path  # folder for the job's output
    ask: Resources = Resources()
    signal_seconds: int = 120  # between the signal for a checkpoint and the time limit
    requeue: bool = True
    max_requeues: int = 10
    setup: tuple[str, ...] = ()  # lines of bash that run before the ranks: module load ...
    sbatch: tuple[str, ...] = ()  # other options of sbatch, a word each
    srun: tuple[str, ...] = ()  # and of srun, which starts the agents
    python: str = sys.executable  # on every node
    allocated: bool = False  # run at once, in the allocation we are in

    def __post_init__(self) -> None:
        """Raises LaunchError."""
        if not 1 <= self.signal_seconds <= 65535:
            raise LaunchError(f"--signal-seconds: {self.signal_seconds}: expected 1 to 65535")
        if self.max_requeues < 0:
            raise LaunchError(f"--max-requeues: {self.max_requeues}: expected at least 0")
        seconds = seconds_of(self.ask.time) if self.ask.time is not None else None
        if seconds is not None and self.signal_seconds >= seconds:
            raise LaunchError(
                f"--signal-seconds: {self.signal_seconds}: expected less than the {seconds} seconds of --time"
            )
        self._check_lines()

    def _check_lines(self) -> None:
        examples = {"sbatch": "--reservation=NAME", "srun": "--mpi=none"}
        for option, example in examples.items():
            for word in getattr(self, option):
                if not word.startswith("-"):
                    raise LaunchError(f"--{option}: {word}: expected an option, such as {example}")
        for word in self.sbatch:
            if not word.startswith("--"):
                raise LaunchError(
                    f"--sbatch: {word}: expected {_long(word)}: a variable such as SBATCH_PARTITION would go "
                    "before the short one"
                )
        for line in self.setup:
            if "\r" in line:  # sbatch refuses the line ends of DOS
                raise LaunchError(f"--setup: {line}: cannot stand in a batch script")


def _long(word: str) -> str:
    """An option of one letter by its whole name."""
    name = _LONG.get(word[1:2])
    return f"--{name}={word[2:].strip(' =') or 'VALUE'}" if name else "its long form"


def seconds_of(time: str) -> int | None:
    """A time limit as Slurm reads it, 0 too; None: it has no end. Raises LaunchError."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = _TIME.fullmatch(time)
    if not found:
        raise LaunchError(
            f"--time: {time}: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    return sum(_SECONDS[unit] * int(number) for unit, number in found.groupdict().items() if number) or None
