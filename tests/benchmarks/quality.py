"""Scores of a prefix beside all that it competes with, on three tasks and a base that is pretrained here.

    python -m tests.benchmarks.quality FOLDER [--quick] [PART OF A TASK'S NAME ...]

E2E (text from data), DialogSum (summaries) and Multi30k (English to German), from ../shared/data; the base is that of
`tests.benchmarks.e2e`, pretrained first. Bare base, written instruction, PEFT's prefix tuning (direct and through its
projection) and LoRA of ranks 8 and 32 (`tests.benchmarks.peft_tuning`), our prefix (from text, and from noise
through an MLP), all weights: the same examples in the same steps. A way's learning rate is the best by
validation with one seed: two neighbours of a ladder (1, 3, 10, ...) are tried, and while the best is at an end,
the rate beyond it. Then two seeds more, of two prefixes only for the better. Printed: test loss and scores
(mean over seeds, the interval of the first), the share of full fine-tuning's gain in loss, trained numbers,
bytes, seconds and MiB of training, and every rate that was tried.

Started again it goes on; hours on two cores, two runs at a time. `--quick`: ten steps, two rates, one seed, a
few records, on a base of ten steps: that it runs, not how good anything is.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tests.benchmarks.e2e import BASE, write_corpus
from tests.benchmarks.made import DATA

RUN = """
model: {name: %(folder)s/base/model, dtype: bfloat16}
prefix: {length: 64, text: "%(text)s"}
data: {task: %(task)s, train: %(data)s/train.jsonl, valid: %(valid)s, test: %(test)s, max_length: %(length)d%(more)s}
train: {max_steps: %(steps)d, global_batch_size: %(batch)d, micro_batch_tokens: 4096, warmup_steps: %(warmup)d}
generate: {max_new_tokens: %(new)d, batch_size: 32}
run: {folder: none, log_every: 1, valid_every: %(every)d, save_every: %(every)d}
mlflow: {uri: null}
"""
PEER = "tests.benchmarks.peft_tuning"
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3))
LOWEST = {  # of the two rates that each way starts with
    "peft prefix": 1e-1, "peft prefix-mlp": 1e-3, "peft lora-8": 3e-3, "peft lora-32": 1e-3, "prefix": 1e-1,
    "prefix-mlp": 1e-3, "full": 3e-4,
}  # fmt: skip
ONE_WAY = (("peft prefix", "peft prefix-mlp"), ("prefix", "prefix-mlp"))  # the better of each counts
OURS = {
    "prefix": (),
    "prefix-mlp": ("prefix.init=random", "prefix.init_std=1", "prefix.reparam_dim=512"),
    "full": ("train.method=full",),
}
SEEDS = (0, 1, 2)
VALIDATED = 300  # records, at most


@dataclass(frozen=True)
class Task:
    """What differs between the tasks. `score`: the one that is shown first."""

    name: str
    kind: str
    files: str
    text: str
    score: str
    length: int
    new: int
    steps: int = 150
    batch: int = 32
    more: str = ""


TASKS = (
    Task(
        "E2E", "data_to_text", "e2e",
        "name[The Mill], eatType[pub], food[Italian], area[riverside], near[Raja Indian Cuisine]\\nText: The"
        " Mill is an Italian pub by the riverside, near Raja Indian Cuisine.\\n",
        "bleu", 256, 64,
    ),
    Task(
        "DialogSum", "summarization", "dialogsum",
        "#Person1#: Is the book here?\\n#Person2#: Yes, take it.\\nTL;DR: #Person1# asks #Person2# for a book.\\n",
        "rougeL", 640, 64, 64, 16, ', references: " {summaries}"',
    ),
    Task(
        "Multi30k", "translation", "multi30k",
        "English: A man is walking with a dog.\\nGerman: Ein Mann geht mit einem Hund.\\n", "bleu", 128, 48,
    ),
)  # fmt: skip


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    quick, folder = "--quick" in sys.argv, Path(words[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pretrain(folder, quick)
    for task in TASKS:
        if all(word in task.name for word in words[1:]):
            show(task, *found_for(task, folder, quick))


def pretrain(folder, quick):
    """The base, once, by two ranks of a thread each."""
    if not (folder / "base" / "model").is_dir():
        write_corpus(folder / "pretrain.jsonl")
        (folder / "base.yaml").write_text(BASE % {"folder": folder})
        words = ["train.max_steps=10", "train.warmup_steps=0"] if quick else []
        two = ("--nproc-per-node", 2, "-m", "prefix_ds", "train", folder / "base.yaml", *words)
        started("torch.distributed.run", *two, threads=1)


def found_for(task, folder, quick):
    """Results by way, a list seed by seed, also of the base alone; and what each rate came to."""
    run, seeds = run_file(task, folder, quick), SEEDS[:1] if quick else SEEDS
    searched = dict(zip(LOWEST, in_twos(lambda way: search(run, way, quick), LOWEST), strict=True))
    best = {way: min(losses, key=losses.get) for way, losses in searched.items()}
    for ways in ONE_WAY:
        del best[max(ways, key=lambda way: min(searched[way].values()))]
    in_twos(lambda one: tuned(run, one[0], best[one[0]], one[1]), [(w, s) for s in seeds[1:] for w in best])
    asked = [(way, seed) for way in best for seed in seeds]
    results = in_twos(lambda one: tested(run, one[0], best[one[0]], one[1]), asked)
    found = {f"{way}, {best[way]:g}": results[n * len(seeds) :][: len(seeds)] for n, way in enumerate(best)}
    from_text = searched["prefix"]
    trained, _ = places_of(run, "prefix", min(from_text, key=from_text.get), SEEDS[0])
    return {name: [alone(trained, name)] for name in ("bare", "instruction")} | found, searched


def in_twos(work, asked):
    with ThreadPoolExecutor(2) as two:
        return list(two.map(work, asked))


def search(run, way, quick):
    """The best validation loss of each rate that was tried."""
    first = LADDER.index(LOWEST[way])
    losses = {rate: best_loss(run, way, rate) for rate in LADDER[first : first + 2]}
    while not quick:
        best = LADDER.index(min(losses, key=losses.get))
        beyond = [rate for rate in LADDER[max(0, best - 1) : best + 2] if rate not in losses]
        if not beyond:
            break
        losses[beyond[0]] = best_loss(run, way, beyond[0])
    return losses


def best_loss(run, way, rate):
    return best_of(tuned(run, way, rate, SEEDS[0]))


def best_of(result):
    """The least validation loss; of a training that was lost from the start, more than any."""
    return min((loss for loss in result["valid"].values() if not math.isnan(loss)), default=math.inf)


def run_file(task, folder, quick):
    """The run that all ways share."""
    data = DATA / task.files
    splits = {"valid": data / "valid.jsonl", "test": data / "test.jsonl"}
    if not splits["valid"].is_file():
        splits = halves(data / "test.jsonl", folder, task)
    counts = {"valid": 8, "test": 8} if quick else {"valid": VALIDATED}
    for name, count in counts.items():
        splits[name] = head(splits[name], folder / f"{task.files}-few-{name}.jsonl", count)
    steps = 10 if quick else task.steps
    steps = {"steps": steps, "warmup": min(20, steps), "every": max(5, math.ceil(steps / 3))}
    told = vars(task) | steps | splits | {"folder": folder, "data": data, "task": task.kind}
    path = folder / f"{task.name}.yaml"
    path.write_text(RUN % told)
    return path


def halves(path, folder, task):
    """A test file without a validation file gives its first tenth."""
    lines = path.read_text().splitlines(keepends=True)
    cut = len(lines) // 10
    parts = {"valid": lines[:cut], "test": lines[cut:]}
    for name, part in parts.items():
        (folder / f"{task.files}-{name}.jsonl").write_text("".join(part))
    return {name: folder / f"{task.files}-{name}.jsonl" for name in parts}


def head(path, into, count):
    into.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return into


def places_of(run, way, rate, seed):
    """The run folder of a training, and the file of what it came to."""
    name = f"{run.stem}-{way.replace(' ', '-')}-{rate:g}-{seed}"
    return run.parent / name, run.parent / f"{name}.json"


def tuned(run, way, rate, seed):
    """What a training came to; trained where it has not been yet."""
    folder, result = places_of(run, way, rate, seed)
    words = [f"train.lr={rate}", f"train.seed={seed}"]
    if not result.is_file() and way.startswith("peft "):
        started(PEER, "tune", run, way.removeprefix("peft "), result, *words, threads=1)
    elif not result.is_file():
        ours(run, "train", f"run.folder={folder}", *OURS[way], *words)
        result.write_text(json.dumps(of_ours(folder), indent=1))
    return json.loads(result.read_text())


def of_ours(folder):
    """The same facts of a run folder as `peft_tuning` gives."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [path for name in ("prefix", "model") for path in (folder / name).glob("*.safetensors")]
    return {
        "trained": sum(tensor.numel() for path in kept for tensor in load_file(path).values()),
        "bytes": sum(path.stat().st_size for path in kept),
        "train_seconds": sum(row.get("time/step_seconds", 0.0) for row in rows),
        "peak_mib": 1024 * max(row.get("memory/peak_gib", 0.0) for row in rows),
        "valid": {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row},
    }


def tested(run, way, rate, seed):
    """The same with the test split's loss and scores."""
    folder, result = places_of(run, way, rate, seed)
    told = json.loads(result.read_text())
    if "scores" not in told and way.startswith("peft "):
        started(PEER, "test", run, way.removeprefix("peft "), result, threads=1)
    elif "scores" not in told:
        ours(folder, "evaluate")
        scored = json.loads((folder / "evaluate" / "test.json").read_text())
        result.write_text(json.dumps(told | scored, indent=1))
    return json.loads(result.read_text())


def alone(trained, name):
    """The base with nothing, or the untrained text, in front."""
    result = trained / "evaluate" / f"test.{name}.json"
    if not result.is_file():
        ours(trained, "evaluate", "--without-prefix" if name == "bare" else "--instruction")
    return json.loads(result.read_text())


def ours(first, command, *words, threads=1):
    started("prefix_ds", command, first, *words, threads=threads)


def started(module, *words, threads):
    """A module in a process of its own; what it says is shown where it fails."""
    environment = os.environ | {"PREFIX_DS_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-800:]}\n{done.stderr[-4000:]}"
        )


def show(task, found, searched):
    """A table of a task, and the rates behind it."""
    names = list(found["bare"][0]["scores"])
    names = [task.score, *(name for name in names if name != task.score)]
    columns = ("way, rate", "test loss", "of full's gain", *names, "trained", "MB", "seconds", "MiB")
    table = Table(*columns, title=task.name)
    bare, full = (
        found["bare"][0]["loss"],
        mean_loss(next(found[way] for way in found if way.startswith("full"))),
    )
    for way, results in found.items():
        share = f"{(bare - mean_loss(results)) / (bare - full):.3f}"
        scores = [score_text(results, name) for name in names]
        table.add_row(way, spread([one["loss"] for one in results]), share, *scores, *costs(results[0]))
    Console(width=190).print(table)
    for way, losses in searched.items():
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses.items()))
        Console(width=190).print(f"{way}, validation loss by rate, seed {SEEDS[0]}: {tried}")


def mean_loss(results):
    return statistics.mean(one["loss"] for one in results)


def costs(result):
    if "trained" not in result:
        return ("",) * 4
    trained, mb = f"{result['trained']:,}", f"{result['bytes'] / 1e6:.2f}"
    return trained, mb, f"{result['train_seconds']:.0f}", f"{result['peak_mib']:.0f}"


def score_text(results, name):
    """Mean over seeds, and the interval of the first."""
    first = results[0]["scores"][name]
    return f"{spread([one['scores'][name]['value'] for one in results])} [{first['low']:.1f}, {first['high']:.1f}]"


def spread(values):
    deviation = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


if __name__ == "__main__":
    main()
