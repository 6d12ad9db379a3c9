"""Files as records: pairs of a number (the line or row an error should name) and the record as JSON text.

Plain Python reads the files, not the loaders of `datasets`, because those change what the model will see
(measured on 5.2): a JSON string that looks like a date becomes a timestamp and is printed differently, 1
becomes 1.0 beside a 1.5, a missing field becomes null; a CSV cell 007 becomes 7 and NA a null, and a first
row with one cell too many shifts all columns. Here a text cell stays the text that stands in the file. Speed
is the same: both are bound by writing the cached table.

Knows nothing of fields, templates or caches.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefix_ds.errors import DataError

Rows = Iterator[tuple[int, str]]

_LARGEST_CELL = 2**31 - 1  # csv's own limit is 128 KiB, less than one long document


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, from 1. Only a newline ends one; str.splitlines knows ten more ends."""
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {_byte(error)}") from None
            if text and not text.isspace():
                yield number, text


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x}"


def text_rows(path: str) -> Rows:
    """One record a line that is not blank, with the field `text`."""
    for number, line in _lines(path):
        yield number, json.dumps({"text": line}, ensure_ascii=False)


def jsonl_rows(path: str) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; expected one object a line") from None
        if not isinstance(record, dict):
            found = json.dumps(record)[:40]
            raise DataError(f'{path}:{number}: found {found}; expected an object such as {{"text": "..."}}')
        yield number, line


def csv_rows(path: str) -> Rows:
    """One record a row, all of its fields text; the first row names the fields."""
    csv.field_size_limit(_LARGEST_CELL)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            _refuse_repeated(names, f"{path}:1")
            number = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield number, _csv_record(path, number, names, cells)
                number = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {_byte(error)} after line {reader.line_num}") from None


def _csv_record(path: str, number: int, names: list[str], cells: list[str]) -> str:
    if len(cells) != len(names):
        raise DataError(f"{path}:{number}: {len(cells)} cells; the first row names {len(names)} columns")
    return json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False)


def parquet_rows(path: str) -> Rows:
    """The rows of a Parquet file, numbered from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, json_text(record)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond the year 9999
        raise DataError(f"{path}: one of the 1,000 records after {number:,}: {error}") from None


def _refuse_repeated(names: list[str], place: str) -> None:
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{place}: the column {sorted(repeated)[0]!r} is there twice")


def json_text(record: dict[str, Any]) -> str:
    """A record as JSON; what JSON has no form for (dates, bytes, images) as Python prints it."""
    return json.dumps(record, ensure_ascii=False, default=str)


FORMATS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": jsonl_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
