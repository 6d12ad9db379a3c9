"""Files that are there whole or not at all, whenever the process or the machine dies.

What is written goes to a temporary sibling (`.tmp-NAME`), is fsynced and takes the place of the old file by
one rename; the folder is fsynced too, without which the rename itself may be lost with the power. A killed
writer leaves at most its `.tmp-` file, which the next writer of the same name overwrites. Some network
filesystems refuse to fsync a folder; there the rename is as durable as the filesystem makes it.

Knows nothing of what is in the files; imports no torch.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefix_ds.errors import PrefixError, RunError

TEMPORARY = ".tmp-"
OLD = ".old-"

_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF}
_NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.ENOSYS,
}  # a network filesystem without them: go on unprotected


def write_text_atomically(path: Path, text: str) -> None:
    """Makes `text` the content of `path`, in an existing folder. Raises RunError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_can_write(folder: Path) -> None:
    """Raises RunError where no file can be made in a folder, before there is work to lose."""
    with telling_disk_errors(folder), tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY):
        pass


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; what is there when the block ends well becomes `path`. Raises RunError."""
    if not path.name:
        raise RunError(f"{path}: is a folder; name a file")
    temporary = path.with_name(TEMPORARY + path.name)
    with telling_disk_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            remove(temporary)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well it becomes `path`, which may exist. Raises RunError.

    A folder cannot replace another in one rename: killed between two, the old one is left as `.old-NAME`, and
    `restore_folder` puts it back.
    """
    temporary, old = path.with_name(TEMPORARY + path.name), path.with_name(OLD + path.name)
    with telling_disk_errors(path):
        remove(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
        except BaseException:
            remove(temporary)
            raise
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    remove(old)


def restore_folder(path: Path) -> None:
    """Mends what a kill within `whole_folder` left: `path` is then the old folder or the new one."""
    old = path.with_name(OLD + path.name)
    if old.exists() and not path.exists():
        old.rename(path)
    remove(old)


@contextlib.contextmanager
def telling_disk_errors(path: Path | str) -> Iterator[None]:
    """Turns what a disk refuses in the block into a RunError of one line that names `path`."""
    try:
        yield
    except PrefixError:
        raise
    except Exception as error:
        # safetensors and tokenizers have exceptions of their own: "I/O error: No space left (os error 28)"
        if isinstance(error, OSError) or "(os error " in str(error):
            raise RunError(
                f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}"
            ) from error
        raise


def hold_alone(path: Path) -> bool | None:
    """Takes a lock on a file until this process ends, however it ends.

    False if another process has it; None on a disk without locks, where nobody knows.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT)  # never closed: the lock lives as long as it is open
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        os.close(handle)
        return None
    os.register_at_fork(after_in_child=lambda: os.close(handle))  # a child that outlives us would hold it
    return True


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_FSYNC):
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, as far as the disk lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
