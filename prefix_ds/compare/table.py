"""A comparison on the terminal.

Knows nothing of how it was made; imports rich and nothing heavy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from prefix_ds.compare import measures
from prefix_ds.compare.comparison import Columns, Comparison
from prefix_ds.compare.rows import Row
from prefix_ds.errors import printable

KEYS_BESIDE = 3  # so many differing keys stand in the first table; more have one of their own
_NARROWEST = 12  # characters of a column of words, where there is no room for more
_LONGEST = 48  # characters of a value or a name


def show(console: Console, comparison: Comparison) -> None:
    """The tables, then the warnings."""
    beside = _keys_beside(console, comparison)
    console.print(_plain(_heading(comparison)), style="bold", soft_wrap=True)
    for columns in comparison.tables:
        console.print(*_fitting(console, comparison.rows, beside, columns))
    for columns in comparison.tables if comparison.has_seeds else ():
        each = replace(columns, title=f"{columns.title}, each run")
        console.print(*_fitting(console, comparison.runs, (), each))
    if comparison.keys and not beside:
        console.print(_differences(comparison))
    for line in comparison.warnings:
        console.print(_plain(f"warning: {line}"), style="yellow", soft_wrap=True)


def _keys_beside(console: Console, comparison: Comparison) -> Sequence[str]:
    """The differing keys, where they are few and there is room for them beside the numbers; else none."""
    keys, columns = comparison.keys, comparison.tables[0]
    if len(keys) > KEYS_BESIDE:
        return ()
    table = _figures(comparison.rows, keys, columns)
    wished = Measurement.get(console, console.options.update(width=10 * console.width), table)
    return keys if wished.maximum <= console.width else ()


def _heading(comparison: Comparison) -> str:
    way = "less" if comparison.less_is_better else "more"
    return f"{comparison.source}, by {measures.title(comparison.by)} ({way} is better)"


def _fitting(console: Console, rows: Sequence[Row], keys: Sequence[str], columns: Columns) -> Iterator[Table]:
    """The columns in as many tables as it takes, each with as many measures as there is room for."""
    names = columns.measures
    for count in range(len(names), 0, -1):
        table = _figures(rows, keys, replace(columns, measures=names[:count]))
        if count == 1 or _least_width(table) <= console.width:
            yield table
            rest = replace(columns, title="", measures=names[count:], is_first=False)
            yield from _fitting(console, rows, (), rest)
            return


def _least_width(table: Table) -> int:
    """Where words are folded and numbers are whole."""

    def width(column: Column) -> int:
        widest = max(text.cell_len for text in (column.header, *column.cells) if isinstance(text, Text))
        return widest if column.no_wrap else min(widest, _NARROWEST)

    between = 3  # with the space around a cell
    return 1 + sum(width(column) + between for column in table.columns)


def _figures(all_rows: Sequence[Row], all_keys: Sequence[str], columns: Columns) -> Table:
    table = Table(title=columns.title or None, title_justify="left", box=box.SIMPLE_HEAD)
    names, rows = columns.measures, columns.rows(all_rows)
    keys = all_keys if columns.is_first else ()
    has_data = columns.is_first and any(row.data for row in rows)
    has_notes = columns.is_first and any(row.notes for row in rows)
    has_seeds = columns.is_first and len({seed for row in rows for seed in row.seeds}) > 1
    heads = [
        "",
        "run",
        *short_keys(keys),
        *(["seeds"] if has_seeds else []),
        *(["data"] if has_data else []),
    ]
    for head in heads:
        table.add_column(_plain(head), overflow="fold", min_width=_NARROWEST if head == "run" else None)
    for name in names:
        table.add_column(_plain(measures.title(name)), justify="right", no_wrap=True)
    if has_notes:
        table.add_column(_plain(""))
    for row in rows:
        cells = [
            "best" if row.is_best else "",
            short(row.name),
            *(short(row.keys.get(key, "")) for key in keys),
        ]
        cells += [short(", ".join(row.seeds))] if has_seeds else []
        cells += [row.data] if has_data else []
        cells += [measures.written(name, row.values.get(name)) for name in names]
        cells += [", ".join(row.notes)] if has_notes else []
        table.add_row(*map(Text, cells), style="bold green" if row.is_best else "")
    return table


def _differences(comparison: Comparison) -> Table:
    """A line a key, a column a value that it has: of many runs most share one."""
    table = Table("key", "value", "runs", title="What differs", title_justify="left", box=box.SIMPLE_HEAD)
    for key in comparison.keys:
        for place, (value, names) in enumerate(by_value(key, comparison.rows).items()):
            cells = (
                printable(key) if not place else "",
                short(value) or "none",
                short(", ".join(names), 3 * _LONGEST),
            )
            table.add_row(*map(Text, cells))
    return table


def _plain(text: str) -> Text:
    """On one line, and no markup, whatever is in brackets."""
    return Text(printable(text))


def short_keys(keys: Sequence[str]) -> list[str]:
    """Without their sections where the names alone tell them apart."""
    names = [key.rpartition(".")[2] for key in keys]
    return names if len(set(names)) == len(names) else list(keys)


def by_value(key: str, rows: Sequence[Row]) -> dict[str, list[str]]:
    """The values of a key, and the rows that have each."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.is_trained:
            found.setdefault(row.keys.get(key, ""), []).append(row.name)
    return found


def short(text: str, longest: int = _LONGEST) -> str:
    """On one line, its middle left out where it is long."""
    plain = printable(text)
    if len(plain) <= longest:
        return plain
    head = longest * 2 // 3
    return f"{plain[:head]}…{plain[head + 1 - longest :]}"
