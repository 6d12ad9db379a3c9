"""One tiny forward pass that finds out what a base can do, by doing it.

Three rows go through the model side by side, and at each attention call the keys and values of the first
row's first tokens stand in front of the two others:

    row 0   p p p p t t t t        a text and what comes before it, no prefix
    row 1   t t t t x x x x        the same text behind a prefix made of p; another document after it
    row 2   x x x x t t t t        the same, behind that other document

Row 1's text must have the logits of row 0's: a prefix made of real tokens *is* those tokens. Where it has
not, the base carries something besides attention (a recurrent state, a convolution) that never sees a prefix.
Row 2's text must have row 1's logits: documents in a row do not see each other. The calls themselves give the
places for a prefix and their shapes, which no configuration tells reliably.

Knows nothing of what is trained, of data or of losses.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from prefix_ds.data.batch import documents_of
from prefix_ds.model.attention import Front
from prefix_ds.model.finish import Finish
from prefix_ds.prefix import Slot

_LENGTH = 4
_VOCABULARY = 16  # every model has that many tokens
_BEHIND_IT = frozenset((1, 2))  # rows
NUM_TOKENS, NUM_TARGETS = 6 * _LENGTH, 3 * _LENGTH  # of the pass


@dataclass(frozen=True)
class Findings:
    """What a trial found."""

    slots: tuple[Slot, ...]  # in order of call
    dtype: torch.dtype  # of keys and values
    means_text: bool  # a prefix made of tokens is those tokens
    can_pack: bool  # documents in a row do not see each other
    attends_alone: bool  # and none costs more for being in a long row
    finish: Finish | None  # what becomes of the output layer's logits; None: not known
    vocab_size: int  # numbers of a token's logits


class Trial:
    """A source of prefixes that takes them from the first row, and takes notes."""

    def __init__(self, device: torch.device) -> None:
        before, text, other = torch.arange(3 * _LENGTH).remainder(_VOCABULARY).view(3, _LENGTH)
        rows = (before, text), (text, other), (other, text)
        count = torch.arange(2 * _LENGTH)
        again = count.remainder(_LENGTH) + _LENGTH
        positions_BT = torch.stack([count, again, again])
        self.documents = documents_of(positions_BT)
        self.positions_BT = positions_BT.to(device)
        self.ids_BT = torch.stack([torch.cat(row) for row in rows]).to(device)
        self.text_index_M = torch.cat([count[:_LENGTH] + start for start in (4, 8, 20)]).to(device)
        self.slots: list[Slot] = []
        self._dtypes: set[torch.dtype] = set()

    def front(self, slot: str, key_BNTH: Tensor, value_BNTH: Tensor) -> Front:
        """The first row's first keys and values, for the two other rows."""
        self.slots.append(Slot(slot, key_BNTH.shape[1], key_BNTH.shape[3], value_BNTH.shape[3]))
        self._dtypes |= {key_BNTH.dtype, value_BNTH.dtype}
        return Front(key_BNTH[0, :, :_LENGTH], value_BNTH[0, :, :_LENGTH], _BEHIND_IT)

    def findings(self, logits_MV: Tensor, attends_alone: bool, finish: Finish | None) -> Findings:
        """What the logits of the three texts say."""
        stock, prefixed, packed = torch.split(logits_MV, _LENGTH)
        return Findings(
            tuple(self.slots),
            reduce(torch.promote_types, self._dtypes),
            _same(prefixed, stock),
            _same(packed, prefixed),
            attends_alone,
            finish,
            logits_MV.shape[1],
        )


_ROPE_OF_THE_LONGEST = ("longrope", "dynamic")


def limits_of(config: Any, findings: Findings) -> tuple[str, ...]:
    """What does not hold for a base of this (text) configuration, a line each."""
    lines = []
    if not findings.means_text:
        lines.append(
            "a prefix is not quite a text in front, as more than keys and values goes from token to token "
            f"({len(findings.slots)} places for a prefix in {config.num_hidden_layers} layers)"
        )
    if not findings.can_pack:
        lines.append("documents in one row would see each other: each needs a row of its own")
    if chunk := getattr(config, "attention_chunk_size", None):
        lines.append(
            f"it attends in chunks of {chunk} tokens, and a document that is longer meets their borders one "
            "prefix length earlier when it shares a row than when it is alone"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _ROPE_OF_THE_LONGEST:
        until = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        lines.append(
            f"its rotary embedding is another as soon as one text of a batch, its prefix included, is longer "
            f"than {until} tokens; below that, by data.max_length, no text depends on what is beside it"
        )
    return tuple(f"{config.model_type}: {line}" for line in lines)


def _same(one_TV: Tensor, other_TV: Tensor) -> bool:
    """Equal but for rounding, at most of the tokens (a rounding can turn a token over to another expert)."""
    error_T = (one_TV - other_TV).abs().amax(dim=1).double() / other_TV.abs().amax().double().clamp(min=1e-30)
    return bool(error_T.median() < max(1e-3, 8 * torch.finfo(one_TV.dtype).eps))
