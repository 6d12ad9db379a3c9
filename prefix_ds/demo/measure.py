"""Measures four ways to tell a record, the last stage of the demo: base, instruction, prefix, all weights.

    python -m torch.distributed.run --nproc-per-node 2 -m prefix_ds.demo.measure FOLDER

For each: the loss on the validation records, and what it writes for the test records. The instruction's way
is the prefix before its first step: the keys and values of the instruction's own tokens.

Knows nothing of how the result is shown.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from prefix_ds.config import RunConfig
from prefix_ds.data.examples import load_examples
from prefix_ds.data.prompts import read_prompts
from prefix_ds.data.stream import Sweep
from prefix_ds.demo.comparison import Comparison, Scores, write_comparison
from prefix_ds.dist import World, end_process, joined_world, peers_may_die
from prefix_ds.engine.prefix_engine import mean_loss
from prefix_ds.errors import EXIT_DONE
from prefix_ds.initial import initial_prefix
from prefix_ds.logs import configure_logging
from prefix_ds.opening import Opened, open_trained
from prefix_ds.rows import limits_for
from prefix_ds.run_folder import open_run
from prefix_ds.writing import write_outputs


def measure(folder: Path) -> None:
    """Compares the demo's finished runs and writes the result into its folder. Every rank calls this."""
    configure_logging()
    with joined_world() as world, peers_may_die():
        scores = (*_ways_of_the_base(folder, world), *_way_of_all_weights(folder, world))
        if world.is_first:
            write_comparison(folder, Comparison(*_test_records(folder), scores))


def _ways_of_the_base(folder: Path, world: World) -> Iterator[Scores]:
    run, config = open_run(folder / "prefix")
    trained = open_trained(run, config, world)
    start = initial_prefix(trained.lm, config.prefix, trained.tokenizer, config.train.seed, world.device)
    bare = replace(trained, table_PD=None, slots=())
    instructed = replace(trained, table_PD=start.table().detach(), slots=start.slots)
    yield _scores("base alone", bare, config, world)
    yield _scores("with the instruction", instructed, config, world)
    yield _scores("with the trained prefix", trained, config, world)


def _way_of_all_weights(folder: Path, world: World) -> Iterator[Scores]:
    run, config = open_run(folder / "full")
    yield _scores("all weights fine-tuned", open_trained(run, config, world), config, world)


def _scores(way: str, opened: Opened, config: RunConfig, world: World) -> Scores:
    data, tokenizer = config.data, opened.tokenizer
    limits = limits_for(opened.lm, config)
    sweep = Sweep(load_examples("valid", data, tokenizer, world), limits, world)
    loss = mean_loss(opened.lm, opened.table_PD, opened.slots, sweep, world.device)
    prompts = read_prompts(str(data.test), "data.test", data, tokenizer, data.max_length, references=False)
    written = write_outputs(opened, prompts, config.generate, world)
    return Scores(way, loss, tuple(w.output for w in written))


def _test_records(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The records and the texts of the test split."""
    lines = (folder / "corpus" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple(row["record"] for row in rows), tuple(row["text"] for row in rows)


def main() -> None:
    """Measures in the folder that is named, and ends the process as a command does."""
    measure(Path(sys.argv[1]))
    end_process(EXIT_DONE)


if __name__ == "__main__":
    main()
