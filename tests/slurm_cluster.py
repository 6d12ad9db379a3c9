"""A real Slurm of two nodes on one machine: a controller here, a slurmd in each of two network namespaces.

Each node has its own address, host name and /etc/hosts; the disk is shared, as it is on a cluster. Everything
(keys, sockets, state) lies in the folder it is given, so a Slurm of the machine's own is not touched.
Processes are tracked by cgroups, as on most clusters, where this machine lets us make them: then a signal
reaches a task's first process alone. Needs root and Debian's `slurm-wlm` and `munge`.

Knows nothing of training.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
NODES = ("calm", "wild")
_BRIDGE, _HERE, _NET = "prefixbr", "10.97.0.1", "10.97.0"
_FREEZER = Path("/sys/fs/cgroup/freezer")
PROCTRACK = "cgroup" if os.access(_FREEZER, os.W_OK) else "linuxproc"
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def missing():
    """Why no cluster can be brought up here; an empty text if it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_SYSTEM_PATH)]
    if os.environ.get("CI") == "true":
        return "seven minutes, most of them waiting for Slurm's own clocks: too long for every change"
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge iproute2)"
    if os.getuid():
        return "network namespaces need root"
    return ""


def call(*words):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


class Cluster:
    """From `with` to its end."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.conf = self.folder / "slurm.conf"
        self._daemons = []

    def __enter__(self):
        self._take_down()  # what a killed test has left
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        try:
            self._network()
            self._munge()
            self._configure()
            self._start("slurmctld", "-D", "-i", "-f", self.conf)
            for node in NODES:
                self.start_node(node)
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        self._take_down()

    def _take_down(self):
        for node in NODES:
            self.kill_node(node)
            for folder in sorted(_FREEZER.glob(f"slurm_{node}/**/"), reverse=True):
                with contextlib.suppress(OSError):  # what has been killed is gone in a moment
                    folder.rmdir()
        for words in (*(("netns", "del", node) for node in NODES), ("link", "del", _BRIDGE)):
            subprocess.run(["ip", *words], capture_output=True, check=False)

    @property
    def environment(self):
        """What a user of the cluster has."""
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def start_node(self, node):
        """Its slurmd, with the node's network, host name and hosts file."""
        names = f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts"
        inside = f"{names}; exec slurmd -D -N {node} -f {self.conf}"
        network = f"--net=/var/run/netns/{node}"
        self._start("nsenter", network, "unshare", "--mount", "--uts", "sh", "-c", inside)

    def kill_node(self, node):
        """All processes of a node, at once, as a power cut would."""
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node, pattern=""):
        """Numbers of a node's processes whose command line has the pattern in it."""
        found = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split() if re.search(pattern, _command_line(pid))]

    def _network(self):
        call("ip", "link", "add", _BRIDGE, "type", "bridge")
        call("ip", "addr", "add", f"{_HERE}/24", "dev", _BRIDGE)
        call("ip", "link", "set", _BRIDGE, "up")
        lines = ["127.0.0.1 localhost", f"{_HERE} {os.uname().nodename}"]
        for number, node in enumerate(NODES):
            address, link = f"{_NET}.{number + 11}", f"prefix{number}"
            call("ip", "netns", "add", node)
            call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", node)
            call("ip", "link", "set", link, "master", _BRIDGE, "up")
            call("ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            call("ip", "-n", node, "link", "set", "eth0", "up")
            call("ip", "-n", node, "link", "set", "lo", "up")
            lines.append(f"{address} {node}")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def _munge(self):
        place = self.folder / "munge"
        (place / "key").write_bytes(os.urandom(128))
        (place / "key").chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        words = [f"--{option}={place / file}" for option, file in files.items()]
        self._start("munged", "--foreground", "--force", *words)
        _until((place / "socket").exists, "munged")

    def _configure(self):
        sizes = f"CPUs={os.cpu_count()} Gres=gpu:1"
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={_NET}.{number + 11} NodeHostname={node} {sizes}"
            for number, node in enumerate(NODES)
        )
        names = {"here": _HERE, "host": os.uname().nodename, "folder": self.folder, "nodes": nodes}
        names["proctrack"] = PROCTRACK
        self.conf.write_text(_CONF.format(**names))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")

    def _start(self, *words):
        log = (self.folder / "log" / "daemons.log").open("a")
        environment = self.environment | {"PATH": _SYSTEM_PATH}
        self._daemons.append(subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, env=environment))

    def _wait_until_idle(self):
        def idle():
            words = ["sinfo", "-h", "-o", "%D %t"]
            told = subprocess.run(words, capture_output=True, text=True, check=False, env=self.environment)
            return told.stdout.split() == [str(len(NODES)), "idle"]

        _until(idle, "slurm", self.folder / "log" / "daemons.log")


_CONF = """
ClusterName=prefix
SlurmctldHost={host}({here})
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
SlurmdTimeout=20
{nodes}
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _until(holds, what, log=None, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} did not start: {log.read_text()[-3000:] if log else ''}"
        time.sleep(0.2)
