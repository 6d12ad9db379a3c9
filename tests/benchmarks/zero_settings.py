"""What ZeRO-3's sizes cost: DeepSpeed's defaults, the numbers that the preset had, those derived from the model.

    python -m tests.benchmarks.zero_settings [ROUNDS]

Two ranks with one thread each, over gloo, bfloat16, random bases of three sizes, rows of one document. The ways
take turns step by step in the same processes. Printed: tokens a second of all ranks, from the median step, and
the median of its ratios to the first way; in processes of their own, the memory of a rank at its peak beyond
what it had before, and collective calls a step.
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
    "6 x 256": (6, 256, 4096, 4),
    "12 x 768": (12, 768, 32000, 2),
    "24 x 1024": (24, 1024, 32000, 1),
}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    table = Table("base", "sizes", "tokens/s", "of the first", "MiB a rank", "calls")
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
    cases = [Case("llama", rows=rows, zero=tuple(zero.items())) for zero in WAYS.values()]
    seconds = on_ranks(2, timed, cases, folder, rounds, timeout_seconds=1200)[0]
    for way, case, mine in zip(WAYS, cases, seconds, strict=True):
        peaks, calls = zip(*on_ranks(2, measured, case, folder, timeout_seconds=600), strict=True)
        ratio = statistics.median(one / other for one, other in zip(seconds[0], mine, strict=True))
        rate = 2 * rows * case.length / statistics.median(mine)
        row = f"{rate:.0f}", f"{ratio:.2f}", f"{max(peaks):.0f}", f"{calls[0]:.0f}"
        print("|", base, "|", way, "|", " | ".join(row), "|", flush=True)
        table.add_row(base, way, *row)


def timed(cases, folder, rounds):
    """Seconds of steps, a list a case: the cases take turns, step by step, after two steps of each."""
    logging.disable(logging.WARNING)
    with joined_world() as world:
        engines = [engine_of(config_of(case, folder), case, world) for case in cases]
        seconds = [[] for _ in cases]
        for number in range(2 + rounds):
            for case, engine, mine in zip(cases, engines, seconds, strict=True):
                wait_for_all()
                began = time.perf_counter()
                engine.step(share_of(case, 4000), 1e-4)
                if number > 1:
                    mine.append(time.perf_counter() - began)
        return seconds


def measured(case, folder):
    """(MiB at the peak, calls a step) of this rank, in a process of its own; two steps are not counted."""
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
        with counted_gathers() as gathers:
            engine.step(share, 1e-4)
        return highest() - own, len(gathers)


if __name__ == "__main__":
    main()
