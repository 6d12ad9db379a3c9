"""`prefix-launch local` and `ssh`: a plan for this machine, or for hosts that ssh reaches.

The same agent runs on both; only the command that starts it differs. Knows nothing of how a job runs.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.crew import CrewPlan, Member
from launcher.hosts import Host
from launcher.spec import JobSpec
from prefix_ds.errors import LaunchError

_AGENT = ("-P", "-m", "launcher.node", "--ordered")  # -P: no launcher.py of the folder that it begins in
_SSH_OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=8"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
)


def local_plan(spec: JobSpec, **how: Any) -> CrewPlan:
    """All ranks on this machine. `how`: other fields of CrewPlan."""
    host = Host("localhost", tuple(range(spec.ranks_per_node)))
    return _plan(spec, [Member(host, (sys.executable, *_AGENT))], how)


def ssh_plan(
    spec: JobSpec, hosts: Sequence[Host], *, ssh: str = "ssh", python: str | None = None, **how: Any
) -> CrewPlan:
    """Ranks on hosts. `ssh`: the command, with options of the user's. `python`: on every host; None: the path
    of ours. Raises LaunchError."""
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise LaunchError(f"--ssh: {ssh}: {error}") from None
    agent = "exec " + shlex.join([python or sys.executable, *_AGENT])  # the login shell over there reads it
    members = [Member(host, (*words, *_SSH_OPTIONS, host.name, agent)) for host in hosts]
    return _plan(spec, members, how)


def _plan(spec: JobSpec, members: Sequence[Member], how: dict[str, Any]) -> CrewPlan:
    fewest = how.get("min_nodes")
    if fewest is not None and not 1 <= fewest <= len(members):
        raise LaunchError(f"--min-nodes: {fewest}: expected 1 to {len(members)}")
    return CrewPlan(
        tuple(members),
        tuple(spec.train_words),
        folder=Path.cwd(),
        run_file=spec.run_file,
        logs=spec.logs,
        variables=spec.variables,
        port=spec.port,
        **how,
    )
