"""Templates: `{field}` in data.prompt or data.target becomes the record's field.

The syntax is str.format's, less what a text template needs none of: no attributes, indices, conversions or
format specs, so a field's name is whatever stands between the braces; `{{` and `}}` are braces. A field
that holds a list makes one text an entry: several references for one prompt.

Knows nothing of tokens and files.
"""

import difflib
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from prefix_ds.errors import DataError


@dataclass(frozen=True)
class Template:
    """Literal texts, each followed by a field or by nothing."""

    key: str  # where run.yaml has it, for messages
    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it needs, each once."""
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    @property
    def rules(self) -> tuple[Any, ...]:
        """What its texts depend on, beside the record."""
        return self.parts

    def check(self, known: Collection[str], source: str) -> None:
        """Raises DataError if a record with the `known` fields lacks one; `source` says which record."""
        for field in self.fields:
            if field not in known:
                raise DataError(f"{self.key}: {source} has no field {field!r}{_nearest(field, list(known))}")

    def text(self, record: dict[str, Any], source: str) -> str:
        """The one text of a record. Raises DataError also for a field that holds a list."""
        for field in self.fields:
            if isinstance(record.get(field), list):
                raise DataError(f"{self.key}: {source}: the field {field!r} holds a list; expected one text")
        return self.texts(record, source)[0]

    def texts(self, record: dict[str, Any], source: str) -> list[str]:
        """The texts of a record: one, or as many as its field that holds a list has entries.

        Raises DataError for a field that is missing, null, an object or an empty list, and for two lists.
        """
        self.check(record, source)
        lists = [field for field in self.fields if isinstance(record[field], list)]
        if len(lists) > 1:
            both = f"{lists[0]!r} and {lists[1]!r}"
            raise DataError(f"{self.key}: {source}: {both} hold lists; expected one list at most")
        entries = record[lists[0]] if lists else [None]
        if not entries:
            raise DataError(f"{self.key}: {source}: the field {lists[0]!r} is an empty list")
        return [self._filled(record | dict.fromkeys(lists, entry), source) for entry in entries]

    def _filled(self, values: dict[str, Any], source: str) -> str:
        pieces = [
            literal + (self._text_of(values[field], field, source) if field is not None else "")
            for literal, field in self.parts
        ]
        return "".join(pieces)

    def _text_of(self, value: object, field: str, source: str) -> str:
        if isinstance(value, str):
            if not value.isascii():
                self._check_characters(value, field, source)
            return value
        if value is None or isinstance(value, list | dict):
            found = (
                "null" if value is None else "a list in a list" if isinstance(value, list) else "an object"
            )
            raise DataError(
                f"{self.key}: {source}: the field {field!r} is {found}; expected text or a number"
            )
        return str(value)

    def _check_characters(self, value: str, field: str, source: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise DataError(
                f"{self.key}: {source}: the field {field!r} holds {half}, half of a character"
            ) from None


def parse_template(text: str, key: str) -> Template:
    """The template a key of run.yaml holds. Raises DataError for braces that do not fit."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{key}: {text!r}: {error}; write {{{{ or }}}} for a brace of the text") from None
    for _, field, spec, conversion in parsed:
        if field is not None and (not field or spec or conversion):
            raise DataError(f"{key}: {text!r}: expected only a field's name between braces, as in {{text}}")
    return Template(key, tuple((literal, field) for literal, field, _, _ in parsed))


def _nearest(field: str, known: list[str]) -> str:
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    return f"; its fields: {', '.join(known)}" + (f"; did you mean {{{near[0]}}}?" if near else "")
