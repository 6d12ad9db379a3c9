"""Attention of packed rows, each document apart, a prefix in front of all of them.

A row so costs the sum of its documents' squares, and there is no mask of the row. A document's queries are
taken some at a time, with the keys up to the last of them: a product with the keys of prefix and text, scores
in float32, a softmax, a product with the values. Half of a document's square, which is hidden, is left out,
and what is behind a window too. Heads are taken so few at a time that their scores stay in the cache. Nothing
of it is kept: the backward pass computes the scores again from queries and keys, as the kernels of GPUs do
(Dao et al. 2022). Its sums over queries are float32.

Rejected for CPUs: torch's own such kernels for the text, and the prefix's part put to it by the logarithms of
the sums. For documents of some hundred tokens that is slower (docs/choices.md), and they want keys and values
of one size.

Below the first layer with a prefix nothing has a gradient; there only the prefix's is wanted. Heads of
queries that share a key are a group, and the key is not copied for them. Some models cap their scores, by a
tangent, or give each head a sink: a score of its own for a key that has no value.

Knows nothing of modules, and of masks no more than their pattern.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_ds.data.batch import Document
from prefix_ds.model.attending import attending
from prefix_ds.model.masks import Causal
from prefix_ds.model.standing import device_type

_BLOCK = 128  # queries at a time, fewer where the scores of a single head would be too many
_CACHED_SCORES = 2**20  # 4 MiB in float32, of a CPU's thread
_MOST_SCORES = 2**24


@dataclass(frozen=True)
class Layout:
    """What may see what: documents in rows, the pattern within one, and the rows that see the prefix."""

    documents: Sequence[Document]
    pattern: Causal
    rows_with_front: frozenset[int]
    scale: float  # of scores
    softcap: float | None = None  # what scores stay below
    sinks_N: Tensor | None = None  # a score of each head, without gradient


def attended(
    query_BNTH: Tensor, key_BKTH: Tensor, value_BKTV: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    """What each place sees [B, T, N, V]; a place of no document sees nothing, and gives zeros.

    `front`: the prefix's keys [K, P, H] and values [K, P, V], of one type with the text's. N heads of queries
    share K of keys.
    """
    seen: Tensor = _Attended.apply(query_BNTH, key_BKTH, value_BKTV, *front, layout)  # type: ignore[no-untyped-call]
    return seen


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.layout = args
        query_BNTH, _, value_BKTV = tensors[:3]
        num_rows, num_heads, length, _ = query_BNTH.shape
        seen_BTNV = query_BNTH.new_zeros(num_rows, length, num_heads, value_BKTV.shape[-1])
        for document in ctx.layout.documents:
            text = _Text.of(document, tensors, ctx.layout)
            seen_KGTV = _of_document(seen_BTNV.transpose(1, 2), document, text)
            for heads in _heads(text):
                _see(text.only(heads), ctx.layout, seen_KGTV[heads])
        ctx.save_for_backward(*tensors)
        return seen_BTNV  # type: ignore[no-any-return]

    @staticmethod
    @attending()
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        tensors, with_text = ctx.saved_tensors, any(ctx.needs_input_grad[:3])
        totals = [*(_zeros_like(t) for t in tensors[:3]), *(_zeros_like(t, _wide(t)) for t in tensors[3:])]
        for document in ctx.layout.documents:
            text, into = (_Text.of(document, each, ctx.layout) for each in (tensors, totals))
            grad_KGTV = _of_document(grads[0].transpose(1, 2), document, text)
            for heads in _heads(text):
                _unsee(text.only(heads), ctx.layout, grad_KGTV[heads], into.only(heads), with_text)
        each = zip(totals, tensors, ctx.needs_input_grad, strict=False)
        return *(total.to(tensor.dtype) if wanted else None for total, tensor, wanted in each), None


class _Text(NamedTuple):
    """A document and what is in front of it, or the gradients to both. **G** heads of queries share a key."""

    query_KGTH: Tensor
    key_KTH: Tensor
    value_KTV: Tensor
    front_key_KPH: Tensor
    front_value_KPV: Tensor
    sinks_KG: Tensor | None

    @staticmethod
    def of(document: Document, tensors: Sequence[Tensor], layout: Layout) -> "_Text":
        """A document's views of what `attended` is given."""
        places = slice(document.start, document.stop)
        query, key, value = (t[document.row, :, places] for t in tensors[:3])
        seen = slice(None if document.row in layout.rows_with_front else 0)
        sinks_KG = None if layout.sinks_N is None else layout.sinks_N.view(len(key), -1)
        front_key, front_value = (t[:, seen] for t in tensors[3:])
        return _Text(_grouped(query, len(key)), key, value, front_key, front_value, sinks_KG)

    def only(self, heads: slice) -> "_Text":
        """The same of some heads of keys."""
        return self._replace(**{n: t[heads] for n, t in self._asdict().items() if t is not None})

    @property
    def front(self) -> int:
        """How long the prefix in front of it is."""
        return self.front_key_KPH.shape[1]


class _Piece(NamedTuple):
    """Some queries of a document, and the keys they may see: none of the text's before `since`."""

    queries: slice
    since: int

    def keys(self, front_KPX: Tensor, text_KTX: Tensor) -> Tensor:
        """Of the prefix and of the text."""
        return torch.cat([front_KPX, text_KTX[:, self.since : self.queries.stop]], dim=1)

    def add(self, sums_KSX: Tensor, more_KCX: Tensor, front: int) -> None:
        """To the sums over all keys, prefix and text, those over these."""
        if not self.since:
            sums_KSX[:, : more_KCX.shape[1]] += more_KCX
            return
        sums_KSX[:, :front] += more_KCX[:, :front]
        sums_KSX[:, front + self.since : front + self.queries.stop] += more_KCX[:, front:]


def _heads(text: _Text) -> Iterator[slice]:
    """Heads of keys; on a CPU so many at a time that the scores of their queries stay in the cache."""
    num_keys, group, length, _ = text.query_KGTH.shape
    most, threads = num_keys, torch.get_num_threads()
    if device_type(text.query_KGTH) == "cpu":
        a_thread = _CACHED_SCORES // (group * min(_BLOCK, length) * (length + text.front))
        most = threads * max(1, a_thread)
    for first in range(0, num_keys, most):
        yield slice(first, first + most)


def _pieces(text: _Text, layout: Layout) -> Iterator[_Piece]:
    length, window = text.query_KGTH.shape[2], layout.pattern.window
    num_keys = min(length, window or length) + text.front
    block = max(1, min(_BLOCK, _MOST_SCORES // (text.query_KGTH.shape[:2].numel() * num_keys)))
    for first in range(0, length, block):
        since = 0 if window is None else max(0, first - window + 1)
        yield _Piece(slice(first, min(first + block, length)), since)


def _see(text: _Text, layout: Layout, into_KGTV: Tensor) -> None:
    for piece in _pieces(text, layout):
        query_KQH, _, probability_KQC, _ = _probabilities(text, piece, layout)
        value_KCV = piece.keys(text.front_value_KPV, text.value_KTV)
        into = into_KGTV[:, :, piece.queries]
        into.copy_(torch.bmm(probability_KQC.to(query_KQH.dtype), value_KCV).view(into.shape))


def _unsee(text: _Text, layout: Layout, grad_KGTV: Tensor, into: _Text, with_text: bool) -> None:
    """The gradients of a document, added to what is there."""
    to_keys_KSH, to_values_KSV = _no_sums(text.key_KTH, text.front), _no_sums(text.value_KTV, text.front)
    for piece in _pieces(text, layout):
        query_KQH, key_KCH, probability_KQC, slope_KQC = _probabilities(text, piece, layout)
        value_KCV = piece.keys(text.front_value_KPV, text.value_KTV)
        grad_KQV = grad_KGTV[:, :, piece.queries].reshape(*query_KQH.shape[:2], -1)
        to_score = _to_score(torch.bmm(grad_KQV, value_KCV.mT), probability_KQC)
        if slope_KQC is not None:
            to_score.mul_(slope_KQC)
        to_score = to_score.mul_(layout.scale).to(query_KQH.dtype)
        piece.add(to_keys_KSH, torch.bmm(to_score.mT, query_KQH), text.front)
        piece.add(to_values_KSV, torch.bmm(probability_KQC.to(grad_KQV.dtype).mT, grad_KQV), text.front)
        if with_text:
            to_query = into.query_KGTH[:, :, piece.queries]
            to_query.copy_(torch.bmm(to_score, key_KCH).view(to_query.shape))
    into.front_key_KPH.add_(to_keys_KSH[:, : text.front])
    into.front_value_KPV.add_(to_values_KSV[:, : text.front])
    if with_text:
        into.key_KTH.copy_(to_keys_KSH[:, text.front :])
        into.value_KTV.copy_(to_values_KSV[:, text.front :])


def _no_sums(text_KTX: Tensor, front: int) -> Tensor:
    num_keys, length, size = text_KTX.shape
    return text_KTX.new_zeros(num_keys, front + length, size, dtype=_wide(text_KTX))


def _probabilities(
    text: _Text, piece: _Piece, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A piece's queries, group after group [K, Q, H], its keys [K, C, H], the probabilities [K, Q, C], and
    how steep the cap of their scores is, where there is one."""
    query_KGQH = text.query_KGTH[:, :, piece.queries]
    num_groups, num_queries = query_KGQH.shape[1:3]
    query_KQH = query_KGQH.reshape(len(query_KGQH), num_groups * num_queries, -1)
    key_KCH = piece.keys(text.front_key_KPH, text.key_KTH)
    wide, num_keys = _wide(query_KQH), key_KCH.shape[1] - text.front
    score_KQC = torch.bmm(query_KQH.to(wide) * layout.scale, key_KCH.to(wide).mT)
    slope_KQC = None if layout.softcap is None else _capped(score_KQC, layout.softcap)
    hidden_QC = _hidden_by(layout.pattern, piece, num_queries, num_keys, score_KQC)
    score_KGQC = score_KQC.view(len(score_KQC), num_groups, num_queries, -1)
    score_KGQC[..., -hidden_QC.shape[1] :] += hidden_QC
    return query_KQH, key_KCH, _softmax(score_KGQC, text.sinks_KG).view_as(score_KQC), slope_KQC


def _capped(score_KQC: Tensor, softcap: float) -> Tensor:
    """Caps scores where they are, and says how steep the cap is there."""
    part_KQC = score_KQC.div_(softcap).tanh_()
    slope_KQC = 1 - part_KQC.square()
    part_KQC.mul_(softcap)
    return slope_KQC


def _softmax(score_KGQC: Tensor, sinks_KG: Tensor | None) -> Tensor:
    """The probabilities of keys, beside what a sink takes of them."""
    if sinks_KG is None:
        return torch.softmax(score_KGQC, dim=-1)
    sinks_KGQ1 = sinks_KG.to(score_KGQC)[:, :, None, None].expand(*score_KGQC.shape[:-1], 1)
    return torch.softmax(torch.cat([score_KGQC, sinks_KGQ1], dim=-1), dim=-1)[..., :-1]


def _hidden_by(pattern: Causal, piece: _Piece, num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """What is added to the scores that a piece's queries have of its last keys; before those all is seen."""
    size = 1 << (num_queries - 1).bit_length()
    if pattern.window is None or piece.queries.stop <= pattern.window:
        return _hidden(None, size, like.dtype, like.device)[-num_queries:, -num_queries:]
    return _hidden(pattern.window, size, like.dtype, like.device)[-num_queries:, -num_keys:]


@lru_cache(maxsize=32)
def _hidden(window: int | None, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """That of `size` queries; fewer have its last rows and columns."""
    seen = Causal(window).seen(size, size + (window - 1 if window else 0), device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _to_score(to_probability: Tensor, probability: Tensor) -> Tensor:
    wide = probability.dtype
    grad: Tensor = torch.ops.aten._softmax_backward_data(to_probability.to(wide), probability, -1, wide)
    return grad


def _of_document(rows_BNTX: Tensor, document: Document, text: _Text) -> Tensor:
    return _grouped(rows_BNTX[document.row, :, document.start : document.stop], len(text.key_KTH))


def _grouped(heads_NTX: Tensor, num_keys: int) -> Tensor:
    """The heads by the key they share: [N, T, X] as [K, G, T, X]."""
    return heads_NTX.view(num_keys, -1, *heads_NTX.shape[1:])


def _zeros_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """With the heads of a place side by side, as projections write them."""
    shape = tensor.transpose(-3, -2).shape
    return tensor.new_zeros(shape, dtype=dtype or tensor.dtype).transpose(-3, -2)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
