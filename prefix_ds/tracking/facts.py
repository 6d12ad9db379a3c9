"""What a run is, apart from its numbers: parameters, versions, where the data came from, who asked for it.

Kept as `RUN/facts.json`, without secrets, so that MLflow can be told later what it was not told at the time.
The `uid` names the run on any server: a request that timed out may have been obeyed all the same, and the uid
finds what it made.

Knows nothing of MLflow's limits or of how a run is trained.
"""

import getpass
import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefix_ds.config.secrets import is_secret
from prefix_ds.errors import RunError
from prefix_ds.files import write_text_atomically
from prefix_ds.tracking.masking import STARS, masked

_FILE = "facts.json"
_PACKAGES = ("prefix-ds", "torch", "deepspeed", "transformers")
_TEMPLATES = {"data.prompt", "data.target", "data.references", "prefix.text"}


@dataclass(frozen=True)
class DatasetFacts:
    """One data set a run reads: what it is called, a digest of its content, what it is for, where it is; and
    what a tokenizer and the longest example make of it, 0 where that was not noted."""

    name: str
    digest: str
    context: str
    source: str
    examples: int = 0
    targets: int = 0  # tokens that are predicted


@dataclass(frozen=True)
class Facts:
    """What a run is. `params` and `tags` are flat; `started` is in unix seconds."""

    experiment: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    datasets: tuple[DatasetFacts, ...] = ()
    started: float = field(default_factory=time.time)
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = ""  # how the run ended, in MLflow's words; empty while it has not
    ended: float = 0  # unix seconds


def write_facts(run: Path, facts: Facts, goes_on: bool) -> None:
    """Keeps the facts; a run that goes on keeps its first uid and start. Raises RunError."""
    if goes_on and (run / _FILE).exists():
        first = read_facts(run)
        facts = replace(facts, uid=first.uid, started=first.started)
    _write(run, facts)


def write_end(run: Path, status: str) -> None:
    """Adds how the run ended to its facts. Raises RunError."""
    _write(run, replace(read_facts(run), status=status, ended=time.time()))


def read_facts(run: Path) -> Facts:
    """The facts of a run folder. Raises RunError."""
    path = run / _FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return _facts(tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read: {error}; a run folder was expected") from error


def _facts(tree: Any) -> Facts:
    facts = Facts(**tree | {"datasets": tuple(DatasetFacts(**d) for d in tree["datasets"])})
    if not isinstance(facts.params, dict) or not isinstance(facts.tags, dict):
        raise TypeError("params and tags are not all there")
    return facts


def has_facts(run: Path) -> bool:
    """Whether a run folder has facts; one that was imported has not."""
    return (run / _FILE).is_file()


def flattened(tree: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as `section.key: value`, all text; None is left out."""
    return dict(_leaves(tree, ""))


def process_tags(argv: Sequence[str], uri: str | None = None) -> dict[str, str]:
    """Tags that tell how to do it again: versions, the command line, the commit of the working directory.

    `uri` is where the run tracks, whose secrets may stand in `argv`.
    """
    tags = {f"version.{name}": version for name in _PACKAGES if (version := _version(name))}
    line = masked(shlex.join(_shown(word, uri) for word in argv))
    tags |= {"version.python": platform.python_version(), "host": platform.node()}
    tags |= {"mlflow.source.name": line, "mlflow.source.type": "LOCAL"}
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    if user := _user():
        tags["mlflow.user"] = user
    return tags


def without_secrets(tree: Any) -> Any:
    """The tree with stars for what looks like a secret, or bears the name of one.

    A template keeps its words, which two runs may differ in.
    """
    return _without_secrets(tree, "")


def _without_secrets(tree: Any, above: str) -> Any:
    if isinstance(tree, Mapping):
        return {name: _without_secrets(value, f"{above}.{name}") for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_secrets(value, above) for value in tree]
    if not isinstance(tree, str):
        return tree
    if tree and is_secret(above.rpartition(".")[2]):
        return STARS
    return masked(tree, is_template=".".join(above.split(".")[-2:]) in _TEMPLATES)


def cut(text: str, limit: int) -> str:
    """The text, or as much of its start as the limit takes, and a digest of all of it: two texts stay two."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{text[: limit - 20]}... {digest}"


def _write(run: Path, facts: Facts) -> None:
    write_text_atomically(run / _FILE, json.dumps(without_secrets(asdict(facts)), indent=1) + "\n")


def _leaves(tree: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        elif value is not None:
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _shown(word: str, uri: str | None) -> str:
    """A word of a command line."""
    name, is_pair, _ = word.partition("=")
    return f"{name}={STARS}" if is_pair and is_secret(name) else masked(word, uri)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return None
