"""A folder of this rank's own on a disk of its host, for the shards that DeepSpeed keeps there.

DeepSpeed writes shards under the path it is given, in files named by their number, and leaves them there: two
jobs on one path would read each other's weights. So each rank gets a folder that nobody else has, under
`engine.nvme_folder`, removed when the process ends. A process that was killed removes nothing; the next to
come takes what nobody holds a lock on away.

Knows nothing of shards.
"""

import atexit
import contextlib
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prefix_ds.dist import gathered, together
from prefix_ds.engine.settings import Settings
from prefix_ds.errors import ConfigError
from prefix_ds.files import hold_alone, remove

log = logging.getLogger(__name__)

_NAME = "prefix-ds-"
_YOUNG_SECONDS = 60  # a lock's file is made before it is held


def with_own_folder(settings: Settings) -> Settings:
    """The settings, with a folder of this rank's own where they keep shards on a disk. Raises ConfigError."""
    zero = settings["zero_optimization"]
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return settings
    _refuse_unbuildable()
    own = {"offload_param": offload | {"nvme_path": str(_own_folder(Path(offload["nvme_path"])))}}
    _build()
    return settings | {"zero_optimization": zero | own}


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises ConfigError if the disk of `folder` has no room for what the ranks of this host will keep there.

    Every rank calls this, with the bytes of its own.
    """
    here = (socket.gethostname(), folder.stat().st_dev)
    needed = sum(count for place, count in gathered((here, num_bytes)) if place == here)
    together(lambda: _check_free(folder, needed))


def _check_free(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"engine.nvme_folder: {folder.parent}: {free / 2**30:,.1f} GiB free; the shards of this host's "
            f"ranks take {needed / 2**30:,.1f} GiB"
        )


def _own_folder(folder: Path) -> Path:
    with _telling(folder):
        _remove_abandoned(folder)
        own = Path(tempfile.mkdtemp(prefix=_NAME, dir=folder))
        lock = _lock_of(own)
        hold_alone(lock)
    for path in (lock, own):  # what is registered last is done first
        atexit.register(remove, path)
    return own


def _lock_of(own: Path) -> Path:
    return own.with_name(f"{own.name}.lock")


def _remove_abandoned(folder: Path) -> None:
    for own in (path for path in folder.glob(f"{_NAME}*") if path.is_dir()):
        with contextlib.suppress(FileNotFoundError):  # another rank was quicker
            is_young = time.time() - own.stat().st_mtime < _YOUNG_SECONDS
            if not is_young and hold_alone(_lock_of(own)):
                log.info("removing what a run that was killed left in %s", own)
                remove(own)
                remove(_lock_of(own))


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"engine.nvme_folder: {folder}: {error.strerror}") from error


def _refuse_unbuildable() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "engine.deepspeed: DeepSpeed cannot use a disk on this host: it compiles its code for that "
            "(async_io) and needs libaio's headers and library (Debian: libaio-dev)"
        )


def _build() -> None:
    """Loads DeepSpeed's code for disks, which DeepSpeed itself would do later, outside of what is told."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    log.info("DeepSpeed opens the disk; the first time on a host it compiles its code for that, some minutes")
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # a TypeError, for one: of a path in a CUDA toolkit that is not there
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(
            "engine.deepspeed: DeepSpeed cannot compile its code for disks (async_io) on this host; it needs"
            f" g++ and, beside GPUs, CUDA's toolkit of torch's version (CUDA_HOME): {reason}"
        ) from error
