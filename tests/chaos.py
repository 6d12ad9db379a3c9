"""Faults on hosts that are training: what must hold whatever happens, whenever it happens.

    python -m tests.chaos 30 [SEED [PART OF A FAULT'S NAME]]

Each trial starts `prefix-launch ssh` on two hosts, does harm at a random moment, and looks: the job ends by
itself with the right exit code and names the culprit; nothing of it is left on any host; another job on the
same host lives; started again, it ends in exactly the prefix of a run nobody disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from prefix_ds.config import config_text
from prefix_ds.errors import EXIT_PEER, EXIT_STOPPED, EXIT_USER
from prefix_ds.files import TEMPORARY
from tests.hosts import HostHere, Hosts, some_hosts
from tests.ranks import command
from tests.test_kill import trained_bytes
from tests.workshop import run_config

STEPS = 300
NOTHING_LEFT_SECONDS = 15
LAUNCH = [sys.executable, "-m", "launcher"]


@dataclass
class Job:
    """A launched run."""

    hosts: Hosts
    run_file: Path
    run: Path
    process: subprocess.Popen = None
    began: float = field(default_factory=time.monotonic)

    def start(self):
        words = ["ssh", self.run_file, f"run.folder={self.run}", "--hostfile", self.hosts.hostfile()]
        words += ["--ssh", self.hosts.ssh, "--env", "PREFIX_DS_THREADS"]
        self.process = subprocess.Popen(
            [*LAUNCH, *map(str, words)],
            env=os.environ | {"PREFIX_DS_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self

    def ended(self, seconds=120):
        """Its exit code and all it said."""
        said, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def wait_for_steps(self, seconds=60):
        """Until it has trained some."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if any(self.run.glob("checkpoints/step-*")):
                return
            time.sleep(0.1)


def of_command(host, *parts):
    """The pids of a host's processes in whose command line all parts are."""
    return [pid for pid in run_pids(host) if all(part in command_of(pid) for part in parts)]


def run_pids(host):
    done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill_one(host, *parts):
    """Whether there was one to be killed."""
    pids = of_command(host, *parts)
    for pid in pids[:1]:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


def kill_rank(job, host):
    return kill_one(host, "-m prefix_ds train")


def kill_agent(job, host):
    return kill_one(host, "-m launcher.node")


def kill_session(job, host):
    return kill_one(host, "sshd: root@notty")


def cut_link(job, host):
    host.cut()
    return True


def worsen_link(job, host):
    host.worsen()
    return True


def fill_disk(job, host):
    """The run's folder is on a disk of this host's that has no room left. Of rank 0's host: it writes."""
    if host is not job.hosts.all[0] or not job.run.exists():
        return False
    while any(job.run.glob(f"checkpoints/{TEMPORARY}*")):  # under a mount it would be gone, not full
        time.sleep(0.01)
    host.run("mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", job.run)
    return True


def press_ctrl_c(job, host):
    job.process.send_signal(signal.SIGINT)
    return True


def press_ctrl_c_twice(job, host):
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    job.process.send_signal(signal.SIGINT)
    return True


def kill_launcher(job, host):
    job.process.kill()
    return True


@dataclass(frozen=True)
class Fault:
    """Harm, the exit codes it may lead to, and what must be said of it ({host}: where it was done)."""

    do: object
    codes: tuple
    said: str = ""


FAULTS = {
    "a rank is killed": Fault(kill_rank, (137,), "{host}, rank"),
    "an agent is killed": Fault(kill_agent, (EXIT_PEER,), "{host}: "),
    "sshd's session is killed": Fault(kill_session, (EXIT_PEER,), "{host}: "),
    "a link is cut": Fault(cut_link, (EXIT_PEER, EXIT_USER), "{host}: "),  # the latter: not reached at all
    "a link is slow and lossy": Fault(worsen_link, (0,)),
    "a disk is full": Fault(fill_disk, (EXIT_USER,), "No space left on device"),
    "Ctrl-C": Fault(press_ctrl_c, (EXIT_STOPPED, 130)),
    "Ctrl-C twice": Fault(press_ctrl_c_twice, (130,)),
    "the launcher is killed": Fault(kill_launcher, (-9,)),
}


def undisturbed(hosts, folder):
    """A run file, and all that it leaves of as many ranks, without hosts."""
    config = run_config(
        folder, f"train.max_steps={STEPS}", "run.save_every=20", "run.valid_every=100", "run.log_every=50"
    )
    run_file = folder / "run.yaml"
    run_file.write_text(config_text(config))
    run = folder / "undisturbed"
    for ended in command("train", run_file, f"run.folder={run}", size=len(hosts.all)):
        assert ended.code == 0, ended.err
    return run_file, trained_bytes(run, STEPS)


def trial(hosts, folder, run_file, fault, chance):
    """(what was done when, what is wrong: nothing when all held, the run's folder)."""
    victim: HostHere = chance.choice(hosts.all)
    neighbour = subprocess.Popen(
        [
            "nsenter",
            "-t",
            str(victim.sshd),
            "-n",
            sys.executable,
            "-c",
            "import time; time.sleep(600)",
            "prefix_ds",
        ]
    )
    job = Job(hosts, run_file, folder / f"trial-{time.monotonic_ns()}").start()
    try:
        moment = chance.choice(["start", "steps", "steps"])
        if moment == "steps":
            job.wait_for_steps()
        delay = chance.uniform(0.0, 6.0 if moment == "start" else 1.5)
        time.sleep(delay)
        wrong = harmed(job, victim, fault)
        if neighbour.poll() is not None:
            wrong.append("the neighbour's job was ended too")
    finally:
        neighbour.kill()
        neighbour.wait()
        victim.mend()
        victim.run("sh", "-c", 'umount "$1" || true', "sh", job.run)
    return f"{victim.name}, {delay:.1f} s after {moment}", wrong, job.run


def harmed(job, victim, fault):
    done = job.process.poll() is None and FAULTS[fault].do(job, victim)
    code, said = job.ended()
    wrong = []
    if done and code not in (*FAULTS[fault].codes, 0):
        wrong.append(f"exit code {code}: {said[-1500:]}")
    if done and code and FAULTS[fault].said.format(host=victim.name) not in said:
        wrong.append(f"does not name {victim.name}: {said[-1500:]}")
    deadline = time.monotonic() + NOTHING_LEFT_SECONDS
    while (left := jobs_processes(job.hosts)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        wrong.append(f"left: {[command_of(pid) for pid in left]}")
    return wrong


def jobs_processes(hosts):
    return [
        pid
        for host in hosts.all
        for pid in run_pids(host)
        if "-m prefix_ds train" in command_of(pid) or "-m launcher" in command_of(pid)
    ]


def again(hosts, run_file, run, expected):
    """What is wrong with the run when it is started again, nobody disturbing it."""
    code, said = Job(hosts, run_file, run).start().ended()
    if code:
        return [f"exit code {code} when started again: {said[-1500:]}"]
    return [] if trained_bytes(run, STEPS) == expected else ["another result than the undisturbed run's"]


def main():
    count, seed, part = [*sys.argv[1:], *["0", ""][len(sys.argv) - 2 :]]
    count, seed, faults = int(count), int(seed), [fault for fault in FAULTS if part in fault]
    chance, num_bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name, some_hosts(2, Path(name) / "hosts") as hosts:
        folder = Path(name) / "work"
        folder.mkdir()
        run_file, expected = undisturbed(hosts, folder)
        for number in range(count):
            fault = faults[number % len(faults)]
            began = time.monotonic()
            done, wrong, run = trial(hosts, folder, run_file, fault, chance)
            wrong += again(hosts, run_file, run, expected)
            num_bad += bool(wrong)
            told = "; ".join(wrong) or "held"
            print(f"{number + 1}: {fault}: {done}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{count} trials, {num_bad} in which something did not hold")
    sys.exit(bool(num_bad))


if __name__ == "__main__":
    main()
