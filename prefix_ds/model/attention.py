"""Where prefix and text meet: the attention functions a base is switched to.

transformers lets an attention function be registered under a name, together with the function that builds its
masks, and a model switched to that name calls it in every layer, after rotary embedding. Ours puts the
prefix's keys and values in front of the text's and hands on to what the model came with: torch's scaled dot
product, or the `eager_attention_forward` of the model's own file where scores are soft-capped or attention
sinks are used, which the former drops without a word. Nothing enters the key/value cache. Recomputation,
packing, windows and generation therefore need no knowledge of the prefix, which is where a prefix put in the
cache breaks (checkpointed layers drop the cache; packed positions are not recognised beside one).

In training every document attends apart, so that a row costs the sum of its documents' squares: by code of
our own (`apart`, and `varlen` on GPUs), soft caps and frozen sinks included, or, where that does not fit, by
the model's function, called for a document at a time. Where a model has changed the mask, or brings something
else that spans the row, the row attends as a whole, and so it does in generation. Documents are hidden from
each other then, for transformers does it only for families that tell its mask functions the positions, and
gpt_oss, OPT and twenty more do not.
The prefix is visible to every position, whatever the window. One widened mask serves all layers of a kind; it
is bool for scaled dot product and additive for the models' own functions.

The prefix is found through the attention module, on which `Joint` leaves a mark, never through a keyword
(some layers pass none on, and `generate` refuses unknown ones) nor a global. A module that attends several
times in a forward pass has a place for a prefix in each; recomputation repeats calls, so it starts from the
count of calls its layer began with.

Knows nothing of what is trained, of losses or of devices.
"""

import sys
from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from prefix_ds.data.batch import Document, sent
from prefix_ds.model import apart, varlen
from prefix_ds.model.attending import attending
from prefix_ds.model.cache import joined_in_place
from prefix_ds.model.masks import Causal, LazyMask, Rule, lazy_eager_mask, lazy_sdpa_mask

# The names decide: transformers looks for "sdpa", "flash" and "paged|" inside them.
OVER_SDPA, OVER_OWN = "prefix", "prefix_own"
_MARK = "_prefix_mark"

Attention = Callable[..., tuple[Tensor, Tensor | None]]
Documents = Sequence[Document]
Text = tuple[Tensor, Tensor, Tensor]  # query_BNTH, key_BKTH, value_BKTH
_WideMasks = MutableMapping[Tensor, dict[tuple[int, int], Tensor]]


@dataclass(frozen=True)
class Front:
    """Keys and values in front of the text, the same for all rows that see them."""

    key_NPH: Tensor
    value_NPH: Tensor
    rows: frozenset[int] | None = None  # None: all

    def seen_by(self, row: int) -> bool:
        """Whether the documents of a row see them."""
        return self.rows is None or row in self.rows

    def of_type(self, dtype: torch.dtype) -> "Front":
        """The same in another number format."""
        return Front(self.key_NPH.to(dtype), self.value_NPH.to(dtype), self.rows)


class Source(Protocol):
    """What the text finds in front of itself."""

    def front(self, slot: str, key_BNTH: Tensor, value_BNTH: Tensor) -> Front | None:
        """What stands in front of these keys and values of the text, at the call named `slot`."""
        ...


class Joint:
    """What one base's attention modules share: the prefix in front, and the documents in their rows."""

    source: Source | None = None
    documents: Documents | None = None  # None: each row is one, as the model's own mask says
    has_kernels = True  # whether those of GPUs may be used
    attended_whole = False  # whether a row of documents ever was: it costs the square of its length

    def __init__(self, base: nn.Module) -> None:
        """Marks every module of the base, since only a forward pass tells which attend."""
        self.calls: Counter[str] = Counter()
        self._wide_masks: _WideMasks = (
            WeakTensorKeyDictionary()
        )  # one lives as long as the mask it is made of
        for name, module in base.named_modules():
            setattr(module, _MARK, (self, name))
        base.register_forward_pre_hook(self._start)

    def _start(self, *_: object) -> None:
        self.calls = Counter()

    def front(self, name: str, key_BNTH: Tensor, value_BNTH: Tensor) -> Front | None:
        """What stands in front of the text at this call of a module."""
        slot = f"{name}#{self.calls[name]}" if self.calls[name] else name
        self.calls[name] += 1
        front = self.source.front(slot, key_BNTH, value_BNTH) if self.source else None
        if front is None:
            return None
        return Front(front.key_NPH.to(key_BNTH), front.value_NPH.to(value_BNTH), front.rows)

    def widened(self, mask: Tensor, key_BNTH: Tensor, front: Front | None) -> Tensor:
        """The mask for the prefix and these keys of the text, documents hidden from each other."""
        length, num_keys = front.key_NPH.shape[1] if front else 0, key_BNTH.shape[2]
        if not length and self.documents is None:
            return mask
        made = self._wide_masks.setdefault(mask, {})
        if (length, num_keys) not in made:
            each = mask[..., :num_keys].expand(len(key_BNTH), -1, -1, -1)
            made[length, num_keys] = widened(each, length, self.documents, front.rows if front else None)
        return made[length, num_keys]

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch's checkpointing: what surrounds a layer's forward pass, and its recomputation."""
        return nullcontext(), _Rewound(self, self.calls.copy())


class _Rewound(AbstractContextManager[None]):
    """Counts calls from where a layer's forward pass began."""

    def __init__(self, joint: Joint, calls: Counter[str]) -> None:
        self.joint, self.calls = joint, calls

    def __enter__(self) -> None:
        self.joint.calls = self.calls.copy()

    def __exit__(self, *_: object) -> None:
        pass


def widened(mask: Tensor, length: int, documents: Documents | None, rows: frozenset[int] | None) -> Tensor:
    """A mask [B, 1 or heads, T, K] with `length` columns in front, and documents hidden from each other.

    Bool masks say what is seen; float ones are added to the scores. `rows`: those that see the columns in
    front; None: all.
    """
    shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    if documents is not None:
        number_BT = sent(_numbers(documents, mask.shape[0], mask.shape[-1]), mask.device)
        mask = mask.masked_fill(number_BT[:, None, :, None] != number_BT[:, None, None, :], hidden)
    if not length:
        return mask
    front = mask.new_full((*mask.shape[:-1], length), shown)
    for row in range(len(mask)) if rows is not None else ():
        front[row].fill_(shown if row in rows else hidden)  # type: ignore[operator]
    return torch.cat([front, mask], dim=-1)


def _numbers(documents: Documents, num_rows: int, length: int) -> Tensor:
    """The number [B, T] of each place's document; what pads a row is one more."""
    number_BT = torch.full((num_rows, length), -1)
    for number, document in enumerate(documents):
        number_BT[document.row, document.start : document.stop] = number
    return number_BT


def _attending_through(delegate_of: Callable[[nn.Module], Attention]) -> Attention:
    @attending()
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *rest: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        own, text, mask = delegate_of(module), (query, key, value), attention_mask
        joint, name = getattr(module, _MARK, (None, ""))
        if joint is None:
            return own(module, *text, mask, *rest, **options)
        front, indices = joint.front(name, key, value), options.pop("indices", None)
        if joint.documents is not None and indices is None and _is_ours(mask, options):
            rule = mask.rule
            if rule.pattern is not None and _is_known(own, rest, options):
                return _apart(text, rule.pattern, front, joint.documents, options, joint.has_kernels), None

            def alone(*piece: Tensor) -> Tensor:
                return own(module, *piece, *rest, **options)[0]

            return _one_by_one(alone, text, rule, front, joint.documents), None
        joint.attended_whole |= joint.documents is not None
        whole = mask.rule.whole() if isinstance(mask, LazyMask) else mask
        if indices is not None:
            whole = _only(indices, whole)
        mask = joint.widened(whole, key, front)
        return own(module, query, *_joined(front, key, value), mask, *rest, **options)

    return attend


def _is_ours(mask: Any, options: dict[str, Any]) -> bool:
    """Whether nothing but the mask spans the row, and it is as it was made."""
    spans = any(isinstance(option, Tensor) and option.dim() > 2 for option in options.values())
    return isinstance(mask, LazyMask) and not spans


def _is_known(own: Attention, rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether all that is asked for is computed here too; what is not is left to others.

    A model's own function caps scores or has sinks where it is told of them in transformers' words. Sinks
    that are trained are left to it.
    """
    sinks = options.get("s_aux")
    if rest or options.get("dropout") or (sinks is not None and sinks.requires_grad):
        return False
    if own is sdpa_attention_forward:
        return not options.get("softcap") and sinks is None
    return "softcap" in options or "s_aux" in options


def _apart(
    text: Text,
    pattern: Causal,
    front: Front | None,
    documents: Documents,
    options: dict[str, Any],
    has_kernels: bool,
) -> Tensor:
    query, key, value = text
    rows = frozenset(row for row in range(len(query)) if front is not None and front.seen_by(row))
    nothing = key[0, :, :0].detach(), value[0, :, :0].detach()
    keys_values = (front.key_NPH, front.value_NPH) if front is not None else nothing
    scale, sinks = options.get("scaling"), options.get("s_aux")
    layout = apart.Layout(
        documents,
        pattern,
        rows,
        query.shape[-1] ** -0.5 if scale is None else scale,
        options.get("softcap"),
        None if sinks is None else sinks.detach().clone(),  # the shard is let go of before the backward pass
    )
    by_kernel = has_kernels and varlen.is_for(*text, layout)
    attended = varlen.attended if by_kernel else apart.attended
    return attended(*text, keys_values, layout)


def _joined(front: Front | None, key_BNTH: Tensor, value_BNTH: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of prefix and text together; a copy, unless a cache has kept room in front."""
    if front is None:
        return key_BNTH, value_BNTH
    if front.rows is None:
        key, value = joined_in_place(front.key_NPH, key_BNTH), joined_in_place(front.value_NPH, value_BNTH)
        if key is not None and value is not None:
            return key, value
    num_rows = len(key_BNTH)
    return (
        torch.cat([front.key_NPH.expand(num_rows, -1, -1, -1), key_BNTH], dim=2),
        torch.cat([front.value_NPH.expand(num_rows, -1, -1, -1), value_BNTH], dim=2),
    )


def _one_by_one(
    alone: Callable[..., Tensor],
    text: Text,
    rule: Rule,
    front: Front | None,
    documents: Documents,
) -> Tensor:
    """What each place sees [B, T, N, H], document by document; places of none see nothing."""
    dtype = text[0].dtype  # the prefix's gradient is a sum over documents: in float32, or more
    wide = front and front.of_type(torch.promote_types(dtype, torch.float32))
    rows: list[list[Tensor]] = [[] for _ in text[0]]
    reached = [0] * len(rows)
    for document in documents:
        row, places = document.row, slice(document.start, document.stop)
        query, key, value = (t[row : row + 1, :, places] for t in text)
        seen = wide.of_type(dtype) if wide is not None and wide.seen_by(row) else None
        block = rule.of_document(document, seen.key_NPH.shape[1] if seen is not None else 0)
        result = alone(query, *_joined(seen, key, value), block)
        rows[row] += [_gap(result, document.start - reached[row]), result]
        reached[row] = document.stop
    filled = [
        torch.cat([*pieces, _gap(pieces[-1], text[0].shape[2] - stop)], dim=1)
        for pieces, stop in zip(rows, reached, strict=True)
    ]
    return torch.cat(filled)


def _gap(like_1TNH: Tensor, length: int) -> Tensor:
    return like_1TNH.new_zeros(1, length, *like_1TNH.shape[2:])


def _only(indices_BTK: Tensor, mask: Tensor) -> Tensor:
    """A mask that also hides every key an indexer did not pick.

    Models with such an indexer do this themselves for "sdpa" and "eager"; to functions of other names they
    hand the indices.
    """
    unpicked = torch.ones_like(mask[:, 0], dtype=torch.bool).scatter(-1, indices_BTK.long(), False)
    return mask.masked_fill(
        unpicked[:, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    )


def _own_eager(module: nn.Module) -> Attention:
    own: Attention = sys.modules[type(module).__module__].eager_attention_forward
    return own


AttentionInterface.register(OVER_SDPA, _attending_through(lambda _: sdpa_attention_forward))
AttentionMaskInterface.register(OVER_SDPA, lazy_sdpa_mask)
AttentionInterface.register(OVER_OWN, _attending_through(_own_eager))
AttentionMaskInterface.register(OVER_OWN, lazy_eager_mask)
