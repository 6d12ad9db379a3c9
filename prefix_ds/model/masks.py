"""Masks that are made when somebody looks at them.

transformers asks for a mask once for all layers of a kind, by handing over a rule: which key a query sees. A
row of 32,000 tokens has a mask of a gigabyte, and attention that goes document by document never reads it. So
what the rule is answered with is a tensor without numbers. Our attention functions ask it for its pattern;
whoever does anything else with it, as some models do, gets the mask written out and never learns of the
difference.

Knows nothing of prefixes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import eager_mask, sdpa_mask

from prefix_ds.data.batch import Document

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # of the indices of row, head, query and key


@dataclass(frozen=True)
class Causal:
    """A place sees itself and what is before it in its document: all of it, or the `window` - 1 nearest."""

    window: int | None = None

    def seen(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """What the last queries of a document, or of its start, see of its keys: [queries, keys]."""
        key = torch.arange(num_keys, device=device)
        back = key[num_keys - num_queries :, None] - key
        return back >= 0 if self.window is None else (back >= 0) & (back < self.window)


class Rule:
    """What a mask [B, 1, T, K] says, and the mask once it is wanted."""

    def __init__(
        self, function: MaskFunction, make: Callable[[], Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`make` writes the mask out."""
        self._function, self._make, self._dtype, self._device = function, make, dtype, device
        self.pattern = pattern_of(function)  # None: another than those known here
        self._whole: Tensor | None = None
        self._of_documents: dict[Any, Tensor] = {}

    def whole(self) -> Tensor:
        """The mask itself."""
        if self._whole is None:
            self._whole = self._make()
        return self._whole

    def of_document(self, document: Document, front: int) -> Tensor:
        """The mask [1, 1, T, front + T] of a document alone, behind `front` positions that all of it sees.

        All layers of a kind have the same, and so have documents of one length where the pattern is known.
        """
        key = document.length if self.pattern is not None else document, front
        if key not in self._of_documents:
            seen = torch.nn.functional.pad(self.seen_in(document), (front, 0), value=True)
            if self._dtype != torch.bool:
                shown = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
                seen = shown.masked_fill_(~seen, torch.finfo(self._dtype).min)
            self._of_documents[key] = seen[None, None]
        return self._of_documents[key]

    def seen_in(self, document: Document) -> Tensor:
        """What the places [T] of a document see of each other [T]."""
        if self.pattern is not None:
            return self.pattern.seen(document.length, document.length, self._device)
        place = torch.arange(document.start, document.stop, device=self._device)
        zero = place.new_zeros(1)
        seen: Tensor = self._function(zero + document.row, zero, place[:, None], place)
        return seen.expand(document.length, document.length)


class LazyMask(torch.Tensor):
    """A mask that has no numbers until an operation wants them."""

    rule: Rule

    @staticmethod
    def of(rule: Rule, shape: Sequence[int], dtype: torch.dtype, device: Any) -> "LazyMask":
        """A mask of this shape that follows a rule."""
        mask: LazyMask = torch.Tensor._make_wrapper_subclass(LazyMask, shape, dtype=dtype, device=device)
        mask.rule = rule
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation is one on the mask written out, but for a slice that is all of it."""
        if func is torch.ops.aten.alias.default:
            return LazyMask.of(args[0].rule, args[0].shape, args[0].dtype, args[0].device)
        args, kwargs = tree_map_only(LazyMask, lambda mask: mask.rule.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_sdpa_mask(**asked: Any) -> Tensor:
    """transformers' mask of bools, later. It is never left out: None means two different things to torch."""
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return _lazy(partial(sdpa_mask, **(asked | whole)), torch.bool, asked)


def lazy_eager_mask(**asked: Any) -> Tensor:
    """transformers' mask to be added to the scores, later."""
    return _lazy(
        partial(eager_mask, **(asked | {"allow_is_bidirectional_skip": False})), asked["dtype"], asked
    )


def _lazy(make: Callable[[], Tensor], dtype: torch.dtype, asked: dict[str, Any]) -> Tensor:
    if asked.get("use_vmap") or asked.get("attention_mask") is not None or asked["q_offset"]:
        return make()  # a rule that takes single numbers, or more than the rule says: padding, a cache
    shape = (asked["batch_size"], 1, asked["q_length"], asked["kv_length"])
    rule = Rule(asked["mask_function"], make, dtype, asked["device"])
    return LazyMask.of(rule, shape, dtype, asked["device"])


def pattern_of(function: MaskFunction) -> Causal | None:
    """The pattern that a rule of transformers gives within one document of a row."""
    windows = set()
    for part in _parts(function):
        if part.__code__ is _WINDOW:
            windows.add(_held(part)["sliding_window"])
        elif part.__code__ not in (_CAUSAL, _SAME_DOCUMENT):
            return None
    return Causal(min(windows, default=None))


def _parts(function: Any) -> Iterator[Any]:
    """The simple rules that all must hold."""
    if function.__code__ is _ALL:
        for part in _held(function)["mask_functions"]:
            yield from _parts(part)
    elif function.__code__ is _RENUMBERED:
        yield from _parts(_held(function)["mask_function"])
    else:
        yield function


def _held(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_NOTHING: Any = None
_CAUSAL = masking_utils.causal_mask_function.__code__
_ALL = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_SAME_DOCUMENT = masking_utils.packed_sequence_mask_function(_NOTHING).__code__
_RENUMBERED = masking_utils.remap_positions_for_packed_sequence(
    masking_utils.causal_mask_function, _NOTHING
).__code__
