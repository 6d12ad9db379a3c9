"""A real Slurm of two nodes trains, loses ranks and nodes, is stopped and goes on, and gives the same prefix.

Every job is a real one: sbatch, slurmctld, slurmd, our agent and a rank on each of two nodes with a network
each. Takes some minutes, since every start of a rank imports torch.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launcher.slurm import backend
from launcher.slurm.options import Resources, SlurmOptions
from launcher.slurm.script import plan
from launcher.spec import job_spec
from prefix_ds.config import config_text, read_config
from tests.slurm_cluster import NODES, Cluster, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
STEPS, ROOT = 60, Path(__file__).parent.parent
HOSTILE = 'mlflow.name=it\'s "$HOME" `id`\\ ü\n#SBATCH --hold # \r\n'  # reaches every rank


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    with Cluster(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(running.conf))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PREFIX_DS_THREADS", "1")
        patch.setenv("OUR_TOKEN", "s3cret")
        yield running


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder whose name needs quotes everywhere."""
    folder = tmp_path_factory.mktemp("room") / "a 'b' $c ü 100%"
    folder.mkdir()
    return folder


def written(room, name):
    """The run file of a run that is long enough to be hit."""
    from tests.workshop import run_config

    every = (
        f"train.max_steps={STEPS}",
        "run.save_every=5",
        "run.valid_every=20",
        f"run.folder={room}/{name}",
    )
    path = room / f"{name}.yaml"
    path.write_text(config_text(run_config(room, *every)))
    return path


def queued(room, name, *overrides, **options):
    spec = job_spec(written(room, name), [*overrides, HOSTILE], num_nodes=2, variables=["OUR_TOKEN"])
    options = SlurmOptions(folder=room, logs=room / f"{name}-logs", **options)
    job = plan(spec, options)
    assert "s3cret" not in job.text()
    return backend.submit(job)


def until(holds, job, seconds=240):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{backend.status(job).told()}\n{log(job)[-4000:]}"
        time.sleep(0.05)


def log(job):
    return "\n".join(backend.logs(job))


def over(job):
    until(lambda: backend.status(job).is_over, job)
    return backend.status(job)


def steps_done(room, name):
    metrics = room / name / "metrics.jsonl"
    return metrics.read_text().count("train/loss") if metrics.exists() else 0


def running(room, name, *overrides):
    """A job in the middle of its run."""
    job = queued(room, name, *overrides)
    until(lambda: steps_done(room, name) >= 8, job)  # there is a checkpoint of step 5
    return job


def trained(room, name):
    """Every tensor of a finished run."""
    from prefix_ds.checkpoint import latest, read_prefix

    checkpoint = latest(room / name)
    assert checkpoint.step == STEPS
    best = read_prefix(room / name / "prefix")
    slots = {f"{slot}.{n}": t for slot, pair in best.slots.items() for n, t in enumerate(pair)}
    return {name: tensor.numpy() for name, tensor in (checkpoint.tensors() | slots).items()}


def same(some, others):
    return {name: t.tobytes() for name, t in some.items()} == {
        name: t.tobytes() for name, t in others.items()
    }


@pytest.fixture(scope="module")
def undisturbed(cluster, room):
    job = queued(room, "calm", setup=('echo "the token has ${#OUR_TOKEN} letters"',))
    ended = over(job)
    assert (ended.state, ended.exit_code, ended.num_restarts) == ("COMPLETED", 0, 0), log(job)
    assert "the token has 6 letters" in log(job)
    assert read_config(room / "calm/run.yaml").mlflow.name == HOSTILE.partition("=")[2]
    assert all(f"[{node}:{rank}]" in log(job) for rank, node in enumerate(NODES)), log(job)
    return trained(room, "calm")


def test_two_nodes_find_the_prefix_of_one_process(undisturbed, room):
    alone = [sys.executable, "-m", "prefix_ds", "train", written(room, "alone")]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    for name, tensor in trained(room, "alone").items():
        np.testing.assert_allclose(undisturbed[name], tensor, atol=1e-6, rtol=0, err_msg=name)


def test_a_killed_rank_costs_nothing_but_time(undisturbed, cluster, room):
    job = running(room, "killed")
    (rank,) = cluster.processes("wild", "^[^ ]*python.* -m prefix_ds train")[:1]
    os.kill(rank, signal.SIGKILL)
    ended = over(job)
    assert (ended.state, ended.num_restarts) == ("COMPLETED", 1), log(job)
    assert "ended with 137: queued again" in log(job)
    assert same(undisturbed, trained(room, "killed"))


def test_a_killed_agent_costs_nothing_but_time(undisturbed, cluster, room):
    job = running(room, "orphaned")
    for process in cluster.processes("wild", "launcher.node"):
        os.kill(process, signal.SIGKILL)
    ended = over(job)
    assert (ended.state, ended.num_restarts) == ("COMPLETED", 1), log(job)
    assert same(undisturbed, trained(room, "orphaned"))


def test_a_node_that_loses_power_costs_nothing_but_time(undisturbed, cluster, room):
    job = running(room, "dark")
    cluster.kill_node("wild")
    until(lambda: backend.status(job).state != "RUNNING", job)
    cluster.start_node("wild")
    ended = over(job)
    assert (ended.state, ended.num_restarts) == ("COMPLETED", 1), log(job)
    assert same(undisturbed, trained(room, "dark"))


def test_the_signal_before_the_time_limit_leads_to_another_start(undisturbed, cluster, room):
    """What Slurm sends by itself with --signal=TERM@120, sent by hand."""
    job = running(room, "stopped")
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    ended = over(job)
    assert (ended.state, ended.num_restarts) == ("COMPLETED", 1), log(job)
    assert "ended with 75: queued again" in log(job)
    assert "checkpoint written" in log(job)
    assert same(undisturbed, trained(room, "stopped"))


def test_cancel_ends_it_for_good(cluster, room):
    from prefix_ds.checkpoint import latest

    job = running(room, "cancelled", "train.max_steps=5000")
    backend.cancel(job)
    assert over(job).state == "CANCELLED"
    until(lambda: not any(cluster.processes(node, "prefix_ds|launcher|srun") for node in NODES), job)
    assert "queued again" not in log(job)
    assert latest(room / "cancelled").step == steps_done(room, "cancelled"), log(job)


def test_a_users_mistake_ends_it_with_2(cluster, room):
    job = queued(room, "mistaken", "data.train=nowhere.jsonl")
    ended = over(job)
    assert (ended.state, ended.exit_code, ended.num_restarts) == ("FAILED", 2, 0), log(job)
    assert "nowhere.jsonl" in log(job)


def test_what_slurm_refuses_is_one_line(cluster, room):
    spec = job_spec(written(room, "refused"))
    options = SlurmOptions(folder=room, logs=room)
    options = replace(options, ask=replace(options.ask, partition="nope"))
    with pytest.raises(backend.LaunchError, match=r"^sbatch: invalid partition specified: nope; "):
        backend.submit(plan(spec, options))


def test_variables_of_sbatch_do_not_go_before_what_the_user_typed(cluster, room, monkeypatch):
    for name, value in {"PARTITION": "nope", "TIMELIMIT": "7", "EXPORT": "NONE", "NO_REQUEUE": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    setup = ('echo "the token has ${#OUR_TOKEN} letters"', "exit 2")
    job = queued(room, "typed", setup=setup, ask=Resources("5:00", "short"), signal_seconds=30)
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
    ).stdout
    assert all(field in shown for field in ("Partition=short", "TimeLimit=00:05:00", "Requeue=1"))
    assert over(job).exit_code == 2
    assert "the token has 6 letters" in log(job)


def test_an_allocations_gpus_have_a_rank_each(cluster, room):
    words = [sys.executable, "-m", "launcher", "slurm", written(room, "counted"), "--dry-run"]
    allocated = ["salloc", "--nodes=1", "--gpus-per-node=1", "--quiet"]
    shown = subprocess.run([*allocated, *words], cwd=room, capture_output=True, text=True, check=True)
    assert " --ranks 1 --gpus 1 " in shown.stdout


def test_in_an_allocation_it_runs_at_once(undisturbed, cluster, room):
    """The run is done already, so every rank finds nothing to do; then a mistake."""
    program = "from launcher import cli; from launcher.slurm.cli import add_to; add_to(cli.app); cli.main()"
    words = [
        "salloc",
        "--nodes=2",
        "--quiet",
        sys.executable,
        "-c",
        program,
        "slurm",
        "calm.yaml",
        "--nodes=2",
    ]
    for mistake, code in ([], 0), (["data.train=nowhere.jsonl"], 2):
        ended = subprocess.run(
            [*words, HOSTILE, *mistake], cwd=room, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
