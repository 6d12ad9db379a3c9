"""What a prefix is worth on E2E (text from data), on a base that is pretrained here.

    python -m tests.benchmarks.e2e [FOLDER]

Pretrains a Llama of 5.8 M parameters on the training texts of ../shared/data (never on validation or test
files), then tunes on E2E's training file at equal steps: a prefix and all weights, each with the learning
rates below, the best by validation. Prints validation loss in nats a target token: bare base, instruction
only, prefix, full fine-tuning, and the share of full fine-tuning's gain that the prefix reaches. Started
again it goes on; about two hours on two cores.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BASE = """
model:
  dtype: bfloat16
  config: {model_type: llama, vocab_size: 4096, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 6,
    num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 1024, tie_word_embeddings: true}
data: {train: %(folder)s/pretrain.jsonl, target: "{text}", max_length: 256, too_long: split}
train: {method: pretrain, epochs: 3, global_batch_size: 64, micro_batch_tokens: 4096, lr: 2.0e-3, warmup_steps: 40,
  weight_decay: 0.1, betas: [0.9, 0.98]}
run: {folder: %(folder)s/base, save_every: 100, valid_every: 0}
mlflow: {uri: null}
"""
TUNING = """
model: {name: %(folder)s/base/model, dtype: bfloat16}
prefix: {length: 64, text: "name[The Mill], eatType[pub], food[Italian], area[riverside], near[Raja Indian Cuisine]\\nThe Mill is an Italian pub by the riverside, near Raja Indian Cuisine.\\n"}
data: {train: %(data)s/e2e/train.jsonl, valid: %(data)s/e2e/valid.jsonl, prompt: "{mr}\\n", target: "{ref}", references: "{refs}",
  max_length: 256}
train: {max_steps: 300, global_batch_size: 32, micro_batch_tokens: 4096, warmup_steps: 20}
run: {folder: none, valid_every: 100, save_every: 100}
mlflow: {uri: null}
"""
RATES = {"prefix": (1e-2, 3e-2, 1e-1), "full": (5e-4, 1.5e-3)}


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/e2e").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "pretrain.jsonl")
    train(folder / "base.yaml", BASE % {"folder": folder})
    tuning = TUNING % {"folder": folder, "data": DATA}
    losses = {(m, lr): tuned(folder, tuning, m, lr) for m, rates in RATES.items() for lr in rates}
    show(losses, bare_loss(folder, tuning))


def write_corpus(path):
    """Documents of the training files: sentences that say the same, a caption in two languages, dialogue and summary."""
    chance = random.Random(0)
    same = {}
    for row in rows("e2e/train.jsonl"):
        same.setdefault(row["mr"], []).append(row["ref"])
    documents = []
    for texts in same.values():
        for _ in range(2):
            chance.shuffle(texts)
            documents += ["\n".join(texts[n : n + 8]) for n in range(0, len(texts), 8)]
    for row in rows("multi30k/train.jsonl"):
        pair = [row["en"], row["de"]] if chance.random() < 0.5 else [row["de"], row["en"]]
        documents.append("\n".join(pair))
    documents += [f"{row['dialogue']}\nTL;DR: {row['summary']}" for row in rows("dialogsum/train.jsonl")]
    chance.shuffle(documents)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def tuned(folder, text, method, rate):
    """The validation losses of a run, by step."""
    name = f"{method}-{rate:g}"
    words = [f"train.method={method}", f"train.lr={rate}", f"run.folder={folder}/{name}"]
    train(folder / "tuning.yaml", text, *words)
    return valid_losses(folder / name)


def bare_loss(folder, text):
    """Full fine-tuning validates before its first step: the base with nothing in front."""
    return valid_losses(folder / f"full-{RATES['full'][0]:g}")[0]


def valid_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid/loss"] for row in lines if "valid/loss" in row}


def train(path, text, *words):
    path.write_text(text)
    subprocess.run([sys.executable, "-m", "prefix_ds", "train", str(path), *words], check=True)


def show(losses, bare):
    best = {m: min((min(losses[m, lr].values()), lr) for lr in rates) for m, rates in RATES.items()}
    instruction = losses["prefix", RATES["prefix"][0]][0]
    table = Table("", "validation loss", "share of full fine-tuning's gain", "learning rate")
    gain = bare - best["full"][0]
    for name, loss, rate in (
        ("bare base", bare, ""),
        ("instruction only", instruction, ""),
        ("prefix", *best["prefix"]),
        ("full fine-tuning", *best["full"]),
    ):
        table.add_row(name, f"{loss:.3f}", f"{(bare - loss) / gain:.2f}", str(rate))
    Console().print(table)
    for (method, rate), by_step in losses.items():
        Console().print(f"{method} {rate:g}: " + ", ".join(f"{s}: {v:.3f}" for s, v in by_step.items()))


if __name__ == "__main__":
    main()
