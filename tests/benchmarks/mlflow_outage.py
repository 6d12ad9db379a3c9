"""What an absent, a hanging and a working MLflow server cost a training run.

    python -m tests.benchmarks.mlflow_outage [ROUNDS]

One process on all cores, a small Llama, 160 steps with a line of metrics each. MLflow can cost a run two
things: seconds inside the calls that the loop makes to its tracker, and processor time that the mirror, a
process of its own, takes from the trainer's. Both are measured by the run itself. The mirror's start, the
import of MLflow, is paid once, however long the run: it is shown in seconds. After the first quarter of the
steps both are shares of the time (the mirror's, of that time on all cores), and their sum is the most that
training can be slowed from there on. Whole runs are not compared by the clock: on the machine of
docs/performance.md the same run without MLflow takes 0.8 to 1.3 times as long from one minute to the next,
and the bar is 2 %. Counted are the lines in metrics.jsonl, which must all be there whatever the server does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from prefix_ds.config import config_text, read_config
from tests.mlflow_server import MlflowServer, free_port, silent_server
from tests.workshop import base_folder, run_config

STEPS = 160


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name, silent_server() as (hanging, _):
        folder = Path(name)
        base = base_folder(folder / "base", hidden_size=128, intermediate_size=344, num_hidden_layers=6)
        (folder / "mlflow").mkdir()
        server = MlflowServer(folder / "mlflow")
        uris = {"dead": f"http://127.0.0.1:{free_port()}", "hanging": hanging, "working": server.uri}
        try:
            for kind, uri in uris.items():
                show(kind, [shares(folder, base, f"{kind}{number}", uri) for number in range(rounds)])
        finally:
            server.stop()


def show(kind, found):
    start, calls, mirror = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"{kind:8s} once: {start:.1f} s of processor; then calls {calls:.3%}, mirror {mirror:.2%}, "
        f"together {calls + mirror:.2%}",
        flush=True,
    )


def shares(folder, base, name, uri):
    """The mirror's processor seconds in the first quarter of the steps; after it, the share of the time that
    the tracker's calls took, and the mirror's processor time on all cores."""
    words = (
        f"train.max_steps={STEPS}",
        f"run.folder={folder}/{name}",
        "run.valid_every=0",
        "run.save_every=0",
    )
    config = run_config(folder, *words, f"mlflow.uri={uri}", "train.global_batch_size=32", base=base)
    path = folder / f"{name}.yaml"
    path.write_text(config_text(config))
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.mlflow_outage", "run", path],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    count = sum("train/loss" in row for row in rows)
    assert count == STEPS, f"{name}: {count} lines of {STEPS}"
    start, seconds, calls, mirror = json.loads(done.stdout.splitlines()[-1])
    return start, calls / seconds, mirror / seconds / os.cpu_count()


def run(path):
    """A run that watches what its tracker's calls and its mirror take, from a quarter of its steps on."""
    from prefix_ds import train as command

    fit, calls, marks = command.fit, [], []

    def watched(parts, *rest):
        metrics = parts.tracker.metrics

        def timed(*values):
            if len(calls) == STEPS // 4:
                marks.append((time.perf_counter(), mirror_seconds()))
            began = time.perf_counter()
            metrics(*values)
            calls.append(time.perf_counter() - began)

        parts.tracker.metrics = timed
        end = fit(parts, *rest)
        marks.append((time.perf_counter(), mirror_seconds()))
        return end

    command.fit = watched
    command.train(read_config(Path(path)))
    (began, start), (ended, total) = marks
    print(json.dumps([start, ended - began, sum(calls[STEPS // 4 :]), total - start]))


def mirror_seconds():
    """Processor time of all child processes so far."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    run(sys.argv[2]) if sys.argv[1:2] == ["run"] else main()
