"""What a prefix starts from: the keys and values of a text, of tokens from the vocabulary, or noise.

The keys and values that a frozen model computes for real tokens *are* those tokens to everything behind them,
so training starts at exactly the quality of the written instruction. A prefix longer than its text holds the
text several times over, cut at the front, so that the last words before the input are the text's last words;
the tokenizer's leading special token (bos), which most models use as a place to attend to when there is
nothing to attend to, stays first.

Tokens drawn at random say nothing, but what the model computes for them has the size, in each layer, of what
it computes for any text (as Lester et al. 2021 start a prompt). Noise is given that size too, unless another
is asked for.

Knows nothing of engines or files.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefix_ds.config import PrefixKeys
from prefix_ds.dist import from_first
from prefix_ds.errors import ConfigError
from prefix_ds.model import PrefixLM
from prefix_ds.prefix import Direct, Reparameterised, Slot, keys_values_of, random_table, table_of


def initial_prefix(
    lm: PrefixLM, keys: PrefixKeys, tokenizer: Any, seed: int, device: torch.device
) -> Direct | Reparameterised:
    """The prefix before the first step. Raises ConfigError. Every rank calls this."""
    slots = chosen_slots(lm.slots, keys)
    table_PD = _table(lm, slots, keys, tokenizer, seed, device)
    if keys.reparam_dim:
        noise = torch.Generator().manual_seed(seed)
        return Reparameterised(slots, table_PD, keys.reparam_dim, noise)
    return Direct(slots, table_PD)


def chosen_slots(slots: Sequence[Slot], keys: PrefixKeys) -> tuple[Slot, ...]:
    """The slots that `prefix.layers` names. Raises ConfigError."""
    if keys.layers == "all":
        return tuple(slots)
    wrong = [n for n in keys.layers if not -len(slots) <= n < len(slots)]
    if wrong:
        raise ConfigError(f"prefix.layers: {wrong[0]}: the base has attention layers 0 to {len(slots) - 1}")
    return tuple(slots[n] for n in sorted({n % len(slots) for n in keys.layers}))


def text_tokens(tokenizer: Any, text: str, length: int | None) -> list[int]:
    """The tokens a prefix of `length` positions starts from.

    Raises ConfigError when the text does not fit.
    """
    ids = list(tokenizer(text).input_ids)
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:  # [SEP], </s>: the text goes on
        ids.pop()
    lead, words = _parted(ids, special)
    if not words:
        raise ConfigError(f"prefix.text: {text!r}: gives no tokens")
    if length is None:
        return ids
    if length < len(ids):
        raise ConfigError(
            f"prefix.length: {length}: prefix.text alone takes {len(ids)} tokens; raise it or leave it out"
        )
    room = length - len(lead)
    return lead + (words * (room // len(words) + 1))[-room:]


def vocabulary_tokens(tokenizer: Any, length: int, seed: int, vocab_size: int) -> list[int]:
    """As many tokens, drawn from all that are not special, behind the special one that leads.

    Raises ConfigError where there are none.
    """
    special = set(tokenizer.all_special_ids)
    lead, _ = _parted(list(tokenizer("a").input_ids), special)
    left_out = special | set(tokenizer.added_tokens_decoder)
    words = sorted({n for n in tokenizer.get_vocab().values() if n < vocab_size} - left_out)
    if not words:
        raise ConfigError("prefix.init: vocabulary: the tokenizer has special tokens only")
    drawn = torch.randint(len(words), (length,), generator=torch.Generator().manual_seed(seed))
    return (lead + [words[n] for n in drawn.tolist()])[:length]


def _parted(ids: list[int], special: set[int]) -> tuple[list[int], list[int]]:
    """The special tokens that lead, and the rest."""
    start = next((n for n, token in enumerate(ids) if token not in special), len(ids))
    return ids[:start], ids[start:]


def _table(
    lm: PrefixLM, slots: Sequence[Slot], keys: PrefixKeys, tokenizer: Any, seed: int, device: torch.device
) -> Tensor:
    if keys.init == "text":
        tokens = text_tokens(tokenizer, keys.text or "", keys.length)
        return _of_tokens(lm, slots, tokens, device)
    assert keys.length is not None
    if keys.init == "random" and keys.init_std is not None:
        return random_table(slots, keys.length, keys.init_std, seed)
    tokens = vocabulary_tokens(tokenizer, keys.length, seed, lm.vocab_size)
    table_PD = _of_tokens(lm, slots, tokens, device)
    if keys.init == "vocabulary":
        return table_PD
    return random_table(slots, keys.length, 1.0, seed) * _sizes(table_PD, slots)


def _of_tokens(lm: PrefixLM, slots: Sequence[Slot], tokens: Sequence[int], device: torch.device) -> Tensor:
    """Rank 0's keys and values: ranks round differently, and all that they exchange later is gradients."""
    lm.check_length(len(tokens), "prefix.length")
    return from_first(table_of(lm.keys_values_of(torch.tensor([tokens], device=device), slots)))


def _sizes(table_PD: Tensor, slots: Sequence[Slot]) -> Tensor:
    """The root mean square [1, D] of each slot's keys and of its values; a leading token's, which may be far
    from any other's, is left out where there are more."""
    rows_PD = table_PD[1:] if len(table_PD) > 1 else table_PD
    pairs = keys_values_of(rows_PD, slots)
    return table_of([(_size(key), _size(value)) for key, value in pairs])


def _size(numbers_NPH: Tensor) -> Tensor:
    """Their root mean square, as of one position [N, 1, H]."""
    return numbers_NPH.square().mean().sqrt().expand_as(numbers_NPH[:, :1])
