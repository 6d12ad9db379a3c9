"""The texts a base is made from: what its tokenizer learns from.

Knows nothing of tokens.
"""

from collections.abc import Iterator

from prefix_ds.config import DataKeys
from prefix_ds.data.source import read_records
from prefix_ds.data.tokenise import templates_of
from prefix_ds.errors import ConfigError


def read_texts(data: DataKeys) -> Iterator[str]:
    """The targets of data.train as text, one after another. Raises DataError and ConfigError."""
    if not data.train:
        raise ConfigError("data.train: missing; name a file or a hub id")
    records = read_records(data.train, "data.train")
    _, target = templates_of("train", data, None)
    for index, record in enumerate(records):
        yield from target.texts(record, records.place(index))
