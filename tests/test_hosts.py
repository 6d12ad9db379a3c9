"""Many hosts, for real: ssh between network namespaces. What one process trains, they train."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_ds.config import config_text, read_config
from prefix_ds.tracking.metrics import read_metrics
from tests.chaos import LAUNCH, Job, again, trial, undisturbed
from tests.hosts import needs_hosts, run, some_hosts
from tests.ranks import command
from tests.test_launcher import HOSTILE
from tests.workshop import run_config

pytestmark = needs_hosts
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with some_hosts(4, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a run file, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("work")
    config = run_config(folder, "train.max_steps=8")
    (folder / "run.yaml").write_text(config_text(config))
    (ended,) = command("train", folder / "run.yaml", f"run.folder={folder}/alone")
    assert ended.code == 0, ended.err
    return folder


def started(*words, launch=LAUNCH, **environment):
    return subprocess.Popen(
        [*launch, *map(str, words)],
        env=os.environ | {"PREFIX_DS_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(*words, seconds=120, **environment):
    process = started(*words, **environment)
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def over_ssh(hosts, work, run, names, *words):
    """The words of a launch."""
    common = ["--ssh", hosts.ssh, "--env", "PREFIX_DS_THREADS"]
    return ["ssh", work / "run.yaml", f"run.folder={work / run}", "--hosts", names, *common, *words]


def losses(run):
    return [record.values["train/loss"] for record in read_metrics(run) if "train/loss" in record.values]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_walk_the_curve_of_one_process(hosts, work, count):
    names = ",".join(host.name for host in hosts.all[:count])
    done = launched(*over_ssh(hosts, work, f"over-{count}", names))
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(work / f"over-{count}")
    assert len(found) == 8
    assert found == pytest.approx(losses(work / "alone"), rel=1e-6)
    logs = sorted(path.name for path in (work / f"over-{count}-logs").iterdir())
    assert logs == [f"host-{n}-rank-{n}.log" for n in range(count)]


def test_deepspeeds_own_launcher_works_too(hosts, work, tmp_path):
    """What its runner does not pass on stands in .deepspeed_env, as its documentation says."""
    lines = ["GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", "PREFIX_DS_THREADS=1", f"PYTHONPATH={ROOT}"]
    (tmp_path / ".deepspeed_env").write_text("\n".join(lines) + "\n")
    hostfile = replace(hosts, all=hosts.all[:2], folder=tmp_path).hostfile()
    words = ["--hostfile", hostfile, "--master_addr", hosts.all[0].address, "--module", "prefix_ds", "train"]
    program = "import sys; from deepspeed.launcher.runner import main; main(sys.argv[1:])"
    ssh = tmp_path / "bin" / "ssh"  # it calls `ssh NAME`, which a user's ~/.ssh/config makes work
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {hosts.ssh.removeprefix("ssh ")} "$@"\n')
    ssh.chmod(0o755)
    variables = {"HOME": str(tmp_path), "PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words), work / "run.yaml", f"run.folder={work}/deepspeed"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(work / "deepspeed") == pytest.approx(losses(work / "alone"), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "host-0,10.213.77.99"], "10.213.77.99: "),
        (["--hosts", "host-0,host-1", "--python", "/nowhere/python"], "host-0: .*/nowhere/python"),
        (["--hosts", "host-0,host-1", "--port", "22"], "host-0: --port: 22: Address already in use"),
        (["--hosts", "host-0,host-1", "--env", "NOT_SET"], "--env: NOT_SET: is not set here"),
        (["--hosts", "host-0,host-1", "--master", "node..1"], "host-0: --master: node..1: expected a name"),
        (["--hosts", "host-0,host-1", "--master", "n.invalid"], "host-0: --master: n.invalid: .* on host-0"),
    ],
)
def test_what_keeps_a_job_from_starting_is_told_in_a_line_each(hosts, work, words, said):
    job = ["ssh", work / "run.yaml", f"run.folder={work}/never", "--ssh", hosts.ssh]
    done = launched(*job, *words, seconds=20)
    assert done.returncode == 2, done.stderr
    assert re.match(f"error: {said}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    end = time.monotonic() + 5
    while hosts.processes():  # an ssh that was told to end may be on its way
        assert time.monotonic() < end, hosts.processes()
        time.sleep(0.1)
    assert not (work / "never").exists()


def test_secrets_are_on_no_command_line_and_in_no_log(hosts, work):
    words = over_ssh(hosts, work, "secret", "host-0,host-1", "train.max_steps=60", "--env", "HF_TOKEN")
    process = started(*words, HF_TOKEN="hf_verysecret")
    commands = environments = ""
    while process.poll() is None:
        commands += run("ps", "axww", "-o", "args")
        for pid in hosts.processes():
            try:
                environments += Path(f"/proc/{pid}/environ").read_text()
            except OSError:
                continue
        time.sleep(0.05)  # they are there for seconds, and need the cores
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "-m prefix_ds train" in commands
    assert "HF_TOKEN=hf_verysecret" in environments
    logs = "".join(path.read_text() for path in (work / "secret-logs").iterdir())
    assert "hf_verysecret" not in commands + out + err + logs


def test_hostile_names_arrive_over_ssh(hosts, work):
    """Quotes, `$`, a newline: in the folder, the run file, and an override."""
    folder = work / HOSTILE
    folder.mkdir()
    config = run_config(work, "train.max_steps=4")
    (folder / "run.yaml").write_text(config_text(config))
    words = ["ssh", folder / "run.yaml", f"run.folder={folder}/run", f"mlflow.name={HOSTILE}"]
    done = launched(*words, "--hosts", "host-0,host-1", "--ssh", hosts.ssh)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_config(folder / "run" / "run.yaml").mlflow.name == HOSTILE


HURRIED = "from launcher import cli, conductor; conductor._PATIENCE_SECONDS = 9; cli.main()"


def test_a_host_that_stays_away_is_gone_on_without(hosts, work):
    """Three hosts lose one for good in the middle of a run; two finish it. (The lost one is asked four times,
    instead of for a minute.)"""
    words = ["train.max_steps=160", "run.save_every=20", "--max-restarts", "1", "--min-nodes", "2"]
    words = over_ssh(hosts, work, "fewer", "host-0,host-1,host-2", *words)
    process = started(*words, launch=[sys.executable, "-c", HURRIED])
    Job(hosts, work / "run.yaml", work / "fewer", process).wait_for_steps()
    hosts.all[2].cut()
    try:
        out, err = process.communicate(timeout=300)
    finally:
        hosts.all[2].mend()
    assert process.returncode == 0, out + err
    assert "host-2: no sign of life" in err
    assert "going on without host-2" in err
    assert hosts.empty_within(15)


def test_a_doctor_names_the_host_that_differs(hosts, work):
    words = ["doctor", work / "run.yaml", "--ssh", hosts.ssh, "--hosts"]
    done = launched(*words, "host-0,host-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-gather" in done.stdout
    assert "nothing is wrong" in done.stdout
    base = work / "base"
    hosts.all[1].run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", base)
    try:
        done = launched(*words, "host-0,host-1,host-9")
    finally:
        hosts.all[1].run("umount", base)
    assert done.returncode == 2
    assert f"host-1: {base}: has other names or sizes" in done.stdout
    assert "host-9: ssh: Could not resolve hostname" in done.stdout


@pytest.fixture(scope="module")
def calm(hosts, tmp_path_factory):
    """Two of the hosts, a folder, a run file, and what a run that nobody disturbs leaves."""
    folder, two = tmp_path_factory.mktemp("chaos"), replace(hosts, all=hosts.all[:2])
    return two, folder, *undisturbed(two, folder)


@pytest.mark.parametrize(
    "fault", ["a rank is killed", "an agent is killed", "a link is cut", "a disk is full"]
)
def test_whatever_happens_the_run_ends_as_if_nothing_had(calm, fault):
    """A handful of `python -m tests.chaos 30`."""
    two, folder, run_file, expected = calm
    done, wrong, left = trial(two, folder, run_file, fault, random.Random(fault))
    wrong += again(two, run_file, left, expected)
    assert not wrong, done
