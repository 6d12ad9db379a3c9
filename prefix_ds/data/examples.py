"""The tokenised examples of a split: ids on disk, lengths in memory.

The ids stay in the memory-mapped table and are read when a batch wants them. Only the lengths and the numbers
of targets, which order and packing need, are numpy arrays.

Knows nothing of batches, ranks' shares and models.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefix_ds import dist
from prefix_ds.config import DataKeys
from prefix_ds.data.chat import chat_of
from prefix_ds.data.encode import Fate, encoder_of
from prefix_ds.data.source import Records, Source, read_records
from prefix_ds.data.tokenise import Recipe, templates_of, tokenised
from prefix_ds.errors import ConfigError, DataError

Ints = NDArray[np.int64]
Marks = tuple[int, int, int, int]


@dataclass(frozen=True)
class Report:
    """What became of a split's records."""

    split: str
    examples: int
    tokens: int
    targets: int  # tokens the model learns to write
    cut: int  # examples whose prompt lost its start
    dropped: int
    pieces: int  # examples that are parts of a longer text
    lengths: Marks  # of examples, in tokens

    def line(self) -> str:
        """All of it on one line."""
        fates = [
            ("prompts cut", self.cut),
            ("dropped", self.dropped),
            ("pieces of longer texts", self.pieces),
        ]
        return (
            f"{self.split}: {self.examples:,} examples, {self.tokens:,} tokens ({self.targets:,} targets); "
            f"{lengths_text(self.lengths)}" + "".join(f"; {count:,} {what}" for what, count in fates if count)
        )


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split, numbered from 0."""

    records: Records
    lengths: Ints  # tokens of each
    num_targets: Ints  # its last tokens, which are predicted
    record_of: Ints  # the record each was made from
    report: Report
    _table: Any  # datasets.Dataset of ids, formatted as arrow
    _rows: Ints  # the table's row of each example

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what order and packing follow from; the ids themselves are not read."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.num_targets.tobytes())
        return digest.hexdigest()

    def ids(self, indices: Sequence[int] | Ints) -> list[NDArray[np.int32]]:
        """The ids of some examples, prompt and target; views of one buffer."""
        column = self._table[self._rows[np.asarray(indices, dtype=np.int64)]].column("ids").combine_chunks()
        flat, borders = column.values.to_numpy(), column.offsets.to_numpy()
        return [flat[start:end] for start, end in itertools.pairwise(borders)]

    def largest_id(self) -> int:
        """Reads all of them."""
        import pyarrow.compute as pc

        return max(pc.max(chunk.flatten()).as_py() or 0 for chunk in self._table[:].column("ids").chunks)


def check_ids(splits: Iterable[Examples], tokenizer: Any, vocab_size: int) -> None:
    """Raises DataError for a token that the base has not. Reads every id where the tokenizer has more."""
    for examples in splits if len(tokenizer) > vocab_size else ():
        check_id(examples.largest_id(), vocab_size, f"{examples.records.key}:")


def check_id(largest: int, vocab_size: int, place: str) -> None:
    """Raises DataError, beginning with `place`, where the base has not this token."""
    if largest >= vocab_size:
        raise DataError(
            f"{place} has token {largest}, and the base has {vocab_size}: is the tokenizer the base's own?"
        )


def load_examples(split: str, data: DataKeys, tokenizer: Any, world: dist.World) -> Examples:
    """The examples of data.train, data.valid or data.test; the node's first rank makes what is not cached.

    Every rank calls this. Raises DataError and ConfigError, on all ranks alike.
    """
    examples = dist.first_here_first(world, lambda: tokenise_split(split, data, tokenizer))
    # Ranks deal parts of one order: with other examples they would train on parts of two.
    dist.check_same(
        examples.digest,
        lambda others, first: DataError(
            f"data.{split}: {others}: other examples than on {first}: the same files, revisions and "
            "tokenizer are needed everywhere"
        ),
    )
    return examples


def tokenise_split(split: str, data: DataKeys, tokenizer: Any) -> Examples:
    """As `load_examples`, in this process alone and without a collective call."""
    source = source_of(split, data)
    chat = chat_of(tokenizer, data)
    encoder, templates = encoder_of(tokenizer, chat), templates_of(split, data, chat)
    recipe = Recipe(encoder, *templates, data.max_length, data.too_long)
    records = read_records(source, f"data.{split}")
    for template in (recipe.prompt, recipe.target):
        template.check(records[0], records.place(0))
    return _examples(split, records, tokenised(records, recipe, data.workers))


def source_of(split: str, data: DataKeys) -> Source:
    """What data.train, data.valid or data.test names. Raises ConfigError where it names nothing."""
    source: Source | None = getattr(data, split)
    if not source:
        raise ConfigError(f"data.{split}: missing; name a file or a hub id")
    return source


def _examples(split: str, records: Records, table: Any) -> Examples:
    columns = table.with_format("arrow")[:]
    fates = columns.column("fate").to_numpy()
    rows = np.flatnonzero(fates != Fate.DROPPED)
    if not len(rows):
        raise DataError(f"{records.key}: all {len(fates)} examples are longer than data.max_length; raise it")
    lengths = _lengths(columns.column("ids"))[rows]
    num_targets = lengths - columns.column("prompt_length").to_numpy()[rows]
    return Examples(
        records=records,
        lengths=lengths,
        num_targets=num_targets,
        record_of=columns.column("record").to_numpy()[rows],
        report=_report(split, lengths, num_targets, fates),
        _table=table.select_columns("ids").with_format("arrow"),
        _rows=rows,
    )


def _lengths(lists: Any) -> Ints:
    """Lengths of a column of lists, from its offsets alone: the ids are not touched."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists.chunks]).astype(np.int64)


def _report(split: str, lengths: Ints, num_targets: Ints, fates: NDArray[np.int8]) -> Report:
    return Report(
        split=split,
        examples=len(lengths),
        tokens=int(lengths.sum()),
        targets=int(num_targets.sum()),
        cut=int((fates == Fate.CUT).sum()),
        dropped=int((fates == Fate.DROPPED).sum()),
        pieces=int((fates == Fate.PIECE).sum()),
        lengths=length_marks(lengths),
    )


def length_marks(lengths: Ints) -> Marks:
    """The lengths that 50, 90, 99 and 100 % do not exceed."""
    half, most, nearly_all, longest = np.percentile(lengths, (50, 90, 99, 100), method="inverted_cdf")
    return int(half), int(most), int(nearly_all), int(longest)


def lengths_text(marks: Marks) -> str:
    """Those four in words."""
    return "lengths 50% {:,}, 90% {:,}, 99% {:,}, longest {:,}".format(*marks)
