"""Killed at any moment, a run that is started again ends with exactly the prefix of a run nobody disturbed.

Real processes, real SIGKILL, on either rank. Five trials here; `python -m tests.test_kill 20` runs as many as
are asked for and prints them.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from prefix_ds.checkpoint import latest, read_prefix
from prefix_ds.config import config_text
from prefix_ds.errors import EXIT_PEER
from tests.ranks import forked, free_port, rank_environment
from tests.workshop import run_config

STEPS = 24


def main_on_rank(rank, size, port, words, log):
    """`prefix-ds WORDS` as a rank, its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(rank_environment(rank, size, port))
    sys.argv = ["prefix-ds", *words]
    from prefix_ds.cli import main

    main()


def start(size, words, log):
    port = free_port()
    ranks = [forked(main_on_rank, rank, size, port, words, str(log)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def exit_codes(ranks, seconds=120):
    for process in ranks:
        process.join(seconds)
    alive = [process.pid for process in ranks if process.is_alive()]
    for process in ranks:
        process.kill()
    assert not alive, f"ranks {alive} outlived their peer"
    return [process.exitcode for process in ranks]


def long_run(folder, name):
    config = run_config(
        folder,
        f"train.max_steps={STEPS}",
        "run.save_every=2",
        "run.valid_every=5",
        f"run.folder={folder}/{name}",
    )
    path = folder / f"{name}.yaml"
    path.write_text(config_text(config))
    return path


def trained_bytes(run, steps=STEPS):
    """Everything a finished run leaves: its last checkpoint's tensors and its best prefix, bit for bit."""
    checkpoint = latest(run)
    assert checkpoint.step == steps
    prefix = read_prefix(run / "prefix")
    tensors = checkpoint.tensors() | {
        f"{slot}.{n}": t for slot, pair in prefix.slots.items() for n, t in enumerate(pair)
    }
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def undisturbed(folder):
    """A whole run; its bytes and how long it took, in seconds."""
    exit_codes(start(1, ["--help"], folder / "help.log"))  # the fork server loads its packages now, untimed
    began = time.monotonic()
    assert exit_codes(start(2, ["train", str(long_run(folder, "calm"))], folder / "calm.log")) == [0, 0]
    return trained_bytes(folder / "calm"), time.monotonic() - began


def killed_and_started_again(folder, name, victim, after_seconds):
    """Kills one rank, lets the other end, starts both again and returns what they leave."""
    path, log = long_run(folder, name), folder / f"{name}.log"
    ranks = start(2, ["train", str(path)], log)
    time.sleep(after_seconds)
    ranks[victim].kill()
    ranks[1 - victim].join(
        10
    )  # it notices, unless it waits for a rank that never came: then its launcher ends it
    ranks[1 - victim].kill()
    codes = exit_codes(ranks, 60)
    assert codes[victim] in (-signal.SIGKILL, 0)
    assert codes[1 - victim] in (-signal.SIGKILL, 0, EXIT_PEER), log.read_text()[-2000:]
    assert exit_codes(start(2, ["train", str(path)], log)) == [0, 0], log.read_text()[-2000:]
    return trained_bytes(folder / name)


def trials(folder, count, seed):
    """Kills at `count` random moments; yields what was done, and whether the result is that of a calm run."""
    expected, seconds = undisturbed(folder)
    chance = random.Random(seed)
    for number in range(count):
        victim, moment = number % 2, chance.uniform(0.05, seconds)
        found = killed_and_started_again(folder, f"trial{number}", victim, moment)
        yield victim, moment, found == expected


def test_a_killed_rank_costs_nothing_but_time(tmp_path):
    for victim, moment, same in trials(tmp_path, 5, seed=time.time_ns()):
        assert same, f"rank {victim} killed after {moment:.2f} s: another result"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path, number):
    path, log = long_run(tmp_path, "run"), tmp_path / "run.log"
    path.write_text(path.read_text().replace(f"max_steps: {STEPS}", "max_steps: 5000"))
    ranks = start(2, ["train", str(path)], log)
    until(lambda: (tmp_path / "run/metrics.jsonl").exists() and steps_done(tmp_path) >= 3, ranks, log)
    before = steps_done(tmp_path)
    os.kill(ranks[1].pid, number)
    assert exit_codes(ranks, 30) == [75, 75], log.read_text()[-2000:]
    checkpoint = latest(tmp_path / "run")
    assert before <= checkpoint.step <= steps_done(tmp_path)
    assert checkpoint.step == steps_done(tmp_path), "steps were done after the checkpoint"
    assert "checkpoint written" in log.read_text()


def steps_done(folder):
    return sum("train/loss" in line for line in (folder / "run/metrics.jsonl").read_text().splitlines())


def until(holds, ranks, log, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log.read_text()[-2000:]
        assert all(process.is_alive() for process in ranks), log.read_text()[-2000:]
        time.sleep(0.02)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        for victim, moment, same in trials(Path(folder), count, seed=0):
            end = "same prefix" if same else "ANOTHER RESULT"
            sys.stdout.write(f"rank {victim} killed after {moment:5.2f} s: {end}\n")


if __name__ == "__main__":
    main()
