"""What ZeRO-3's sizes cost: DeepSpeed's defaults, the numbers that the preset had, those derived from the model.

    python -m tests.benchmarks.zero_settings [ROUNDS]

Two ranks with one thread each, over gloo, bfloat16, random bases of four sizes, rows of one document. The ways
take turns in fresh processes. Printed, as medians: tokens a second, of all ranks; the memory of a rank at its
peak beyond what it had before; collective calls a step.
"""

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from prefix_ds.dist import joined_world, wait_for_all
from tests.planned import Case, config_of, counted_gathers, engine_of, share_of
from tests.ranks import on_ranks
from tests.resident import forget_highest, give_back_what_is_free, highest, resident, settle

STEPS = 4
OLD = {
    "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 0,
}  # fmt: skip
WAYS = {
    "DeepSpeed's defaults": OLD | {"stage3_max_reuse_distance": 1_000_000_000},
    "numbers, as before": OLD,
    "of the model": {},
}
BASES = {  # layers, width, vocabulary, rows of 128
    "6 x 256": (6, 256, 4096, 8),
    "12 x 768": (12, 768, 32000, 4),
    "24 x 1024": (24, 1024, 32000, 2),
    "8 x 2048": (8, 2048, 32000, 2),
}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    table = Table("base", "sizes", "tokens/s", "MiB a rank", "calls")
    with tempfile.TemporaryDirectory() as name:
        for base, (num_layers, width, vocab_size, rows) in BASES.items():
            folder = Path(name) / base.replace(" ", "")
            made_base(folder / "llama", num_layers, width, vocab_size)
            compare(base, folder, rows, rounds, table)
    Console(width=100).print(table)


def made_base(folder, num_layers, width, vocab_size):
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=num_layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=vocab_size, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def compare(base, folder, rows, rounds, table):
    found = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, zero in WAYS.items():
            case = Case("llama", rows=rows, zero=tuple(zero.items()))
            ranks = on_ranks(2, measured, case, folder, timeout_seconds=600)
            found[way].append([max(values) for values in zip(*ranks, strict=True)])
            print(base, way, *(f"{value:.1f}" for value in found[way][-1]), flush=True)
    for way, rows_of in found.items():
        seconds, peak, calls = (statistics.median(values) for values in zip(*rows_of, strict=True))
        tokens = 2 * rows * 128
        table.add_row(base, way, f"{tokens / seconds:.0f}", f"{peak:.0f}", f"{calls:.0f}")


def measured(case, folder):
    """(seconds a step, MiB at the peak, calls a step) of this rank; two steps are not counted."""
    settle()
    logging.disable(logging.WARNING)
    with joined_world() as world:
        give_back_what_is_free()
        own = resident()
        engine, share = engine_of(config_of(case, folder), case, world), share_of(case, 4000)
        for _ in range(2):
            engine.step(share, 1e-4)
        give_back_what_is_free()
        wait_for_all()
        forget_highest()
        began = time.perf_counter()
        with counted_gathers() as gathers:
            for _ in range(STEPS):
                engine.step(share, 1e-4)
        return (time.perf_counter() - began) / STEPS, highest() - own, len(gathers) / STEPS


if __name__ == "__main__":
    main()
