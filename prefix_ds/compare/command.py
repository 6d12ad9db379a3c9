"""`prefix-ds compare`: finds runs, puts them side by side, and shows them.

Reads like a table of contents: where runs are, what they come to, and up to four ways to show it: the
terminal, a page, data for programs, and a report kept in MLflow, whose own pages then show runs over seeds as
nested.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from prefix_ds.compare import measures
from prefix_ds.compare.comparison import Comparison, compared
from prefix_ds.compare.data import as_data
from prefix_ds.compare.folders import Folders
from prefix_ds.compare.mlflow_runs import MlflowRuns
from prefix_ds.compare.page import page
from prefix_ds.compare.rows import Row, computed
from prefix_ds.compare.table import show
from prefix_ds.config import MlflowKeys
from prefix_ds.dist import set_default_environment
from prefix_ds.errors import RunError
from prefix_ds.files import write_text_atomically

if TYPE_CHECKING:
    from prefix_ds.tracking.experiment import Experiment

_ASKED = 10  # runs
_WIDE = 240  # columns, where nobody's window sets a width


@dataclass(frozen=True)
class Request:
    """What a user asked for: run folders, or else an experiment of MLflow; None takes run.yaml's defaults."""

    runs: Sequence[Path] = ()
    experiment: str | None = None
    uri: str | None = None
    by: str | None = None
    html: Path | None = None
    as_json: bool = False
    log: bool = False


def compare(request: Request) -> Comparison:
    """Shows the comparison of some runs. Raises PrefixError."""
    if request.runs and (request.experiment or request.uri or request.log):
        raise RunError("compare: name run folders, or an experiment (--experiment, --uri, --log), not both")
    experiment = None if request.runs else _experiment(request)
    source = Folders(request.runs) if experiment is None else MlflowRuns(experiment)
    comparison = comparison_of(source, request.by)
    text = page(comparison, source, time.strftime("%Y-%m-%d %H:%M")) if request.html or request.log else ""
    if request.html:
        write_text_atomically(request.html, text)
    if experiment is not None and request.log:
        _keep(experiment, comparison, text)
    _print(comparison, request.as_json)
    return comparison


def comparison_of(source: Folders | MlflowRuns, by: str | None = None) -> Comparison:
    """The comparison of what a source has. Whether results are there is asked again for the best runs."""
    runs = source.runs()
    comparison = compared(source.name, runs, by)
    gone = source.gone([run for row in comparison.rows for run in row.members if row.is_trained][:_ASKED])
    marked = [replace(run, result_is_gone=True) if run.place in gone else run for run in runs]
    return compared(source.name, marked, by) if gone else comparison


def _experiment(request: Request) -> "Experiment":
    set_default_environment(
        MLFLOW_HTTP_REQUEST_TIMEOUT="20",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    )
    from prefix_ds.tracking.experiment import Experiment

    defaults = MlflowKeys()
    uri = defaults.uri if request.uri is None else request.uri
    if not uri:
        raise RunError("--uri: is empty; name MLflow's server or database, or run folders")
    return Experiment(uri, request.experiment or defaults.experiment)


def _print(comparison: Comparison, as_json: bool) -> None:
    console = Console()
    if as_json:
        print(_json(comparison))  # noqa: T201
        return
    show(console if console.is_terminal else Console(width=_WIDE), comparison)


def _json(comparison: Comparison) -> str:
    return json.dumps(as_data(comparison), indent=1, allow_nan=False)


def _keep(experiment: "Experiment", comparison: Comparison, text: str) -> None:
    """The report as an artifact of a run of its own, and runs over seeds below a parent."""
    from prefix_ds.tracking.experiment import Family

    name = f"comparison by {measures.title(comparison.by)}"
    experiment.keep_report(name, {"report.html": text, "comparison.json": _json(comparison)})
    rows = [row for row in comparison.rows if row.kind == "seeds"]
    experiment.nest([Family(_key(r), _title(r), [run.place for run in r.members], _figures(r)) for r in rows])


def _key(row: Row) -> str:
    """The same for the same configuration, whichever seeds there are."""
    return hashlib.sha256(json.dumps(sorted(computed(row.members[0].params).items())).encode()).hexdigest()[
        :16
    ]


def _title(row: Row) -> str:
    return f"{row.name} ({len(row.seeds)} seeds)"


def _figures(row: Row) -> dict[str, float]:
    """Means under the names that single runs have, so that MLflow's table has them in one column."""
    return {
        f"evaluate/{name}{suffix}" if measures.is_score(name) else f"summary/{name}{suffix}": number
        for name, value in row.values.items()
        for suffix, number in (("", value.value), ("/deviation", value.deviation))
        if number is not None
    }
