"""How long `prefix-ds compare` takes for 200 runs: from folders, a database and a server of MLflow.

    python -m tests.benchmarks.compare [RUNS [STEPS]]

The runs are written by the tracker itself, 400 lines of metrics each, three seeds of each configuration, and
sent to MLflow by `sync`. Then the command is run as a user would run it, in a process of its own, from its
start to its end; printed are the median of five times, the shortest and the longest, and the processor time of
the command, which tells how much of it was waiting for others on a busy machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefix_ds.tracking import sync_run
from tests.compared import made_run
from tests.mlflow_server import MlflowServer

EXPERIMENT, REPEATS = "benchmark", 5


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = made(folder / "runs", count, steps)
        lines = sum(len((run / "metrics.jsonl").read_text().splitlines()) for run in runs)
        print(f"{count} runs of {lines // count} lines of metrics, {os.cpu_count()} cores", flush=True)
        show("folders", [folder / "runs"])
        show("folders, page", [folder / "runs", "--html", folder / "page.html"])
        print(f"the page has {(folder / 'page.html').stat().st_size:,} bytes")
        measure_mlflow(folder, runs)


def made(folder, count, steps):
    folder.mkdir()
    return [
        made_run(
            folder,
            f"lr{index // 3}-s{index % 3}",
            f"train.lr={0.001 * (1 + index // 3)}",
            f"train.seed={index % 3}",
            loss=1.5 + index / 1000,
            steps=steps,
            experiment=EXPERIMENT,
        )
        for index in range(count)
    ]


def measure_mlflow(folder, runs):
    (folder / "mlflow").mkdir()
    server = MlflowServer(folder / "mlflow")
    began = time.perf_counter()
    try:
        for run in runs:
            sync_run(run, server.uri)
        print(f"sending them took {time.perf_counter() - began:.0f} s", flush=True)
        for place, uri in (("server", server.uri), ("database", f"sqlite:///{folder}/mlflow/mlflow.db")):
            words = ["--experiment", EXPERIMENT, "--uri", uri]
            show(place, words)
            show(f"{place}, page", [*words, "--html", folder / "page.html"])
    finally:
        server.stop()


def show(kind, words):
    seconds, busy = zip(*(timed(words) for _ in range(REPEATS)), strict=True)
    median, processor = statistics.median(seconds), statistics.median(busy)
    spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
    print(f"{kind:16s} {median:6.2f} s {spread:18s} {processor:.2f} s of processor", flush=True)


def timed(words):
    command = [sys.executable, "-m", "prefix_ds", "compare", *map(str, words)]
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    busy = sum(getattr(after, k) - getattr(before, k) for k in ("children_user", "children_system"))
    return time.perf_counter() - began, busy


if __name__ == "__main__":
    main()
