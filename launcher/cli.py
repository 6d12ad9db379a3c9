"""`prefix-launch`: starts a run on one machine, on many over ssh, under Slurm or on Kubernetes.

Knows nothing of how anything is done.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.hosts import MOST_SLOTS
from launcher.kubernetes import cli as kubernetes_cli
from launcher.slurm import cli as slurm_cli
from prefix_ds.errors import EXIT_USER, PrefixError

if TYPE_CHECKING:
    from launcher.crew import CrewPlan

app = typer.Typer(
    help="Starts training runs on one machine, on many over ssh, under Slurm or on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(help="the run's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="keys to change: section.key=value", metavar="[KEY=VALUE]...")
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME", help="a variable every rank gets, by name")
]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="how often to start again after a rank, a host or the network died; never after codes 1 and 2",
    ),
]
Grace = Annotated[float, typer.Option(min=0, help="for a checkpoint, when the job is stopped")]
Port = Annotated[int | None, typer.Option(help="of the first host, for ranks to meet; left out: a free one")]
Hostfile = Annotated[Path | None, typer.Option(help="hosts, as DeepSpeed reads them")]
HostNames = Annotated[str | None, typer.Option(help="a,b or a:4,b:4")]
Slots = Annotated[int, typer.Option(help="ranks of a host of --hosts that says no number")]
Include = Annotated[str | None, typer.Option(help="hosts, without USER@, and devices to use: a@b:0,2")]
Exclude = Annotated[str | None, typer.Option(help="hosts and devices to leave out, written alike")]
SshCommand = Annotated[str, typer.Option("--ssh", help="ssh, with options")]
PythonPath = Annotated[str | None, typer.Option(help="on every host; left out: the path of this one")]
Master = Annotated[
    str | None, typer.Option(help="address of the first host for the others; left out: where ssh reaches it")
]
JobName = Annotated[str, typer.Argument(help="a number: Slurm's; a name: Kubernetes'")]
Namespace = Annotated[str, typer.Option(help="of a Kubernetes job")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="go on as lines come")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be started")]


@app.command()
def local(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=MOST_SLOTS, help="ranks; left out: one for each GPU, or one")
    ] = None,
    port: Port = None,
    max_restarts: Restarts = 0,
    grace_seconds: Grace = 600,
    dry_run: DryRun = False,
) -> None:
    """Run on this machine: a process for each GPU."""
    from launcher.here import local_plan
    from launcher.spec import job_spec
    from launcher.survey import usable_gpus

    ranks = processes or usable_gpus(os.environ)
    if not ranks:
        typer.echo("no GPU of NVIDIA's driver is found: one process; --processes says otherwise", err=True)
        ranks = 1
    spec = job_spec(run_file, overrides or [], ranks_per_node=ranks, port=port)
    plan = local_plan(spec, max_restarts=max_restarts, grace_seconds=grace_seconds)
    _show_or_submit(plan, dry_run)


@app.command()
def ssh(
    run_file: RunFile,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    hosts: HostNames = None,
    slots: Slots = 1,
    include: Include = None,
    exclude: Exclude = None,
    env: Env = None,
    ssh_command: SshCommand = "ssh",
    python: PythonPath = None,
    master: Master = None,
    port: Port = None,
    max_restarts: Restarts = 0,
    min_nodes: Annotated[int | None, typer.Option(help="hosts enough for a restart; left out: all")] = None,
    grace_seconds: Grace = 600,
    dry_run: DryRun = False,
) -> None:
    """Run on many machines that ssh reaches, with the same files under the same paths."""
    from launcher.here import ssh_plan
    from launcher.hosts import chosen_hosts
    from launcher.spec import job_spec

    spec = job_spec(run_file, overrides or [], variables=env or [], port=port)
    how = {
        "master": master,
        "max_restarts": max_restarts,
        "min_nodes": min_nodes,
        "grace_seconds": grace_seconds,
    }
    chosen = chosen_hosts(hostfile, hosts, slots, include, exclude)
    _show_or_submit(ssh_plan(spec, chosen, ssh=ssh_command, python=python, **how), dry_run)


@app.command()
def doctor(
    run_file: RunFile,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    hosts: HostNames = None,
    slots: Slots = 1,
    include: Include = None,
    exclude: Exclude = None,
    env: Env = None,
    ssh_command: SshCommand = "ssh",
    python: PythonPath = None,
    master: Master = None,
    port: Port = None,
) -> None:
    """Look at the hosts of a job before it is started: versions, files, devices, clocks, disks, links."""
    from rich.console import Console

    from launcher.doctor import examine
    from launcher.here import ssh_plan
    from launcher.hosts import chosen_hosts
    from launcher.spec import job_spec

    spec = job_spec(run_file, overrides or [], variables=env or [], port=port)
    chosen = chosen_hosts(hostfile, hosts, slots, include, exclude)
    plan = ssh_plan(spec, chosen, ssh=ssh_command, python=python, master=master)
    raise typer.Exit(examine(plan, spec.config, Console()))


@app.command()
def status(job: JobName, namespace: Namespace = "default") -> None:
    """Show where a job of Slurm (by number) or Kubernetes (by name) stands."""
    from launcher.kubernetes import backend as kubernetes
    from launcher.slurm import backend as slurm

    typer.echo(slurm.status(job).told() if job.isdecimal() else kubernetes.status(job, namespace).rstrip())


@app.command()
def logs(job: JobName, namespace: Namespace = "default", follow: Follow = False) -> None:
    """Show what its ranks have said."""
    from launcher.kubernetes import backend as kubernetes
    from launcher.slurm import backend as slurm

    if not job.isdecimal():
        raise typer.Exit(kubernetes.logs(job, namespace, follow=follow))
    for line in slurm.logs(job, follow=follow):
        typer.echo(line)


@app.command()
def cancel(job: JobName, namespace: Namespace = "default") -> None:
    """End it for good; its ranks have a while for a checkpoint."""
    from launcher.kubernetes import backend as kubernetes
    from launcher.slurm import backend as slurm

    if job.isdecimal():
        slurm.cancel(job)
    else:
        typer.echo(kubernetes.cancel(job, namespace), nl=False)


def _show_or_submit(plan: "CrewPlan", dry_run: bool) -> None:
    from launcher.conductor import submit

    if dry_run:
        typer.echo(plan.text(), nl=False)
    else:
        raise typer.Exit(submit(plan))


kubernetes_cli.add_to(app)
slurm_cli.add_to(app)


def main() -> None:
    """Runs a command; a mistake of the user's ends in one line and exit code 2."""
    try:
        app()
    except PrefixError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USER)
