"""Runs a function, or the command line, on several ranks, in real processes that talk over gloo.

The processes come from a fork server that has all a run needs loaded (`tests.preloaded`), so that a test pays
for torch and DeepSpeed once.
"""

import atexit
import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.preloaded"])
_ROOT = Path(__file__).parents[1]


def forked(target, *arguments):
    """A process of the fork server, not yet started."""
    with contextlib.chdir(_ROOT):  # a test may be elsewhere, where the server would not find what it loads
        forkserver.ensure_running()
    return _FORKSERVER.Process(target=_loaded, args=(target, *arguments), daemon=False)


def _loaded(target, *arguments):
    assert "tests.preloaded" in sys.modules, "the fork server has not found what ranks need"
    target(*arguments)


def on_ranks(size, work, *arguments, timeout_seconds=240):
    """The results of `work(*arguments)` on ranks 0 to size - 1; a failure on any of them is raised here."""
    port = free_port()
    started = []
    for rank in range(size):
        mine, theirs = _FORKSERVER.Pipe()
        process = forked(_rank, theirs, rank, size, port, work, arguments)
        process.start()
        theirs.close()
        started.append((process, mine))
    try:
        return [_result(process, pipe, timeout_seconds) for process, pipe in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


@dataclass(frozen=True)
class Ended:
    """How a rank of the command line ended, and all it wrote."""

    code: int
    out: str
    err: str


def command(*words, size=1, before=None, timeout_seconds=240):
    """`prefix-ds WORDS` on some ranks, as a user would run it; one `Ended` a rank.

    `before` runs first in each process, with the rank.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(size)]
        started = [forked(_commanded, files[rank], words, rank, size, port, before) for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout_seconds)
        late = [process for process in started if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        ended = [
            Ended(process.exitcode, *(file.with_suffix(end).read_text() for end in (".out", ".err")))
            for process, file in zip(started, files, strict=True)
        ]
    if late:
        raise TimeoutError(f"did not end: {ended}")
    return ended


def program(code, folder, *words):
    """How `python -c CODE WORDS` ends in a folder, where all that a run needs is loaded already."""
    (ended,) = command(*words, before=partial(_programmed, code, folder))
    return ended


def _programmed(code, folder, _rank):
    os.chdir(folder)
    exec(code, {"__name__": "__main__"})
    sys.exit()


def _commanded(file, words, rank, size, port, before):
    environment = rank_environment(rank, size, port)
    os.environ.update(environment if size > 1 else {"PREFIX_DS_THREADS": "1"})
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(file.with_suffix(name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["prefix-ds", *map(str, words)]
    if before is not None:
        before(rank)
    from prefix_ds.cli import main

    try:
        main()
    finally:  # as at the end of a process that multiprocessing has not started
        atexit._run_exitfuncs()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank, size, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PREFIX_DS_THREADS": "1",
    }


def _result(process, pipe: Connection, timeout_seconds):
    if not pipe.poll(timeout_seconds):
        raise TimeoutError("a rank did not answer")
    try:
        kind, value = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a rank died with exit code {process.exitcode}") from None
    if kind == "failed":
        error, text = value
        raise error from RuntimeError(text)
    return value


def _rank(pipe, rank, size, port, work, arguments):
    os.environ.update(rank_environment(rank, size, port))
    try:
        pipe.send(("done", work(*arguments)))
    except BaseException as error:  # it is raised in the test
        pipe.send(("failed", (_sendable(error), traceback.format_exc())))


def _sendable(error):
    try:
        return type(error)(*error.args)
    except TypeError:
        return RuntimeError(repr(error))
