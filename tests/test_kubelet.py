"""Pods of a rendered manifest train, are taken away and replaced by its own policy, and nothing is lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from launcher.kubernetes.options import KubernetesOptions
from launcher.kubernetes.plan import plan
from launcher.spec import job_spec
from prefix_ds.cli import main
from prefix_ds.config import config_text
from prefix_ds.dist import _store_of_all, joined_world
from prefix_ds.errors import EXIT_BUG, EXIT_DEVICE, EXIT_PEER, EXIT_STOPPED, EXIT_USER
from tests.kubelet import ROOT, Cluster, action_for, missing, showing_logs
from tests.ranks import command, forked, free_port, rank_environment
from tests.test_kill import STEPS, trained_bytes
from tests.workshop import run_config

IMAGE = {"PREFIX_DS_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
SECRETS = {"hub": {"HF_TOKEN": "hf_$(HOME)"}}


@pytest.fixture
def claim(tmp_path):
    """The volume `runs`: a base, data, and a run.yaml whose paths are relative to it."""
    folder = tmp_path / "claim"
    folder.mkdir()
    config = run_config(folder, f"train.max_steps={STEPS}", "run.save_every=2", "run.valid_every=5")
    (folder / "run.yaml").write_text(config_text(config).replace(f"{folder}/", ""))
    return folder


def manifests_of(claim, *overrides):
    spec = job_spec(claim / "run.yaml", overrides, num_nodes=2, variables=["HF_TOKEN"])
    options = KubernetesOptions(
        "this-machine", gpus_per_node=0, runs_claim="runs", shm="256Mi", grace_seconds=60, env_secret="hub"
    )
    return list(yaml.safe_load_all(plan(spec, options).text()))


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return sum("train/loss" in line for line in path.read_text().splitlines()) if path.exists() else 0


def until(job, holds, seconds=240):
    """Lets the cluster work until it is so."""
    end = time.monotonic() + seconds
    while job.is_running() and not holds():
        assert time.monotonic() < end, "too long"
        time.sleep(0.1)


def test_the_policy_of_the_manifest_says_which_ends_count(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: x}\nprefix: {text: x}\ndata: {train: x.jsonl, target: '{x}'}\n")
    spec = job_spec(path)
    job = list(yaml.safe_load_all(plan(spec, KubernetesOptions("image")).text()))[-1]["spec"]
    alone = {
        code: action_for(job, code, False)
        for code in (EXIT_BUG, EXIT_USER, EXIT_STOPPED, EXIT_PEER, EXIT_DEVICE, 134, 137)
    }
    counted = {76: "Count", 77: "Count", 134: "Count", 137: "Count"}
    assert alone == {1: "FailJob", 2: "FailJob", 75: "Ignore"} | counted
    assert {action_for(job, code, True) for code in (1, 75, 137, 143)} == {"Ignore"}


@pytest.mark.skipif(bool(missing()), reason=missing() or "none")
def test_pods_that_are_taken_away_cost_nothing_but_time(claim, tmp_path, monkeypatch):
    monkeypatch.chdir(claim)
    for ended in command("train", "run.yaml", "run.folder=calm", size=2):
        assert ended.code == 0, ended.err
    pods = tmp_path / "pods"
    with Cluster(pods, {"runs": claim}, SECRETS, IMAGE) as cluster:
        job = cluster.submit(manifests_of(claim, "run.folder=wild"))
        with showing_logs(job, pods):
            until(job, lambda: steps_done(claim / "wild") >= 4)
            job.disrupt(1)  # drained: it has its grace
            until(job, lambda: len(job.ended) == 2)
            assert {(code, action) for _, code, action in job.ended} == {(EXIT_STOPPED, "Ignore")}
            before = steps_done(claim / "wild")
            until(job, lambda: steps_done(claim / "wild") >= before + 4)
            job.disrupt(0, grace_seconds=0)  # its node is lost, and with it rank 0 and where ranks meet
            until(job, lambda: False)
            assert not job.is_failed
            assert job.done == {0, 1}
    assert job.ended[2:4] == [(0, 137, "Ignore"), (1, EXIT_PEER, "Count")]
    assert trained_bytes(claim / "wild") == trained_bytes(claim / "calm")


def check_process(pod):
    """The first process is what the manifest says: whom it runs as, and what is in its environment."""
    status = dict(line.split(":\t") for line in pod.told("status").splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["10001"] * 4
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert {"HF_TOKEN=hf_$(HOME)", "HOME=/home/prefix"} <= set(pod.told("environ").split("\0"))
    mounts = {line.split()[4]: line.split()[5] for line in pod.told("mountinfo").splitlines()}
    writable = {path: options.startswith("rw") for path, options in mounts.items()}
    assert not writable["/"]
    assert not writable["/config"]
    assert all(writable[path] for path in ("/work", "/tmp", "/dev/shm", "/home/prefix"))


@pytest.mark.skipif(bool(missing()), reason=missing() or "none")
def test_a_users_mistake_ends_the_job_at_once(claim, tmp_path):
    pods = tmp_path / "pods"
    with Cluster(pods, {"runs": claim}, SECRETS, IMAGE) as cluster:
        job = cluster.submit(manifests_of(claim, "data.train=nothing.jsonl"))
        with showing_logs(job, pods):
            until(job, lambda: False)
            assert job.is_failed
            assert (EXIT_USER, "FailJob") in {(code, action) for _, code, action in job.ended}
            said = "".join(path.read_text() for path in Path(pods).glob("*/log"))
            assert "nothing.jsonl" in said


def test_a_pod_waits_for_the_first_one_until_it_is_told_to_stop():
    """Where the first has no machine yet, an end would be counted, and another pod would wait as this one."""
    words = ["--nodes=2", "--node=1", "--master=nowhere.invalid:29500", "--", "train", "run.yaml"]
    program = [sys.executable, "-m", "launcher.node", *words]
    waiting = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert waiting.stdout.readline().startswith("waiting for nowhere.invalid, which runs nowhere yet")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(3)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.communicate(timeout=30)[0] == ""
    assert waiting.returncode == EXIT_STOPPED


@dataclass(frozen=True)
class Arriving:
    """A rank of two that meets the other, from the fork server."""

    process: BaseProcess
    errors: Path

    def said(self, seconds=60):
        """On its error stream, until it ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it did not end"
        return self.errors.read_text()


@pytest.fixture
def arriving(tmp_path):
    """Starts such ranks; what is left of them is killed."""
    started = []

    def arriving(rank, port, work, *arguments):
        errors = tmp_path / f"rank-{rank}"
        process = forked(_arrived, errors, rank, port, work, arguments)
        process.start()
        started.append(process)
        return Arriving(process, errors)

    yield arriving
    for process in started:
        process.kill()
        process.join()


def _arrived(errors, rank, port, work, arguments):
    os.environ.update(rank_environment(rank, 2, port))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    work(*arguments)


def meet(*minutes):
    with joined_world(*minutes):
        pass


def come_and_say_nothing():
    _store_of_all(1, 2, timedelta(minutes=1))
    time.sleep(60)


def main_of(*words):
    sys.argv = ["prefix-ds", *words]
    main()


def until_it_listens(first, port):
    while first.process.is_alive():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)


def test_a_peer_that_is_lost_while_ranks_meet_is_no_bug(arriving):
    with socket.create_server(("127.0.0.1", 0)) as first:
        arrived = arriving(1, first.getsockname()[1], meet, 0.1, 0.1)
        first.accept()[0].close()
    assert "PeerLost: another rank is gone" in arrived.said()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_does_not_come_is_no_bug(arriving, rank):
    assert "PeerLost: another rank is gone" in arriving(rank, free_port(), meet, 0.05, 0.05).said()


def test_a_peer_that_comes_and_says_nothing_is_no_bug(arriving):
    """It is at the store, and dies before the groups are made."""
    port = free_port()
    arriving(1, port, come_and_say_nothing)
    waiting = arriving(0, port, meet, 0.03)
    assert "PeerLost: another rank is gone" in waiting.said()


def test_a_peer_may_come_later_than_a_sum_is_waited_for(arriving):
    port = free_port()
    waiting = arriving(0, port, meet, 0.03)
    until_it_listens(waiting, port)
    time.sleep(4)
    late = arriving(1, port, meet, 0.5)
    assert [waiting.said(), late.said()] == ["", ""]
    assert [waiting.process.exitcode, late.process.exitcode] == [0, 0]


def test_a_port_that_is_in_use_is_one_line_and_another_start(arriving):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        first = arriving(0, port, main_of, "links")
        said = first.said()
    assert first.process.exitcode == EXIT_PEER
    assert len(said.splitlines()) == 1
    assert f"port {port} of {socket.gethostname()} is in use" in said
    assert "--port" in said


def test_a_signal_while_ranks_meet_ends_one_at_once(arriving, tmp_path):
    """It has nothing to save, and the other may be hours away."""
    path, port = tmp_path / "run.yaml", free_port()
    path.write_text("model: {name: x}\nprefix: {text: x}\ndata: {train: x.jsonl, target: '{x}'}\n")
    waiting = arriving(0, port, main_of, "train", str(path))
    until_it_listens(waiting, port)
    waiting.process.terminate()
    waiting.said(10)
    assert waiting.process.exitcode == -signal.SIGTERM
