"""Plans of Llama-shaped bases of 8, 70 and 405 billion parameters on 8, 64 and 1,024 GPUs.

    python -m tests.benchmarks.plan_tables [GPU]

Eight examples of 1,024 tokens for each device in a step, a quarter of the tokens targets, 30 prefix
positions; micro-batches of 8,192 tokens, nodes of eight. Prints a Markdown table; no weights, no GPU.
"""

import json
import sys
import tempfile
from pathlib import Path

from prefix_ds.config import parse_config
from prefix_ds.plan import Job, device_named, estimator

BASES = {  # layers, width, of the MLP, heads
    "8B": (32, 4096, 14336, 32),
    "70B": (80, 8192, 28672, 64),
    "405B": (126, 16384, 53248, 128),
}
WAYS = (), ("model.recompute=true",), ("model.recompute=true", "model.bits=8")
COUNTS = 8, 64, 1024
RUN = """
model: {{name: {folder}}}
prefix: {{length: 30, init: random}}
data: {{max_length: 1024}}
train: {{global_batch_size: {examples}, micro_batch_tokens: 8192}}
"""
HEAD = (
    "base",
    "GPUs",
    "way",
    "GiB a GPU",
    "shards",
    "gathered",
    "activations",
    "fits",
    "s a step",
    "tokens/s",
    "limit",
)


def main():
    device = device_named(sys.argv[1] if len(sys.argv) > 1 else None, None, None, None)
    rows = [HEAD, ("---",) * len(HEAD)]
    with tempfile.TemporaryDirectory() as name:
        for base, sizes in BASES.items():
            folder = Path(name) / base
            write_config(folder, *sizes)
            estimated = estimator(device, 30)
            rows += [row(base, folder, count, way, estimated, device) for count in COUNTS for way in WAYS]
    sys.stdout.write("".join(f"| {' | '.join(cells)} |\n" for cells in rows))


def write_config(folder, num_layers, width, inner, heads):
    folder.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": num_layers, "hidden_size": width, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def row(base, folder, count, way, estimated, device):
    config = parse_config(RUN.format(folder=folder, examples=8 * count), list(way))
    found = estimated(config, Job(count // 8, 8, 1024, 0.25))
    parts = (found.memory[name] for name in ("shards", "gathered layers", "activations"))
    fits = found.total_bytes <= device.usable_bytes
    return (
        base,
        f"{count:,}",
        ", ".join(word.removeprefix("model.") for word in way) or "as it is",
        *(f"{size / 2**30:,.1f}" for size in (found.total_bytes, *parts)),
        "yes" if fits else "no",
        f"{found.step_seconds:.2f}",
        f"{found.tokens / found.step_seconds:,.0f}",
        found.limit,
    )


if __name__ == "__main__":
    main()
