"""A training step whose layers went through torch.compile beside one whose layers did not.

    python -m tests.benchmarks.compiled [--quick] [PAIRS]

A Llama of 12 layers, 768 wide, 32,000 tokens, bfloat16 (`--quick`: 4 layers), a micro-batch of 2,048 tokens in
documents of 256, a prefix of 30, ZeRO-3 on one rank with all threads. What torch.compile sees of a layer lies
between the hooks that gather weights, and around attention, whose documents it must not unroll. Printed: the
seconds of compiling, the two losses, the seconds of a step of each (medians of pairs), and graphs and breaks.
"""

import statistics
import sys
import time

import torch
from rich.console import Console
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from prefix_ds.dist import joined_world
from prefix_ds.model import attention
from prefix_ds.model.recompute import repeatable_layers
from tests.benchmarks.limit import DOCUMENTS, PREFIX, SIZES
from tests.benchmarks.made import made_share, new_engine, seconds


def main():
    quick = "--quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    pairs = numbers[0] if numbers else 2 if quick else 7
    sizes = SIZES | ({"num_hidden_layers": 4} if quick else {})
    with joined_world() as world:
        engine = new_engine(sizes, world, PREFIX)
        share = made_share(DOCUMENTS, sizes["vocab_size"], world, sum(DOCUMENTS))
        ways = forwards_of(engine.lm.base)
        console = Console(width=110)
        for way in ways:
            began = time.perf_counter()
            loss = step(engine, share, ways[way])
            step(engine, share, ways[way])
            console.print(f"{way}: loss {loss}, two steps in {time.perf_counter() - began:.1f} s")
        turns = [{w: seconds(lambda w=w: step(engine, share, ways[w])) for w in ways} for _ in range(pairs)]
        for way in ways:
            console.print(f"{way}: {statistics.median(turn[way] for turn in turns):.3f} s a step")
        ratios = [turn["compiled"] / turn["as it is"] for turn in turns]
        console.print(
            f"compiled / as it is: {statistics.median(ratios):.3f}; pairs", *(f"{r:.3f}" for r in ratios)
        )
        console.print(dict(counters["stats"]), sum(counters["graph_break"].values()), "kinds of breaks")


def forwards_of(base):
    """The forward functions of its layers, by way."""
    name = attention.OVER_SDPA
    AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))
    layers = repeatable_layers(base)
    return {
        "as it is": {layer: layer.forward for layer in layers},
        "compiled": {layer: torch.compile(layer.forward, dynamic=False) for layer in layers},
    }


def step(engine, share, forwards):
    """The loss of a step at rate zero, so that all steps are the same."""
    for layer, forward in forwards.items():
        layer.forward = forward
    return engine.step(share, 0.0)


if __name__ == "__main__":
    main()
