"""A step beside the limit of the machine: the rate at which it does bare matrix products of the same shapes.

    python -m tests.benchmarks.limit [--quick] [PAIRS]

A Llama of 12 layers, 768 wide, 32,000 tokens, bfloat16 (`--quick`: 4 layers, nothing recomputed); a
micro-batch of 2,048 tokens in documents of 256, half of the tokens targets, a prefix of 30. Once one rank
with two threads, once two ranks with one thread each, under ZeRO-3. In each process steps and bare products
take turns, and start together on all ranks. A step's arithmetic (`tests.benchmarks.arithmetic`: recomputation
not counted) over its time is its rate; the machine's is that of the products with weights, each shape as
often as a step has it, alone. Printed are both and their ratio (medians of pairs; of ranks the slowest), the
rates of the shapes, and where the time of a step goes: operators by their own time, as torch's profiler sees
them.

The bars: 0.80 of the machine's rate on one rank, 0.65 on two.
"""

import statistics
import sys

from rich.console import Console
from rich.table import Table

from prefix_ds.dist import joined_world, wait_for_all
from tests.benchmarks.arithmetic import Bare, Work
from tests.benchmarks.made import made_share, new_engine, seconds, use_threads
from tests.benchmarks.profiled import profiled
from tests.ranks import on_ranks

SIZES = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 32000,
}  # fmt: skip
DOCUMENTS, PREFIX = (256,) * 8, 30
WORLDS = {"1 rank, 2 threads": (1, 2), "2 ranks, a thread each": (2, 1)}
BARS = {1: 0.80, 2: 0.65}
CONSOLE = Console(width=120)


def main():
    quick = "--quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    pairs = numbers[0] if numbers else 2 if quick else 7
    sizes = SIZES | ({"num_hidden_layers": 4} if quick else {})
    table = Table("ranks", "way", "GFLOP a step", "s a step", "GFLOP/s", "bare products", "ratio", "bar")
    for world, (size, threads) in WORLDS.items():
        for recompute in (False,) if quick else (False, True):
            way = "recomputed" if recompute else "as it is"
            answers = on_ranks(size, measured, sizes, threads, recompute, pairs, timeout_seconds=1200)
            show(f"{world}, {way}", answers, table)
    CONSOLE.print(table)


def measured(sizes, threads, recompute, pairs):
    """Of a rank: its arithmetic, (seconds of a step, of the bare products) of each pair, the rates of the
    shapes, and the operators of one step."""
    use_threads(threads)
    with joined_world() as world:
        engine = new_engine(sizes, world, PREFIX, recompute=recompute)
        share = made_share(DOCUMENTS, sizes["vocab_size"], world, sum(DOCUMENTS))
        work = Work(sizes, DOCUMENTS, sum(DOCUMENTS) // 2, PREFIX)
        bare = Bare(work, world.device)
        turns = [turn(engine, share, bare) for _ in range(pairs + 2)][2:]
        rates = bare.rates({key: statistics.median(found[key] for _, found in turns) for key in turns[0][1]})
        times = [(step, sum(found.values())) for step, found in turns]
        told = profiled(lambda: engine.step(share, 1e-3)).operators
        return work.flops(), work.product_flops(), times, rates, told


def turn(engine, share, bare):
    """Seconds of a step, and of bare products by shape; all ranks begin together."""
    wait_for_all()
    step = seconds(lambda: engine.step(share, 1e-3))
    wait_for_all()
    return step, bare.timed()


def show(name, answers, table):
    """A row of the table, of the slowest rank of each pair; at once, the rates and the breakdown."""
    flops, products = answers[0][:2]
    pairs = [tuple(map(max, zip(*pair, strict=True))) for pair in zip(*(a[2] for a in answers), strict=True)]
    step, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [flops / step / (products / bare) for step, bare in pairs]
    size = len(answers)
    numbers = (flops * size, step, flops * size / step, products * size / bare)
    texts = [f"{numbers[0] / 1e9:,.0f}", f"{step:.2f}", *(f"{rate / 1e9:.0f}" for rate in numbers[2:])]
    world, way = name.rsplit(", ", 1)
    bar = "" if way == "recomputed" else f"{BARS[size]:.2f}"
    table.add_row(world, way, *texts, f"{statistics.median(ratios):.2f}", bar)
    CONSOLE.print(f"{name}: {statistics.median(ratios):.2f} of the rate of bare products; pairs", end=" ")
    CONSOLE.print(", ".join(f"{ratio:.2f}" for ratio in ratios))
    show_parts(name, *answers[0][3:])


def show_parts(name, rates, told):
    """The rates of the shapes and the operators of the first rank."""
    shapes = Table("product, alone", "forward GFLOP/s", "backward", title=name)
    for product in dict.fromkeys(product for product, _ in rates):
        shapes.add_row(product, *(f"{rates[product, way] / 1e9:.0f}" for way in ("forward", "backward")))
    parts = Table("operator of a step, profiled", "calls", "part of the step", title=name)
    for operator, count, part in told:
        parts.add_row(operator, str(count), f"{part:.1%}")
    CONSOLE.print(shapes, parts)


if __name__ == "__main__":
    main()
