"""What each evaluation of a run read, as tags of the run's counterpart in MLflow.

    evaluate.test.data           the trained run
    evaluate.test.bare.data      the base with nothing in front

`prefix-ds evaluate` may be told another file than run.yaml has; its verdict says which it was.

Knows nothing of MLflow or of scores.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from prefix_ds.errors import RunError
from prefix_ds.tracking.masking import masked
from prefix_ds.verdicts import Verdict, read_verdict, verdict_files

_HEAD, _TAIL = "evaluate.", ".data"


def data_tags(run: Path) -> dict[str, str]:
    """The tags of a run folder; none of an evaluation that cannot be read."""
    found = {name: _source(path) for name, path in verdict_files(run).items()}
    return {f"{_HEAD}{name}{_TAIL}": source for name, source in found.items() if source}


def tagged_data(tags: Mapping[str, str]) -> dict[str, str]:
    """The data by evaluation (test, test.bare), from a run's tags."""
    return {
        name.removeprefix(_HEAD).removesuffix(_TAIL): source
        for name, source in tags.items()
        if name.startswith(_HEAD) and name.endswith(_TAIL)
    }


def source_text(verdict: Verdict) -> str:
    """The data that was read, without secrets; empty if it is not known."""
    data = verdict.data or ""
    return masked(data if isinstance(data, str) else json.dumps(data))


def _source(path: Path) -> str:
    try:
        return source_text(read_verdict(path))
    except RunError:
        return ""
