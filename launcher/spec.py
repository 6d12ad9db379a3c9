"""What a job asks for, wherever it runs.

Knows nothing of hosts or clusters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefix_ds.config import RunConfig, read_config
from prefix_ds.config.secrets import has_login, is_secret
from prefix_ds.errors import ConfigError, LaunchError

DEFAULT_PORT = 29500
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobSpec:
    """A run and how many processes train it. `config` is `run_file` with the overrides, read and checked."""

    run_file: Path
    overrides: tuple[str, ...]
    config: RunConfig
    num_nodes: int = 1
    ranks_per_node: int = 1  # one for each GPU
    variables: tuple[str, ...] = ()  # names of environment variables that every rank gets from the launcher's
    port: int | None = None  # of the first node, for the ranks to meet; None: one that is free

    @property
    def name(self) -> str:
        """For people and schedulers: MLflow's name of the run, or the run folder's."""
        return self.config.mlflow.name or Path(self.config.run.folder).name

    @property
    def logs(self) -> Path:
        """The folder beside the run's for what the ranks say. Raises LaunchError."""
        run = Path(self.config.run.folder)
        if run.name in ("", ".."):
            raise LaunchError(
                f"run.folder: {self.config.run.folder}: expected a folder with a name, such as runs/NAME"
            )
        return run.with_name(run.name + "-logs")

    @property
    def train_words(self) -> list[str]:
        """The arguments of prefix-ds on every rank."""
        return ["train", str(self.run_file), *self.overrides]


def job_spec(
    run_file: Path,
    overrides: Sequence[str] = (),
    *,
    num_nodes: int = 1,
    ranks_per_node: int = 1,
    variables: Sequence[str] = (),
    port: int | None = None,
) -> JobSpec:
    """A checked job. Raises ConfigError for a run that would be refused, LaunchError for what is no job."""
    config = read_config(run_file, overrides)
    _refuse_secrets(config)
    for option, value in (("--nodes", num_nodes), ("--ranks-per-node", ranks_per_node)):
        if value < 1:
            raise LaunchError(f"{option}: {value}: expected at least 1")
    if port is not None and not 1 <= port <= 65535:
        raise LaunchError(f"--port: {port}: expected 1 to 65535")
    for name in variables:
        if not _NAME.fullmatch(name):
            raise LaunchError(
                f"--env: {name.partition('=')[0]}: expected the name of a variable; its value is taken from "
                "the environment, where no process list shows it"
            )
    names = tuple(dict.fromkeys(variables))
    return JobSpec(run_file, tuple(overrides), config, num_nodes, ranks_per_node, names, port)


def ranks_of_node(gpus: int, ranks: int | None) -> int:
    """One for each GPU, else those that were asked for, or one. Raises LaunchError if the two contradict."""
    if ranks is None:
        return max(gpus, 1)
    if gpus > 0 and ranks != gpus:
        raise LaunchError(
            f"--ranks-per-node: {ranks}: a node's {gpus} GPUs have a rank each; on CPUs say --gpus-per-node 0"
        )
    return ranks


def _refuse_secrets(config: RunConfig) -> None:
    """Whatever a run file or an override says ends up in command lines and manifests."""
    mistakes = []
    if config.mlflow.uri and has_login(config.mlflow.uri):
        mistakes.append(
            "mlflow.uri: has a user, a password or a token in it, and a launched job's configuration can be "
            "read by others; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, and pass them on with --env"
        )
    for name, value in config.mlflow.tags.items():
        if is_secret(name) or has_login(value):
            mistakes.append(f"mlflow.tags: {name}: looks like a secret, which all who see the run could read")
    if mistakes:
        raise ConfigError(*mistakes)
