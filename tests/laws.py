"""The words in which the laws about models are stated: documents in rows, a table, a distance.

Knows nothing of families.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prefix_ds.data.batch import Batch, documents_of
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import KeyValue, random_table


def batch_of(*rows: Sequence[Tensor]) -> Batch:
    """Rows of documents (of one length together), every place of which has a target."""
    ids_BT = torch.stack([torch.cat(list(row)) for row in rows])
    positions_BT = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows])
    places = torch.arange(ids_BT.numel())
    return whole_batch(ids_BT, positions_BT, places, ids_BT.flatten().roll(-1))


def whole_batch(ids_BT: Tensor, positions_BT: Tensor, index_M: Tensor, target_ids_M: Tensor) -> Batch:
    """Rows without padding, whose documents are read off their positions."""
    return Batch(ids_BT, positions_BT, index_M, target_ids_M, ids_BT.numel(), documents_of(positions_BT))


def table_of(keys_values: Sequence[KeyValue]) -> Tensor:
    """The table of these keys and values, without a change of type."""
    return torch.cat([t.transpose(0, 1).flatten(1) for pair in keys_values for t in pair], dim=1)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@contextmanager
def seen_steps(lm: PrefixLM) -> Iterator[list[Tensor]]:
    """The logits [B, V] of the last token of every forward pass inside."""
    steps: list[Tensor] = []
    hook = lm.base.register_forward_hook(lambda _, __, output: steps.append(output.logits[:, -1].clone()))
    yield steps
    hook.remove()


@contextmanager
def calls_of(module: Any) -> Iterator[list[None]]:
    """One entry for every call of a module inside, also of one that is broken off."""
    calls: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    hook.remove()


def tokens(count: int, seed: int = 0) -> Tensor:
    """Random ones."""
    return torch.randint(20, 100, (count,), generator=torch.Generator().manual_seed(seed))


def noisy_table(lm: PrefixLM, length: int = 5, slots: Any = None) -> Tensor:
    """A table of noise for a base in float64."""
    table_PD = random_table(lm.slots if slots is None else slots, length, std=1.0, seed=1)
    return table_PD.double().requires_grad_()


def answers(
    lm: PrefixLM, prompts: list[list[int]], table_PD: Tensor | None, **options: Any
) -> list[list[int]]:
    """Greedy answers of four tokens, unless the options say otherwise."""
    options = {"max_new_tokens": 4, "eos_ids": [], "pad_id": 0} | options
    return lm.generate(prompts, table_PD, lm.slots if table_PD is not None else (), **options)
