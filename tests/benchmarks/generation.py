"""Text written under ZeRO-3 on two ranks: record by record, in batches, and with the base gathered once.

    python -m tests.benchmarks.generation [--quick] [PART OF A WAY'S NAME]

A Llama of 12 layers, 768 wide, 32,000 tokens, bfloat16, random weights (`--quick`: 4 layers, half of the
records); a prefix of 30; prompts from the first records of DialogSum's test file of ../shared/data, cut to
256 tokens, in two batches of eight; 32 new tokens each, greedy, none of which ends a text. Two ranks, a thread
each. The first way is what a script does: each rank calls transformers' `generate` for its records, one after
the other, with `synced_gpus`. The others are `prefix-ds generate` with and without `generate.gather: once`; of
these, one copies all keys and values for every token, as transformers' cache and a prefix joined to it do. Every
way runs in fresh processes; the first writes for a quarter of the records, which is enough to time it. Printed:
new tokens a second of both ranks, gathering included, as the slower rank saw them, and how many collective
gathers there were.

The bar: 4 times the tokens a second of the first way.
"""

import logging
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from prefix_ds.config import DataKeys, GenerateKeys, parse_config
from prefix_ds.data.prompts import prompt_of_text
from prefix_ds.dist import joined_world, wait_for_all
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import sharded
from prefix_ds.loading import load_base, load_tokenizer
from prefix_ds.model import PrefixLM, decoding, steps
from prefix_ds.opening import Opened
from prefix_ds.prefix import random_table
from prefix_ds.writing import write_outputs
from tests.benchmarks.made import base_folder, rows, summaries
from tests.planned import counted_gathers
from tests.ranks import on_ranks

RANKS, PREFIX, NEW, BATCH = 2, 30, 32, 8
SIZES = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 32000,
}  # fmt: skip
RUN = "model: {{name: {folder}}}\nprefix: {{init: random, length: 30}}"


@dataclass(frozen=True)
class Way:
    """How text is written."""

    is_by_record: bool = False
    gather: str = "once"
    batch: int = BATCH
    copies: bool = False


WAYS = {
    "`generate` for each record": Way(is_by_record=True),
    "batches, each layer gathered for each token": Way(gather="each_layer"),
    "gathered once, record by record": Way(batch=1),
    "gathered once, batches, keys and values copied": Way(copies=True),
    "gathered once, batches": Way(),
}


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    quick = "--quick" in sys.argv
    sizes = SIZES | ({"num_hidden_layers": 4} if quick else {})
    count = RANKS * BATCH // (2 if quick else 1)
    table = Table("way", "tokens/s", "of the first", "gathers", "new tokens")
    first = None
    with tempfile.TemporaryDirectory() as name:
        folder = base_folder(Path(name) / "base", sizes, summaries())
        for told, way in WAYS.items():
            if all(word in told for word in words):
                fewer = count // 4 if way.is_by_record else count
                rate, gathers, tokens = measured_way(folder, way, max(RANKS, fewer))
                first = first or rate
                print(f"{told}: {rate:.1f} tokens/s, {gathers} gathers, {tokens} tokens", flush=True)
                table.add_row(told, f"{rate:.1f}", f"{rate / first:.1f}", f"{gathers:,}", f"{tokens}")
    Console(width=130).print(table)


def measured_way(folder, way, count):
    """(tokens/s of all ranks, gathers, new tokens)."""
    found = on_ranks(RANKS, measured, folder, way, count, timeout_seconds=3000)
    tokens, seconds, gathers = zip(*found, strict=True)
    return sum(tokens) / max(seconds), max(gathers), sum(tokens)


def measured(folder, way, count):
    """(this rank's new tokens, seconds, gathers)."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with joined_world() as world:
        opened = opened_base(folder, world)
        prompts = prompts_of(opened.tokenizer, count)
        write = by_record if way.is_by_record else in_batches
        write(opened, prompts[:RANKS], way, world)  # what is made at first use
        wait_for_all()
        copying = mock.patch.object(steps, "make_room", return_value=None) if way.copies else nullcontext()
        with counted_gathers() as gathers, copying:
            began = time.perf_counter()
            tokens = write(opened, prompts, way, world)
            seconds = time.perf_counter() - began
        return tokens, seconds, len(gathers)


def opened_base(folder, world):
    """A base in shards behind a random prefix."""
    config = parse_config(RUN.format(folder=folder))
    settings = deepspeed_settings(config, world.size)
    shards = sharded(in_shards(load_base(config.model), settings), settings)
    lm = PrefixLM(shards.module, device=world.device)
    table = random_table(lm.slots, PREFIX, 0.02, seed=0)
    tokenizer = load_tokenizer(config.model, config.data)
    tokenizer.eos_token = None
    return Opened(lm, table, lm.slots, tokenizer, shards)


def prompts_of(tokenizer, count):
    """Of dialogues."""
    texts = [row["dialogue"] + "\nTL;DR:" for row in rows("dialogsum/test.jsonl")]
    return [
        prompt_of_text(text, DataKeys(max_length=256), tokenizer)
        for text in list(dict.fromkeys(texts))[:count]
    ]


def by_record(opened, prompts, _way, world):
    """As a script of one's own would; new tokens of this rank."""
    settings = decoding.settings(
        max_new_tokens=NEW, eos_ids=[], pad_id=0, num_beams=1, temperature=0.0, top_p=1.0
    )
    written = 0
    for prompt in prompts[world.rank :: world.size]:
        ids = torch.tensor([prompt.ids])
        told = {
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1])[None] + PREFIX,
        }
        with opened.lm.prefixed(opened.table_PD, opened.slots), decoding.no_settings_of(opened.lm.base):
            answer = opened.lm.base.generate(ids, settings, synced_gpus=True, **told)
        written += answer.shape[1] - ids.shape[1]
    return written


def in_batches(opened, prompts, way, world):
    """As `prefix-ds generate` does."""
    written = []
    generate = opened.lm.generate

    def counted(*arguments, **options):
        answers = generate(*arguments, **options)
        written.append(sum(map(len, answers)))
        return answers

    opened.lm.generate = counted
    at_once = min(way.batch, max(1, len(prompts) // world.size))  # or a rank would repeat the other's
    keys = GenerateKeys(max_new_tokens=NEW, batch_size=at_once, gather=way.gather)
    try:
        write_outputs(opened, prompts, keys, world)
    finally:
        del opened.lm.generate
    return sum(written)


if __name__ == "__main__":
    main()
