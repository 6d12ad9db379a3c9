"""A comparison as one HTML page that needs nothing else: no network, no script, no other file.

The template (`report.html`) writes every tag and escapes whatever is put into it, so a run may be called
anything.

Knows nothing of where runs were found.
"""

from pathlib import Path

from prefix_ds import __version__
from prefix_ds.compare import measures, plots
from prefix_ds.compare.comparison import Comparison
from prefix_ds.compare.drawings import MOST_CURVES, Source, colours_of, drawings
from prefix_ds.compare.table import KEYS_BESIDE, by_value, short, short_keys
from prefix_ds.errors import printable

_TEMPLATE = "report.html"


def page(comparison: Comparison, source: Source, made: str) -> str:
    """The page; `made` says when. Asks the source for the curves. Raises PrefixError."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"as_title": measures.title, "short": short, "printable": printable}
    colours, drawn = colours_of(comparison.rows), drawings(comparison, source)
    text = environment.get_template(_TEMPLATE).render(
        comparison=comparison,
        coloured=list(zip(comparison.rows, colours, strict=True)),
        each_run=[(row, 0) for row in comparison.runs],
        plots=drawn,
        beside=comparison.keys if len(comparison.keys) <= KEYS_BESIDE else (),
        most_curves=MOST_CURVES,
        area=plots,
        parts=measures.parts,
        by_value=by_value,
        short_keys=short_keys,
        made=made,
        version=__version__,
    )
    return text.lstrip()
