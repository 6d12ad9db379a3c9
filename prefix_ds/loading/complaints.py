"""What the libraries say of a user's mistake, as one line of ours.

Knows nothing of what is loaded.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from prefix_ds.errors import ConfigError, ModelError, PrefixError

# All else that the libraries raise (files, formats, connections, missing packages) is about what is loaded.
_ABOUT_OTHER_THINGS = (
    AssertionError,
    AttributeError,
    IndexError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
)
_LONGEST_REASON = 300  # characters; some libraries list all they know


def place(key: str, name: str) -> str:
    """Key and name, and where the name was looked for: a mistyped folder is taken for a hub id."""
    return f"{key}: {name}" + ("" if Path(name).is_dir() else " (no such folder, so a hub id)")


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """What transformers says of sizes that do not go together, as a ConfigError of one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {one_line(error)}") from None


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """What the libraries say of a user's mistake, as one line that begins with the place."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except (PrefixError, *_ABOUT_OTHER_THINGS):
        raise
    except Exception as error:
        raise ModelError(f"{where}: {one_line(error)}") from error


def one_line(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
