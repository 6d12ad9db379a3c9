"""Hosts that are real to each other, on one machine: network namespaces with addresses, names and sshd.

    with some_hosts(3, folder) as hosts: ...

Needs root, iproute2, nftables and openssh-server. Each host has its own network, host name and mounts, and
shares files and processes with the machine. `hosts.ssh` is the ssh command that knows their names and keys.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent  # whose agent the hosts run, whatever is installed
BRIDGE, NETWORK = "pds-bridge", "10.213.77"
TOOLS = ("ip", "tc", "nft", "sshd", "ssh-keygen", "unshare", "nsenter")
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
LogLevel ERROR
PermitRootLogin yes
MaxStartups 100
SetEnv PYTHONPATH={root}
"""
LOSS = """
add table netdev {table}
add chain netdev {table} lossy {{ type filter hook ingress device "{link}" priority 0; }}
add rule netdev {table} lossy numgen random mod 100 < 2 drop
"""
SSH = """
Host {name}
  HostName {address}
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing():
    """Why hosts cannot be made here; empty: they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install openssh-server iproute2 nftables"
    name = f"pds-try-{os.getpid()}"  # several workers of pytest ask at once
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "network namespaces cannot be made here"


MISSING = missing()
needs_hosts = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@dataclass(frozen=True)
class HostHere:
    """One of them."""

    name: str
    address: str
    link: str  # this machine's end of its cable
    sshd: int  # pid

    def run(self, *words, **options):
        """A command on it, in its network, host name and mounts."""
        inside = ["nsenter", "-t", str(self.sshd), "-n", "-u", "-m", *map(str, words)]
        return subprocess.run(inside, check=True, capture_output=True, text=True, **options)

    def processes(self):
        """Pids of all that run on it, but sshd's own."""
        pids = run("ip", "netns", "pids", self.name).split()
        return [int(pid) for pid in pids if _command(pid) and "sshd" not in _command(pid)]

    def cut(self):
        """Takes its cable out."""
        run("ip", "link", "set", self.link, "down")

    def worsen(self):
        """Lets 4 Mbit/s through to it, and loses 2 % of what it sends. (netem is not in every kernel.)"""
        slow = ["rate", "4mbit", "burst", "16kb", "latency", "300ms"]
        run("tc", "qdisc", "replace", "dev", self.link, "root", "tbf", *slow)
        rules = LOSS.format(table=self._table, link=self.link)
        subprocess.run(["nft", "-f", "-"], input=rules, check=True, capture_output=True, text=True)

    def mend(self):
        """Makes its link whole again."""
        run("ip", "link", "set", self.link, "up")
        subprocess.run(["tc", "qdisc", "del", "dev", self.link, "root"], capture_output=True, check=False)
        subprocess.run(["nft", f"delete table netdev {self._table}"], capture_output=True, check=False)

    @property
    def _table(self):
        return self.link.replace("-", "_")


@dataclass(frozen=True)
class Hosts:
    """All of them, and how to reach them."""

    all: tuple[HostHere, ...]
    ssh: str
    folder: Path

    def hostfile(self, slots=1):
        """A file that names them."""
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.all))
        return path

    def processes(self):
        """On all of them."""
        return [pid for host in self.all for pid in host.processes()]

    def empty_within(self, seconds):
        """Whether nothing runs on them any more, before so many seconds have passed."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self.processes()


def run(*words):
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


@contextlib.contextmanager
def some_hosts(count, folder):
    """`host-0` and so on, with addresses in one network; keys and settings in `folder`."""
    names = [f"host-{n}" for n in range(count)]
    _take_down(names)
    folder.mkdir(exist_ok=True)
    for key in ("host_key", "user_key"):
        if not (folder / key).exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    Path("/run/sshd").mkdir(exist_ok=True)
    started = []
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        settings = [_set_up(n, name, names, folder, started) for n, name in enumerate(names)]
        (folder / "ssh_config").write_text(
            "".join(SSH.format(name=h.name, address=h.address, folder=folder) for h in settings)
        )
        hosts = Hosts(tuple(settings), f"ssh -F {folder}/ssh_config", folder)
        _wait_for_sshd(hosts)
        yield hosts
    finally:
        for process in started:
            process.kill()
            process.wait()
        _take_down(names)


def _set_up(number, name, names, folder, started):
    link, address = f"pds-{name}", f"{NETWORK}.{number + 1}"
    run("ip", "netns", "add", name)
    run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", link, "master", BRIDGE, "up")
    for words in (
        ["address", "add", f"{address}/24", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
    ):
        run("ip", "-n", name, *words)
    known = Path("/etc/netns") / name
    known.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{n + 1} {other}" for n, other in enumerate(names))]
    (known / "hosts").write_text("\n".join(lines) + "\n")
    conf = folder / "sshd_config"
    conf.write_text(SSHD.format(folder=folder, root=ROOT))
    inside = f"hostname {name} && exec $(command -v sshd) -D -f {conf}"
    process = subprocess.Popen(
        ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inside], stderr=subprocess.DEVNULL
    )
    started.append(process)
    return HostHere(name, address, link, process.pid)


def _wait_for_sshd(hosts):
    for host in hosts.all:
        for _ in range(100):
            done = subprocess.run([*hosts.ssh.split(), host.name, "true"], capture_output=True, check=False)
            if done.returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{host.name}: {done.stderr.decode()}")


def _take_down(names):
    """Also what a killed test has left."""
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"pds-{name}"], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
