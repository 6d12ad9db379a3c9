"""What surrounds `generate`: prompts side by side, how to choose tokens, where an answer ends.

The base's own generation defaults (penalties, top-k, forced tokens) are set aside: an answer depends on what
was asked for and on nothing a checkpoint's authors left behind.

Knows nothing of prefixes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts as rows [B, T] that end together, and a mask of the same shape: 1 where there is one."""
    if not all(prompts):
        raise ValueError("a prompt without tokens")
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids_BT.to(device), mask_BT.to(device)


def positions_of(mask_BT: Tensor) -> Tensor:
    """How many tokens of its prompt come before each token; 0 where there is none."""
    return (mask_BT.cumsum(dim=1) - 1).clamp(min=0)


@contextmanager
def no_settings_of(base: Any) -> Iterator[None]:
    """The base's own, which would fill in what a call leaves open, are blank inside."""
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def settings(
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    num_beams: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    """Greedy or beam search at temperature 0, sampling above."""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


def drawer(seeds: Sequence[int] | None) -> Callable[[Sequence[int]], Tensor]:
    """Draws a number from [0, 1) for each of some prompts: from its own stream, or all from torch's."""
    if seeds is None:
        return lambda rows: torch.rand(len(rows), dtype=torch.float64)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda rows: torch.cat(
        [torch.rand(1, dtype=torch.float64, generator=streams[row]) for row in rows]
    )


def cut(answers_BT: Tensor, eos_ids: Sequence[int]) -> list[list[int]]:
    """The tokens of each row before the first that ends it."""
    ends = set(eos_ids)
    rows: list[list[int]] = answers_BT.tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
