"""Disks that are full, limited or read-only: one line for the user, and nothing changed on the disk."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prefix_ds.checkpoint import (
    save_checkpoint,
    write_prefix,
)
from prefix_ds.errors import RunError
from prefix_ds.files import write_text_atomically
from tests.saving import FACTS, FORK, tensors_of

torch.set_num_threads(1)


def outcome_with_little_space(work: Callable[[], None], limit_bytes: int) -> str:
    """What `work` raises in a process whose files may not grow beyond a limit."""
    answers, questions = FORK.Pipe(duplex=False)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        questions.send(outcome(work))

    process = FORK.Process(target=limited, daemon=True)
    process.start()
    answer: str = answers.recv()
    process.join()
    return answer


def outcome(work: Callable[[], None]) -> str:
    try:
        work()
    except RunError as error:
        return str(error)
    return "done"


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


BIG = {"table": torch.zeros(100_000)}
BIG_SLOT = {"h.0.attn": (torch.zeros(2, 50, 1000), torch.zeros(2, 50, 1000))}
WRITES: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda run: save_checkpoint(run, 300, BIG, {}),
    "state": lambda run: save_checkpoint(run, 300, {}, {"list": list(range(100_000))}),
    "prefix": lambda run: write_prefix(run / "prefix", BIG_SLOT, FACTS),
    "text": lambda run: write_text_atomically(run / "run.yaml", "x" * 400_000),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(run: Path) -> dict[str, bytes]:
    save_checkpoint(run, 200, tensors_of(200), {})
    write_prefix(run / "prefix", {"h.0.attn": (torch.ones(2, 3, 4), torch.ones(2, 3, 4))}, FACTS)
    write_text_atomically(run / "run.yaml", "old")
    return everything_under(run)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_full_disk_is_one_line_and_changes_nothing(small_disk: Path, write: Callable[[Path], None]) -> None:
    before = fill(small_disk)
    message = outcome(lambda: write(small_disk))
    assert str(small_disk) in message
    assert "No space left on device" in message
    assert "\n" not in message
    assert everything_under(small_disk) == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_file_size_limit_is_one_line_and_changes_nothing(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    before = fill(tmp_path)
    message = outcome_with_little_space(lambda: write(tmp_path), 200_000)
    assert str(tmp_path) in message
    assert "File too large" in message
    assert "\n" not in message
    assert everything_under(tmp_path) == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_read_only_disk_is_one_line(small_disk: Path, write: Callable[[Path], None]) -> None:
    before = fill(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = outcome(lambda: write(small_disk))
    assert "Read-only file system" in message
    assert "\n" not in message
    assert everything_under(small_disk) == before


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    (tmp_path / "prefix").write_text("")
    for write in (WRITES["checkpoint"], WRITES["prefix"]):
        with pytest.raises(RunError, match=f"{tmp_path}.*cannot be written"):
            write(tmp_path)


@pytest.mark.parametrize(
    ("code", "is_fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_filesystem_that_cannot_sync_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_fatal: bool
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    message = outcome(lambda: save_checkpoint(tmp_path, 1, tensors_of(1), {}))
    assert message.endswith(os.strerror(code)) if is_fatal else message == "done"
