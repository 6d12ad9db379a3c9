"""Small real things for tests: a tokenizer, a base on disk, data files, a run's configuration."""

import json

import torch

from prefix_ds.config import parse_config
from prefix_ds.new_tokenizer import trained_tokenizer

WORDS = (
    "the",
    "cat",
    "dog",
    "bird",
    "red",
    "blue",
    "big",
    "sees",
    "likes",
    "sleeps",
    "under",
    "house",
    "tree",
    "garden",
)


def records(count, seed=0):
    """Records with a `source` and a `goal` of several lengths; the goal is the source backwards."""
    noise = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        size = int(torch.randint(3, 12, (1,), generator=noise))
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (size,), generator=noise)]
        made.append({"source": " ".join(words), "goal": " ".join(reversed(words))})
    return made


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer():
    """A byte-level BPE tokenizer of some 300 entries."""
    return trained_tokenizer([r["source"] for r in records(200)], 320)


def base_folder(folder, **sizes):
    """A tiny random Llama with grouped-query attention, and its tokenizer, saved as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    small = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**(small | sizes), bos_token_id=0, eos_token_id=0, pad_token_id=None)
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def run_config(folder, *overrides, base=None):
    """A small prefix run below `folder`, whose base and data are made if they are not there."""
    base = base or folder / "base"
    if not base.exists():
        base_folder(base)
    for name, count, seed in (("train", 40, 1), ("valid", 10, 2)):
        if not (folder / f"{name}.jsonl").exists():
            write_jsonl(folder / f"{name}.jsonl", records(count, seed))
    return parse_config(
        f"""
model: {{name: {base}, dtype: float32}}
prefix: {{text: "turn the words around:"}}
data:
  train: {folder}/train.jsonl
  valid: {folder}/valid.jsonl
  prompt: "{{source}} ="
  target: " {{goal}}"
  max_length: 64
train: {{max_steps: 6, global_batch_size: 8, micro_batch_tokens: 128, lr: 1.0e-2}}
engine: {{deepspeed: zero3}}
run: {{folder: {folder}/run, log_every: 1, valid_every: 3, save_every: 2}}
mlflow: {{uri: null}}
""",
        overrides,
    )
