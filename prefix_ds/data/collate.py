"""Rows of examples as tensors.

A document of prompt length p and total length n that starts at column o has its targets predicted at the
columns o+p-1 ... o+n-2, one before each: the columns of one document never predict the first token of the
next. What is left of a row is padding, all of it at position 0: token 0, which every base has, where a
tokenizer's own padding may have no row in the embedding.

Of the widths that rows may have there are few, for at most a thirty-second of padding. A CPU's matrix product
is compiled for its shape, and oneDNN keeps a megabyte of each; of rows that just hold their documents hardly
two are alike.

Knows nothing of how the rows were chosen.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_ds.data.batch import Batch, Document

Ints = NDArray[np.int64]

_PADDING = 32  # a row may be wider by a part of so many


def collate(
    rows: Sequence[Sequence[int]],
    ids: Mapping[int, NDArray[np.int32]],
    num_targets: Sequence[int] | Ints,
) -> Batch:
    """One micro-batch; `rows` holds indices into `ids` and `num_targets`. No rows make an empty batch."""
    if not rows:
        return empty_batch()
    widths = [sum(len(ids[document]) for document in row) for row in rows]
    ids_BT = np.zeros((len(rows), _width(max(widths))), dtype=np.int64)
    positions_BT = np.zeros_like(ids_BT)
    is_target_BT = np.zeros(ids_BT.shape, dtype=bool)
    documents = []
    for b, row in enumerate(rows):
        column = 0
        for document in row:
            end = column + len(ids[document])
            documents.append(Document(b, column, end))
            ids_BT[b, column:end] = ids[document]
            positions_BT[b, column:end] = np.arange(end - column)
            is_target_BT[b, end - num_targets[document] : end] = True
            column = end
    return _batch(ids_BT, positions_BT, np.flatnonzero(is_target_BT), documents, sum(widths))


def _width(num_tokens: int) -> int:
    """The next multiple of the largest power of two that pads by so little."""
    step = 1 << max(1, num_tokens // _PADDING).bit_length() - 1
    return math.ceil(num_tokens / step) * step


def empty_batch() -> Batch:
    """What a rank runs when it has nothing left and others do: two tokens, no target."""
    ids_BT = np.zeros((1, 2), dtype=np.int64)
    return _batch(ids_BT, np.array([[0, 1]]), np.zeros(0, dtype=np.int64), [Document(0, 0, 2)], 0)


def _batch(
    ids_BT: Ints, positions_BT: Ints, places_M: Ints, documents: Sequence[Document], num_tokens: int
) -> Batch:
    """`places_M` are the targets' own places in the flattened rows; each is predicted one before."""
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        positions_BT=torch.from_numpy(positions_BT),
        target_index_M=torch.from_numpy(places_M - 1),
        target_ids_M=torch.from_numpy(ids_BT.ravel()[places_M]),
        num_tokens=num_tokens,
        documents=tuple(documents),
    )
