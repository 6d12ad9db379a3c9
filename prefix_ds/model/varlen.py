"""Attention of packed rows on a GPU: one kernel for all documents, whatever their lengths.

torch's kernel for sequences of several lengths (`varlen_attn`, Flash Attention) takes queries and keys of all
documents one after the other, each with lengths of its own, and lines causality up at their ends. So a
prefix is so many more keys in front of each document: it is copied for each, which costs little beside the
scores, and nothing has to be put together afterwards.

A window would hide the prefix, so layers whose window is shorter than a document are left to `apart`. So is
all that the kernel does not take: float32, large heads or ones of odd sizes, GPUs before Ampere, and whatever
else it refuses where it is tried once (torch may be built without it). It wants keys and values of one size;
values that are narrower, as latent attention has them, are filled with zeros.

Knows nothing of modules, and of masks no more than their pattern.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen

from prefix_ds.data.batch import Document, sent
from prefix_ds.model.apart import Layout
from prefix_ds.model.standing import device_type

log = logging.getLogger(__name__)

_LARGEST_HEAD, _HEADS_ARE_MULTIPLES_OF = 256, 8
_LONGEST_PADDING = 128  # places of a row that belong to no document, in a sequence
_AMPERE = (8, 0)
_TYPES = (torch.bfloat16, torch.float16)


def is_for(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> bool:
    """Whether the kernel takes these."""
    longest = max((document.length for document in layout.documents), default=0)
    sees_all = layout.pattern.window is None or longest <= layout.pattern.window
    size = key.shape[-1]
    is_filled = query.shape[-1] == size >= value.shape[-1]
    fits = is_filled and size <= _LARGEST_HEAD and size % _HEADS_ARE_MULTIPLES_OF == 0
    can_be = fits and sees_all and longest > 0 and query.dtype in _TYPES
    return (
        can_be and device_type(query) == "cuda" and (query.is_meta or _runs(query.device, query.dtype, size))
    )


@lru_cache
def _runs(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernel computes two documents with heads of this size, forwards and backwards."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE:
        return False
    query, key = (torch.zeros(4, heads, size, dtype=dtype, device=device) for heads in (2, 1))
    borders = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            leaves = query.requires_grad_(), key.requires_grad_()
            seen: Any = varlen.varlen_attn(
                query, key, key, borders, borders, 3, 3, scale=1.0, window_size=(-1, 0), enable_gqa=True
            )
            torch.autograd.grad(seen.sum(), leaves)
    except (RuntimeError, TypeError) as error:
        log.warning("attention's kernel for packed rows is not used: %s", str(error).partition("\n")[0])
        return False
    return True


def attended(
    query_BNTH: Tensor, key_BKTH: Tensor, value_BKTH: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    """As `apart.attended`, but for places of no document, which nothing asks for: they see each other."""
    num_rows, num_heads, length, size = query_BNTH.shape
    width = value_BKTH.shape[-1]
    rows = num_rows, length
    course = _course(
        tuple(layout.documents), layout.rows_with_front, front[0].shape[1], rows, query_BNTH.device
    )
    key_SKH, value_SKH = (
        _filled_up(_Joined.apply(before.transpose(0, 1), _flat(text), course), size)  # type: ignore[no-untyped-call]
        for before, text in zip(front, (key_BKTH, value_BKTH), strict=True)
    )
    seen_TNH: Any = varlen.varlen_attn(
        _flat(query_BNTH),
        key_SKH,
        value_SKH,
        course.query_borders,
        course.key_borders,
        course.longest,
        course.longest + front[0].shape[1],
        scale=layout.scale,
        window_size=(-1, 0),
        enable_gqa=num_heads != key_BKTH.shape[1],
    )
    whole: Tensor = seen_TNH[..., :width].view(*rows, num_heads, width)
    return whole


class _Joined(torch.autograd.Function):
    """Each document's keys or values, behind a copy of the prefix's, of which the gradient is a sum over
    documents in float32."""

    @staticmethod
    def forward(ctx: Any, front_PKH: Tensor, text_TKH: Tensor, course: "_Course") -> Tensor:
        ctx.course, ctx.length = course, len(front_PKH)
        return torch.cat([front_PKH, text_TKH]).index_select(0, course.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        course, (grad_SKH,) = ctx.course, grads
        to_front = to_text = None
        if ctx.needs_input_grad[0]:
            copies_DPKH = grad_SKH.index_select(0, course.fronts).view(-1, ctx.length, *grad_SKH.shape[1:])
            wide = torch.promote_types(grad_SKH.dtype, torch.float32)
            to_front = copies_DPKH.sum(0, dtype=wide).to(grad_SKH.dtype)
        if ctx.needs_input_grad[1]:
            to_text = grad_SKH.index_select(0, course.texts)
        return to_front, to_text, None


@dataclass(frozen=True)
class _Course:
    """Where the sequences' keys are taken from, and where each ends. Their queries are the flattened rows."""

    keys: Tensor  # places in prefix and flattened rows
    fronts: Tensor  # which of these are the prefix's
    texts: Tensor  # and which the rows', in their order
    query_borders: Tensor
    key_borders: Tensor
    longest: int


@lru_cache(maxsize=4)  # all layers of a micro-batch have one
def _course(
    documents: tuple[Document, ...],
    with_front: frozenset[int],
    front: int,
    rows: tuple[int, int],
    device: torch.device,
) -> _Course:
    sequences = _sequences(documents, with_front, rows)
    places = [torch.arange(d.row * rows[1] + d.start, d.row * rows[1] + d.stop) for d, _ in sequences]
    fronts = [torch.arange(front if has_front else 0) for _, has_front in sequences]
    keys = [torch.cat([before, place + front]) for before, place in zip(fronts, places, strict=True)]
    is_text = torch.cat(keys) >= front
    return _Course(
        sent(torch.cat(keys), device),
        sent((~is_text).nonzero()[:, 0], device),
        sent(is_text.nonzero()[:, 0], device),
        sent(_borders(places), device),
        sent(_borders(keys), device),
        max(d.length for d, _ in sequences),
    )


def _sequences(
    documents: Sequence[Document], with_front: frozenset[int], rows: tuple[int, int]
) -> list[tuple[Document, bool]]:
    """All that rows of such a number and length hold, in order, and whether a prefix stands in front of it.

    What pads a row is cut into short ones: no query has to be taken out of the rows, nor a result put back.
    """
    found = []
    for row in range(rows[0]):
        reached, end = 0, Document(row, rows[1], rows[1])
        for document in (*sorted((d for d in documents if d.row == row), key=lambda d: d.start), end):
            cuts = (*range(reached, document.start, _LONGEST_PADDING), document.start)
            found += [(Document(row, *pair), False) for pair in pairwise(cuts)]
            found += [(document, row in with_front)] if document.length else []
            reached = document.stop
    return found


def _borders(sequences: Sequence[Tensor]) -> Tensor:
    return torch.tensor(list(accumulate(map(len, sequences), initial=0)), dtype=torch.int32)


def _filled_up(narrow_SKH: Tensor, size: int) -> Tensor:
    missing = size - narrow_SKH.shape[-1]
    return functional.pad(narrow_SKH, (0, missing)) if missing else narrow_SKH


def _flat(rows_BNTH: Tensor) -> Tensor:
    """The rows' places one after the other: [B * T, N, H]."""
    return rows_BNTH.transpose(1, 2).flatten(0, 1)
