"""Attention of packed rows by kernels that write no scores down (Dao et al. 2022), a prefix in front.

Two attentions are computed and put together. The text's is causal within each document, which kernels do
without a mask, and costs the sum of the documents' squares. The prefix's is that of all queries of a row to
the same few keys, which is hidden from nobody whatever the text's window, and is not copied for each
document. Each gives its result and the logarithm of its sum of exponentials, from which the result of both
follows; told that result and the sum of both, the kernels' backward passes give each part's share of the
gradients.

Below the first layer with a prefix nothing has a gradient; there only the prefix's share is computed.

Knows nothing of modules, and of masks no more than their pattern.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_ds.data.batch import Document
from prefix_ds.model.masks import Causal

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_BLOCK = 256  # queries at a time where a window is shorter than its document


@dataclass(frozen=True)
class Layout:
    """What may see what: documents in rows, the pattern within one, and the rows that see the prefix."""

    documents: Sequence[Document]
    pattern: Causal
    rows_with_front: Sequence[int]
    scale: float | None  # of scores; None: one over the square root of the keys' size


def is_for(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these."""
    of_one_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return of_one_size and query.shape[1] % key.shape[1] == 0 and query.device.type in ("cpu", "meta")


def attended(
    query_BNTH: Tensor, key_BKTH: Tensor, value_BKTH: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    """What each place sees [B, T, N, H]; a place of no document sees the prefix at most.

    `front`: the prefix's keys and values [K, P, H], of one type with the text's. N heads of queries share
    K of keys.
    """
    seen: Tensor = _Attended.apply(query_BNTH, key_BKTH, value_BKTH, *front, layout)  # type: ignore[no-untyped-call]
    return seen


class _Attended(torch.autograd.Function):
    """Heads are dealt to groups [K, G] of those that share a key; a shared key is not copied."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BNTH: Tensor,
        key_BKTH: Tensor,
        value_BKTH: Tensor,
        front_key_KPH: Tensor,
        front_value_KPH: Tensor,
        layout: Layout,
    ) -> Tensor:
        ctx.layout, num_keys = layout, key_BKTH.shape[1]
        seen_BNTH = _empty_like(query_BNTH).zero_()
        norm_BNT = seen_BNTH.new_full(seen_BNTH.shape[:3], float("-inf"), dtype=_wide(seen_BNTH))
        query, seen, norm = (_grouped(t, num_keys) for t in (query_BNTH, seen_BNTH, norm_BNT))
        for row, queries, keys, mask in _pieces(layout, query_BNTH):
            text = _shared(key_BKTH[row, :, keys], query), _shared(value_BKTH[row, :, keys], query)
            seen[row, :, :, queries], norm[row, :, :, queries] = _forward(
                query[row, :, :, queries], *text, 0.0, mask is None, attn_mask=mask, scale=layout.scale
            )
        front = _shared(front_key_KPH, query), _shared(front_value_KPH, query)
        for row in layout.rows_with_front if front_key_KPH.shape[1] else ():
            also = _forward(query[row], *front, 0.0, False, scale=layout.scale)
            _put_together(seen[row], norm[row], *also)
        ctx.save_for_backward(
            query_BNTH, key_BKTH, value_BKTH, front_key_KPH, front_value_KPH, seen_BNTH, norm_BNT
        )
        return seen_BNTH.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        state = _State._make([*ctx.saved_tensors, grads[0].transpose(1, 2)])
        results = [*(_empty_like(t).zero_() for t in state[:3]), *map(torch.zeros_like, state[3:5])]
        if any(ctx.needs_input_grad[:3]):
            _text_gradients(ctx.layout, state, *results[:3])
        if len(results[3][0]):
            _front_gradients(ctx.layout, state, results[0], *results[3:])
        wanted = zip(results, ctx.needs_input_grad, strict=False)
        return *(grad if is_wanted else None for grad, is_wanted in wanted), None


class _State(NamedTuple):
    """What a backward pass starts from."""

    query_BNTH: Tensor
    key_BKTH: Tensor
    value_BKTH: Tensor
    front_key_KPH: Tensor
    front_value_KPH: Tensor
    seen_BNTH: Tensor
    norm_BNT: Tensor
    grad_BNTH: Tensor

    def of_queries(self) -> tuple[Tensor, ...]:
        """The gradient, the queries, what they saw and their norms, by group of heads."""
        of_queries = self.grad_BNTH, self.query_BNTH, self.seen_BNTH, self.norm_BNT
        return tuple(_grouped(t, self.key_BKTH.shape[1]) for t in of_queries)


def _text_gradients(
    layout: Layout, state: _State, to_query_BNTH: Tensor, to_key_BKTH: Tensor, to_value_BKTH: Tensor
) -> None:
    """Adds them up in tensors of zeros."""
    grad, query, seen, norm = state.of_queries()
    to_query = _grouped(to_query_BNTH, query.shape[1])
    for row, queries, keys, mask in _pieces(layout, query):
        at = row, slice(None), slice(None), queries
        text = _shared(state.key_BKTH[row, :, keys], query), _shared(state.value_BKTH[row, :, keys], query)
        to_query[at], to_keys, to_values = _backward(
            grad[at],
            query[at],
            *text,
            seen[at],
            norm[at],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=layout.scale,
        )
        to_key_BKTH[row, :, keys] += _summed(to_keys)
        to_value_BKTH[row, :, keys] += _summed(to_values)


def _front_gradients(
    layout: Layout, state: _State, to_query_BNTH: Tensor, to_key_KPH: Tensor, to_value_KPH: Tensor
) -> None:
    """Adds them to what is there."""
    grad, query, seen, norm = state.of_queries()
    to_query = _grouped(to_query_BNTH, query.shape[1])
    front = _shared(state.front_key_KPH, query), _shared(state.front_value_KPH, query)
    for row in layout.rows_with_front:
        to_queries, to_keys, to_values = _backward(
            grad[row], query[row], *front, seen[row], norm[row], 0.0, False, scale=layout.scale
        )
        to_query[row] += to_queries
        to_key_KPH += _summed(to_keys)
        to_value_KPH += _summed(to_values)


def _pieces(layout: Layout, query: Tensor) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """(row, its queries, their keys, a mask to add to their scores; None: causal)."""
    window = layout.pattern.window
    for document in layout.documents:
        row, start, stop = document.row, document.start, document.stop
        if window is None or document.length <= window:
            yield row, slice(start, stop), slice(start, stop), None
            continue
        for first in range(start, stop, _BLOCK):
            last, since = min(first + _BLOCK, stop), max(start, first - window + 1)
            mask = _band(last - first, last - since, window, query.dtype, query.device)
            yield row, slice(first, last), slice(since, last), mask


@lru_cache(maxsize=64)
def _band(num_queries: int, num_keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask of the last queries of a piece of text: each sees `window` keys, itself the last."""
    seen = Causal(window).block(num_keys, device)[-num_queries:]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _put_together(seen_KGTH: Tensor, norm_KGT: Tensor, other_KGTH: Tensor, other_norm_KGT: Tensor) -> None:
    """Makes what was seen of some keys what is seen of these and the others, in place."""
    for seen, norm, other, other_norm in zip(seen_KGTH, norm_KGT, other_KGTH, other_norm_KGT, strict=True):
        part = torch.sigmoid(other_norm - norm)[..., None]
        seen.copy_(torch.lerp(seen.to(part.dtype), other.to(part.dtype), part))
        norm.copy_(torch.logaddexp(norm, other_norm))


def _grouped(rows_BNT: Tensor, num_keys: int) -> Tensor:
    """The heads by key: [B, N, ...] as [B, K, G, ...]."""
    return rows_BNT.view(rows_BNT.shape[0], num_keys, -1, *rows_BNT.shape[2:])


def _shared(keys_KTH: Tensor, query_BKGTH: Tensor) -> Tensor:
    """Keys or values for all heads that share them, without a copy."""
    return keys_KTH[:, None].expand(-1, query_BKGTH.shape[2], -1, -1)


def _summed(grad_KGTH: Tensor) -> Tensor:
    return grad_KGTH[:, 0] if grad_KGTH.shape[1] == 1 else grad_KGTH.sum(1)


def _empty_like(rows_BNTH: Tensor) -> Tensor:
    """As projections write them: the heads of a place side by side."""
    return rows_BNTH.transpose(1, 2).new_empty(rows_BNTH.transpose(1, 2).shape).transpose(1, 2)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
