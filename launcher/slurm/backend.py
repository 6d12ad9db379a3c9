"""Talks to Slurm through its own commands: submits, and tells about, shows and ends a job.

Whatever Slurm refuses is a LaunchError with its own words on one line. Knows nothing of what a job runs.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launcher.slurm.script import SlurmPlan
from prefix_ds.errors import LaunchError

_COMPLAINT = re.compile(r"^\w+: (error|fatal): ", re.MULTILINE)
_OVER = re.compile(r"BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
_POLL_SECONDS = 1.0
_DIRECTIVE = re.compile(r'^#SBATCH "?--([a-z-]+)', re.MULTILINE)
_MEMORY, _REQUEUE = ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"), ("REQUEUE", "NO_REQUEUE")
_VARIABLES = {"time": ("TIMELIMIT",), "mem": _MEMORY, "requeue": _REQUEUE, "no-requeue": _REQUEUE}


@dataclass(frozen=True)
class JobStatus:
    """What Slurm says of a job."""

    job: str
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED, ...
    reason: str = ""
    nodes: str = ""
    exit_code: int = 0
    num_restarts: int = 0
    log: Path | None = None  # None: Slurm has forgotten it

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return bool(_OVER.match(self.state))

    def told(self) -> str:
        """One line."""
        parts = [f"job {self.job}: {self.state}"]
        parts += [f"({self.reason})"] if self.reason else []
        parts += [f"on {self.nodes}"] if self.nodes else []
        parts += [f"exit code {self.exit_code}"] if self.is_over else []
        parts += [f"{self.num_restarts + 1} starts"] if self.num_restarts else []
        return ", ".join(parts).replace(", (", " (")


def in_allocation() -> bool:
    """Whether Slurm has given us nodes already."""
    return "SLURM_JOB_ID" in os.environ


def gpus_here() -> int:
    """Of each node of the allocation that we are in; 0: none, or we are in none. Raises LaunchError.

    Slurm says it to what runs on a node, and of `salloc --gpus-per-node` also where salloc was called.
    """
    given = os.environ if in_allocation() else {}
    found = given.get("SLURM_GPUS_ON_NODE") or given.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]
    for name in ("SLURM_GPUS", "SLURM_GPUS_PER_TASK"):
        if not found and name in given:
            raise LaunchError(f"{name}: {given[name]}: how many ranks a node? Say --gpus-per-node")
    return int(found) if found.isdecimal() else 0


def submit(plan: SlurmPlan) -> str:
    """Queues the job; its id. Raises LaunchError."""
    assert not plan.allocated
    for name in plan.variables:
        if name not in os.environ:
            raise LaunchError(f"--env: {name}: is not set here")
    try:
        plan.logs.mkdir(parents=True, exist_ok=True)  # without it a job dies and leaves no word
    except OSError as error:
        raise LaunchError(f"--logs: {plan.logs}: {error.strerror}") from None
    said = _said(["sbatch", "--parsable"], plan.text(), _environment(plan))
    return said.strip().partition(";")[0]


def _environment(plan: SlurmPlan) -> dict[str, str]:
    """Ours without SBATCH_PARTITION and the like: to sbatch they go before what the script says."""
    options = _DIRECTIVE.findall(plan.text())
    names = {
        f"SBATCH_{name}"
        for each in options
        for name in _VARIABLES.get(each, [each.upper().replace("-", "_")])
    }
    return {name: value for name, value in os.environ.items() if name not in names}


def run_here(plan: SlurmPlan) -> NoReturn:
    """In an allocation: this process becomes the job, and ends as it does. Raises LaunchError."""
    assert plan.allocated
    os.execvp("bash", ["bash", "-c", plan.text()])


def status(job: str) -> JobStatus:
    """From the controller, or when it has forgotten the job from the accounting. Raises LaunchError."""
    try:
        return _remembered(job, _said(["scontrol", "show", "job", _number(job)]))
    except LaunchError:
        found = _accounted(job)
        if found is None:
            raise
        return found


def cancel(job: str) -> None:
    """Ends it for good; within Slurm's KillWait its ranks write a checkpoint. Raises LaunchError."""
    status(job)  # scancel says nothing of a job that is not there
    _said(["scancel", _number(job)])


def logs(job: str, *, follow: bool = False) -> Iterator[str]:
    """The lines of its ranks, of all its starts; `follow`: until the job is over. Raises LaunchError."""
    place = 0
    while True:
        now = status(job)
        if now.log is None:
            raise LaunchError(f"job {job}: Slurm has forgotten where its log is; look for {job}.log")
        is_last = now.is_over or not follow
        for line in _lines_from(now.log, place):
            if line.endswith(b"\n") or is_last:  # half a line is read again when it is whole
                place += len(line)
                yield line.decode(errors="replace").rstrip("\n")
        if is_last:
            return
        time.sleep(_POLL_SECONDS)


def _lines_from(file: Path, place: int) -> Iterator[bytes]:
    """Those that are there; none before the job has started."""
    try:
        with file.open("rb") as opened:
            opened.seek(place)
            yield from opened
    except FileNotFoundError:
        return


def _number(job: str) -> str:
    if not re.fullmatch(r"\d+", job, re.ASCII):
        raise LaunchError(f"{job}: expected the number of a Slurm job")
    return job


def _remembered(job: str, text: str) -> JobStatus:
    def field(pattern: str) -> str:
        found = re.search(pattern, text, re.MULTILINE)
        return found[1] if found and found[1] not in ("None", "(null)") else ""

    log = field(r"^ *StdOut=(.*)$").replace("%%", "%")
    return JobStatus(
        job,
        field(r"\bJobState=(\S+)"),
        field(r"\bReason=(\S+)"),
        field(r"^ *NodeList=(\S*)"),
        int(field(r"\bExitCode=(\d+)") or 0),
        int(field(r"\bRestarts=(\d+)") or 0),
        Path(log) if log else None,
    )


def _accounted(job: str) -> JobStatus | None:
    """None: there is no accounting, or it does not know the job."""
    words = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=State,ExitCode,NodeList",
        "--jobs",
    ]
    try:
        lines = _said([*words, job]).splitlines()
    except LaunchError:
        return None
    if not lines:
        return None
    state, code, nodes = lines[-1].split("|")
    return JobStatus(job, state, nodes=nodes, exit_code=int(code.partition(":")[0]))


def _said(words: list[str], text: str = "", environment: dict[str, str] | None = None) -> str:
    """What one of Slurm's commands answers."""
    given = os.fsencode(text)
    try:
        done = subprocess.run(words, input=given, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"{words[0]}: not found; Slurm jobs start on a machine that has Slurm's commands"
        ) from None
    if done.returncode:
        lines = [_COMPLAINT.sub("", line) for line in os.fsdecode(done.stderr).splitlines() if line.strip()]
        raise LaunchError(f"{words[0]}: {'; '.join(lines) or f'exit code {done.returncode}'}")
    return os.fsdecode(done.stdout)
