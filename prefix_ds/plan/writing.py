"""What writing text takes of a rank's memory: whether the base may lie whole on each, how many rows at once.

Sums, said before the first token. Of the base: all of it where it is gathered once, else what ZeRO-3 may hold
gathered at a time. Of a row: keys and values of its positions in every attention, what the rows of one more
layer take while their cache grows, what a prompt's places have in hand in a layer (a stated multiple of the
base's width), each place's products with all others where attention is not one of torch's kernels, and its
scores over the vocabulary. Windows and latent keys take less than is counted here. The rank with the least
memory speaks for all.

Knows nothing of what is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from prefix_ds.config import GenerateKeys
from prefix_ds.dist import World, gathered
from prefix_ds.engine.sharding import Sharded
from prefix_ds.engine.whole import bytes_to_gather
from prefix_ds.errors import ConfigError
from prefix_ds.model import PrefixLM
from prefix_ds.plan.here import memory_left

_WIDTHS_IN_HAND = 16  # of a place: its inputs, queries, keys, values and the feed-forward layer's
_SCORES_IN_HAND = 3  # of a row, in float32
_PRODUCTS_IN_HAND = 4  # of each query with each key of a prompt, where attention writes them down


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank while it writes."""

    left: int  # before the base is gathered
    once: int  # what the base takes where it is gathered once
    each_layer: int  # and where it is not
    position: int  # a position of one row
    row: int  # a row, however long
    square: int  # times the square of its positions

    def rows(self, length: int, is_whole: bool) -> int:
        """How many rows of so many positions fit."""
        room = self.left - (self.once if is_whole else self.each_layer)
        return max(0, room // self.row_bytes(length))

    def row_bytes(self, length: int) -> int:
        """A row of so many positions."""
        return length * self.position + self.row + length**2 * self.square


@dataclass(frozen=True)
class Manner:
    """How text is written: with the base whole or in shards, and in rows of what footprint."""

    is_whole: bool
    footprint: Footprint
    num_beams: int
    most_rows: int

    def rows(self, length: int) -> int:
        """How many prompts are continued at once, where the longest takes so many positions in all.

        Raises ConfigError where there is no memory for one.
        """
        fitting = self.footprint.rows(length, self.is_whole) // self.num_beams
        if not fitting:
            needed = self.num_beams * self.footprint.row_bytes(length)
            raise ConfigError(
                f"generate.max_new_tokens: {_gib(needed)} GiB for the keys and values of one prompt and its "
                f"answer ({length} positions, {self.num_beams} beams); {_gib(self.footprint.left)} GiB are "
                "left on a rank: lower it, generate.num_beams or data.max_length, or use generate.gather: "
                "each_layer and more ranks"
            )
        return min(self.most_rows, fitting)


def manner_of(lm: PrefixLM, base: Sharded, keys: GenerateKeys, world: World, longest: int) -> Manner:
    """How a base writes, where the longest prompt takes so many positions with prefix and answer.

    Raises ConfigError where `generate.gather: once` asks for what cannot be. Every rank calls this.
    """
    footprint = _footprint(lm, base, world)
    fits = footprint.rows(longest, is_whole=True) >= keys.num_beams
    is_whole = _is_whole(keys.gather, base.bytes_on_disk() > 0, fits, footprint)
    return Manner(is_whole, footprint, keys.num_beams, keys.batch_size)


def _is_whole(
    wish: Literal["auto", "once", "each_layer"], is_on_disk: bool, fits: bool, footprint: Footprint
) -> bool:
    if wish == "once" and is_on_disk:
        raise ConfigError(
            "generate.gather: once: the base lies on a disk (engine.nvme_folder); use auto or each_layer"
        )
    if wish == "once" and not fits:
        raise ConfigError(
            f"generate.gather: once: the whole base takes {_gib(footprint.once)} GiB more of a rank, and "
            f"{_gib(footprint.left)} GiB are left, for keys and values too; use auto or each_layer"
        )
    return wish != "each_layer" and fits and not is_on_disk


def _footprint(lm: PrefixLM, base: Sharded, world: World) -> Footprint:
    itemsize = lm.dtype.itemsize
    whole = bytes_to_gather(base, world.device)
    live = base.settings["zero_optimization"]["stage3_max_live_parameters"] * itemsize
    cached = [slot.width for slot in lm.slots]
    position = sum(cached) + 2 * max(cached) + _WIDTHS_IN_HAND * lm.width
    left = min(gathered(memory_left(world)))
    row = _SCORES_IN_HAND * lm.vocab_size * torch.float32.itemsize
    square = _PRODUCTS_IN_HAND * lm.num_products * itemsize
    return Footprint(left, whole, min(whole, live), position * itemsize, row, square)


def batches_of(lengths: Sequence[int], more: int, manner: Manner) -> list[list[int]]:
    """Neighbours by length, longest first, as many together as fit; `more` is what a prompt gets beside it.

    Raises ConfigError.
    """
    order = sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True)
    batches, first = [], 0
    while first < len(order):
        rows = manner.rows(lengths[order[first]] + more)
        batches.append(order[first : first + rows])
        first += rows
    return batches


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}"
