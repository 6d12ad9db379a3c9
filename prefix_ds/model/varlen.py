"""Attention of packed rows on a GPU: one kernel for all documents, whatever their lengths.

torch's kernel for sequences of several lengths (Flash Attention; Dao et al. 2022) takes queries and keys of
all documents one after the other, each with lengths of its own, and lines causality up at their ends. So a
prefix is so many more keys in front of each document: it is copied for each, which costs little beside the
scores, and nothing has to be put together afterwards.

A window that is shorter than a document would hide the prefix. There the kernel is called twice, for the text
in its windows and for the prefix, and the two are put together by the logarithms of their sums. Given the
result and the sums of both, each part's backward pass finds that part's gradients.

What the kernel does not take is left to `apart`: scores with a cap, float32, large heads or ones of odd
sizes, GPUs before Ampere, and all else where, tried once on the device, it does not give what `apart` does
(torch may be built without it). It wants keys and values of one size; values that are narrower, as latent
attention has them, are filled with zeros. A sink is one more key, and is put to the sums afterwards.

Knows nothing of modules, and of masks no more than their pattern.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import varlen  # noqa: F401 - registers the kernel

from prefix_ds.data.batch import Document, sent
from prefix_ds.model import apart
from prefix_ds.model.agreement import error_between
from prefix_ds.model.apart import Layout
from prefix_ds.model.masks import Causal
from prefix_ds.model.standing import device_type

log = logging.getLogger(__name__)

_LARGEST_HEAD, _HEADS_ARE_MULTIPLES_OF = 256, 8
_LONGEST_PADDING = 128  # places of a row that belong to no document, in a sequence
_A_COPY = 1024  # places that share a copy of the prefix where it is attended by itself: more, and a GPU idles
_AMPERE = (8, 0)
_TYPES = (torch.bfloat16, torch.float16)
_EVERYTHING, _CAUSAL = (-1, -1), (-1, 0)  # windows, as the kernel has them: places before, and after
_TOLERANCE = 0.05  # of bfloat16, beside the largest number


def is_for(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> bool:
    """Whether the kernel takes these."""
    size = key.shape[-1]
    is_filled = query.shape[-1] == size >= value.shape[-1]
    fits = is_filled and size <= _LARGEST_HEAD and size % _HEADS_ARE_MULTIPLES_OF == 0
    has_windows = _has_windows(layout)
    is_alike = not has_windows or len(layout.rows_with_front) in (0, len(query))
    can_be = fits and is_alike and bool(layout.documents) and query.dtype in _TYPES and not layout.softcap
    if not can_be or device_type(query) != "cuda":
        return False
    has_sinks = layout.sinks_N is not None
    return query.is_meta or _agrees(query.device, query.dtype, size, has_windows, has_sinks)


def _has_windows(layout: Layout) -> bool:
    """Whether a document is longer than what a place sees of it."""
    window = layout.pattern.window
    return window is not None and any(document.length > window for document in layout.documents)


@lru_cache
def _agrees(device: torch.device, dtype: torch.dtype, size: int, has_windows: bool, has_sinks: bool) -> bool:
    """Whether the kernel gives what `apart` gives, and its gradients, for two documents."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE:
        return False
    documents = [Document(0, 0, 3), Document(0, 3, 16)]
    sinks_N = torch.arange(4.0, device=device) if has_sinks else None
    layout = Layout(
        documents, Causal(5 if has_windows else None), frozenset({0}), size**-0.5, sinks_N=sinks_N
    )
    chance = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 16, size), (1, 2, 16, size), (1, 2, 16, size), (2, 3, size), (2, 3, size)]
    tensors = [torch.randn(shape, generator=chance).to(device, dtype) for shape in shapes]
    try:
        pairs = zip(_tried(attended, tensors, layout), _tried(apart.attended, tensors, layout), strict=True)
        error = max(error_between(*pair) for pair in pairs)
    except (RuntimeError, TypeError) as refusal:
        log.warning("attention's kernel for packed rows is not used: %s", str(refusal).partition("\n")[0])
        return False
    if error < _TOLERANCE:
        return True
    log.warning("attention's kernel for packed rows is not used: it is off by %.2g of the largest", error)
    return False


def _tried(attend: Any, tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """What is seen, and the gradients of the sum of its squares. A layer around it keeps nothing of it."""
    with torch.enable_grad(), saved_tensors_hooks(_same, _same):
        query, key, value, *front = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        seen = attend(query, key, value, tuple(front), layout)
        return [t.detach().float() for t in (seen, *torch.autograd.grad(seen.float().square().sum(), leaves))]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def attended(
    query_BNTH: Tensor, key_BKTH: Tensor, value_BKTH: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    """As `apart.attended`, but for places of no document, which nothing asks for: they see each other."""
    num_rows, num_heads, length, size = query_BNTH.shape
    width, rows = value_BKTH.shape[-1], (num_rows, length)
    text = _flat(key_BKTH), _filled_up(_flat(value_BKTH), size)
    before = front[0].transpose(0, 1), _filled_up(front[1].transpose(0, 1), size)
    documents, device = tuple(layout.documents), query_BNTH.device
    if _has_windows(layout):
        assert layout.pattern.window is not None
        borders, longest = _borders_of(documents, rows, device)
        window = layout.pattern.window - 1, 0
        parts = [_Part(borders, borders, longest, longest, window)]
        keys_values = [*text]
        if layout.rows_with_front:
            part, num_copies = _prefix_alone(num_rows * length, len(before[0]), device)
            parts.append(part)
            keys_values += [t.expand(num_copies, *t.shape).flatten(0, 1) for t in before]
    else:
        course = _course(documents, layout.rows_with_front, len(before[0]), rows, device)
        parts = [course.part]
        keys_values = [
            _Joined.apply(*each, course)  # type: ignore[no-untyped-call]
            for each in zip(before, text, strict=True)
        ]
    asked = _flat(query_BNTH), layout.scale, layout.sinks_N, parts
    seen_TNH: Tensor = _Seen.apply(*asked, *keys_values)  # type: ignore[no-untyped-call]
    return seen_TNH[..., :width].view(*rows, num_heads, width)


@dataclass(frozen=True)
class _Part:
    """Which queries see which keys: both cut into as many sequences, at these borders."""

    query_borders: Tensor
    key_borders: Tensor
    longest_query: int
    longest_key: int
    window: tuple[int, int]


class _Outcome(NamedTuple):
    """Of all parts together: what was seen, the logarithms of the sums, and the gradient to what was seen."""

    seen_TNH: Tensor
    sums_NT: Tensor
    grad_TNH: Tensor


class _Seen(torch.autograd.Function):
    """What queries see of the keys and values of all parts together."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Of queries, the scale, the sinks, the parts, and keys and values of each, one after the other."""
        query_TNH, ctx.scale, sinks_N, ctx.parts, *keys_values = args
        pairs = zip(keys_values[::2], keys_values[1::2], strict=True)
        found = [_kernel(query_TNH, *kv, part, ctx.scale) for kv, part in zip(pairs, ctx.parts, strict=True)]
        is_whole = len(found) == 1 and sinks_N is None
        seen_TNH, sums_NT = found[0] if is_whole else _put_together(found, sinks_N)
        ctx.save_for_backward(query_TNH, seen_TNH, sums_NT, *keys_values)
        return seen_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_TNH, seen_TNH, sums_NT, *keys_values = ctx.saved_tensors
        to_query: Tensor | None = None
        to_keys_values: list[Tensor | None] = []
        outcome = _Outcome(seen_TNH, sums_NT, grads[0].contiguous())
        for number, part in enumerate(ctx.parts):
            here = slice(2 * number, 2 * number + 2)
            if not (ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:][here])):
                to_keys_values += None, None
                continue
            key, value = keys_values[here]
            to_this, *found = _kernel_backwards(query_TNH, key, value, outcome, part, ctx.scale)
            to_query = to_this if to_query is None else to_query + to_this
            to_keys_values += found
        return to_query, None, None, None, *to_keys_values


def _put_together(found: Sequence[tuple[Tensor, Tensor]], sinks_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of what is seen of each part, and the logarithms of the sums, those of all parts and of sinks."""
    sums = [each for _, each in found]
    if sinks_N is not None:
        sums.append(sinks_N.to(sums[0])[:, None].expand_as(sums[0]))
    sums_NT = torch.stack(sums).logsumexp(0)
    whole_TNH: Any = sum(seen * (each - sums_NT).exp().t()[..., None] for seen, each in found)
    return whole_TNH.to(found[0][0].dtype), sums_NT


def _kernel(query: Tensor, key: Tensor, value: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    """What is seen [T, N, H], and the logarithms of the sums of scores' exponentials [N, T] in float32."""
    seen, sums, _ = torch.ops.torch_attn._varlen_attn(
        query,
        key,
        value,
        part.query_borders,
        part.key_borders,
        part.longest_query,
        part.longest_key,
        part.window == _CAUSAL,
        scale,
        list(part.window),
        query.shape[1] != key.shape[1],
    )
    return seen, sums


def _kernel_backwards(
    query: Tensor, key: Tensor, value: Tensor, outcome: _Outcome, part: _Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to queries, keys and values."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_attn._varlen_attn_backward(
        outcome.grad_TNH,
        query,
        key,
        value,
        outcome.seen_TNH,
        outcome.sums_NT,
        part.query_borders,
        part.key_borders,
        part.longest_query,
        part.longest_key,
        part.window == _CAUSAL,
        no_dropout,
        scale,
        list(part.window),
    )
    return found


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
    """Where the sequences' keys are taken from. Their queries are the flattened rows."""

    keys: Tensor  # places in prefix and flattened rows
    fronts: Tensor  # which of these are the prefix's
    texts: Tensor  # and which the rows', in their order
    part: _Part


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
    is_text, longest = torch.cat(keys) >= front, max(d.length for d, _ in sequences)
    query_borders, key_borders = (_borders(map(len, each), device) for each in (places, keys))
    return _Course(
        sent(torch.cat(keys), device),
        sent((~is_text).nonzero()[:, 0], device),
        sent(is_text.nonzero()[:, 0], device),
        _Part(query_borders, key_borders, longest, longest + front, _CAUSAL),
    )


@lru_cache(maxsize=4)
def _borders_of(
    documents: tuple[Document, ...], rows: tuple[int, int], device: torch.device
) -> tuple[Tensor, int]:
    """Of the sequences that rows hold, and the longest."""
    lengths = [document.length for document, _ in _sequences(documents, frozenset(), rows)]
    return _borders(lengths, device), max(lengths)


@lru_cache(maxsize=4)
def _prefix_alone(num_places: int, front: int, device: torch.device) -> tuple[_Part, int]:
    """All places before a copy of the prefix for some at a time, and the number of copies."""
    lengths = [min(_A_COPY, num_places - first) for first in range(0, num_places, _A_COPY)]
    borders = _borders(lengths, device), _borders([front] * len(lengths), device)
    return _Part(*borders, lengths[0], front, _EVERYTHING), len(lengths)


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


def _borders(lengths: Iterable[int], device: torch.device) -> Tensor:
    return sent(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32), device)


def _filled_up(narrow_SKH: Tensor, size: int) -> Tensor:
    missing = size - narrow_SKH.shape[-1]
    return functional.pad(narrow_SKH, (0, missing)) if missing else narrow_SKH


def _flat(rows_BNTH: Tensor) -> Tensor:
    """The rows' places one after the other: [B * T, N, H]."""
    return rows_BNTH.transpose(1, 2).flatten(0, 1)
