"""Shows what the demo found: a table of the four ways, some of their outputs, and where everything lies.

Knows nothing of how it was found; imports no torch.
"""

from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefix_ds.demo.comparison import Comparison

_SHOWN_RECORDS = 3


def show(console: Console, folder: Path, comparison: Comparison) -> None:
    """Prints it all."""
    console.print(_table(folder, comparison))
    for index in range(_SHOWN_RECORDS):
        console.print(_outputs(comparison, index))
    console.print(_places(folder), soft_wrap=True)


def _table(folder: Path, comparison: Comparison) -> Table:
    kept = ["", "", _size(folder / "prefix" / "prefix"), _size(folder / "full" / "model")]
    table = Table(title="The task: a style the base has never read as a whole")
    table.add_column("way", no_wrap=True)
    table.add_column("validation loss", justify="right")
    table.add_column(f"exact, of {len(comparison.references)} test texts", justify="right")
    table.add_column("kept on disk", justify="right")
    for scores, size in zip(comparison.scores, kept, strict=True):
        table.add_row(scores.way, f"{scores.valid_loss:.4f}", str(comparison.num_exact(scores)), size)
    return table


def _outputs(comparison: Comparison, index: int) -> Panel:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column()
    rows.add_row(Text("wanted", style="bold"), Text(comparison.references[index], style="bold"))
    for scores in comparison.scores:
        output = scores.outputs[index]
        style = "green" if output == comparison.references[index] else ""
        rows.add_row(scores.way, Text(output, style=style))
    return Panel(Group(comparison.records[index], "", rows))


def _places(folder: Path) -> Text:
    lines = (
        f"Runs: {folder}/base, {folder}/prefix, {folder}/full; their files: {folder}/*.yaml",
        f"Curves: mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db",
        f"More text: prefix-ds generate {folder}/prefix",
    )
    return Text("\n".join(lines))


def _size(folder: Path) -> str:
    """The bytes of a result, in thousands."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{total / 1000:,.0f} kB"
