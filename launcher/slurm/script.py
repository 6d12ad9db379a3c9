"""The text that sbatch gets: a pure function of the job and its options.

Slurm starts one task on each node, our agent, which starts the node's ranks. Whether the job starts again is
decided by the exit code:

    0                 done
    1, 2              a bug, the user's mistake: the end, for both would come again
    75, 76, 77        stopped with a checkpoint, a peer lost or the port in use, a device broken: queued
                      again
    128 + n           killed: queued again
    others            srun or Slurm failed, or a cgroup's memory was full (253): the end

The time limit's signal goes to the tasks alone (`--signal` without `B:`), and 75 follows. Where Slurm tracks
processes by cgroups, it signals a task's first process and none below it: the agent, which tells its ranks.
`scancel` and the limit itself also tell the script's shell, which then does not queue the job again.

Rejected: a shell as the task, which passes the signal on and waits. In bash 5.2 `wait`, told again at the
moment its child ends, gives -1 for the child's exit code, about once in fifty times.

Rejected: `--kill-on-bad-exit=1`, which kills rank 0 while it writes the checkpoint because another node has
ended first.

Knows nothing of how the text reaches Slurm.
"""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.ends import LIFT, lifted
from launcher.slurm.options import Resources, SlurmOptions
from launcher.spec import JobSpec
from prefix_ds.errors import EXIT_BUG, EXIT_DEVICE, EXIT_PEER, EXIT_STOPPED, EXIT_USER, LaunchError

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below those that Linux and Kubernetes hand out by themselves
# From its first node on, where the ranks meet; a shell that is itself a step holds what it runs on.
_IN_ALLOCATION = ("--relative=0", "--overlap")
_WAIT_SECONDS = 120  # after the first node's end, for the others to end by themselves
_LETTERS = frozenset(range(32, 127)) - set(b"'\\")  # that need no escape in bash's $'...'
_PLAIN = re.compile(r"[\w./:=@%+,*~\[\]-]+", re.ASCII)

_TASK = f"""\
# srun ends with the highest exit code of its tasks. After a bug or a mistake on one node others lose a peer,
# which must not look like the reason: so these two are lifted above all others. Slurm may signal a task's
# first process alone, so the shell makes room for the agent.
task='"$1" -P -c "import launcher.node" || exit {lifted(EXIT_BUG)}
exec "$@"'
"""
_REACHED = f"""\
case $code in
{lifted(EXIT_BUG)} | {lifted(EXIT_USER)}) exit $((code - {LIFT})) ;;
"""
_END = "*) exit $code ;;\nesac\n"
_ENDED = """\
# scancel and the time limit tell this shell too, and then it does not queue the job again.
ended=
trap 'ended=yes' TERM
"""


@dataclass(frozen=True)
class SlurmPlan:
    """A job that is ready to go."""

    script: str
    logs: Path
    variables: tuple[str, ...]
    allocated: bool

    def text(self) -> str:
        """What sbatch, or in an allocation bash, gets."""
        return self.script


def plan(spec: JobSpec, options: SlurmOptions) -> SlurmPlan:
    """Raises LaunchError for what cannot be written into a batch script."""
    paragraphs = _run(spec, options)
    if options.allocated:
        paragraphs = ["#!/bin/bash\n", *paragraphs, _REACHED + _END]
    else:
        header = "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in _directives(spec, options))
        told = [_ENDED] if options.requeue else []
        paragraphs = [header, *told, *paragraphs, _REACHED + _again(options)]
    return SlurmPlan("\n".join(paragraphs), options.logs, spec.variables, options.allocated)


def job_name(spec: JobSpec) -> str:
    """The run's, in letters that no tool trips over."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", spec.name)[:64].strip("-.") or "prefix-ds"


def _directives(spec: JobSpec, options: SlurmOptions) -> Iterator[str]:
    yield f"--job-name={job_name(spec)}"
    yield f"--nodes={spec.num_nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={_cpus(spec, options)}"
    yield from _asked(options.ask)
    yield f"--signal=TERM@{options.signal_seconds}"
    yield "--requeue" if options.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield _directive("output", _pattern(options.logs))
    if spec.variables:
        yield f"--export=ALL,{','.join(spec.variables)}"
    for word in options.sbatch:
        yield _quoted("--sbatch", word)


def _asked(ask: Resources) -> Iterator[str]:
    """What the partition would otherwise decide."""
    asked = {
        "gpus-per-node": ask.gpus_per_node or None,
        "mem": ask.memory,
        "time": ask.time,
        "partition": ask.partition,
        "account": ask.account,
        "qos": ask.qos,
        "constraint": ask.constraint,
    }
    for option, value in asked.items():
        if value is not None:
            yield _directive(option, str(value))


def _cpus(spec: JobSpec, options: SlurmOptions) -> int:
    return options.ask.cpus_per_task or spec.ranks_per_node


def _pattern(logs: Path) -> str:
    """A file a job, in sbatch's own pattern language."""
    if "\\" in str(logs):
        raise LaunchError(f"--logs: {logs}: Slurm cannot write to a path with a backslash in it")
    return str(logs).replace("%", "%%") + "/%j.log"


def _directive(option: str, value: str) -> str:
    return f"--{option}={_quoted(f'--{option}', value)}"


def _quoted(option: str, value: str) -> str:
    """As sbatch, which is no shell, reads a value."""
    if not value or not value.isprintable():
        raise LaunchError(f"{option}: {value}: cannot stand in a batch script")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _run(spec: JobSpec, options: SlurmOptions) -> list[str]:
    """From the folder to srun's exit code, a paragraph each."""
    setup = "".join(f"{line}\n" for line in options.setup)
    port = spec.port or f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))"
    meeting = f'master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\nport={port}\n'
    return [
        f"cd -- {_word(options.folder)} || exit {EXIT_USER}\n{setup}",
        meeting,
        _TASK + _srun(spec, options),
    ]


def _srun(spec: JobSpec, options: SlurmOptions) -> str:
    nodes = spec.num_nodes
    cpus = options.ask.cpus_per_task if options.allocated else _cpus(spec, options)
    slurm = [
        *(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={cpus}"] if cpus else []),  # srun does not take it from sbatch
        *("--kill-on-bad-exit=0", f"--wait={_WAIT_SECONDS}"),
        *(_IN_ALLOCATION if options.allocated else []),
    ]
    gpus = f" --gpus {options.ask.gpus_per_node}" if options.ask.gpus_per_node else ""
    agent = f"{_word(options.python)} -P -m launcher.node --lifted"
    lines = [
        f"srun {' '.join(slurm)}",
        *map(_word, options.srun),
        'bash -c "$task" task',
        f'{agent} --nodes {nodes} --ranks {spec.ranks_per_node}{gpus} --master "$master:$port" --',
        " ".join(map(_word, spec.train_words)),
    ]
    return " \\\n    ".join(lines) + "\ncode=$?\n"


def _again(options: SlurmOptions) -> str:
    """The end of the script: the job ends with srun's code, or queues itself again."""
    if not options.requeue:
        return _END
    return f"""\
{EXIT_STOPPED} | {EXIT_PEER} | {EXIT_DEVICE} | 12[89] | 1[3-9]?) ;;
{_END}if [ -n "$ended" ]; then
    exit $code
fi
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {options.max_requeues} ]; then
    echo "ended with $code, and was started again {options.max_requeues} times already: the end"
    exit $code
fi
echo "ended with $code: queued again"
scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def _word(value: str | Path) -> str:
    """As bash reads a word. On one line, for sbatch refuses a script that has a carriage return in it."""
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)
    letters = (chr(b) if b in _LETTERS else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(letters)}'"
