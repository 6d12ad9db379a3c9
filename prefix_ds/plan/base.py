"""The structure of a run's base, with weights that have shapes and no numbers.

What is asked for is a configuration: a folder needs no more than a config.json, and of a hub id nothing else
is downloaded. Knows nothing of plans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefix_ds.config import ModelKeys, RunConfig
from prefix_ds.errors import ModelError
from prefix_ds.initial import text_tokens
from prefix_ds.int8 import stored_in_8_bits
from prefix_ds.loading import base_config, load_tokenizer
from prefix_ds.model.skeleton import skeleton
from prefix_ds.promise import Promise


@dataclass(frozen=True)
class _Blank:
    """Numbers that nobody will read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


def bare_base(keys: ModelKeys) -> Any:
    """The base as a run would have it. Raises PrefixError."""
    dtype = getattr(torch, keys.dtype)
    base = skeleton(base_config(keys), keys.trust_remote_code, dtype).requires_grad_(False)
    if keys.bits == 8:
        _exchange(base, lambda p: Promise.of(_Blank(tuple(p.shape), p.dtype)))
        stored_in_8_bits(base, keys.vocabulary_bits == 8, keys.in_16_bits)
        _exchange(base, lambda p: torch.empty(p.shape, dtype=p.dtype, device="meta"))
    return base


def _exchange(base: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
    new: dict[Tensor, nn.Parameter] = {}
    for module in base.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in new:
                    new[old] = nn.Parameter(made(old), requires_grad=False)
                module._parameters[name] = new[old]


def prefix_length(config: RunConfig) -> int:
    """Positions of the run's prefix; 0 for a run that trains all weights. Raises PrefixError."""
    if config.train.method != "prefix":
        return 0
    if config.prefix.length is not None:
        return config.prefix.length
    base_config(config.model)  # what is wrong with the base is told first
    try:
        tokenizer = load_tokenizer(config.model, config.data)
    except ModelError as error:
        raise ModelError(f"{error}; or give prefix.length") from error
    return len(text_tokens(tokenizer, config.prefix.text or "", None))
