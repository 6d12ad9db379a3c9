"""Which hosts, and which devices of each: from a hostfile as DeepSpeed reads them, or from a list of names.

    worker-0 slots=4        # comment
    worker-1 slots=4

Filters are DeepSpeed's too: `worker-0@worker-1:0,2` includes (or excludes) whole hosts, or some of their
devices. `@` stands between hosts there, so one that is reached as `USER@worker-0` is `worker-0`.

Knows nothing of how a host is reached.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefix_ds.errors import LaunchError

MOST_SLOTS = 1024  # more ranks than any machine has devices
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True)
class Host:
    """A machine by the name under which ssh knows it, and the numbers of its devices, a rank for each."""

    name: str
    devices: tuple[int, ...]

    @property
    def has_all(self) -> bool:
        """Whether the devices are the first ones, without a gap."""
        return self.devices == tuple(range(len(self.devices)))


def hosts_of_file(path: Path) -> list[Host]:
    """Of a hostfile. Raises LaunchError with the file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile: {path}: cannot be read: {error}") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            found = _LINE.fullmatch(text)
            if found is None:
                raise LaunchError(f"{path}:{number}: {text!r}: expected NAME slots=NUMBER")
            hosts.append(_host(found["name"], int(found["slots"]), f"{path}:{number}"))
    return _checked(hosts, str(path))


def hosts_of_list(text: str, slots: int) -> list[Host]:
    """Of `a,b:4`, each with its own number of ranks or `slots`. Raises LaunchError."""
    hosts = []
    for word in filter(None, map(str.strip, text.split(","))):
        name, _, own = word.partition(":")
        if own and not own.isdecimal():
            raise LaunchError(f"--hosts: {word}: expected NAME or NAME:NUMBER")
        hosts.append(_host(name, int(own) if own else slots, "--hosts"))
    return _checked(hosts, "--hosts")


def _host(name: str, slots: int, source: str) -> Host:
    if name.split() != [name]:
        raise LaunchError(f"{source}: {name!r}: expected the name of a host")
    if not 1 <= slots <= MOST_SLOTS:
        raise LaunchError(
            f"{source}: {name}: {slots} slots: expected 1 to {MOST_SLOTS}, or leave the host out"
        )
    if name.startswith("-"):
        raise LaunchError(f"{source}: {name}: ssh would take it for an option")
    return Host(name, tuple(range(slots)))


def _checked(hosts: list[Host], source: str) -> list[Host]:
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise LaunchError(f"{source}: {name}: is there twice")
    if not hosts:
        raise LaunchError(f"{source}: names no host")
    return hosts


def filtered(hosts: Sequence[Host], include: str | None, exclude: str | None) -> list[Host]:
    """What the filters leave. Raises LaunchError for a host or device that is not there."""
    if include and exclude:
        raise LaunchError("--include and --exclude: give one of them")
    if not include and not exclude:
        return list(hosts)
    option, text = ("--include", include) if include else ("--exclude", exclude)
    words = str(text).split("@")
    named = dict(_filter(word, hosts, option) for word in words)
    if len(named) < len(words):
        raise LaunchError(f"{option}: {text}: names a host twice; say its devices in one place: NAME:0,1,2")
    left = [_left(host, named.get(host.name, ()), bool(include)) for host in hosts]
    return _checked([host for host in left if host.devices], option)


def _filter(word: str, hosts: Sequence[Host], option: str) -> tuple[str, tuple[int, ...]]:
    name, _, numbers = word.partition(":")
    without_user = {host.name.rpartition("@")[2]: host for host in hosts}
    host = without_user.get(name)
    if host is None:
        raise LaunchError(f"{option}: {name}: is none of {', '.join(without_user)}")
    try:
        devices = tuple(int(number) for number in numbers.split(",")) if numbers else host.devices
    except ValueError:
        raise LaunchError(f"{option}: {word}: expected NAME or NAME:0,1,2") from None
    for device in devices:
        if device not in host.devices:
            raise LaunchError(f"{option}: {word}: {name} has {len(host.devices)} slots, from 0")
    return host.name, devices


def _left(host: Host, named: tuple[int, ...], is_included: bool) -> Host:
    return Host(host.name, tuple(d for d in host.devices if (d in named) == is_included))


def chosen_hosts(
    hostfile: Path | None, names: str | None, slots: int, include: str | None, exclude: str | None
) -> list[Host]:
    """What the options of the command line name. Raises LaunchError."""
    if (hostfile is None) == (names is None):
        raise LaunchError("--hostfile and --hosts: give one of them")
    hosts = hosts_of_file(hostfile) if hostfile is not None else hosts_of_list(str(names), slots)
    return filtered(hosts, include, exclude)
