"""Registers a model with MLflow: code that runs it, and the few files it needs.

It is logged to the run that MLflow has of the same run folder, if there is one on that server, else to a run
of its own. A run is named to MLflow and not resumed, which would write over how and when it ended.
Knows nothing of what the model does.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from prefix_ds import __version__
from prefix_ds.dist import set_default_environment
from prefix_ds.errors import ConfigError, RunError
from prefix_ds.tracking.facts import has_facts, read_facts
from prefix_ds.tracking.masking import WITH_PASSWORD, is_masked, masked, words_of
from prefix_ds.tracking.state import absolute_uri, read_state

_PACKAGES = ("torch", "transformers", "deepspeed")


def log_model(run: Path, name: str, *, code: Path, files: Path, uri: str | None) -> str:
    """Makes the next version of the registered model `name`; its URI. Raises ConfigError or RunError.

    `code` is a file that sets an MLflow model, which finds `files` as its artifact "run".
    """
    if not uri:
        raise ConfigError("mlflow.uri: missing; name the server or database that the model goes to (--uri)")
    set_default_environment(
        MLFLOW_HTTP_REQUEST_TIMEOUT="60",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    )
    if not name.strip() or set(name) & set("/:"):
        raise ConfigError(f"--mlflow: {name!r}: a model's name has neither / nor :")
    uri = absolute_uri(uri)
    try:
        return _logged(run, name, code, files, uri)
    except Exception as error:
        words = words_of(error, uri) + (f"; {WITH_PASSWORD}" if is_masked(uri) else "")
        raise RunError(f"{masked(uri, uri)}: MLflow did not take the model {name}: {words}") from error


def _logged(run: Path, name: str, code: Path, files: Path, uri: str) -> str:
    import mlflow
    from mlflow.models import Model

    from prefix_ds.tracking.mlflow_terms import quiet_mlflow

    quiet_mlflow()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment(read_facts(run).experiment if has_facts(run) else "prefix-ds")
    with _run_of(run, uri) as run_id:
        info = Model.log(  # what mlflow.pyfunc.log_model does, with a run that is named
            artifact_path=None,
            name="served",  # not that of the run's own folder of artifacts
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(code),
            artifacts={"run": str(files)},
            registered_model_name=name,
            pip_requirements=[f"prefix-ds=={__version__}", *map(_requirement, _PACKAGES)],
        )
    return f"models:/{name}/{info.registered_model_version}"


@contextlib.contextmanager
def _run_of(run: Path, uri: str) -> Iterator[str]:
    """The id of the run that MLflow has of a folder, or of a new one that ends with the block."""
    import mlflow
    from mlflow.tracking import MlflowClient

    from prefix_ds.tracking.experiment import KIND_TAG
    from prefix_ds.tracking.mlflow_terms import live_run

    state = read_state(run)
    is_known = bool(state.run_id) and state.uri == masked(uri, uri)
    if is_known and live_run(MlflowClient(uri), state.run_id) is not None:
        yield state.run_id
        return
    with mlflow.start_run(run_name=run.name, tags={KIND_TAG: "model"}) as made:
        yield made.info.run_id


def _requirement(package: str) -> str:
    version, _, _build = importlib.metadata.version(package).partition("+")
    return f"{package}=={version}"
