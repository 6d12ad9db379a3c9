"""Hosts that train together, and how: what `--dry-run` prints and what is started are this one value.

Knows nothing of what happens once it runs.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.hosts import Host


@dataclass(frozen=True)
class Member:
    """A host and the command that starts the agent on it."""

    host: Host
    command: tuple[str, ...]


@dataclass(frozen=True)
class CrewPlan:
    """A job on some hosts. Values of variables are not in it: they are read when it starts."""

    members: tuple[Member, ...]
    words: tuple[str, ...]  # arguments of prefix-ds, on every rank
    folder: Path  # in which every rank runs
    run_file: Path
    logs: Path  # a file a rank, on its own host
    variables: tuple[str, ...] = ()
    master: str | None = None  # the first host's address; None: where ssh reached it
    port: int | None = None
    max_restarts: int = 0
    min_nodes: int | None = None  # None: all of them
    grace_seconds: float = 600

    @property
    def fewest(self) -> int:
        """Hosts without which it does not run."""
        return len(self.members) if self.min_nodes is None else self.min_nodes

    def order(self, environment: dict[str, str], port: int | None) -> dict[str, Any]:
        """What an agent is told first."""
        return {
            "folder": str(self.folder),
            "run_file": str(self.run_file),
            "logs": str(self.logs),
            "environment": environment,
            "port": port,
            "master": self.master,
        }

    def text(self) -> str:
        """For people: YAML."""
        shown = {
            "run": shlex.join(["prefix-ds", *self.words]),
            "folder": str(self.folder),
            "logs": str(self.logs),
            "variables": list(self.variables),
            "master": self.master or "the first host's address",
            "port": self.port or "one that is free",
            "restarts": f"{self.max_restarts}, with at least {self.fewest} of {len(self.members)} hosts",
            "grace_seconds": self.grace_seconds,
            "ranks": self._ranks(),
        }
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=1000)

    def _ranks(self) -> list[dict[str, Any]]:
        first = 0
        shown: list[dict[str, Any]] = []
        for member in self.members:
            size = len(member.host.devices)
            shown.append(
                {
                    "host": member.host.name,
                    "ranks": f"{first} to {first + size - 1}" if size > 1 else str(first),
                    "devices": list(member.host.devices),
                    "agent": shlex.join(member.command),
                }
            )
            first += size
        return shown
