"""What a prefix starts from: the keys and values of a text, of tokens from the vocabulary, or noise.

The keys and values that a frozen model computes for real tokens *are* those tokens to everything behind them,
so training starts at exactly the quality of the written instruction. A prefix longer than its text holds the
text several times over, cut at the front, so that the last words before the input are the text's last words;
the tokenizer's leading special token (bos), which most models use as a place to attend to when there is
nothing to attend to, stays first.

Tokens drawn at random say nothing, but what the model computes for them has the size, in each layer, of what
it computes for any text (as Lester et al. 2021 start a prompt); noise has the same size in all.

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
from prefix_ds.prefix import Direct, Reparameterised, Slot, random_table, table_of


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
    if keys.init == "random":
        assert keys.length is not None
        return random_table(slots, keys.length, keys.init_std, seed)
    if keys.init == "vocabulary":
        assert keys.length is not None
        tokens = vocabulary_tokens(tokenizer, keys.length, seed, lm.vocab_size)
    else:
        tokens = text_tokens(tokenizer, keys.text or "", keys.length)
    lm.check_length(len(tokens), "prefix.length")
    table_PD = table_of(lm.keys_values_of(torch.tensor([tokens], device=device), slots))
    return from_first(table_PD)  # ranks round differently, and all that they exchange later is gradients
