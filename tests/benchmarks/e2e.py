"""What a prefix is worth on E2E (text from data), on a base that is pretrained here.

    python -m tests.benchmarks.e2e [FOLDER]

Pretrains a Llama of 11.2 M parameters on the training texts of ../shared/data (never on validation or test
files), then tunes on E2E's training file at equal steps: a prefix and all weights, each with the learning
rates below. The best rate of each, by validation, is run with two more seeds. Prints validation loss in nats
a target token: bare base, instruction only, prefix, full fine-tuning, and the share of full fine-tuning's
gain that the prefix reaches, seed by seed. Started again it goes on; some two hours on two cores, on
which two tuning runs go at a time.
"""

import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.made import DATA, rows

BASE = """
model:
  dtype: bfloat16
  config:
    {model_type: llama, vocab_size: 4096, hidden_size: 320, intermediate_size: 864, num_hidden_layers: 8,
    num_attention_heads: 8, num_key_value_heads: 8, max_position_embeddings: 1024, tie_word_embeddings: true}
data: {train: %(folder)s/pretrain.jsonl, target: "{text}", max_length: 256, too_long: split}
train: {method: pretrain, epochs: 3, global_batch_size: 16, micro_batch_tokens: 4096, lr: 2.0e-3,
  warmup_steps: 40, weight_decay: 0.1, betas: [0.9, 0.98]}
run: {folder: %(folder)s/base, save_every: 100, valid_every: 0}
mlflow: {uri: null}
"""
TUNING = """
model: {name: %(folder)s/base/model, dtype: bfloat16}
prefix:
  length: 64
  text: "name[The Mill], eatType[pub], food[Italian], area[riverside], near[Raja Indian Cuisine]\\nThe Mill
    is an Italian pub by the riverside, near Raja Indian Cuisine.\\n"
data: {train: %(data)s/e2e/train.jsonl, valid: %(data)s/e2e/valid.jsonl, prompt: "{mr}\\n", target: "{ref}",
  references: "{refs}", max_length: 256}
train: {max_steps: 300, global_batch_size: 32, micro_batch_tokens: 4096, warmup_steps: 20}
run: {folder: none, valid_every: 100, save_every: 100}
mlflow: {uri: null}
"""
RATES = {"prefix": (3e-2, 1e-1, 3e-1), "full": (5e-4, 1.5e-3, 3e-3)}
SEEDS = (0, 1, 2)
NOTATIONS = (
    ("{key}: {value}", "; "),
    ("{value} ({key})", ", "),
    ("{key} = {value}", " | "),
    ("- {key}: {value}", "\n"),
)


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/e2e").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "pretrain.jsonl")
    base = folder / "base.yaml"
    base.write_text(BASE % {"folder": folder})
    train(base)
    path = folder / "tuning.yaml"
    path.write_text(TUNING % {"folder": folder, "data": DATA})
    losses = tuned(path, [(method, rate, SEEDS[0]) for method, rates in RATES.items() for rate in rates])
    best = {method: best_rate(losses, method) for method in RATES}
    losses |= tuned(path, [(method, best[method], seed) for seed in SEEDS[1:] for method in RATES])
    show(losses, best)


def write_corpus(path):
    """Documents of the training files: facts in several notations, none of them E2E's, each with a sentence that
    says them; sentences that say the same; captions in two languages, always the same one first; dialogues, of
    which it never reads a summary."""
    chance = random.Random(0)
    rows_of_e2e = rows("e2e/train.jsonl")
    documents = [*told_facts(rows_of_e2e, chance), *said_again(rows_of_e2e, chance)]
    captions = [(row["en"], row["de"]) for row in rows("multi30k/train.jsonl")]
    for some in in_fours(captions):
        way = chance.choice((1, -1))
        documents.append("\n".join("\n".join(pair[::way]) for pair in some))
    documents += [row["dialogue"] for row in rows("dialogsum/train.jsonl")]
    chance.shuffle(documents)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def told_facts(rows_of_e2e, chance):
    """Facts and a sentence, four times in one notation."""
    shuffled = chance.sample(rows_of_e2e, len(rows_of_e2e))
    for some in in_fours(shuffled):
        fact, between = chance.choice(NOTATIONS)
        told = []
        for row in some:
            facts = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", row["mr"])
            chance.shuffle(facts)
            line = between.join(fact.format(key=key.strip(), value=value) for key, value in facts)
            told.append(f"{line}\n{row['ref']}")
        yield "\n\n".join(told)


def said_again(rows_of_e2e, chance):
    """Sentences of one meaning, up to eight, in two orders."""
    same = {}
    for row in rows_of_e2e:
        same.setdefault(row["mr"], []).append(row["ref"])
    for texts in same.values():
        for _ in range(2):
            chance.shuffle(texts)
            yield from ("\n".join(texts[n : n + 8]) for n in range(0, len(texts), 8))


def in_fours(items):
    return [items[n : n + 4] for n in range(0, len(items), 4)]


def tuned(path, runs):
    """The validation losses by step of each run (method, rate, seed)."""
    with ThreadPoolExecutor(2) as two:
        return dict(zip(runs, two.map(lambda run: tuned_once(path, *run), runs), strict=True))


def tuned_once(path, method, rate, seed):
    run = path.parent / f"{method}-{rate:g}-{seed}"
    words = [f"train.method={method}", f"train.lr={rate}", f"train.seed={seed}", f"run.folder={run}"]
    train(path, *words, threads=1)
    return valid_losses(run)


def best_rate(losses, method):
    return min(RATES[method], key=lambda rate: min(losses[method, rate, SEEDS[0]].values()))


def valid_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid/loss"] for row in lines if "valid/loss" in row}


def train(path, *words, threads=2):
    environment = os.environ | {"PREFIX_DS_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "prefix_ds", "train", path, *words], check=True, env=environment)


def show(losses, best):
    table = Table(
        "seed", "bare base", "instruction only", "prefix", "full fine-tuning", "share of full's gain"
    )
    for seed in SEEDS:
        prefix, full = (losses[method, best[method], seed] for method in ("prefix", "full"))
        bare, tuned, fully = full[0], min(prefix.values()), min(full.values())
        numbers = (bare, prefix[0], tuned, fully, (bare - tuned) / (bare - fully))
        table.add_row(str(seed), *(f"{number:.4f}" for number in numbers))
    Console(width=110).print(table)
    for (method, rate, seed), by_step in losses.items():
        steps = ", ".join(f"{step}: {loss:.4f}" for step, loss in by_step.items())
        Console(width=110).print(f"{method} {rate:g}, seed {seed}: {steps}")


if __name__ == "__main__":
    main()
