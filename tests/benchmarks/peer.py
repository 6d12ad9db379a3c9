"""A step of ours beside PEFT's prefix tuning under DeepSpeed ZeRO-3 with a loop written by hand.

    python -m tests.benchmarks.peer [--quick] [--sizes] [PART OF A NAME]

The same model (Llama, bfloat16, random weights), the same examples (E2E's and DialogSum's training files of
../shared/data, mixed three to one) in the same order, the same global batches, on two ranks with one thread
each. The peer is `tests.benchmarks.peft_zero3`; its micro-batches have so many examples that they hold,
padded, about as many tokens as ours. The two take turns in fresh processes. Printed: real tokens a second
(padding not counted), and the memory a rank takes at its peak beyond what Python and its packages take; the
losses, which must be alike. Memory is that of one step, while glibc keeps nothing that is freed; steps are
timed after it, while it does. With recomputation ours is compared with the peer without, which cannot
recompute.

`--sizes` looks instead at how the peer does with micro-batches of other sizes, with its examples sorted by
length within a step, and with what transformers' Trainer fills in where DeepSpeed's file says "auto". `--quick`: a third of the layers and a quarter of the batch, one turn.

The bars, of the two models: 2.2 and 8 times the tokens a second, 0.45 and 0.30 of the memory; recomputed 1.7
and 6, 0.33 and 0.25.
"""

import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefix_ds.config import parse_config
from prefix_ds.data.examples import load_examples
from prefix_ds.data.order import Order
from prefix_ds.data.stream import Stream
from prefix_ds.dist import joined_world
from prefix_ds.loading import load_base, load_tokenizer
from prefix_ds.rows import limits_for
from tests.benchmarks.made import base_folder, captions, engine_on, summaries
from tests.ranks import on_ranks
from tests.resident import forget_highest, give_back_what_is_free, highest, relax, resident, settle

RANKS, PREFIX, MICRO_BATCH_TOKENS = 2, 30, 2048
SIZES = {
    "12 layers x 768, vocabulary 32,000": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 32000,
    },
    "8 layers x 512, vocabulary 128,256": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "vocab_size": 128256,
    },
}  # fmt: skip
RUN = """
model: {{name: {folder}, recompute: {recompute}}}
prefix: {{init: random, length: 30}}
data: {{train: {data}, prompt: "{{prompt}}", target: "{{target}}", max_length: 640}}
train: {{global_batch_size: {batch}, micro_batch_tokens: 2048, max_steps: 100, lr: 1.0e-3}}
"""


@dataclass(frozen=True)
class Case:
    """What runs: a base, examples, so many of them a step, so many steps timed after two others; of the peer
    how many examples it takes at once (0: what suits), whether sorted, and whether ZeRO's sizes are those that
    the Trainer derives."""

    folder: Path
    data: Path
    batch: int
    steps: int
    at_once: int = 0
    is_sorted: bool = False
    is_as_trainer: bool = False

    def config(self, recompute=False):
        """The run, as its file would say."""
        told = {"folder": self.folder, "data": self.data, "batch": self.batch}
        return parse_config(RUN.format(recompute=str(recompute).lower(), **told))


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    quick = "--quick" in sys.argv
    rounds, batch, steps = (1, 8, 1) if quick else (3, 32, 2)
    compared = compare_sizes if "--sizes" in sys.argv else compare
    table = Table("model", "way", "tokens/s", "of the peer", "MiB a rank", "of the peer")
    with tempfile.TemporaryDirectory() as name:
        texts = mixed()
        data = Path(name) / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in texts))
        for model, sizes in SIZES.items():
            if all(word in model for word in words):
                fewer = {"num_hidden_layers": sizes["num_hidden_layers"] // 3} if quick else {}
                folder = base_folder(Path(name) / f"base{sizes['hidden_size']}", sizes | fewer, texts)
                compared(Case(folder, data, batch, steps), model, rounds, table)
    Console(width=130).print(table)


def mixed():
    """Short and long ones."""
    texts = captions()[:1500] + summaries()
    random.Random(0).shuffle(texts)
    return texts


def compare(case, model, rounds, table):
    """Rows of a table: medians of turns."""
    ways = {
        "PEFT": (theirs, case),
        "ours": (ours, case, False),
        "ours, recomputed": (ours, case, True),
    }
    take_turns(ways, model, rounds, table)


def compare_sizes(case, model, rounds, table):
    """The same of the peer alone."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size * RANKS <= case.batch]
    ways = {"PEFT": (theirs, case)}
    ways |= {f"PEFT, {size} at once": (theirs, replace(case, at_once=size)) for size in sizes}
    ways["PEFT, sorted by length"] = (theirs, replace(case, is_sorted=True))
    ways["PEFT, the Trainer's sizes of ZeRO-3"] = (theirs, replace(case, is_as_trainer=True))
    take_turns(ways, model, 1, table)


def take_turns(ways, model, rounds, table):
    """Every way once a round; the first is what the others are compared with."""
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (work, *arguments) in ways.items():
            rates, peaks, losses = zip(*on_ranks(RANKS, work, *arguments, timeout_seconds=3000), strict=True)
            found[way].append((sum(rates), max(peaks)))
            told = f"{sum(rates):.0f} tokens/s, {max(peaks):.0f} MiB, loss {statistics.mean(losses):.3f}"
            print(f"{model}: {way}: {told}", flush=True)
    firsts = found[next(iter(ways))]
    for way, pairs in found.items():
        rate, peak = (statistics.median(column) for column in zip(*pairs, strict=True))
        of_rate, of_peak = (
            statistics.median(mine / theirs for mine, theirs in zip(*columns, strict=True))
            for columns in zip(zip(*pairs, strict=True), zip(*firsts, strict=True), strict=True)
        )
        table.add_row(model, way, f"{rate:.0f}", f"{of_rate:.2f}", f"{peak:.0f}", f"{of_peak:.2f}")


def ours(case, recompute):
    """(tokens/s, MiB, loss) of this rank's part."""
    be_quiet()
    settle()
    config = case.config(recompute)
    with joined_world() as world:
        examples = examples_of(config, world)
        give_back_what_is_free()
        own = resident()
        engine = engine_on(load_base(config.model), config, world, PREFIX)
        stream = Stream(examples, limits_for(engine.lm, config), config.train, world)

        def step(number):
            share = stream.share(number)
            return share.global_tokens, engine.step(share, 1e-3).loss

        return measured(case, world, own, step)


def theirs(case):
    """The same, with PEFT."""
    from tests.benchmarks import peft_zero3 as peer

    be_quiet()
    settle()
    with joined_world() as world:
        config = case.config()
        examples = examples_of(config, world)
        order = Order(len(examples), config.train)
        size = case.at_once or suiting(examples, order)
        give_back_what_is_free()
        own = resident()
        zero = peer.trainers_sizes(case.folder) if case.is_as_trainer else {}
        engine = peer.new_engine(case.folder, peer.settings(size, case.batch, world.size, zero), PREFIX)

        def step(number):
            indices = order.batch(number)
            mine = their_examples(examples, indices[world.rank :: world.size], case.is_sorted)
            groups = [mine[start : start + size] for start in range(0, len(mine), size)]
            loss = peer.step(engine, map(peer.padded, groups))
            return int(examples.lengths[indices].sum()), loss

        return measured(case, world, own, step)


def be_quiet():
    """About what is old in DeepSpeed and what it does by default."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def examples_of(config, world):
    """The same for both."""
    return load_examples("train", config.data, load_tokenizer(config.model, config.data), world)


def suiting(examples, order):
    """How many examples have, padded, about as many tokens as a micro-batch of ours: a power of two."""
    most = order.batch_size // RANKS
    lengths = [examples.lengths[order.batch(step)] for step in range(20)]

    def padded_tokens(size):
        return size * statistics.mean(float(one[:size].max()) for one in lengths)

    sizes = [2**power for power in range(8) if 2**power <= most]
    return min(sizes, key=lambda size: abs(padded_tokens(size) - MICRO_BATCH_TOKENS))


def their_examples(examples, indices, is_sorted):
    """As its collator wants them."""
    order = sorted(indices, key=lambda n: -examples.lengths[n]) if is_sorted else indices
    texts = [ids.astype("int64") for ids in examples.ids(order)]
    return [
        {"ids": ids, "prompt": len(ids) - examples.num_targets[n]}
        for ids, n in zip(texts, order, strict=True)
    ]


def measured(case, world, own, step):
    """(this rank's part of tokens/s, MiB at the peak of the second step beyond `own`, the last loss)."""
    step(0)
    give_back_what_is_free()
    forget_highest()
    step(1)
    peak = highest() - own
    relax()
    began = time.perf_counter()
    found = [step(2 + number) for number in range(case.steps)]
    seconds = time.perf_counter() - began
    return sum(tokens for tokens, _ in found) / seconds / world.size, peak, found[-1][1]


if __name__ == "__main__":
    main()
