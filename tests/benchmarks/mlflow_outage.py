"""What an absent, a hanging and a working MLflow server cost a training run, beside a run without MLflow.

    python -m tests.benchmarks.mlflow_outage [ROUNDS]

One process on all cores, a small Llama, 80 steps with a line of metrics each. Timed is the median step, from
one metric to the next as metrics.jsonl says, so that start-up does not count, nor a hiccup of the machine.
A run with MLflow stands between two without, and is compared with their mean: a machine's speed drifts by
more than what is measured here. Counted are the lines in metrics.jsonl, which must all be there whatever the
server does.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from prefix_ds.config import config_text
from tests.mlflow_server import MlflowServer, free_port, silent_server
from tests.workshop import base_folder, run_config

STEPS = 80


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as name, silent_server() as (hanging, _):
        folder = Path(name)
        base = base_folder(folder / "base", hidden_size=128, intermediate_size=344, num_hidden_layers=6)
        (folder / "mlflow").mkdir()
        server = MlflowServer(folder / "mlflow")
        uris = {"dead": f"http://127.0.0.1:{free_port()}", "hanging": hanging, "working": server.uri}
        try:
            show(list(measured(rounds, uris, lambda name, uri: median_step(folder, base, name, uri))))
        finally:
            server.stop()


def measured(rounds, uris, step_seconds):
    """(kind of server, its step beside that of the runs without MLflow before and after it)."""
    before = step_seconds("none", "null")
    for number in range(rounds):
        for kind, uri in uris.items():
            mine, after = step_seconds(f"{kind}{number}", uri), step_seconds(f"{kind}{number}-after", "null")
            yield kind, 2 * mine / (before + after)
            yield "none", before / after
            before = after


def show(ratios):
    for kind in dict.fromkeys(kind for kind, _ in ratios):
        mine = sorted(ratio for other, ratio in ratios if other == kind)
        shown = ", ".join(f"{ratio:.3f}" for ratio in mine)
        print(f"{kind:8s} median {statistics.median(mine):.3f} of {shown}")


def median_step(folder, base, name, uri):
    """Seconds between two lines of training metrics."""
    words = (
        f"train.max_steps={STEPS}",
        f"run.folder={folder}/{name}",
        "run.valid_every=0",
        "run.save_every=0",
    )
    config = run_config(folder, *words, f"mlflow.uri={uri}", "train.global_batch_size=32", base=base)
    path = folder / f"{name}.yaml"
    path.write_text(config_text(config))
    subprocess.run([sys.executable, "-m", "prefix_ds", "train", str(path)], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if "train/loss" in row]
    assert len(times) == STEPS, f"{name}: {len(times)} lines of {STEPS}"
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


if __name__ == "__main__":
    main()
