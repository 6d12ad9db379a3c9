"""The few ways a run can be wrong.

    PrefixError                 the user can mend it: one line on the terminal, exit code 2
    ├── ConfigError             a key of run.yaml, or two keys that contradict each other
    ├── DataError               a file, a record or a template
    ├── ModelError              a base that cannot be loaded, or cannot take a prefix
    ├── RunError                a run folder, a checkpoint or a saved prefix
    └── LaunchError             a host, a scheduler or a cluster a job is to run on
    Stopped                     a signal asked for the end; a checkpoint was written: exit code 75
    PeerLost                    another rank died, or could not be met: exit code 76
    DeviceLost                  this rank's own device broke down: exit code 77

Everything else is a bug of ours (exit code 1, with its traceback). Knows nothing of what raises these.
"""

from typing import Literal

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_STOPPED, EXIT_PEER, EXIT_DEVICE = 0, 1, 2, 75, 76, 77

# Who tells of a mistake: all ranks make it alike, all of a machine do, or one alone.
Teller = Literal["first rank", "machine", "rank"]


def printable(text: str) -> str:
    """The text on one line: a newline in a file's name, or what would move a terminal's cursor, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; what Python makes of other bytes of a command line cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class PrefixError(Exception):
    """Mistakes the user can mend, a line each: it names the place, the value found and what was expected."""

    teller: Teller = "machine"

    def __str__(self) -> str:
        """The lines; there are as many as arguments, whatever is in them."""
        return "\n".join(printable(str(line)) for line in self.args)


class ConfigError(PrefixError):
    """A key is unknown, has a wrong value, or contradicts another."""


class DataError(PrefixError):
    """A data file or one of its records cannot be used."""


class ModelError(PrefixError):
    """A base model cannot be loaded or cannot take a prefix."""


class RunError(PrefixError):
    """A run folder, a checkpoint or a saved prefix cannot be used."""


class LaunchError(PrefixError):
    """A job cannot be started where it was asked to run."""


class Stopped(Exception):  # noqa: N818 - a request that was met, not an error
    """A signal asked for the end of the run and every rank agreed."""


class PeerLost(Exception):  # noqa: N818 - the error is on the other rank
    """A collective call failed because another rank is gone, or ranks cannot meet."""


class DeviceLost(Exception):  # noqa: N818 - it is the machine that is wrong
    """This rank's device reports a fault of its own: another try, better on another machine, may succeed."""
