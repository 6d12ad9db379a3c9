"""`prefix-launch slurm`: its arguments, as a user gives them.

Knows nothing of how a job is written or queued.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefix_ds.errors import LaunchError

if TYPE_CHECKING:
    from launcher.slurm.options import SlurmOptions
    from launcher.slurm.script import SlurmPlan
    from launcher.spec import JobSpec

RunFile = Annotated[Path, typer.Argument(help="the run's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="keys to change: section.key=value", metavar="[KEY=VALUE]...")
]
Nodes = Annotated[int, typer.Option(help="machines")]
Gpus = Annotated[
    int, typer.Option(min=0, help="GPUs of each node, with a rank for each; 0: the allocation's, or none")
]
Ranks = Annotated[
    int | None, typer.Option(help="of each node, where --gpus-per-node does not say it; left out: one")
]
Cpus = Annotated[int | None, typer.Option(min=1, help="cores of a node for all ranks; left out: one each")]
Memory = Annotated[str | None, typer.Option(help="of each node: 200G")]
Time = Annotated[str | None, typer.Option(help="limit, as sbatch takes it: 4:00:00")]
Partition = Annotated[str | None, typer.Option(help="where to queue")]
Account = Annotated[str | None, typer.Option(help="who pays")]
Qos = Annotated[str | None, typer.Option(help="quality of service")]
Constraint = Annotated[str | None, typer.Option(help="features that a node must have")]
Signal = Annotated[int, typer.Option(help="between the signal for a checkpoint and the time limit")]
Requeue = Annotated[bool, typer.Option(help="start again after the time limit or a lost rank")]
MaxRequeues = Annotated[int, typer.Option(help="starts after the first one")]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME", help="a variable every rank gets, by name")
]
Setup = Annotated[list[str] | None, typer.Option(help="a line of bash before the ranks: module load cuda")]
Sbatch = Annotated[list[str] | None, typer.Option(help="another option of sbatch: --reservation=NAME")]
Srun = Annotated[list[str] | None, typer.Option(help="another option of srun: --container-image=FILE")]
Python = Annotated[str | None, typer.Option(help="on every node; left out: the path of this one")]
Port = Annotated[int | None, typer.Option(help="of the first node; left out: one made of the job's id")]
Logs = Annotated[Path | None, typer.Option(help="folder for the job's output; left out: RUN-logs")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the script that would be submitted")]


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(slurm)


def slurm(
    run_file: RunFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    ranks_per_node: Ranks = None,
    cpus_per_task: Cpus = None,
    memory: Memory = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    signal_seconds: Signal = 120,
    requeue: Requeue = True,
    max_requeues: MaxRequeues = 10,
    env: Env = None,
    setup: Setup = None,
    sbatch: Sbatch = None,
    srun: Srun = None,
    python: Python = None,
    port: Port = None,
    logs: Logs = None,
    dry_run: DryRun = False,
) -> None:
    """Run under Slurm: queued, and again after the time limit; inside an allocation at once."""
    from launcher.slurm.backend import gpus_here
    from launcher.slurm.options import Resources
    from launcher.slurm.script import plan
    from launcher.spec import job_spec, ranks_of_node

    _refuse_silent_gpus(sbatch or [], ranks_per_node or gpus_per_node)
    gpus_per_node = gpus_per_node or (gpus_here() if ranks_per_node is None else 0)
    ranks, names = ranks_of_node(gpus_per_node, ranks_per_node), env or []
    spec = job_spec(
        run_file, overrides or [], num_nodes=nodes, ranks_per_node=ranks, variables=names, port=port
    )
    ask = Resources(time, partition, account, qos, constraint, gpus_per_node, cpus_per_task, memory)
    again = {"requeue": requeue, "max_requeues": max_requeues, "signal_seconds": signal_seconds}
    lines = {"setup": tuple(setup or ()), "sbatch": tuple(sbatch or ()), "srun": tuple(srun or ())}
    _show_or_submit(plan(spec, _options(spec, logs, python, ask=ask, **again, **lines)), dry_run)


def _refuse_silent_gpus(words: list[str], num_ranks: int) -> None:
    """Raises LaunchError where a node has GPUs and nobody says how many ranks are to use them."""
    for word in words:
        if not num_ranks and word.startswith(("--gres=gpu", "--gpus")):
            raise LaunchError(
                f"--sbatch={word}: how many ranks a node? Say --ranks-per-node (one for each GPU)"
            )


def _options(spec: "JobSpec", logs: Path | None, python: str | None, **others: Any) -> "SlurmOptions":
    """With what is known only where the command is given."""
    from launcher.slurm.backend import in_allocation
    from launcher.slurm.options import SlurmOptions

    here = Path.cwd()
    return SlurmOptions(
        folder=here,
        logs=here / (logs or spec.logs),
        python=python or sys.executable,
        allocated=in_allocation(),
        **others,
    )


def _show_or_submit(plan: "SlurmPlan", dry_run: bool) -> None:
    from launcher.slurm.backend import run_here, submit

    if dry_run:
        typer.echo(plan.text(), nl=False)
    elif plan.allocated:
        run_here(plan)
    else:
        typer.echo(f"job {submit(plan)} submitted; its output: {plan.logs}")
