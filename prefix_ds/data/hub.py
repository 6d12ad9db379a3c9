"""Data sets of the hub, written as `org/name?split=train&revision=main&config=de-en`.

Every parameter may be left out. The split is then the hub's usual name for the section of run.yaml
(`validation` for data.valid), the revision the newest, the config the data set's own default.

Knows nothing of files on this machine.
"""

import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefix_ds.data import formats
from prefix_ds.data.cache import quiet_library
from prefix_ds.errors import DataError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PARAMETERS = ("split", "revision", "config")
_USUAL_SPLIT = {"valid": "validation"}


@dataclass(frozen=True)
class HubId:
    """One split of a data set on the hub."""

    name: str
    split: str
    revision: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        parameters = [(p, getattr(self, p)) for p in _PARAMETERS if getattr(self, p)]
        return f"{self.name}?{'&'.join(f'{p}={value}' for p, value in parameters)}"


def parse_hub_id(text: str, key: str, split: str) -> HubId | None:
    """The hub id that `text` is, or None if it cannot be one; raises DataError for a wrong parameter.

    `split` is the one of run.yaml (train, valid, test) that stands for a missing parameter.
    """
    name, question, query = text.partition("?")
    if not _NAME.fullmatch(name) or (question and "=" not in query):
        return None
    query = query.replace("+", "%2B")  # not a blank: split=train+test
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for parameter, value in given.items():
        if parameter not in _PARAMETERS:
            raise DataError(f"{key}: {text}: unknown parameter {parameter}; known: {', '.join(_PARAMETERS)}")
        if not value:
            raise DataError(f"{key}: {text}: {parameter} is empty")
    return HubId(name, **{"split": _USUAL_SPLIT.get(split, split)} | given)


def load_from_hub(hub_id: HubId, key: str) -> Any:
    """The `datasets.Dataset` of a hub id. Raises DataError if hub, name or split cannot be had."""
    import datasets

    try:
        with quiet_library():
            found = datasets.load_dataset(
                hub_id.name, name=hub_id.config, revision=hub_id.revision, split=hub_id.split
            )
            return _without_media(found)
    except Exception as error:  # the library raises anything from OSError to its scripts' own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{key}: {hub_id}: no such file here, nor can the hub give it: {reason}") from None


def _without_media(dataset: Any) -> Any:
    """Text is all that is wanted; to decode a sound takes packages that may be missing."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio | datasets.Image | datasets.Video):
            dataset = dataset.remove_columns(name)
    return dataset


def hub_rows(dataset: Any) -> Iterator[tuple[int, str]]:
    """The records of a loaded data set, numbered from 1, as JSON text."""
    for number, record in enumerate(dataset, 1):
        yield number, formats.json_text(record)
