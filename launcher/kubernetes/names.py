"""What Kubernetes takes for a name.

Knows nothing of the objects that bear them.
"""

import re
from collections.abc import Iterator

from prefix_ds.errors import LaunchError

_LONGEST = 63  # of a label of DNS, which every pod's host name is
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # a Service, and so our job, begins with a letter
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_EXPECTED = "lower-case letters, digits and '-', a letter first and no '-' last"


def job_name(wish: str, suffix: str, *, is_given: bool = False) -> str:
    """The wish with its case and underscores as Kubernetes wants them. Raises LaunchError for all else.

    `suffix` is the longest that is put behind it to name a pod.
    """
    name, longest = wish.lower().replace("_", "-"), _LONGEST - len(suffix)
    where = "--name" if is_given else "the run's name (mlflow.name, or run.folder's last part)"
    remedy = "" if is_given else "; give another with --name"
    if not _LABEL.fullmatch(name):
        raise LaunchError(f"{where}: {wish!r}: Kubernetes expects {_EXPECTED}{remedy}")
    if len(name) > longest:
        raise LaunchError(
            f"{where}: {wish!r}: {len(name)} characters: Kubernetes expects at most {longest} here, since a "
            f"pod's name adds {suffix!r}{remedy}"
        )
    return name


def check_name(option: str, name: str) -> Iterator[str]:
    """A line if no object can have this name."""
    longest = _LONGEST if option == "--namespace" else 253
    has_dot = option == "--namespace" and "." in name
    if not _OBJECT.fullmatch(name) or len(name) > longest or has_dot:
        yield (
            f"{option}: {name!r}: Kubernetes expects at most {longest} lower-case letters, digits and '-', "
            "no '-' first or last"
        )
