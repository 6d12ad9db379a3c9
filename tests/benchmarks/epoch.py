"""An epoch as a user runs it: `prefix-ds train` beside PEFT and DeepSpeed ZeRO-3 with a loop by hand.

    python -m tests.benchmarks.epoch [--quick] [ROUNDS] [PART OF A NAME ...]

E2E's and DialogSum's training files of ../shared/data (`--quick`: the first 384 and 64 examples, on the
smallest base), on Llamas of random numbers in bfloat16: the two of `tests.benchmarks.peer`, and a small one
with embeddings tied, of 11.2 M parameters, as in `tests.benchmarks.e2e`. A prefix of 30, 64 examples a step, two ranks with one
thread each, under torchrun both: `-m prefix_ds train` with a run file, and `tests.benchmarks.peft_zero3`.
Neither has anything cached but its compiled C++. The two take turns. Printed are seconds of the whole command, and of the loop
alone, from its first step to its last; medians, and those of the ratios of pairs. The bar: 2.5. All of it takes
three hours a round; the small base alone eight minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.made import base_folder, captions, seconds, summaries
from tests.benchmarks.peer import SIZES

RANKS = 2
SMALL = {
    "8 layers x 320, vocabulary 4,096": {
        "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 8,
        "tie_word_embeddings": True, "vocab_size": 4096,
    },
}  # fmt: skip
RUN = """
model: {{name: {base}}}
prefix: {{init: random, length: 30}}
data: {{train: {data}, prompt: "{{prompt}}", target: "{{target}}", max_length: 640}}
train: {{epochs: 1, global_batch_size: 64, micro_batch_tokens: 4096, lr: 1.0e-3}}
run: {{folder: {folder}, log_every: 1, save_every: 0}}
mlflow: {{uri: null}}
"""
TASKS = {  # texts, how many of them with --quick, and how many the peer takes at once
    "E2E": (captions, 384, 16),
    "DialogSum": (summaries, 64, 4),
}


@dataclass(frozen=True)
class Task:
    """An epoch: a base, examples, where results go, and how many examples the peer takes at once."""

    base: Path
    data: Path
    folder: Path
    at_once: int


def main():
    quick = "--quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    words = [word for word in sys.argv[1:] if not word.isdigit() and word != "--quick"]
    rounds = numbers[0] if numbers else 1 if quick else 2
    table = Table("epoch of", "way", "s, all", "ratio", "s, the loop", "ratio", "last loss")
    with tempfile.TemporaryDirectory() as place:
        for model, sizes in (SMALL if quick else SMALL | SIZES).items():
            for task, (texts, first, at_once) in TASKS.items():
                chosen = texts()[: first if quick else None]
                name = f"{task}, {len(chosen):,} examples, {model}"
                if all(word in name for word in words):
                    place_of_base = Path(place) / f"base{sizes['hidden_size']}"
                    folder = base_folder(place_of_base, sizes, captions() + summaries())
                    compare(written(folder, task, chosen, at_once), name, rounds, table)
    Console(width=130).print(table)


def written(folder, name, texts, at_once):
    """A task, with its data."""
    data = folder.parent / f"{folder.name}-{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return Task(folder, data, folder.parent, at_once)


def compare(task, name, rounds, table):
    """Two rows: medians of turns, and of the ratios of pairs."""
    found = {"PEFT": [], "ours": []}
    for number in range(rounds):
        for way, work in (("PEFT", theirs), ("ours", ours)):
            found[way].append(work(task, f"{way}-{number}"))
            whole, loop, loss = found[way][-1]
            print(f"{name}: {way}: {whole:.1f} s, its loop {loop:.1f} s, loss {loss:.3f}", flush=True)
    for way, turns in found.items():
        pairs = list(zip(found["PEFT"], turns, strict=True))
        ratios = [statistics.median(theirs[n] / mine[n] for theirs, mine in pairs) for n in (0, 1)]
        whole, loop, loss = (statistics.median(column) for column in zip(*turns, strict=True))
        told = (f"{whole:.1f}", f"{ratios[0]:.2f}", f"{loop:.1f}", f"{ratios[1]:.2f}", f"{loss:.3f}")
        table.add_row(name, way, *told)


def ours(task, name):
    """(seconds of the command, of its steps, last loss)."""
    run = task.folder / name
    file = run.with_suffix(".yaml")
    file.write_text(RUN.format(base=task.base, data=task.data, folder=f"{run}-{task.data.stem}"))
    whole = seconds(lambda: on_two_ranks(run, "prefix_ds", "train", file))
    lines = (Path(f"{run}-{task.data.stem}") / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "time/step_seconds" in row]
    return whole, sum(row["time/step_seconds"] for row in steps), mean_loss(steps)


def mean_loss(steps):
    """Of the last five."""
    return statistics.mean(row["train/loss"] for row in steps[-5:])


def theirs(task, name):
    """The same of the peer."""
    result = task.folder / f"{name}-{task.data.stem}.json"
    words = (task.base, task.data, result, task.at_once)
    whole = seconds(lambda: on_two_ranks(task.folder / name, "tests.benchmarks.peft_zero3", *words))
    told = json.loads(result.read_text())
    return whole, told["seconds"], told["loss"]


def on_two_ranks(place, module, *words):
    """A module under torchrun, with an empty cache of data; what it says is shown where it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    with tempfile.TemporaryDirectory(dir=place.parent) as cache:
        own = {"HF_DATASETS_CACHE": cache, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        words = [*launch, "-m", module, *map(str, words)]
        done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{module} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )


if __name__ == "__main__":
    main()
