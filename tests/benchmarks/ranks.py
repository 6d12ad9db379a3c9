"""One rank with two threads beside two ranks with a thread each: what sharding and talking cost a step.

    python -m tests.benchmarks.ranks [--quick] [ROUNDS]

A Llama of 12 layers, 768 wide, 32,000 tokens, bfloat16 (`--quick`: 4 layers), a prefix of 30; a step is two
micro-batches of 2,048 tokens in documents of 256, half of them targets: both on the one rank, or one on
each of the two. The worlds take turns in fresh processes; printed are tokens a second (a turn's is the
median of three steps) and the ratios of pairs. The bar: 0.85 or more.
"""

import logging
import statistics
import sys
import warnings

from rich.console import Console
from rich.table import Table

from prefix_ds.dist import joined_world, wait_for_all
from tests.benchmarks.limit import DOCUMENTS, PREFIX, SIZES
from tests.benchmarks.made import made_share, new_engine, seconds, use_threads
from tests.ranks import on_ranks

MICRO_BATCHES, STEPS = 2, 3
WORLDS = {"1 rank, 2 threads": (1, 2), "2 ranks, a thread each": (2, 1)}


def main():
    quick = "--quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    rounds = numbers[0] if numbers else 1 if quick else 5
    sizes = SIZES | ({"num_hidden_layers": 4} if quick else {})
    found = {world: [] for world in WORLDS}
    for _ in range(rounds):
        for world, (size, threads) in WORLDS.items():
            found[world].append(min(on_ranks(size, measured, sizes, threads, timeout_seconds=1200)))
            print(f"{world}: {found[world][-1]:.0f} tokens/s", flush=True)
    show(found)


def measured(sizes, threads):
    """Tokens a second of all ranks together, as this one saw it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    use_threads(threads)
    with joined_world() as world:
        engine = new_engine(sizes, world, PREFIX)
        documents = DOCUMENTS * (MICRO_BATCHES // world.size)
        share = made_share(documents, sizes["vocab_size"], world, sum(DOCUMENTS))
        engine.step(share, 1e-3)
        return share.global_tokens / statistics.median(step_seconds(engine, share) for _ in range(STEPS))


def step_seconds(engine, share):
    """Of a step that all ranks begin together."""
    wait_for_all()
    return seconds(lambda: engine.step(share, 1e-3))


def show(found):
    """Medians, and the ratios of the pairs."""
    one, two = found.values()
    ratios = [of_two / of_one for of_one, of_two in zip(one, two, strict=True)]
    table = Table("world", "tokens/s", "of one rank")
    for world, rates in found.items():
        ratio = f"{statistics.median(ratios):.2f}" if rates is two else ""
        table.add_row(world, f"{statistics.median(rates):.0f}", ratio)
    Console(width=110).print(table, "pairs: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
