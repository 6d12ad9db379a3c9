"""MLflow's terms: what it takes as a name or a value, how it counts time, and what its refusals mean.

The limits are those of its server's validation; a value that is too long is cut here, since a refusal would
take everything in the same request with it.

Knows nothing of runs.
"""

import logging
import re

from mlflow.entities import Dataset, DatasetInput, InputTag, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from prefix_ds.tracking.facts import DatasetFacts, cut
from prefix_ds.tracking.masking import masked

METRICS_A_REQUEST = 1000
PARAMETER_LENGTH, TAG_LENGTH = 6000, 5000  # characters
FILES_TAG = "prefix_ds.files"  # of a run all of whose files were sent once
DATA_COUNTS = ("examples", "targets")  # of a data set, as tags of a run's use of it
_KEY_LENGTH = 250


def dataset_input(facts: DatasetFacts) -> DatasetInput:
    """A data set as MLflow takes it."""
    source = masked(facts.source)
    dataset = Dataset(cut(facts.name, 500), facts.digest[:36], "local", cut(source, 60000))
    tags = {"mlflow.data.context": facts.context}  # of this run; what is said of the data set holds for all
    tags |= {name: str(count) for name in DATA_COUNTS if (count := getattr(facts, name))}
    return DatasetInput(dataset, [InputTag(name, value) for name, value in tags.items()])


def is_refusal(error: Exception) -> bool:
    """Whether asking again is of no use: said by the server, or by the client that packs the request."""
    refused = getattr(error, "error_code", None) in {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "ENDPOINT_NOT_FOUND",
    }
    return refused or is_gone(error) or isinstance(error, ValueError | TypeError)


def is_gone(error: Exception) -> bool:
    """Whether the server does not know what was asked for."""
    return getattr(error, "error_code", None) in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}


def live_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run that the server knows and nobody has deleted."""
    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if is_gone(error):
            return None
        raise
    return found if found.info.lifecycle_stage == "active" else None


def milliseconds(seconds: float) -> int:
    """Unix time as MLflow counts it."""
    return int(seconds * 1000)


def plain_key(name: str) -> str:
    """A name that MLflow takes: few characters, and none that means another place as a path."""
    plain = re.sub(r"[^\w./ :-]", "_", name)[:_KEY_LENGTH]
    return "/".join(part for part in plain.split("/") if part.strip(".")) or "_"


def quiet_mlflow() -> None:
    """Leaves only warnings of MLflow and of the database tools it brings."""
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(
        logging.ERROR
    )  # it tells each retry; the mirror tells an outage once
