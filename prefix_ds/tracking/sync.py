"""Sends MLflow what it has not got of a run, in the foreground: `prefix-ds sync RUN`.

Knows nothing of training.
"""

from pathlib import Path

from prefix_ds.dist import set_default_environment
from prefix_ds.errors import RunError
from prefix_ds.tracking.facts import read_facts
from prefix_ds.tracking.masking import WITH_PASSWORD, is_masked, masked, words_of
from prefix_ds.tracking.progress import progress_bar
from prefix_ds.tracking.state import only_writer, resolved_uri


def sync_run(run: Path, uri: str | None = None) -> int:
    """Sends what is missing and returns the number of records sent. Raises RunError if the server fails.

    `uri` is needed where it holds a password, which the run folder does not.
    """
    read_facts(run)
    uri = resolved_uri(uri, run)
    set_default_environment(
        MLFLOW_HTTP_REQUEST_TIMEOUT="30",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    )
    with only_writer(run, patience_seconds=1):
        try:
            return _sent(run, uri)
        except RunError:
            raise
        except Exception as error:
            words = words_of(error, uri)
            where = masked(uri, uri)
            way = WITH_PASSWORD if is_masked(uri) else "sync again later"
            raise RunError(f"{where}: MLflow did not take everything: {words}; {way}") from None


def _sent(run: Path, uri: str) -> int:
    from prefix_ds.tracking.mlflow_run import MlflowRun
    from prefix_ds.tracking.mlflow_terms import quiet_mlflow

    quiet_mlflow()
    there = MlflowRun(run, uri)
    there.open()
    sent = 0
    with progress_bar("sending to MLflow", there.num_waiting()) as bar:
        for count in there.send_metrics():
            sent += count
            bar.at(sent)
    there.send_summary()
    there.send_status("FAILED")  # if nobody could say how it ended
    there.send_files(is_last=True)
    return sent
