"""`prefix-ds generate`: text written with a trained prefix, for one prompt or a file of records.

Prompts are sorted by length and written in batches of neighbours, as many together as memory allows. Where
every rank can hold the whole base it is gathered once, and each rank writes for itself and takes the next
batch when it is free. Where it cannot, ZeRO-3 gathers layer by layer, and every rank must run every layer as
often as the others: they get equal numbers of batches, and what one rank lacks is filled with repeats whose
output is dropped. Each prompt draws random numbers from a seed of its own, so what is sampled depends neither
on the number of ranks nor on batches.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from prefix_ds.config import GenerateKeys, RunConfig, parse_config
from prefix_ds.config.reading import config_text
from prefix_ds.data.prompts import Prompt, prompt_of_text, read_prompts
from prefix_ds.dist import (
    World,
    first_here_first,
    gathered,
    joined_world,
    numbers_in_turn,
    on_first,
    peers_may_die,
)
from prefix_ds.engine.whole import whole
from prefix_ds.errors import ConfigError, RunError
from prefix_ds.files import write_text_atomically
from prefix_ds.logs import configure_logging
from prefix_ds.opening import Opened, open_trained
from prefix_ds.plan.writing import batches_of, manner_of
from prefix_ds.run_folder import open_run
from prefix_ds.tracking import progress_bar

_WORKS = count()  # of this process, which all ranks begin in the same order


@dataclass(frozen=True)
class Request:
    """What to write: for one prompt, or for a file of records; to a file, or to the terminal."""

    prompt: str | None = None
    input_file: Path | None = None
    output_file: Path | None = None
    without_prefix: bool = False


@dataclass(frozen=True)
class Written:
    """One output: the prompt as the model read it, what it wrote, and what was expected, if that is known."""

    prompt: str
    output: str
    references: tuple[str, ...]


def generate(run: Path, overrides: Sequence[str], request: Request) -> None:
    """Writes text with a run's prefix and shows or saves it. Raises PrefixError. Every rank calls this."""
    configure_logging()
    folder, config = open_run(run)
    config = parse_config(config_text(config), overrides)
    check_request(config, request)
    with joined_world() as world, peers_may_die():
        opened = open_trained(folder, config, world, with_prefix=not request.without_prefix)
        prompts = first_here_first(world, lambda: _prompts(config, request, opened.tokenizer))
        written = write_outputs(opened, prompts, config.generate, world)
        on_first(world, lambda: _deliver(written, request.output_file))


def check_request(config: RunConfig, request: Request) -> None:
    """Raises ConfigError or RunError for what would come to light only after the work."""
    if request.prompt is not None and request.input_file:
        raise ConfigError("--prompt and --input: one of them says what to write for; leave the other out")
    if request.prompt is None and not request.input_file and not config.data.test:
        raise ConfigError("nothing to write for: give --prompt, --input, or data.test")
    output = request.output_file
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise RunError(f"--output: {output}: expected a file in a folder that exists")


def write_outputs(
    opened: Opened, prompts: Sequence[Prompt], keys: GenerateKeys, world: World
) -> list[Written]:
    """One output a prompt, in the order of the prompts. Raises ConfigError. Every rank calls this."""
    lengths = [len(prompt.ids) for prompt in prompts]
    more = (0 if opened.table_PD is None else len(opened.table_PD)) + keys.max_new_tokens
    opened.lm.check_length(max(lengths) + more, "generate.max_new_tokens")
    manner = manner_of(opened.lm, opened.sharded, keys, world, max(lengths) + more)
    batches = batches_of(lengths, more, manner)
    with whole(opened.sharded) if manner.is_whole else nullcontext():
        mine = _written(opened, prompts, batches, keys, world, manner.is_whole)
    texts = {n: text for part in gathered(mine) for n, text in part.items()}
    return [Written(p.text, texts[n], p.references) for n, p in enumerate(prompts)]


def _written(
    opened: Opened,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    keys: GenerateKeys,
    world: World,
    is_whole: bool,
) -> dict[int, str]:
    """What this rank wrote, by the number of the prompt."""
    mine: dict[int, str] = {}
    numbers = _taken(len(batches), world) if is_whole else _dealt(len(batches), world)
    with progress_bar("writing", len(batches), is_visible=world.is_first) as bar:
        for number in numbers:
            batch = batches[number]
            outputs = _continued(opened, prompts, batch, keys, is_synced=world.size > 1 and not is_whole)
            mine |= dict(zip(batch, outputs, strict=True))
            bar.at(number + 1)
    return mine


def _taken(num_batches: int, world: World) -> Iterator[int]:
    """The numbers of batches that this rank is the first to ask for."""
    if world.size == 1:
        return iter(range(num_batches))
    return takewhile(lambda number: number < num_batches, numbers_in_turn(f"writing-{next(_WORKS)}"))


def _dealt(num_batches: int, world: World) -> Iterator[int]:
    """This rank's, as many as every other rank has; the last may come twice."""
    rounds = -(-num_batches // world.size)
    return (min(turn * world.size + world.rank, num_batches - 1) for turn in range(rounds))


def _continued(
    opened: Opened, prompts: Sequence[Prompt], batch: Sequence[int], keys: GenerateKeys, *, is_synced: bool
) -> list[str]:
    tokenizer = opened.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(_seed(keys, batch[0]))  # of beams, which transformers samples
    outputs = opened.lm.generate(
        [list(prompts[n].ids) for n in batch],
        opened.table_PD,
        opened.slots,
        max_new_tokens=keys.max_new_tokens,
        num_beams=keys.num_beams,
        temperature=keys.temperature,
        top_p=keys.top_p,
        seeds=[_seed(keys, n) for n in batch],
        eos_ids=[] if end is None else [end],
        pad_id=next(token for token in (pad, end, 0) if token is not None),
        synced=is_synced,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]


def _seed(keys: GenerateKeys, number: int) -> int:
    return random.Random(f"{keys.seed} {number}").getrandbits(63)


def _prompts(config: RunConfig, request: Request, tokenizer: Any) -> list[Prompt]:
    data = config.data
    if request.prompt is not None:
        return [prompt_of_text(request.prompt, tokenizer, data.max_length)]
    if request.input_file:
        source = str(request.input_file)
        return read_prompts(source, "--input", data, tokenizer, data.max_length, references=False)
    assert data.test
    return read_prompts(data.test, "data.test", data, tokenizer, data.max_length, references=True)


def _deliver(written: Sequence[Written], output: Path | None) -> None:
    if output:
        rows = [{"prompt": w.prompt, "output": w.output, "references": w.references} for w in written]
        write_text_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        for w in written:
            sys.stdout.write(f"{w.output}\n" if len(written) == 1 else f"{w.prompt!r}\n  -> {w.output!r}\n")
