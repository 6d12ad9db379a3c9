"""The few ways a run can be wrong.

    PrefixError                 the user can mend it: one line on the terminal, exit code 2
    ├── ConfigError             a key of run.yaml, or two keys that contradict each other
    ├── DataError               a file, a record or a template
    ├── ModelError              a base that cannot be loaded, or cannot take a prefix
    └── RunError                a run folder, a checkpoint or a saved prefix
    Stopped                     a signal asked for the end; a checkpoint was written: exit code 75
    PeerLost                    another rank died in the middle of a step: exit code 1

Everything else is a bug of ours (exit code 1, with its traceback). Knows nothing of what raises these.
"""

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_STOPPED = 0, 1, 2, 75


class PrefixError(Exception):
    """A mistake the user can mend. The message names the place, the value found and what was expected."""


class ConfigError(PrefixError):
    """A key is unknown, has a wrong value, or contradicts another."""


class DataError(PrefixError):
    """A data file or one of its records cannot be used."""


class ModelError(PrefixError):
    """A base model cannot be loaded or cannot take a prefix."""


class RunError(PrefixError):
    """A run folder, a checkpoint or a saved prefix cannot be used."""


class Stopped(Exception):  # noqa: N818 - a request that was met, not an error
    """A signal asked for the end of the run and every rank agreed."""


class PeerLost(Exception):  # noqa: N818 - the error is on the other rank
    """A collective call failed because another rank is gone."""
