"""Scores of a prefix beside all that it competes with, on three tasks and a base that is pretrained here.

    python -m tests.benchmarks.quality FOLDER [--quick] [PART OF A TASK'S NAME ...]

E2E (text from data), DialogSum (summaries) and Multi30k (English to German), from ../shared/data; the base is that of
`tests.benchmarks.e2e`, pretrained first. Bare base, written instruction, PEFT's prefix tuning (direct and through its
projection) and LoRA of ranks 8 and 32 (`tests.benchmarks.peft_tuning`), our prefix, all weights: the same
examples in the same steps, the best learning rate of each by validation with one seed, then two seeds more.
Printed: test loss and scores (mean over seeds, the interval of the first), trained numbers, bytes, seconds, MiB.

Started again it goes on; hours on two cores, two runs at a time. `--quick`: ten steps, one rate, one seed, a
few records, on a base of ten steps: that it runs, not how good anything is.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.e2e import BASE, write_corpus
from tests.benchmarks.made import DATA

RUN = """
model: {name: %(folder)s/base/model, dtype: bfloat16}
prefix: {length: 64, text: "%(text)s"}
data: {task: %(task)s, train: %(data)s/train.jsonl, valid: %(valid)s, test: %(test)s, max_length: %(length)d%(more)s}
train: {max_steps: %(steps)d, global_batch_size: 32, micro_batch_tokens: 4096, warmup_steps: 20}
generate: {max_new_tokens: %(new)d, batch_size: 32}
run: {folder: none, log_every: 1, valid_every: %(every)d, save_every: %(every)d}
mlflow: {uri: null}
"""
RATES = {
    "prefix": (3e-2, 1e-1, 3e-1),
    "full": (5e-4, 1.5e-3),
    "peft prefix": (1e-2, 3e-2, 1e-1, 3e-1),
    "peft prefix-mlp": (3e-4, 1e-3, 3e-3),
    "peft lora-8": (5e-4, 2e-3, 5e-3),
    "peft lora-32": (5e-4, 2e-3, 5e-3),
}
SEEDS = (0, 1, 2)


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
    steps: int = 300
    more: str = ""


TASKS = (
    Task(
        "E2E", "data_to_text", "e2e",
        "name[The Mill], eatType[pub], food[Italian], area[riverside], near[Raja Indian Cuisine]\\nText: The"
        " Mill is an Italian pub by the riverside, near Raja Indian Cuisine.\\n",
        "bleu", 256, 64,
    ),
    Task(
        "DialogSum", "summarization", "dialogsum", "A dialogue, and TL;DR: what it is about in a sentence.\\n",
        "rougeL", 640, 64, more=', references: " {summaries}"',
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
            show(task, found_for(task, folder, quick))


def pretrain(folder, quick):
    """The base, once."""
    if not (folder / "base" / "model").is_dir():
        write_corpus(folder / "pretrain.jsonl")
        (folder / "base.yaml").write_text(BASE % {"folder": folder})
        ours(folder / "base.yaml", "train", *(["train.max_steps=10"] if quick else []), threads=2)


def found_for(task, folder, quick):
    """Results by way: a list, seed by seed; and of the base alone."""
    run = run_file(task, folder, quick)
    rates = {way: all_of[:1] if quick else all_of for way, all_of in RATES.items()}
    firsts = in_twos(run, [(way, rate, SEEDS[0]) for way, all_of in rates.items() for rate in all_of])
    best = {
        way: min(all_of, key=lambda rate: min(firsts[way, rate, SEEDS[0]]["valid"].values()))
        for way, all_of in rates.items()
    }
    seeds = SEEDS[:1] if quick else SEEDS
    every = firsts | in_twos(run, [(way, best[way], seed) for seed in seeds[1:] for way in rates])
    found = {f"{way}, {best[way]:g}": [every[way, best[way], seed] for seed in seeds] for way in rates}
    trained = folder_of(run, "prefix", best["prefix"], SEEDS[0])
    return {name: [alone(trained, name)] for name in ("bare", "instruction")} | found


def run_file(task, folder, quick):
    """The run that all ways share."""
    data = DATA / task.files
    splits = {"valid": data / "valid.jsonl", "test": data / "test.jsonl"}
    if not splits["valid"].is_file():
        splits = halves(data / "test.jsonl", folder, task)
    if quick:
        splits = {
            name: head(path, folder / f"{task.files}-few-{name}.jsonl", 8) for name, path in splits.items()
        }
    steps = 10 if quick else task.steps
    steps = {"steps": steps, "every": max(5, steps // 6)}
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


def in_twos(run, asked):
    """The result of each (way, rate, seed)."""
    with ThreadPoolExecutor(2) as two:
        return dict(zip(asked, two.map(lambda one: found_once(run, *one), asked), strict=True))


def folder_of(run, way, rate, seed):
    return run.parent / f"{run.stem}-{way.replace(' ', '-')}-{rate:g}-{seed}"


def found_once(run, way, rate, seed):
    """One result, made where it is not there yet."""
    folder = folder_of(run, way, rate, seed)
    result = folder.with_suffix(folder.suffix + ".json")
    words = [f"train.lr={rate}", f"train.seed={seed}"]
    if not result.is_file() and way.startswith("peft "):
        module = "tests.benchmarks.peft_tuning"
        started(module, run, way.removeprefix("peft "), result, *words, threads=1)
    elif not result.is_file():
        ours(run, "train", f"train.method={way}", f"run.folder={folder}", *words)
        ours(folder, "evaluate")
        result.write_text(json.dumps(of_ours(folder)))
    return json.loads(result.read_text())


def of_ours(folder):
    """The same facts of a run folder as `peft_tuning` gives."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [path for name in ("prefix", "model") for path in (folder / name).glob("*.safetensors")]
    return json.loads((folder / "evaluate" / "test.json").read_text()) | {
        "valid": {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row},
        "bytes": sum(path.stat().st_size for path in kept),
        "train_seconds": sum(row.get("time/step_seconds", 0.0) for row in rows),
    }


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


def show(task, found):
    """A table of a task."""
    names = list(found["bare"][0]["scores"])
    names = [task.score, *(name for name in names if name != task.score)]
    table = Table("way, rate", "test loss", *names, "MB", "seconds", title=task.name)
    for way, results in found.items():
        loss = spread([one["loss"] for one in results])
        scores = [score_text(results, name) for name in names]
        size = results[0].get("bytes")
        took = results[0].get("train_seconds")
        table.add_row(way, loss, *scores, f"{size / 1e6:.2f}" if size else "", f"{took:.0f}" if took else "")
    Console(width=170).print(table)


def score_text(results, name):
    """Mean over seeds, and the interval of the first."""
    first = results[0]["scores"][name]
    return f"{spread([one['scores'][name]['value'] for one in results])} [{first['low']:.1f}, {first['high']:.1f}]"


def spread(values):
    deviation = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


if __name__ == "__main__":
    main()
