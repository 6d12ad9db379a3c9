"""Templates: `{field}` in data.prompt or data.target becomes the record's field.

The syntax is str.format's, less what a text template needs none of: no attributes, indices, conversions or
format specs, so a field's name is whatever stands between the braces; `{{` and `}}` are braces. A field
that holds a list makes one text an entry: several references for one prompt. Of a field that holds an object,
`{field.name}` is what it has under that name (SQuAD's answers.text, WMT's translation.de), unless the record
has a field of that whole name.

Knows nothing of tokens and files.
"""

import difflib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefix_ds.errors import DataError

_MISSING = object()


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

    def check(self, record: dict[str, Any], source: str) -> None:
        """Raises DataError if the record lacks a field; `source` says which record it is."""
        self._values(record, source)

    def text(self, record: dict[str, Any], source: str) -> str:
        """The one text of a record. Raises DataError also for a field that holds a list."""
        for field, value in self._values(record, source).items():
            if isinstance(value, list):
                raise DataError(f"{self.key}: {source}: the field {field!r} holds a list; expected one text")
        return self.texts(record, source)[0]

    def texts(self, record: dict[str, Any], source: str) -> list[str]:
        """The texts of a record: one, or as many as its field that holds a list has entries.

        Raises DataError for a field that is missing, null, an object or an empty list, and for two lists.
        """
        values = self._values(record, source)
        lists = [field for field, value in values.items() if isinstance(value, list)]
        if len(lists) > 1:
            both = f"{lists[0]!r} and {lists[1]!r}"
            raise DataError(f"{self.key}: {source}: {both} hold lists; expected one list at most")
        entries = values[lists[0]] if lists else [None]
        if not entries:
            raise DataError(f"{self.key}: {source}: the field {lists[0]!r} is an empty list")
        return [self._filled(values | dict.fromkeys(lists, entry), source) for entry in entries]

    def _values(self, record: dict[str, Any], source: str) -> dict[str, Any]:
        return {field: field_of(record, field, self.key, source) for field in self.fields}

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
            raise DataError(f"{self.key}: {source}: the field {field!r} is {_kind(value, field)}")
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


def field_of(record: dict[str, Any], field: str, key: str, source: str) -> Any:
    """What a record has under a name that `key` says. Raises DataError where it has nothing."""
    value = _value(record, field)
    if value is _MISSING:
        raise DataError(f"{key}: {source} has no field {field!r}{_nearest(field, record)}")
    return value


def _value(record: dict[str, Any], field: str) -> Any:
    if field in record:
        return record[field]
    outer, _, inner = field.partition(".")
    return _value(record[outer], inner) if isinstance(record.get(outer), dict) else _MISSING


def _kind(value: dict[str, Any] | list[Any] | None, field: str) -> str:
    if isinstance(value, dict) and value:
        return f"an object; name one of its own, as {{{field}.{next(iter(value))}}}"
    kind = "null" if value is None else "an object" if isinstance(value, dict) else "a list in a list"
    return f"{kind}; expected text or a number"


def _nearest(field: str, record: dict[str, Any]) -> str:
    known = list(_names(record))
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    return f"; its fields: {', '.join(known)}" + (f"; did you mean {{{near[0]}}}?" if near else "")


def _names(record: dict[str, Any], outer: str = "") -> Iterator[str]:
    """Of all fields; of one that holds an object, those in it."""
    for name, value in record.items():
        yield from _names(value, f"{outer}{name}.") if isinstance(value, dict) and value else [outer + name]
