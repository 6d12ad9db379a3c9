"""Registers a model with MLflow: code that runs it, and the few files it needs.

It is logged to the run that MLflow has of the same run folder, if there is one on that server, else to a run
of its own. Knows nothing of what the model does.
"""

import importlib.metadata
from pathlib import Path

from prefix_ds import __version__
from prefix_ds.dist import set_default_environment
from prefix_ds.errors import ConfigError, RunError
from prefix_ds.tracking.facts import has_facts, read_facts
from prefix_ds.tracking.masking import masked, words_of
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
    )
    uri = absolute_uri(uri)
    try:
        return _logged(run, name, code, files, uri)
    except Exception as error:
        words = words_of(error, uri)
        raise RunError(f"{masked(uri, uri)}: MLflow did not take the model {name}: {words}") from error


def _logged(run: Path, name: str, code: Path, files: Path, uri: str) -> str:
    import mlflow

    from prefix_ds.tracking.mlflow_terms import quiet_mlflow

    quiet_mlflow()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment(read_facts(run).experiment if has_facts(run) else "prefix-ds")
    state = read_state(run)
    known = state.run_id if state.uri == masked(uri, uri) and state.run_id else None
    with mlflow.start_run(run_id=known, run_name=None if known else run.name):
        info = mlflow.pyfunc.log_model(
            name="prefix",
            python_model=str(code),
            artifacts={"run": str(files)},
            registered_model_name=name,
            pip_requirements=[f"prefix-ds=={__version__}", *map(_requirement, _PACKAGES)],
        )
    return f"models:/{name}/{info.registered_model_version}"


def _requirement(package: str) -> str:
    version, _, _build = importlib.metadata.version(package).partition("+")
    return f"{package}=={version}"
