"""Where prefix and text meet: the attention functions a base is switched to.

transformers lets an attention function be registered under a name, together with the function that builds its
masks, and a model switched to that name calls it in every layer, after rotary embedding. Ours puts the
prefix's keys and values in front of the text's, widens the mask, and hands on to the function the model came
with: torch's scaled dot product, or the `eager_attention_forward` of the model's own file where scores are
soft-capped or attention sinks are used, which the former drops without a word. Nothing enters the key/value
cache. Recomputation, packing, windows and generation therefore need no knowledge of the prefix, which is
where a prefix put in the cache breaks (checkpointed layers drop the cache; packed positions are not
recognised beside one).

The prefix is found through the attention module, on which `Joint` leaves a mark, never through a keyword
(some layers pass none on, and `generate` refuses unknown ones) nor a global. A module that attends several
times in a forward pass has a place for a prefix in each; recomputation repeats calls, so it starts from the
count of calls its layer began with.

Masks: ours are never left out (`None` means two different things to torch), bool for scaled dot product and
additive for the models' own functions. The prefix is visible to every position, whatever the window.
Documents in a row are hidden from each other here, for transformers does it only for families that tell its
mask functions the positions, and gpt_oss, OPT and twenty more do not. One widened mask serves all layers of a
kind.

Knows nothing of what is trained, of losses or of devices.
"""

import sys
from collections import Counter
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

# The names decide: transformers looks for "sdpa", "flash" and "paged|" inside them.
OVER_SDPA, OVER_OWN = "prefix", "prefix_own"
_MARK = "_prefix_mark"

Attention = Callable[..., tuple[Tensor, Tensor | None]]
_WideMasks = MutableMapping[Tensor, dict[tuple[int, int], Tensor]]


@dataclass(frozen=True)
class Front:
    """Keys and values in front of the text, for one row or each, and the rows that see them (None: all)."""

    key_BNPH: Tensor
    value_BNPH: Tensor
    seen_B: Tensor | None = None


class Source(Protocol):
    """What the text finds in front of itself."""

    def front(self, slot: str, key_BNTH: Tensor, value_BNTH: Tensor) -> Front | None:
        """What stands in front of these keys and values of the text, at the call named `slot`."""
        ...


class Joint:
    """What one base's attention modules share: the prefix in front, and the documents in their rows."""

    source: Source | None = None
    documents_BT: Tensor | None = None  # equal numbers: one document. None: what the model's own mask says

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

    def joined(
        self, name: str, key_BNTH: Tensor, value_BNTH: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and mask of prefix and text together."""
        slot = f"{name}#{self.calls[name]}" if self.calls[name] else name
        self.calls[name] += 1
        front = self.source.front(slot, key_BNTH, value_BNTH) if self.source else None
        if front is None:
            return key_BNTH, value_BNTH, self._widened(mask, key_BNTH.shape[2], 0, None)
        num_rows, length = key_BNTH.shape[0], front.key_BNPH.shape[2]
        key = torch.cat([front.key_BNPH.to(key_BNTH).expand(num_rows, -1, -1, -1), key_BNTH], dim=2)
        value = torch.cat([front.value_BNPH.to(value_BNTH).expand(num_rows, -1, -1, -1), value_BNTH], dim=2)
        return key, value, self._widened(mask, key_BNTH.shape[2], length, front.seen_B)

    def _widened(self, mask: Tensor, num_keys: int, length: int, seen_B: Tensor | None) -> Tensor:
        if not length and self.documents_BT is None:
            return mask
        made = self._wide_masks.setdefault(mask, {})
        if (length, num_keys) not in made:
            made[length, num_keys] = widened(mask[..., :num_keys], length, self.documents_BT, seen_B)
        return made[length, num_keys]

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch's checkpointing: what surrounds a layer's forward pass, and its recomputation."""
        return nullcontext(), _Rewound(self, self.calls.copy())


def documents_of(positions_BT: Tensor) -> Tensor:
    """The number of each place's document in its row: a new one starts where positions do not go on."""
    return (positions_BT.diff(dim=1, prepend=positions_BT[:, :1] - 1) != 1).cumsum(dim=1)


class _Rewound(AbstractContextManager[None]):
    """Counts calls from where a layer's forward pass began."""

    def __init__(self, joint: Joint, calls: Counter[str]) -> None:
        self.joint, self.calls = joint, calls

    def __enter__(self) -> None:
        self.joint.calls = self.calls.copy()

    def __exit__(self, *_: object) -> None:
        pass


def widened(mask: Tensor, length: int, documents_BT: Tensor | None, seen_B: Tensor | None) -> Tensor:
    """A mask [B, 1 or heads, T, K] with `length` columns in front, and documents hidden from each other.

    Bool masks say what is seen; float ones are added to the scores.
    """
    shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    if documents_BT is not None:
        others = documents_BT[:, None, :, None] != documents_BT[:, None, None, :]
        mask = mask.masked_fill(others, hidden)
    if not length:
        return mask
    num_rows = mask.shape[0] if seen_B is None else len(seen_B)
    front = mask.new_full((num_rows, *mask.shape[1:-1], length), shown)
    if seen_B is not None:
        front = front.masked_fill(~seen_B[:, None, None, None], hidden)
    return torch.cat([front, mask.expand(num_rows, -1, -1, -1)], dim=-1)


def _attending_through(delegate_of: Callable[[nn.Module], Attention]) -> Attention:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *rest: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        indices = options.pop("indices", None)
        if indices is not None:
            attention_mask = _only(indices, attention_mask)
        mark = getattr(module, _MARK, None)
        if mark is not None:
            joint, name = mark
            key, value, attention_mask = joint.joined(name, key, value, attention_mask)
        return delegate_of(module)(module, query, key, value, attention_mask, *rest, **options)

    return attend


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


def _whole_sdpa_mask(*args: Any, **options: Any) -> Tensor:
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(*args, **(options | whole))
    return mask


AttentionInterface.register(OVER_SDPA, _attending_through(lambda _: sdpa_attention_forward))
AttentionMaskInterface.register(OVER_SDPA, _whole_sdpa_mask)
AttentionInterface.register(OVER_OWN, _attending_through(_own_eager))
AttentionMaskInterface.register(OVER_OWN, eager_mask)
