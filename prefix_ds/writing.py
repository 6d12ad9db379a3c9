"""Text written behind a prefix, on all ranks: one output a prompt.

Prompts are sorted by length and dealt to the ranks in equal numbers of batches, since under ZeRO-3 every rank
must run every layer as often as the others; what one rank lacks is filled with repeats whose output is
dropped. Each batch draws its random numbers from a seed of its own, so what is sampled does not depend on the
number of ranks either.

Knows nothing of what the outputs are for.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prefix_ds.config import GenerateKeys
from prefix_ds.data.prompts import Prompt
from prefix_ds.dist import World, gathered
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import Slot
from prefix_ds.tracking import progress_bar


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
    """One output a prompt, in the order of the prompts, with a bar if `is_shown`. Every rank calls this."""
    front = 0 if writer.table_PD is None else len(writer.table_PD)
    longest = max(len(prompt.ids) for prompt in prompts)
    writer.lm.check_length(front + longest + keys.max_new_tokens, "generate.max_new_tokens")
    by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids), reverse=True)
    batches = list(_dealt(by_length, keys.batch_size, world))
    mine: dict[int, str] = {}
    with progress_bar("writing", len(batches), is_visible=is_shown and world.is_first) as bar:
        for done, batch in enumerate(batches, start=1):
            torch.manual_seed(random.Random(f"{keys.seed} {batch[0]}").getrandbits(63))
            outputs = _continued(writer, [list(prompts[n].ids) for n in batch], keys, world)
            mine |= dict(zip(batch, outputs, strict=True))
            bar.at(done)
    texts = {n: text for part in gathered(mine) for n, text in part.items()}
    return [Written(p.text, texts[n], p.references) for n, p in enumerate(prompts)]


def _dealt(order: Sequence[int], batch_size: int, world: World) -> Iterator[list[int]]:
    """This rank's batches: neighbours in `order`, and as many as every other rank has."""
    batches = [list(order[n : n + batch_size]) for n in range(0, len(order), batch_size)]
    batches += [batches[-1]] * (-len(batches) % world.size)
    yield from batches[world.rank :: world.size]


def _continued(writer: Writer, prompts: list[list[int]], keys: GenerateKeys, world: World) -> list[str]:
    tokenizer = writer.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    outputs = writer.lm.generate(
        prompts,
        writer.table_PD,
        writer.slots,
        max_new_tokens=keys.max_new_tokens,
        num_beams=keys.num_beams,
        temperature=keys.temperature,
        top_p=keys.top_p,
        eos_ids=[] if end is None else [end],
        pad_id=next(token for token in (pad, end, 0) if token is not None),
        synced=world.size > 1,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
