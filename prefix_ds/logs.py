"""Log lines: configured once, by the composition root.

Rank 0 speaks at INFO, the others at WARNING and with their number in front. Libraries speak only when
something is wrong, and draw their bars only on rank 0's terminal: a log file would hold every frame of them.
Knows nothing of what is logged.
"""

import logging
import warnings

from prefix_ds.dist import rank_of_environment
from prefix_ds.errors import printable
from prefix_ds.tracking.progress import CONSOLE

_QUIET = ("DeepSpeed", "transformers", "datasets", "torch.distributed", "urllib3", "mlflow", "alembic")


def configure_logging() -> None:
    """Sends our log lines to the terminal's error stream, through rich where it is a terminal."""
    rank = rank_of_environment()
    handler = _terminal_handler() if CONSOLE.is_terminal else _plain_handler(rank)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the last one is an error
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if rank or not CONSOLE.is_terminal:
        _switch_bars_off()


def _switch_bars_off() -> None:
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()  # and those of the hub
    datasets.disable_progress_bars()


def _terminal_handler() -> logging.Handler:
    from rich.logging import RichHandler

    return RichHandler(console=CONSOLE, show_path=False, show_level=False)


def _plain_handler(rank: int) -> logging.Handler:
    handler = logging.StreamHandler()
    who = f"rank {rank}: " if rank else ""
    handler.setFormatter(_OneLine(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
    return handler


class _OneLine(logging.Formatter):
    """A record without a traceback is one line, whatever names are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))
