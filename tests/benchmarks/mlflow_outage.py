"""What an absent, a hanging and a working MLflow server cost a training run, beside a run without MLflow.

    python -m tests.benchmarks.mlflow_outage [ROUNDS]

One process on all cores, a small Llama, 300 steps with a line of metrics each. Timed is what training takes
from its first to its last metric, as metrics.jsonl says, so that start-up does not count. The four take
turns. Counted are the lines in metrics.jsonl, which must all be there whatever the server does.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from prefix_ds.config import config_text
from tests.mlflow_server import MlflowServer, free_port, silent_server
from tests.workshop import base_folder, run_config

STEPS = 300


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name, silent_server() as (hanging, _):
        folder = Path(name)
        base = base_folder(folder / "base", hidden_size=128, intermediate_size=344, num_hidden_layers=6)
        (folder / "mlflow").mkdir()
        server = MlflowServer(folder / "mlflow")
        uris = {
            "none": "null",
            "dead": f"http://127.0.0.1:{free_port()}",
            "hanging": hanging,
            "working": server.uri,
        }
        try:
            times = {kind: [] for kind in uris}
            for number in range(rounds):
                for kind, uri in uris.items():
                    times[kind].append(timed_run(folder, base, f"{kind}{number}", uri))
        finally:
            server.stop()
    for kind, seconds in times.items():
        ratios = [mine / none for mine, none in zip(seconds, times["none"], strict=True)]
        shown = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{kind:8s} seconds {shown}; beside none, median {statistics.median(ratios):.3f}")


def timed_run(folder, base, name, uri):
    """Seconds from the first to the last line of training metrics."""
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
    return times[-1] - times[0]


if __name__ == "__main__":
    main()
