"""Text written behind a prefix, on all ranks: one output a prompt.

Prompts are sorted by length and written in batches of neighbours, as many together as memory allows. Where
every rank can hold the whole base it is gathered once, and each rank writes for itself and takes the next
batch when it is free. Where it cannot, ZeRO-3 gathers layer by layer, and every rank must run every layer as
often as the others: they get equal numbers of batches, and what one rank lacks is filled with repeats whose
output is dropped. Each prompt draws random numbers from a seed of its own, so what is sampled depends neither
on the number of ranks nor on batches.

Knows nothing of what the outputs are for.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from prefix_ds.config import GenerateKeys
from prefix_ds.data.examples import check_id
from prefix_ds.data.prompts import Prompt
from prefix_ds.dist import World, gathered, numbers_in_turn
from prefix_ds.engine.sharding import Sharded
from prefix_ds.engine.whole import whole
from prefix_ds.model import PrefixLM
from prefix_ds.plan.writing import batches_of, manner_of
from prefix_ds.prefix import Slot, num_positions
from prefix_ds.tracking import progress_bar

log = logging.getLogger(__name__)

_WORKS = count()  # of this process, which all ranks begin in the same order


class Writer(Protocol):
    """A model with what stands in front of its texts, and its tokenizer."""

    @property
    def lm(self) -> PrefixLM:
        """The base."""
        ...

    @property
    def table_PD(self) -> Tensor | None:  # noqa: N802 - its shape
        """The prefix; None: nothing in front."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """Where the prefix goes."""
        ...

    @property
    def sharded(self) -> Sharded:
        """The base's shards."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Of the base."""
        ...


@dataclass(frozen=True)
class Written:
    """One output: the prompt as the model read it, what it wrote, and what was expected, if that is known."""

    prompt: str
    output: str
    references: tuple[str, ...]


def write_outputs(
    writer: Writer, prompts: Sequence[Prompt], keys: GenerateKeys, world: World, *, is_shown: bool = True
) -> list[Written]:
    """One output a prompt, in the order of the prompts, with a bar if `is_shown`.

    Raises ConfigError and DataError. Every rank calls this.
    """
    check_prompts(writer, prompts, keys)
    lengths, more = [len(prompt.ids) for prompt in prompts], _beside(writer, keys)
    manner = manner_of(writer.lm, writer.sharded, keys, world, max(lengths) + more)
    batches = batches_of(lengths, more, manner)
    with whole(writer.sharded) if manner.is_whole else nullcontext():
        mine = _written(writer, prompts, batches, keys, world, manner.is_whole, is_shown)
    texts = {n: text for part in gathered(mine) for n, text in part.items()}
    return [Written(p.text, texts[n], p.references) for n, p in enumerate(prompts)]


def check_prompts(writer: Writer, prompts: Sequence[Prompt], keys: GenerateKeys) -> None:
    """Raises ConfigError or DataError for a position or a token that the base has not."""
    writer.lm.check_length(_longest(writer, prompts, keys), "generate.max_new_tokens")
    check_id(max(max(prompt.ids) for prompt in prompts), writer.lm.vocab_size, "a prompt")


def tell_far(writer: Writer, prompts: Sequence[Prompt], keys: GenerateKeys) -> None:
    """A warning, where outputs may reach further than the base was made for. Rank 0 calls this."""
    longest, most = _longest(writer, prompts, keys), writer.lm.made_for
    if most is not None and most < longest:
        log.warning(
            "prompt, prefix and generate.max_new_tokens come to %d positions; the base was made for %d",
            longest,
            most,
        )


def _longest(writer: Writer, prompts: Sequence[Prompt], keys: GenerateKeys) -> int:
    return max(len(prompt.ids) for prompt in prompts) + _beside(writer, keys)


def _beside(writer: Writer, keys: GenerateKeys) -> int:
    """Positions that a prompt needs besides its own, at most."""
    return num_positions(writer.table_PD) + keys.max_new_tokens


def _written(
    writer: Writer,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    keys: GenerateKeys,
    world: World,
    is_whole: bool,
    is_shown: bool,
) -> dict[int, str]:
    """What this rank wrote, by the number of the prompt."""
    mine: dict[int, str] = {}
    numbers = _taken(len(batches), world) if is_whole else _dealt(len(batches), world)
    with progress_bar("writing", len(batches), is_visible=is_shown and world.is_first) as bar:
        for number in numbers:
            batch = batches[number]
            outputs = _continued(writer, prompts, batch, keys, is_synced=world.size > 1 and not is_whole)
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
    writer: Writer, prompts: Sequence[Prompt], batch: Sequence[int], keys: GenerateKeys, *, is_synced: bool
) -> list[str]:
    tokenizer = writer.tokenizer
    end = tokenizer.eos_token_id
    torch.manual_seed(_seed(keys, batch[0]))  # of beams, which transformers samples
    outputs = writer.lm.generate(
        [list(prompts[n].ids) for n in batch],
        writer.table_PD,
        writer.slots,
        max_new_tokens=keys.max_new_tokens,
        num_beams=keys.num_beams,
        temperature=keys.temperature,
        top_p=keys.top_p,
        seeds=[_seed(keys, n) for n in batch],
        eos_ids=[] if end is None else [end],
        pad_id=0,  # a tokenizer's own may have no row in the embedding
        synced=is_synced,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]


def _seed(keys: GenerateKeys, number: int) -> int:
    return random.Random(f"{keys.seed} {number}").getrandbits(63)
